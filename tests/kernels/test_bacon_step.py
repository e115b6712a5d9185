"""BaCon's fused step in Triton's interpreter: against the composed path, step by step, and golden vectors."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from bacon_step_cases import SHAPES, assert_same_state, batch, module, take

from bacon_fast.kernels import bacon_step_phases
from bacon_fast.kernels.bacon_step_design import DESIGNS, use_design
from bacon_fast.kernels.config import INTERPRETER, bacon_phases_config
from bacon_fast.losses.bacon import VARIANTS
from bacon_fast.ops.bacon_step import BUFFERS, fuses_bacon_step
from bacon_fast.ops.checks import trusted_values

pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="needs TRITON_INTERPRET=1")
GOLDEN = Path(__file__).parents[1] / "golden"


@pytest.fixture(autouse=True, params=DESIGNS)
def design(request):
    with use_design(request.param):
        yield request.param


@pytest.fixture(autouse=True)
def poisoned_allocations(monkeypatch):
    """Memory that is allocated but not written shows: NaN, and integers that are no index."""
    plain = torch.Tensor.new_empty

    def new_empty(self, *arguments, **options):
        tensor = plain(self, *arguments, **options)
        return tensor.fill_(torch.nan if tensor.is_floating_point() else 77_777)

    monkeypatch.setattr(torch.Tensor, "new_empty", new_empty)


def compare(found, expected, steps, tolerance=3e-6, upstream=1.0, **options):
    """Losses of both modules' steps, after each of which all buffers are equal bit for bit."""
    losses = []
    for step in steps:
        loss, gradient, stats = take(found, step, upstream=upstream, **options)
        expected_loss, expected_gradient, expected_stats = take(expected, step, upstream=upstream, **options)
        torch.testing.assert_close(loss, expected_loss, rtol=tolerance, atol=tolerance)
        torch.testing.assert_close(gradient, expected_gradient, rtol=tolerance, atol=tolerance * abs(upstream))
        torch.testing.assert_close(stats, expected_stats, rtol=1e-6, atol=0)
        assert_same_state(found, expected)
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("name, neg_mode", [(name, "authors") for name in SHAPES] + [("odd", "paper")])
def test_steps_equal_the_composed_path(name, neg_mode):
    shape = SHAPES[name]
    modules = [module(shape, backend, neg_mode=neg_mode) for backend in ("triton", "reference")]
    assert fuses_bacon_step("triton", torch.empty(1, shape[2]), torch.empty(1, shape[3]), modules[0].top_k)
    losses = compare(*modules, [batch(shape, seed) for seed in range(2)])
    if name in ("odd", "several-blocks", "many-classes"):
        assert losses[-1] > 0


@pytest.mark.parametrize("variant", [name for name in VARIANTS if name != "fixed"])
def test_the_other_variants(variant):
    shape = SHAPES["odd"]
    modules = [module(shape, backend, variant=variant) for backend in ("triton", "reference")]
    steps = [batch(shape, seed) for seed in range(4)]
    steps[1]["logits"] *= 0.01  # no unlabeled row is confident
    assert max(compare(*modules, steps)) > 0


@pytest.mark.parametrize("neg_mode", ["authors", "paper"])
def test_float64(neg_mode):
    shape = SHAPES["several-blocks"]
    modules = [module(shape, backend, neg_mode=neg_mode, bta=0.5) for backend in ("triton", "reference")]
    steps = [batch(shape, seed, torch.float64) for seed in range(2)]
    assert compare(*modules, steps, tolerance=1e-12, upstream=-37.0)[-1] > 0


PAPER = (64, 128, 32, 10, 500, 900)
MIDDLE = (50, 90, 70, 130, 60, 120)
LARGEST = (300, 724, 128, 1000, 900, 3000)


def test_shapes_span_several_programs_and_tiles_of_each_phase():
    _, _, dim, num_classes, _, _ = SHAPES["several-blocks"]
    config = bacon_phases_config(43, dim, num_classes, torch.float32, "tf32x3", INTERPRETER)
    assert 2 * max(config.rank_rows, config.bank_rows, config.group_rows, config.gradient_rows, config.block_rows) < 43
    assert 2 * config.gradient_columns < 43
    assert config.splits == 2 and 2 * config.block_columns < 43  # a split has several tiles
    assert num_classes * dim > config.block_centers
    for shape, splits in ((PAPER, 3), (LARGEST, 4)):
        config = bacon_phases_config(sum(shape[:2]), *shape[2:4], torch.float32, "tf32x3", 90)
        assert config.splits == splits and config.block_all >= sum(shape[:2]) and config.block_classes >= shape[3]


