"""`functional.fixmatch_abc_loss`, every backend usable here against torch's cross entropy in a loop over the rows."""

import os

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from bacon_fast.data.philox import Stream, uniform
from bacon_fast.functional import fixmatch_abc_loss
from bacon_fast.ops import backends
from bacon_fast.reference.philox import philox_uniform

BACKENDS = [n for n, b in backends.BACKENDS["fixmatch_abc_loss"].items() if b.why_not(torch.empty(1, 1)) is None]
NATIVE = [name for name in BACKENDS if name != "reference"]
interpreted = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1", reason="Triton's interpreter is off; tests/gpu runs the compiled kernels"
)
LOSSES = ("supervised", "unsupervised", "abc_labeled", "abc_unlabeled")


@interpreted
def test_all_backends_are_tested():
    assert set(BACKENDS) >= {"reference", "triton"} and (backends.native_error is not None or "cpp" in BACKENDS)


def random_batch(batch=6, unlabeled=9, num_classes=7, seed=0, dtype=torch.float64, scale=4.0):
    g = torch.Generator().manual_seed(seed)
    rows = batch + 2 * unlabeled
    return {
        "logits": torch.randn(rows, num_classes, generator=g, dtype=torch.float64).mul(scale).to(dtype),
        "balanced": torch.randn(rows, num_classes, generator=g, dtype=torch.float64).mul(scale).to(dtype),
        "labels": torch.randint(num_classes, (batch,), generator=g),
        "true_labels": torch.randint(-1, num_classes, (unlabeled,), generator=g),
        "keep_labeled": torch.rand(num_classes, generator=g),
        "keep_unlabeled": torch.rand(num_classes, generator=g),
        "threshold": 0.8,
    }


def oracle(logits, balanced, labels, true_labels, keep_labeled, keep_unlabeled, threshold, step, seed):
    """Sections B and C of the specification, one row at a time; without a seed in the mean over the draws."""
    batch, unlabeled = len(labels), len(true_labels)
    draw_labeled = uniform(seed or 0, step, Stream.ABC_LABELED, torch.arange(batch))
    draw_unlabeled = uniform(seed or 0, step, Stream.ABC_UNLABELED, torch.arange(unlabeled))
    loss = {name: logits.new_zeros(()) for name in LOSSES}
    found = {"pseudo_rate": 0.0, "abc_rate": 0.0, "pseudo_known": 0, "pseudo_correct": 0, "pseudo_labels": []}
    for b in range(batch):
        y = labels[b : b + 1]
        loss["supervised"] = loss["supervised"] + F.cross_entropy(logits[b : b + 1], y) / batch
        kept = keep_labeled[y[0]].item()
        kept = kept if seed is None else float(draw_labeled[b] < keep_labeled[y[0]])
        if kept:
            loss["abc_labeled"] = loss["abc_labeled"] + kept * F.cross_entropy(balanced[b : b + 1], y) / batch
    for j in range(unlabeled):
        weak = batch + j
        strong = slice(weak + unlabeled, weak + unlabeled + 1)
        p, q = logits[weak].detach().softmax(0), balanced[weak].detach().softmax(0)
        found["pseudo_labels"].append(int(p.argmax()) if p.max() >= threshold else -1)
        if p.max() >= threshold:
            target = p.argmax()[None]
            loss["unsupervised"] = loss["unsupervised"] + F.cross_entropy(logits[strong], target) / unlabeled
            found["pseudo_rate"] += 1 / unlabeled
            found["pseudo_known"] += int(true_labels[j] >= 0)
            found["pseudo_correct"] += int(true_labels[j] == target)
        if q.max() >= threshold:
            c = q.argmax()
            kept = keep_unlabeled[c].item() if seed is None else float(draw_unlabeled[j] < keep_unlabeled[c])
            if kept:
                cost = F.cross_entropy(balanced[strong], c[None])
                loss["abc_unlabeled"] = loss["abc_unlabeled"] + kept * cost / unlabeled
            found["abc_rate"] += kept / unlabeled
    return loss, found


def run(arguments, upstream=(1.0, -0.5, 2.0, 3.0), function=fixmatch_abc_loss, **options):
    """Output, and the gradients of both heads' logits at the upstream gradients."""
    heads = [arguments[name].clone().requires_grad_() for name in ("logits", "balanced")]
    out = function(**(arguments | {"logits": heads[0], "balanced": heads[1]}), **options)
    losses = [getattr(out, name) for name in LOSSES]
    torch.autograd.backward(losses, [torch.tensor(u, dtype=losses[0].dtype) for u in upstream])
    return out, [head.grad for head in heads]


