"""`fixmatch_abc_loss` on a GPU, compiled, against the reference in float64 on the CPU; in graphs, and run after run."""

import pytest
import torch

from bacon_fast.functional import fixmatch_abc_loss

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")

LOSSES = ("supervised", "unsupervised", "abc_labeled", "abc_unlabeled")
UPSTREAM = (1.0, -0.5, 2.0, 3.0)


def random_batch(batch, unlabeled, num_classes, dtype, seed=0):
    g = torch.Generator().manual_seed(seed)
    rows = batch + 2 * unlabeled
    return {
        "logits": torch.randn(rows, num_classes, generator=g).mul(5).to(dtype),
        "balanced": torch.randn(rows, num_classes, generator=g).mul(5).to(dtype),
        "labels": torch.randint(num_classes, (batch,), generator=g),
        "true_labels": torch.randint(-1, num_classes, (unlabeled,), generator=g),
        "keep_labeled": torch.rand(num_classes, generator=g),
        "keep_unlabeled": torch.rand(num_classes, generator=g),
        "threshold": 0.7,
    }


def moved(arguments, device, dtype=None):
    result = {k: v.to(device) if torch.is_tensor(v) else v for k, v in arguments.items()}
    if dtype is not None:
        result |= {name: result[name].to(dtype) for name in ("logits", "balanced")}
    return result


def run(arguments, function=fixmatch_abc_loss, **options):
    heads = [arguments[name].clone().requires_grad_() for name in ("logits", "balanced")]
    out = function(**(arguments | {"logits": heads[0], "balanced": heads[1]}), **options)
    losses = [getattr(out, name) for name in LOSSES]
    torch.autograd.backward(losses, [torch.full_like(loss, u) for loss, u in zip(losses, UPSTREAM)])
    return [value.detach() for value in out], [head.grad for head in heads]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("seed", [7, 2**64 - 1])
@pytest.mark.parametrize(
    "batch, unlabeled, num_classes",
    [(1, 1, 1), (0, 9, 7), (9, 0, 7), (64, 128, 10), (33, 65, 100), (5, 4, 1000), (3, 2, 8192)],
)
def test_equals_the_reference(batch, unlabeled, num_classes, seed, dtype):
    arguments = random_batch(batch, unlabeled, num_classes, dtype)
    options = {"step": 5, "seed": seed}
    found, gradients = run(moved(arguments, "cuda"), backend="triton", **options)
    expected, wanted = run(moved(arguments, "cpu", torch.float64), backend="reference", **options)
    tolerance = 1e-12 if dtype == torch.float64 else 5e-6
    for a, b in zip(found, expected):
        torch.testing.assert_close(a.double().cpu(), b.double(), rtol=max(tolerance, 2e-6), atol=tolerance)
    for a, b in zip(gradients, wanted):
        epsilon = torch.finfo(dtype).eps
        torch.testing.assert_close(a.double().cpu(), b, rtol=4 * epsilon + tolerance, atol=max(3e-7, tolerance))


def test_the_result_does_not_vary_over_100_runs():
    arguments = moved(random_batch(64, 1000, 100, torch.bfloat16), "cuda")
    first, first_gradients = run(arguments, step=1, seed=1)
    for _ in range(100):
        again, gradients = run(arguments, step=1, seed=1)
        assert all(torch.equal(a, b) for a, b in zip([*again, *gradients], [*first, *first_gradients]))


@pytest.fixture
def poisoned_memory():
    """PyTorch fills every new tensor with NaN, or with the largest integer."""
    torch.use_deterministic_algorithms(True)
    assert torch.empty(1000, device="cuda").isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


def test_nothing_is_left_uninitialized(poisoned_memory):
    arguments = random_batch(64, 128, 10, torch.float32)
    found, gradients = run(moved(arguments, "cuda"), backend="triton", step=1, seed=1)
    expected, wanted = run(moved(arguments, "cpu", torch.float64), backend="reference", step=1, seed=1)
    for a, b in zip([*found, *gradients], [*expected, *wanted]):
        torch.testing.assert_close(a.double().cpu(), b.double(), rtol=1e-5, atol=1e-6)


def test_captured_in_a_graph_the_masks_follow_the_step():
    arguments = moved(random_batch(64, 128, 10, torch.float32), "cuda")
    step = torch.zeros((), dtype=torch.int64, device="cuda")
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        fixmatch_abc_loss(**arguments, step=step, seed=3)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = fixmatch_abc_loss(**arguments, step=step, seed=3)
    for value in (0, 1, 2**32 - 1):
        step.fill_(value)
        graph.replay()
        expected = fixmatch_abc_loss(**arguments, step=value, seed=3)
        assert all(torch.equal(a, b) for a, b in zip(out, expected))


def test_no_synchronization_and_the_best_backend_is_triton():
    arguments = moved(random_batch(64, 128, 10, torch.float32), "cuda")
    step = torch.zeros((), dtype=torch.int64, device="cuda")
    expected, _ = run(arguments, step=step, seed=3, backend="triton")
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        found, _ = run(arguments, step=step, seed=3)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(torch.equal(a, b) for a, b in zip(found, expected))


def test_compiles_to_one_graph():
    compiled = torch.compile(fixmatch_abc_loss, fullgraph=True)
    arguments = moved(random_batch(64, 128, 10, torch.float32), "cuda")
    step = torch.ones((), dtype=torch.int64, device="cuda")
    expected, wanted = run(arguments, step=step, seed=3)
    found, gradients = run(arguments, function=compiled, step=step, seed=3)
    for a, b in zip([*found, *gradients], [*expected, *wanted]):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-8)