@pytest.mark.parametrize("shape, neg_mode", [(PAPER, "authors"), (MIDDLE, "paper")])
def test_the_tiles_of_a_gpu(design, monkeypatch, shape, neg_mode):
    """All programs that an H200 would run, in the interpreter."""
    if design != "phases":
        pytest.skip("its tiles on a GPU are those of the interpreter, halved")
    monkeypatch.setattr(bacon_step_phases, "architecture", lambda tensor: 90)
    modules = [module(shape, backend, neg_mode=neg_mode) for backend in ("triton", "reference")]
    centers = torch.randn(shape[3], shape[2], generator=torch.Generator().manual_seed(0))
    for m in modules:
        m.bank.centers.copy_(centers)
        m.bank.has_center.fill_(True)
    assert compare(*modules, [batch(shape, 0)], tolerance=1e-5)[0] > 0


def test_duplicates_across_programs_last_row_wins():
    """Every slot is named by many rows, labeled as different classes, in all programs."""
    shape = (70, 26, 8, 5, 3, 2)
    modules = [module(shape, backend) for backend in ("triton", "reference")]
    compare(*modules, [batch(shape, seed) for seed in range(3)])
    assert modules[0].bank.written.any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype):
    shape = SHAPES["odd"]
    modules = [module(shape, backend) for backend in ("triton", "reference")]
    for seed in range(2):
        step = batch(shape, seed, dtype)
        (loss, gradient, _), (expected, expected_gradient, _) = (take(m, step) for m in modules)
        assert loss.dtype == torch.float32 and gradient.dtype == dtype
        torch.testing.assert_close(loss, expected, rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(gradient.float(), expected_gradient.float(), rtol=2e-2, atol=2e-3)
        assert_same_state(*modules)


def test_two_devices_normalize_the_blogs_features_to_other_last_bits(monkeypatch):
    """As on a GPU: the states then agree to rounding, as tests/gpu compares them, and not bit for bit."""
    shape = SHAPES["odd"]
    modules = [module(shape, backend, variant="blog") for backend in ("triton", "reference")]
    for seed in range(3):
        monkeypatch.setattr(F, "normalize", lambda x, dim: x * (x * x).sum(dim, keepdim=True).rsqrt())
        take(modules[0], batch(shape, seed))
        monkeypatch.undo()
        take(modules[1], batch(shape, seed))
    assert_same_state(*modules, rounding=1e-6)
    with pytest.raises(AssertionError):
        assert_same_state(*modules)
    modules[0].bank.centers[0, 0] += 1e-5
    with pytest.raises(AssertionError, match="centers"):
        assert_same_state(*modules, rounding=1e-6)


def test_nothing_reliable_then_nothing_counted():
    shape = SHAPES["odd"]
    modules = [module(shape, backend) for backend in ("triton", "reference")]
    steps = [batch(shape, seed) for seed in range(3)]
    steps[1]["logits"] = steps[1]["logits"] * 1e-3
    assert compare(*modules, steps)[1] == 0


def test_strided_inputs_and_progress_on_the_device():
    shape = SHAPES["odd"]
    modules = [module(shape, backend) for backend in ("triton", "reference")]
    for seed in range(2):
        step = batch(shape, seed)
        # The same values in every second element, the axes of matrices stored the other way round.
        strided = {}
        for name, tensor in step.items():
            wide = (
                tensor.new_zeros(*tensor.shape[:-1], 2 * tensor.shape[-1]).mT.contiguous().mT
                if (tensor.dim() == 2)
                else tensor.new_zeros(2 * tensor.shape[0])
            )
            wide[..., ::2] = tensor
            strided[name] = wide[..., ::2]
        found = modules[0](**strided, progress=torch.tensor(0.25), active=True)
        expected = modules[1](**step, progress=torch.tensor(0.25), active=True)
        torch.testing.assert_close(found.loss, expected.loss, rtol=3e-6, atol=1e-6)
        assert_same_state(*modules)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("exponent", [65, 90, 120])
def test_features_beyond_1e19_count_as_others(exponent, dtype):
    """Their products overflow. No loss looks at lengths: loss and gradient are those of features a power of two less.

    The bank clamps them, and takes none that is not finite: so its fixed-point sums never see a NaN.
    """
    shape, scale = SHAPES["odd"], 2.0**exponent
    plain, large, broken = (module(shape, "triton") for _ in range(3))
    steps = [batch(shape, seed, dtype) for seed in range(2)]
    for each in (plain, large, broken):
        take(each, steps[0])  # the centers that the next step pulls to
    expected, slope, _ = take(plain, steps[1])
    loss, gradient, _ = take(large, steps[1] | {"features": steps[1]["features"] * scale})
    features = steps[1]["features"].clone()
    features[:, 0] = torch.nan
    assert take(broken, steps[1] | {"features": features})[0].isnan()
    assert expected > 0 and slope.any()
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)
    smallest = 1e-40 * scale  # gradients near the end of the range keep few bits
    torch.testing.assert_close(gradient.float() * scale, slope.float(), rtol=1e-2, atol=smallest + 1e-6)
    assert large.bank.features.isfinite().all() and large.bank.features.abs().max() <= 4096
    assert broken.bank.features.isfinite().all() and broken.bank.centers.isfinite().all()