def assert_matches_oracle(arguments, tolerance=1e-12, **options):
    upstream = (1.0, -0.5, 2.0, 3.0)
    out, gradients = run(arguments, upstream, **options)
    options.pop("backend")
    heads = [arguments[name].double().requires_grad_() for name in ("logits", "balanced")]
    losses, found = oracle(**(arguments | {"logits": heads[0], "balanced": heads[1]}), **options)
    total = sum(u * losses[name] for u, name in zip(upstream, LOSSES))
    expected = [torch.zeros_like(head) for head in heads]
    if total.requires_grad:
        grads = torch.autograd.grad(total, heads, allow_unused=True)
        expected = [zero if grad is None else grad for zero, grad in zip(expected, grads)]
    for name in LOSSES:
        assert getattr(out, name).item() == pytest.approx(losses[name].item(), rel=tolerance * 10, abs=tolerance)
    assert out.pseudo_labels.dtype == torch.int64 and out.pseudo_labels.tolist() == found.pop("pseudo_labels")
    for name, value in found.items():
        assert getattr(out, name).item() == pytest.approx(value, rel=1e-6)
    for gradient, wanted in zip(gradients, expected):
        torch.testing.assert_close(gradient.double(), wanted, rtol=tolerance * 10, atol=tolerance)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("seed", [7, 2**64 - 1])
@pytest.mark.parametrize(
    "sizes",
    [
        {},
        {"batch": 0},
        {"unlabeled": 0},
        {"batch": 1, "unlabeled": 1, "num_classes": 1},
        {"batch": 3, "unlabeled": 2, "num_classes": 2},
        {"batch": 40, "unlabeled": 35, "num_classes": 10},
        {"batch": 5, "unlabeled": 4, "num_classes": 600, "scale": 40.0},
    ],
    ids=str,
)
def test_against_the_row_loop(backend, sizes, seed):
    assert_matches_oracle(random_batch(**sizes), backend=backend, step=5, seed=seed)


@pytest.mark.parametrize("backend", BACKENDS)
@settings(max_examples=15, deadline=None)
@given(
    batch=st.integers(0, 4),
    unlabeled=st.integers(0, 4),
    num_classes=st.integers(1, 20),
    threshold=st.sampled_from([0.0, 0.3, 0.95, 1.5]),
    seed=st.integers(0, 2**64 - 1),
    step=st.integers(0, 2**32 - 1),
)
def test_any_sizes_seeds_and_steps(backend, batch, unlabeled, num_classes, threshold, seed, step):
    arguments = random_batch(batch, unlabeled, num_classes, seed % 1000) | {"threshold": threshold}
    assert_matches_oracle(arguments, backend=backend, step=step, seed=seed)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_low_precision_is_no_worse_than_torchs_float32(backend, dtype):
    """Against float64 on the same, rounded logits; the tolerance is an ulp of the gradient's dtype."""
    arguments = random_batch(30, 50, 10, dtype=dtype)
    out, gradients = run(arguments, backend=backend, step=3, seed=1)
    exact = {k: v.double() if k in ("logits", "balanced") else v for k, v in arguments.items()}
    expected, expected_gradients = run(exact, backend="reference", step=3, seed=1)
    for name in LOSSES:
        assert getattr(out, name).dtype == torch.float32
        assert getattr(out, name).item() == pytest.approx(getattr(expected, name).item(), rel=2e-6)
    epsilon = torch.finfo(dtype).eps
    for gradient, wanted in zip(gradients, expected_gradients):
        assert gradient.dtype == dtype
        torch.testing.assert_close(gradient.double(), wanted, rtol=4 * epsilon, atol=3e-7)


