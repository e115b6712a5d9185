"""Backend "cpp" of bacon_loss against the released code's golden vectors and a plain loop over classes and rows."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from bacon_fast import functional

GOLDEN = sorted((Path(__file__).parents[1] / "golden").glob("bacon_*.npz"))
TOLERANCES = {torch.float64: (1e-12, 1e-12), torch.float32: (3e-6, 3e-7)}


def cpp_loss(batch, **options):
    return functional.bacon_loss(**{**batch, **options}, backend="cpp")


def reference_loss(batch, **options):
    return functional.bacon_loss(**{**batch, **options}, backend="reference")


def loss_and_gradient(loss_function, batch, **options):
    features = batch["features"].detach().clone().requires_grad_()
    loss = loss_function({**batch, "features": features}, **options)
    (gradient,) = torch.autograd.grad(loss, features)
    return loss.detach(), gradient


def loop_loss(batch, *, progress=0.5, temperature=0.1, bta=0.005, negative_weight=64.0, top_k=3, neg_mode="authors",
              min_temperature=0.0):  # fmt: skip
    """methods.md E.2-E.6, one class and one row at a time, on sums of probabilities."""
    features, labels, centers, reliable = (batch[name] for name in ("features", "labels", "centers", "reliable"))
    num_classes, counts = centers.shape[0], batch["class_counts"].double()
    has_center = batch.get("has_center")
    top = batch["logits"].topk(min(top_k, num_classes), dim=1).indices.tolist()
    may_be = [[label] for label in labels.tolist()] + top
    total = features.sum() * 0
    for c in range(num_classes):
        anchors = [r for r, codes in enumerate(may_be) if codes[0] == c]
        negatives = [j for j, codes in enumerate(may_be) if c not in codes]
        if not negatives or (has_center is not None and not has_center[c]):
            continue
        tau = temperature * (1 - bta * (1 - progress) ** 2 * (counts[c] / counts.max().clamp(min=1)).sqrt().item())
        tau = max(tau, min_temperature)
        terms = {
            r: torch.stack([(F.cosine_similarity(features[r], features[j], dim=0) / temperature).exp()
                            for j in negatives]).mean()
            for r in anchors
        }  # fmt: skip
        for r in anchors:
            if not reliable[r]:
                continue
            mean = torch.stack(list(terms.values())).mean() if neg_mode == "authors" else terms[r]
            positive = F.cosine_similarity(features[r], centers[c], dim=0) / tau
            weight = len(negatives) if negative_weight is None else negative_weight
            total = total + (positive.exp() + weight * mean + 1e-8).log() - positive
    return total / max(int(reliable.sum()), 1)


def make_batch(rows, batch, num_classes, dim, *, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape):
        return torch.randn(*shape, generator=generator, dtype=dtype)

    return {
        "features": randn(rows, dim) * 3,
        "labels": torch.randint(0, num_classes, (batch,), generator=generator),
        "logits": randn(rows - batch, num_classes),
        "centers": randn(num_classes, dim),
        "reliable": torch.rand(rows, generator=generator) < 0.7,
        "class_counts": torch.randint(0, 50, (num_classes,), generator=generator),
    }


def assert_matches_loop(batch, *, loss_tolerance=1e-12, gradient_tolerance=1e-12, **options):
    expected, expected_gradient = loss_and_gradient(loop_loss, batch, **options)
    loss, gradient = loss_and_gradient(cpp_loss, batch, **{"progress": 0.5, **options})
    assert loss.item() == pytest.approx(expected.item(), rel=loss_tolerance, abs=loss_tolerance)
    torch.testing.assert_close(gradient, expected_gradient, rtol=0, atol=gradient_tolerance)
    return loss, gradient


def golden_batch(path, dtype):
    stored = {name: torch.from_numpy(np.asarray(value)) for name, value in np.load(path).items()}
    batch = {name: stored[name].to(dtype) for name in ("features", "logits", "centers")}
    batch |= {"labels": stored["labels"], "reliable": stored["selected"].bool()}
    batch |= {
        "class_counts": stored["class_freq"].to(dtype),
        "progress": stored["step"].item() / stored["total_steps"].item(),
        "temperature": stored["tau"].item(),
        "bta": stored["eta"].item(),
        "negative_weight": stored["neg_weight"].item(),
        "top_k": stored["top_k"].item(),
    }
    return batch, stored["loss_class_mean"].item(), stored["grad_class_mean"]


def assert_matches_golden(path, dtype):
    batch, expected, expected_gradient = golden_batch(path, dtype)
    relative, absolute = TOLERANCES[dtype]
    loss, gradient = loss_and_gradient(cpp_loss, batch)
    assert loss.dtype == gradient.dtype == dtype
    assert loss.item() == pytest.approx(expected, rel=relative)
    torch.testing.assert_close(gradient.double(), expected_gradient, rtol=0, atol=absolute)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("path", GOLDEN, ids=lambda path: path.stem)
def test_golden(path, dtype):
    assert_matches_golden(path, dtype)


@pytest.mark.parametrize("capability", ["default", "avx2"])
def test_golden_with_other_instruction_sets(capability):
    """The kernels are compiled for three instruction sets; the choice is made once a process."""
    command = "import sys, torch; sys.path.insert(0, sys.argv[1]); import test_bacon_loss_cpp as t\n"
    command += "[t.assert_matches_golden(path, dtype) for path in t.GOLDEN for dtype in t.TOLERANCES]\n"
    command += "print(torch.backends.cpu.get_cpu_capability())"
    environment = {**os.environ, "ATEN_CPU_CAPABILITY": capability}
    arguments = [sys.executable, "-c", command, str(Path(__file__).parent)]
    done = subprocess.run(arguments, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == capability.upper()


@pytest.mark.parametrize("neg_mode", ["authors", "paper"])
@pytest.mark.parametrize(
    ("rows", "batch", "num_classes", "dim"),
    [(1, 1, 2, 3), (2, 1, 2, 1), (9, 3, 4, 7), (33, 33, 5, 16), (40, 0, 6, 33), (31, 10, 3, 130), (24, 8, 2, 5)],
)
def test_matches_a_loop(rows, batch, num_classes, dim, neg_mode):
    assert_matches_loop(make_batch(rows, batch, num_classes, dim), neg_mode=neg_mode)


@pytest.mark.parametrize("neg_mode", ["authors", "paper"])
@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 0.01},  # similarities too far apart for one float: the shifted sums
        {"temperature": 0.01, "bta": 0.9, "progress": 0.0, "min_temperature": 0.004},
        {"negative_weight": None},
        {"top_k": 1},
        {"top_k": 2, "temperature": 0.02},
        {"top_k": 9},  # all classes: unlabeled rows are nobody's negatives; and more than the fast selection takes
    ],
    ids=str,
)
def test_options_match_a_loop(options, neg_mode):
    assert_matches_loop(make_batch(30, 12, 9, 8), neg_mode=neg_mode, **options)


@pytest.mark.parametrize("temperature", [0.1, 0.02])
@pytest.mark.parametrize("rows", [1450, 300])
def test_large_batch_matches_the_reference(rows, temperature):
    """Several tiles of columns; with 1450 rows also without the table of similarities."""
    batch = make_batch(rows, 100, 20, 24) | {"progress": 0.3, "temperature": temperature}
    batch["class_counts"] = batch["class_counts"].double()
    expected, expected_gradient = loss_and_gradient(reference_loss, batch)
    loss, gradient = loss_and_gradient(cpp_loss, batch)
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(gradient, expected_gradient, rtol=0, atol=1e-12)


@pytest.mark.parametrize("temperature", [0.1, 0.01])
def test_float32_is_as_good_as_its_inputs(temperature):
    batch = make_batch(200, 64, 100, 32, dtype=torch.float32)
    expected, expected_gradient = loss_and_gradient(
        cpp_loss, batch | {"features": batch["features"].double()}, progress=0.1, temperature=temperature
    )
    loss, gradient = loss_and_gradient(cpp_loss, batch, progress=0.1, temperature=temperature)
    assert loss.item() == pytest.approx(expected.item(), rel=3e-6)
    # A rounding of a similarity moves its logit by 1 / temperature times as much.
    torch.testing.assert_close(gradient.double(), expected_gradient, rtol=0, atol=3e-8 / temperature)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(dtype):
    batch = make_batch(50, 20, 10, 24, dtype=torch.float32)
    half = {name: value.to(dtype) if value.is_floating_point() else value for name, value in batch.items()}
    widened = {name: value.float() if value.is_floating_point() else value for name, value in half.items()}
    loss, gradient = loss_and_gradient(cpp_loss, half, progress=0.5)
    expected, expected_gradient = loss_and_gradient(cpp_loss, widened, progress=0.5)
    assert loss.dtype == torch.float32
    assert gradient.dtype == dtype
    assert torch.equal(loss, expected)
    assert torch.equal(gradient, expected_gradient.to(dtype))


def test_strides_do_not_matter():
    batch = make_batch(40, 16, 6, 20)
    spread = {
        name: torch.stack([value, torch.zeros_like(value)], dim=-1)[..., 0]
        if name != "logits"
        else value.T.contiguous().T
        for name, value in batch.items()
    }
    assert not any(value.is_contiguous() for value in spread.values())
    for result, expected in zip(
        loss_and_gradient(cpp_loss, spread, progress=0.5), loss_and_gradient(cpp_loss, batch, progress=0.5)
    ):
        assert torch.equal(result, expected)


def test_result_does_not_depend_on_the_number_of_threads():
    batch = make_batch(700, 200, 10, 40, dtype=torch.float32)
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results += [loss_and_gradient(cpp_loss, batch, progress=0.5) for _ in range(3)]
    finally:
        torch.set_num_threads(threads)
    for loss, gradient in results[1:]:
        assert torch.equal(loss, results[0][0])
        assert torch.equal(gradient, results[0][1])


def test_equal_logits_are_ranked_as_torch_topk_does():
    """Among equal logits, the choice of a row's class decides whose negative it is: the loop takes torch.topk's."""
    for seed in range(5):
        batch = make_batch(40, 8, 12, 6, seed=seed)
        batch["logits"] = batch["logits"].round()  # -2, -1, 0, 1, 2: ties everywhere
        assert batch["logits"].sort(dim=1).values.diff(dim=1).eq(0).any(dim=1).all()
        assert_matches_loop(batch)


def test_nan_logits_are_ranked_as_torch_topk_does():
    batch = make_batch(30, 8, 12, 6)
    batch["logits"][::3, 5] = float("nan")
    assert_matches_loop(batch)


class TestRowsWithoutATerm:
    """The failure modes of methods.md E.6."""

    def test_class_without_center(self):
        batch = make_batch(40, 20, 6, 8)
        batch["has_center"] = torch.tensor([True, False, True, True, False, True])
        clean_loss, clean_gradient = assert_matches_loop(batch)
        batch["centers"][[1, 4]] = float("nan")
        loss, gradient = loss_and_gradient(cpp_loss, batch, progress=0.5)
        assert torch.equal(loss, clean_loss)
        assert torch.equal(gradient, clean_gradient)

    def test_nan_center_of_a_class_with_unreliable_rows_only(self):
        batch = make_batch(40, 20, 6, 8)
        classes = torch.cat([batch["labels"], batch["logits"].argmax(dim=1)])
        batch["reliable"] &= classes != 2
        expected = loss_and_gradient(cpp_loss, batch, progress=0.5)
        batch["centers"][2] = float("nan")
        for result, same in zip(loss_and_gradient(cpp_loss, batch, progress=0.5), expected):
            assert torch.equal(result, same)

    @pytest.mark.parametrize("neg_mode", ["authors", "paper"])
    def test_no_negative(self, neg_mode):
        batch = make_batch(12, 12, 4, 8)
        batch["labels"][:] = 3
        loss, gradient = loss_and_gradient(cpp_loss, batch, progress=0.5, neg_mode=neg_mode)
        assert loss == 0
        assert not gradient.any()

    @pytest.mark.parametrize("neg_mode", ["authors", "paper"])
    def test_nothing_reliable(self, neg_mode):
        batch = make_batch(12, 4, 4, 8)
        batch["reliable"][:] = False
        loss, gradient = loss_and_gradient(cpp_loss, batch, progress=0.5, neg_mode=neg_mode)
        assert loss == 0
        assert not gradient.any()

    def test_nothing_selected_ever(self):
        batch = make_batch(20, 10, 4, 8)
        batch["class_counts"][:] = 0
        assert_matches_loop(batch)

    def test_empty_batch(self):
        loss, gradient = loss_and_gradient(cpp_loss, make_batch(0, 0, 4, 8), progress=0.5)
        assert loss == 0
        assert gradient.shape == (0, 8)

    @pytest.mark.parametrize("temperature", [0.1, 0.01])
    def test_row_that_nobody_uses_may_be_nan(self, temperature):
        """Not reliable in a class without anchors, and of all the classes that have anchors by its top 3."""
        batch = make_batch(20, 19, 4, 8)
        batch["labels"][:10] = 0
        batch["labels"][10:] = 1
        batch["reliable"][-1] = False
        batch["logits"] = torch.tensor([[1.0, 2.0, 3.0, 0.0]], dtype=torch.float64)
        for value in (float("nan"), float("inf")):
            expected = loss_and_gradient(cpp_loss, batch, progress=0.5, temperature=temperature)
            broken = {**batch, "features": batch["features"].clone()}
            broken["features"][-1, 3] = value
            for result, same in zip(
                loss_and_gradient(cpp_loss, broken, progress=0.5, temperature=temperature), expected
            ):
                assert torch.equal(result, same)

    @pytest.mark.parametrize("row", [0, 25])
    @pytest.mark.parametrize("temperature", [0.1, 0.01])
    def test_used_row_that_is_nan_shows(self, row, temperature):
        batch = make_batch(40, 20, 6, 8)
        batch["reliable"][:] = True
        batch["features"][row, 3] = float("nan")
        loss, gradient = loss_and_gradient(cpp_loss, batch, progress=0.5, temperature=temperature)
        assert loss.isnan()
        assert gradient[row].isnan().all()

    def test_zero_row(self):
        batch = make_batch(12, 6, 4, 8)
        batch["features"][5] = 0
        loss, gradient = loss_and_gradient(cpp_loss, batch, progress=0.5)
        assert loss.isfinite()
        assert gradient.isfinite().all()


class TestAutograd:
    def test_scales_with_the_upstream_gradient(self):
        batch = make_batch(40, 20, 6, 8)
        _, expected = loss_and_gradient(cpp_loss, batch, progress=0.5)
        features = batch["features"].requires_grad_()
        (cpp_loss(batch, progress=torch.tensor(0.5)) * -3.5).backward()
        torch.testing.assert_close(features.grad, expected * -3.5, rtol=1e-15, atol=0)

    def test_gradcheck(self):
        batch = make_batch(9, 4, 4, 5)
        batch["features"].requires_grad_()
        assert torch.autograd.gradcheck(lambda f: cpp_loss(batch | {"features": f}, progress=0.5), batch["features"])

    def test_no_second_derivative(self):
        batch = make_batch(20, 10, 4, 8)
        features = batch["features"].requires_grad_()
        (gradient,) = torch.autograd.grad(cpp_loss(batch, progress=0.5), features, create_graph=True)
        with pytest.raises(RuntimeError, match="no second derivative in backend 'cpp'"):
            gradient.square().sum().backward()

    def test_no_graph_without_need(self):
        assert not cpp_loss(make_batch(20, 10, 4, 8), progress=0.5).requires_grad

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_opcheck(self, dtype):
        batch = make_batch(20, 10, 5, 8, dtype=dtype)
        batch["features"].requires_grad_()
        has_center, progress = torch.ones(5, dtype=torch.bool), torch.tensor(0.5)
        names = ("features", "labels", "logits", "centers")
        arguments = (*(batch[name] for name in names), has_center, batch["reliable"], batch["class_counts"], progress)
        options = (0.1, 0.005, 64.0, 3, "authors", 0.0)
        torch.library.opcheck(torch.ops.bacon_fast.bacon_loss_cpp, (*arguments, *options))
        arguments = (torch.tensor(2.0), torch.randn(20, 8), batch["features"].detach())
        torch.library.opcheck(torch.ops.bacon_fast.bacon_loss_backward_cpp, arguments)

    @pytest.mark.parametrize("progress", [0.5, torch.tensor(0.5)], ids=["number", "tensor"])
    def test_compiles_as_one_graph(self, progress):
        batch = make_batch(20, 10, 5, 8)

        def step(batch):
            return cpp_loss(batch, progress=progress) * 2

        expected, expected_gradient = loss_and_gradient(step, batch)
        loss, gradient = loss_and_gradient(torch.compile(step, fullgraph=True, backend="aot_eager"), batch)
        assert torch.equal(loss, expected)
        assert torch.equal(gradient, expected_gradient)


def test_labels_out_of_range_are_refused():
    batch = make_batch(20, 10, 5, 8)
    batch["labels"][7] = 5
    with pytest.raises(ValueError, match=r"labels: expected classes in 0\.\.4, found 5 in row 7"):
        cpp_loss(batch, progress=0.5)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("labels", torch.zeros(21, dtype=torch.int64), r"labels: expected shape \[B\], B <= 20, found \[21\]"),
        ("logits", torch.zeros(10, 4), r"logits: expected shape \[10, 5\], found \[10, 4\]"),
        ("centers", torch.zeros(5, 7), r"centers: expected shape \[5, 8\], found \[5, 7\]"),
        ("reliable", torch.zeros(3, dtype=torch.bool), r"reliable: expected shape \[20\], found \[3\]"),
        ("class_counts", torch.zeros(6), r"class_counts: expected shape \[5\], found \[6\]"),
        ("features", torch.zeros(20), r"features: expected shape \[R, D\], found \[20\]"),
    ],
)
def test_direct_call_is_checked(name, value, message):
    """Without `functional.bacon_loss`, which checks more."""
    batch = make_batch(20, 10, 5, 8) | {name: value}
    tensors = [batch[key] for key in ("features", "labels", "logits", "centers")]
    others = (None, batch["reliable"], batch["class_counts"], torch.tensor(0.5))
    with pytest.raises(ValueError, match=message):
        torch.ops.bacon_fast.bacon_loss_cpp(*tensors, *others, 0.1, 0.005, 64.0, 3, "authors", 0.0)


def test_is_the_default_on_a_cpu():
    batch = make_batch(20, 10, 5, 8, dtype=torch.float32)
    assert torch.equal(functional.bacon_loss(**batch, progress=0.5), cpp_loss(batch, progress=0.5))