def test_rows_of_nan_reach_the_loss_only_if_they_matter():
    shape = SHAPES["one-class"]  # nobody is a negative, so no row matters
    modules = [module(shape, backend) for backend in ("triton", "reference")]
    step = batch(shape, 0)
    step["features"][0] = torch.nan
    (loss, gradient, _), _ = (take(m, step) for m in modules)
    assert loss == 0 and not gradient.any()
    assert_same_state(*modules)

    shape = SHAPES["odd"]
    modules = [module(shape, backend) for backend in ("triton", "reference")]
    compare(*modules, [batch(shape, 0)])
    step = batch(shape, 1)
    step["features"][2] = torch.inf
    (loss, gradient, _), _ = (take(m, step) for m in modules)
    assert loss.isnan() and gradient.isnan().any()
    assert_same_state(*modules)


def test_a_label_or_slot_out_of_range_is_no_silent_zero():
    shape = SHAPES["odd"]
    for name, value in (("labels", 99), ("unlabeled_slots", 10**9), ("labeled_slots", -1)):
        found = module(shape, "triton")
        step = batch(shape, 0)
        step[name][0] = value
        with trusted_values():  # a GPU has no check before the kernels
            assert take(found, step)[0].isnan()
        assert found.bank.selected_label.max() < shape[3]