def test_half_precision_gradients_survive_a_loss_scale():
    """Rounded before they are scaled, most of these would be subnormal in float16, or zero."""
    arguments = random_batch(30, 1000, 10, dtype=torch.float16, scale=8.0)
    for backend in BACKENDS:
        _, gradients = run(arguments, upstream=(2.0**14,) * 4, backend=backend, step=3, seed=1)
        exact = {k: v.double() if k in ("logits", "balanced") else v for k, v in arguments.items()}
        _, expected = run(exact, upstream=(2.0**14,) * 4, backend="reference", step=3, seed=1)
        for gradient, wanted in zip(gradients, expected):
            torch.testing.assert_close(gradient.double(), wanted, rtol=2e-3, atol=4e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_non_contiguous_arguments(backend):
    arguments = random_batch()
    expected, gradients = run(arguments, backend=backend, step=1, seed=2)
    strided = {k: torch.stack([v, v], -1)[..., 0] if torch.is_tensor(v) else v for k, v in arguments.items()}
    assert not strided["logits"].is_contiguous()
    found, found_gradients = run(strided, backend=backend, step=torch.tensor(1), seed=2)
    for a, b in zip([*found, *found_gradients], [*expected, *gradients]):
        torch.testing.assert_close(a.detach(), b.detach(), rtol=1e-14, atol=1e-16)


@pytest.mark.parametrize("backend", BACKENDS)
def test_nothing_confident_is_exactly_zero(backend):
    arguments = random_batch() | {"threshold": 1.5}
    out, gradients = run(arguments, backend=backend, step=0, seed=0)
    assert out.unsupervised == 0 and out.abc_unlabeled == 0 and out.pseudo_rate == 0
    assert not any(gradient[6:].any() for gradient in gradients)


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_in_rows_that_take_no_part(backend):
    """Weak rows that are NaN are not confident, and their strong rows then have no weight, whatever is in them."""
    arguments = random_batch()
    arguments["logits"][[6, 8]] = float("nan")
    arguments["balanced"][[6, 8]] = float("nan")
    options = {"backend": backend, "step": 0, "seed": 0}
    expected, expected_gradients = run(arguments, **options)
    arguments["logits"][[15, 17]] = float("nan")
    arguments["balanced"][[15, 17], 2] = float("inf")
    found, gradients = run(arguments, **options)
    for a, b in zip([*found, *gradients], [*expected, *expected_gradients]):
        assert torch.equal(a, b) and a.isfinite().all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_in_rows_that_take_part_is_not_hidden(backend):
    arguments = random_batch() | {"threshold": 0.0, "keep_labeled": torch.ones(7), "keep_unlabeled": torch.ones(7)}
    for row, lost in ((0, LOSSES[::2]), (15, LOSSES[1::2])):
        poisoned = arguments | {name: arguments[name].clone() for name in ("logits", "balanced")}
        poisoned["logits"][row, 1] = poisoned["balanced"][row, 1] = float("nan")
        out, _ = run(poisoned, backend=backend, step=0, seed=0)
        assert {name for name in LOSSES if getattr(out, name).isnan()} == set(lost)


@pytest.mark.parametrize("backend", BACKENDS)
def test_classes_that_are_ruled_out(backend):
    """A logit of -inf is a probability of 0."""
    arguments = random_batch(num_classes=5)
    arguments["logits"][:, 4] = arguments["balanced"][:, 4] = float("-inf")
    arguments["labels"].clamp_(max=3)
    with_four = arguments | {name: arguments[name][:, :4] for name in ("logits", "balanced")}
    with_four |= {name: arguments[name][:4] for name in ("keep_labeled", "keep_unlabeled")}
    options = {"step": 0, "seed": 0, "backend": backend}
    found, gradients = run(arguments, **options)
    expected, expected_gradients = run(with_four, **options)
    for a, b in zip(found, expected):
        torch.testing.assert_close(a.detach(), b.detach(), rtol=1e-12, atol=0)
    for a, b in zip(gradients, expected_gradients):
        torch.testing.assert_close(a[:, :4], b, rtol=1e-12, atol=1e-15)
        assert not a[:, 4].any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_equal_logits_take_the_first_class(backend):
    arguments = random_batch() | {"threshold": 0.0, "keep_unlabeled": torch.ones(7)}
    arguments["logits"][6:15] = 1.0
    arguments["balanced"][6:15] = torch.tensor([0.0, 2.0, 2.0, 0.0, 2.0, 0.0, 0.0], dtype=torch.float64)
    # The gradient of the strong rows is negative at the pseudo-label alone.
    _, gradients = run(arguments, upstream=(1.0,) * 4, backend=backend, step=0, seed=0)
    for gradient, label in zip(gradients, (0, 1)):
        assert torch.equal(gradient[15:] < 0, (torch.arange(7) == label).expand(9, 7))


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradcheck(backend):
    arguments = random_batch(2, 2, 2) | {"threshold": 0.0, "keep_labeled": torch.tensor([1.0, 0.0])}
    heads = [arguments.pop(name).requires_grad_() for name in ("logits", "balanced")]

    def losses(logits, balanced):
        out = fixmatch_abc_loss(logits=logits, balanced=balanced, **arguments, step=3, seed=1, backend=backend)
        return out.supervised, out.unsupervised, out.abc_labeled, out.abc_unlabeled

    assert torch.autograd.gradcheck(losses, heads, fast_mode=backend == "triton")  # the interpreter is slow


@pytest.mark.parametrize("backend", [name for name in BACKENDS if name != "triton"])  # too many draws to interpret
def test_the_draws_average_to_the_expected_loss(backend):
    arguments = random_batch(200, 200, 4) | {"threshold": 0.0}
    outs = [fixmatch_abc_loss(**arguments, step=t, seed=9, backend=backend) for t in range(40)]
    losses, found = oracle(**arguments, step=0, seed=None)
    del found["pseudo_labels"]
    expected = {name: value.item() for name, value in losses.items()} | found
    for name in ("abc_labeled", "abc_unlabeled", "abc_rate"):
        values = np.array([getattr(out, name).item() for out in outs])
        error = values.std(ddof=1) / len(values) ** 0.5
        assert abs(values.mean() - expected[name]) < 4 * error
        assert values.std() > 0


@pytest.mark.parametrize("seed", [0, 1, 2**32 + 5, 2**64 - 1])
@pytest.mark.parametrize("step", [0, 3, 2**32 - 1])
def test_reference_draws_the_bits_of_data_philox(seed, step):
    slots = torch.cat([torch.arange(100), torch.tensor([2**31, 2**32 - 1])])
    for stream in (Stream.ABC_LABELED, Stream.ABC_UNLABELED):
        found = philox_uniform(seed, torch.tensor(step), int(stream), slots)
        assert torch.equal(found, uniform(seed, step, stream, slots))


@pytest.mark.parametrize("backend", NATIVE)
def test_differentiating_twice_is_refused(backend):
    arguments = random_batch()
    arguments["logits"].requires_grad_()
    out = fixmatch_abc_loss(**arguments, step=0, seed=0, backend=backend)
    (gradient,) = torch.autograd.grad(out.supervised**2, arguments["logits"], create_graph=True)
    with pytest.raises(RuntimeError, match="fixmatch_abc_loss cannot be differentiated twice"):
        gradient.sum().backward()


@pytest.mark.parametrize("backend", NATIVE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_opcheck(backend, dtype):
    arguments = random_batch(dtype=dtype)
    tensors = [v for v in arguments.values() if torch.is_tensor(v)]
    tensors = [t.requires_grad_() if i < 2 else t for i, t in enumerate(tensors)]
    forward = getattr(torch.ops.bacon_fast, f"fixmatch_abc_{backend}").default
    options = (torch.tensor(3), 5, 0.8)
    torch.library.opcheck(forward, (*tensors, *options))
    grad_logits, grad_balanced = (t.detach() for t in forward(*tensors, *options)[3:])
    backward = getattr(torch.ops.bacon_fast, f"fixmatch_abc_backward_{backend}").default
    strided = torch.randn(8, dtype=dtype)[::2]
    torch.library.opcheck(
        backward,
        (strided, grad_logits, grad_balanced, tensors[0].detach(), tensors[1].detach(), 6, 9),
    )


@pytest.mark.parametrize("backend", [*NATIVE, "reference"])
def test_compiles_to_one_graph(backend):
    compiled = torch.compile(fixmatch_abc_loss, fullgraph=True, backend="aot_eager")
    arguments = random_batch()
    for step in (0, 4):
        options = {"step": torch.tensor(step), "seed": 3, "backend": backend}
        expected, gradients = run(arguments, **options)
        found, found_gradients = run(arguments, function=compiled, **options)
        for a, b in zip([*found, *found_gradients], [*expected, *gradients]):
            torch.testing.assert_close(a.detach(), b.detach(), rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_result_does_not_vary(backend):
    arguments = random_batch(64, 128, 10, dtype=torch.float32)
    first, first_gradients = run(arguments, backend=backend, step=1, seed=1)
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 1):
            torch.set_num_threads(count)
            again, gradients = run(arguments, backend=backend, step=1, seed=1)
            assert all(torch.equal(a, b) for a, b in zip([*again, *gradients], [*first, *first_gradients]))
    finally:
        torch.set_num_threads(threads)


@pytest.fixture
def poisoned_memory():
    """PyTorch fills every new tensor with NaN, or with the largest integer."""
    torch.use_deterministic_algorithms(True)
    assert torch.empty(1000).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("sizes", [(6, 9, 7), (0, 3, 40), (3, 0, 4)])
def test_nothing_is_left_uninitialized(poisoned_memory, backend, sizes):
    assert_matches_oracle(random_batch(*sizes), backend=backend, step=5, seed=1)


def test_cpp_uses_several_threads_where_there_is_work():
    arguments = random_batch(300, 300, 200, dtype=torch.float32, scale=10.0)
    found, gradients = run(arguments, backend=BACKENDS[0], step=1, seed=1)
    expected, expected_gradients = run(arguments, backend="reference", step=1, seed=1)
    for a, b in zip([*found, *gradients], [*expected, *expected_gradients]):
        torch.testing.assert_close(a.detach(), b.detach(), rtol=2e-5, atol=1e-7)


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"balanced": torch.zeros(24, 6)}, ValueError, r"balanced: expected shape \[24, 7\], found \[24, 6\]"),
        ({"balanced": torch.zeros(24, 7)}, TypeError, r"balanced: expected dtype torch\.float64, that of logits"),
        (
            {"true_labels": torch.zeros(8).long()},
            ValueError,
            "logits: expected 22 rows, 6 labeled and 2 times 8",
        ),
        ({"labels": torch.zeros(6)}, TypeError, r"labels: expected dtype int64, found torch\.float32"),
        ({"true_labels": torch.zeros(9, 1)}, ValueError, r"true_labels: expected shape \[U\], found \[9, 1\]"),
        ({"keep_labeled": torch.zeros(6)}, ValueError, r"keep_labeled: expected shape \[7\], found \[6\]"),
        ({"keep_unlabeled": torch.zeros(7).long()}, TypeError, "keep_unlabeled: expected dtype float"),
        (
            {"keep_labeled": torch.full((7,), 1.5)},
            ValueError,
            r"keep_labeled: expected probabilities in 0\.\.1, found 1.5",
        ),
        ({"keep_unlabeled": torch.full((7,), -0.5)}, ValueError, "keep_unlabeled: expected probabilities"),
        ({"keep_unlabeled": torch.full((7,), torch.nan)}, ValueError, "keep_unlabeled: expected probabilities"),
        ({"threshold": -1}, ValueError, "threshold: expected a number >= 0, found -1"),
        ({"seed": -1}, ValueError, r"seed: expected an integer in \[0, 2\^64\), found -1"),
        ({"seed": None}, TypeError, "seed: expected an integer, found NoneType"),
        ({"step": 1.5}, ValueError, r"step: expected an integer >= 0, found 1\.5"),
        ({"step": -1}, ValueError, "step: expected an integer >= 0, found -1"),
        ({"step": "a"}, ValueError, "step: expected an integer >= 0, found 'a'"),
        ({"step": torch.zeros(2).long()}, ValueError, r"step: expected shape \[\], found \[2\]"),
        ({"step": torch.zeros(())}, TypeError, r"step: expected dtype int64, found torch\.float32"),
        ({"labels": torch.zeros(6).long().to("meta")}, ValueError, "labels: expected device cpu, that of logits"),
        ({"backend": "cuda"}, RuntimeError, "backend 'cuda' does not implement fixmatch_abc_loss"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else None,
)
def test_bad_arguments_are_named(change, error, message):
    with pytest.raises(error, match=message):
        fixmatch_abc_loss(**(random_batch() | {"step": 0, "seed": 0} | change))


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
@pytest.mark.parametrize("label", [-1, 7])
def test_labels_out_of_range(label):
    arguments = random_batch()
    arguments["labels"][3] = label
    for backend in BACKENDS:
        if backend == "triton":  # a kernel cannot raise
            assert fixmatch_abc_loss(**arguments, step=0, seed=0, backend=backend).supervised.isnan()
        else:
            with pytest.raises(ValueError, match=rf"labels: expected classes in 0\.\.6, found {label}"):
                fixmatch_abc_loss(**arguments, step=0, seed=0, backend=backend)