def test_equal_logits_are_ranked_in_the_order_of_classes():
    shape = (2, 5, 4, 6, 3, 9)
    found, expected = module(shape, "triton"), module(shape, "reference")
    for seed in range(3):
        step = batch(shape, seed)
        step["unlabeled_slots"] = torch.arange(5)
        tied = torch.tensor([[9.0, 9, 9, 9, 0, 0]]).expand(7, -1)
        untied = tied - 1e-5 * torch.arange(6)
        for m in (found, expected):
            m.count_threshold = m.reliable_threshold = 0.2
        loss, gradient, _ = take(found, step | {"logits": tied})
        expected_loss, expected_gradient, _ = take(expected, step | {"logits": untied})
        torch.testing.assert_close(loss, expected_loss, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(gradient, expected_gradient, rtol=1e-5, atol=1e-5)
        assert_same_state(found, expected)


@pytest.mark.parametrize("name", ["c7_odd_t150001", "c10_small_t0", "c3_tiny_t299999"])
def test_golden_vectors(name):
    data = np.load(GOLDEN / f"bacon_{name}.npz")
    tensor = {key: torch.from_numpy(data[key]) for key in ("features", "labels", "logits", "centers", "selected")}
    (rows, dim), batch_size, num_classes = tensor["features"].shape, len(tensor["labels"]), len(tensor["centers"])
    selected, counts = tensor["selected"], torch.from_numpy(data["class_freq"])
    # Rows are reliable by their logits; scaling leaves the ranking as it is, and so the loss.
    spread = tensor["logits"] - tensor["logits"].max(1, keepdim=True).values
    logits = torch.cat([torch.eye(num_classes, dtype=torch.float64)[tensor["labels"]], spread])
    logits = torch.where(selected[:, None], logits * 1e9, logits * 1e-9)
    # Nothing is counted, so the counts stay those of the vectors, and the centers are as they are set.
    counts_are_integers = torch.equal(counts, counts.round())
    assert counts_are_integers
    shape = (batch_size, rows - batch_size, dim, num_classes, batch_size, rows - batch_size)
    found = module(
        shape,
        "triton",
        reliable_threshold=0.99 if num_classes > 1 else 2.0,
        count_threshold=2.0,
        labeled_counts="with_pseudo",
        temperature=float(data["tau"]),
        bta=float(data["eta"]),
        negative_weight=float(data["neg_weight"]),
        top_k=int(data["top_k"]),
    )
    found.top_k = int(data["top_k"])
    found.bank.class_counts.copy_(counts)
    found.bank.centers.copy_(tensor["centers"])
    found.bank.has_center.fill_(True)
    step = {
        "features": tensor["features"],
        "labels": tensor["labels"],
        "logits": logits,
        "labeled_slots": torch.arange(batch_size),
        "unlabeled_slots": torch.arange(rows - batch_size),
    }
    loss, gradient, _ = take(found, step, progress=float(data["step"] / data["total_steps"]))
    # The bank's centers and the temperatures are float32.
    assert loss.item() == pytest.approx(data["loss_class_mean"].item(), rel=1e-6)
    assert np.abs(gradient.numpy() - data["grad_class_mean"]).max() < 1e-6


def arguments(shape, dtype=torch.float32):
    found, step = module(shape, "triton"), batch(shape, 0, dtype)
    buffers = dict(found.bank.named_buffers())
    return (
        *step.values(),
        torch.tensor(0.5),
        0.0,
        *(buffers[name] for name in BUFFERS),
        shape[4],
        0.1,
        0.005,
        0.0,
        64.0,
        "authors",
        found.top_k,
        0.6,
        0.5,
        "prob",
        "always",
    )


def test_opcheck():
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(torch.ops.bacon_fast.bacon_step_triton, arguments(SHAPES["odd"]), test_utils=tests)
    gradient = torch.randn(4, 3)
    torch.library.opcheck(
        torch.ops.bacon_fast.bacon_step_backward_triton,
        (torch.tensor(2.0), gradient, gradient.half().requires_grad_()),
        test_utils=tests,
    )


def test_compiles_to_one_graph_and_refuses_a_second_derivative():
    shape = SHAPES["odd"]
    modules = [module(shape, "triton") for _ in range(2)]
    compiled = torch.compile(modules[0], fullgraph=True, backend="aot_eager")
    for seed in range(2):
        results = [
            take(m, batch(shape, seed), progress=torch.tensor(0.5), upstream=3.0) for m in (compiled, modules[1])
        ]
        torch.testing.assert_close(*results)
        assert results[0][1].any() or seed == 0
        assert_same_state(*modules)
    features = batch(shape, 2)["features"].requires_grad_()
    loss = modules[1](**(batch(shape, 2) | {"features": features}), progress=0.5, active=True).loss
    (gradient,) = torch.autograd.grad(loss, features, create_graph=True)
    with pytest.raises(RuntimeError, match="cannot be differentiated twice"):
        gradient.sum().backward()


def test_sizes_beyond_the_kernels_take_the_composed_path():
    for rows, dim, num_classes, top_k in (
        (1025, 8, 5, 3),
        (4, 129, 5, 3),
        (4, 8, 1001, 3),
        (4, 8, 20, 9),
        (0, 8, 5, 3),
    ):
        features, logits = torch.empty(rows, dim), torch.empty(rows, num_classes)
        assert not fuses_bacon_step("triton", features, logits, top_k)
    assert not fuses_bacon_step(None, torch.empty(4, 8), torch.empty(4, 5), 3)


def test_bad_arguments_are_named():
    step = batch(SHAPES["odd"], 0)
    found = module(SHAPES["odd"], "triton")
    for name, value, error in (
        ("logits", step["logits"][:, 1:], "logits: expected shape"),
        ("labeled_slots", step["labeled_slots"][1:], "labeled_slots: expected shape"),
        ("unlabeled_slots", step["unlabeled_slots"].int(), "unlabeled_slots: expected dtype int64"),
    ):
        with pytest.raises((ValueError, TypeError), match=error):
            take(found, step | {name: value})
    with pytest.raises(ValueError, match="progress: expected a number >= 0 and <= 1, found 7"):
        take(found, step, progress=7.0)
