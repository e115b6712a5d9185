"""The contrastive family on a GPU against the reference in float64 on the CPU; in graphs, and run after run."""

import math

import pytest
import torch
from contrastive_cases import CASES, Case, assert_as_accurate_as_torch, loss_and_gradients, problem, upstream

from bacon_fast import functional
from bacon_fast.functional import info_nce, sscl_loss, sup_con_loss
from bacon_fast.ops.contrastive import contrastive

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")

FORMS = ["mean", "sum", "prod"]
LARGE = [
    Case("bacon-1000x100", 1000, None, 100, own=1, codes=3, match="ignore", groups=50, floor=1e-8),
    Case("ssc-1060x64", 1060, None, 64, codes=1, self_column=True),
    Case("queue-300x9000x128", 300, 9000, 128, own=4, bias=True, columns_need_gradient=False),
    Case("memory-257x2049x512", 257, 2049, 512, own=1, codes=2, strided=True),
]


def run(*arguments, **options):
    return contrastive(*arguments, **options, backend="triton")


@pytest.mark.parametrize("case", CASES + LARGE, ids=str)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_as_accurate_as_torch(case, form, dtype):
    assert_as_accurate_as_torch(run, case, form, dtype, "cuda")


@pytest.mark.parametrize("case", CASES + LARGE, ids=str)
def test_tf32_where_torch_is_allowed_to(case):
    """With torch.set_float32_matmul_precision("high") similarities have the 10 bits of tf32, and the loss follows."""
    arguments, options = problem(case, torch.float32, "cuda")
    grad = upstream(case, torch.float32, "cuda")
    expected, wanted = loss_and_gradients(run, case, arguments, grad, **options, form="sum")
    previous = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        loss, gradients = loss_and_gradients(run, case, arguments, grad, **options, form="sum")
    finally:
        torch.set_float32_matmul_precision(previous)
    torch.testing.assert_close(loss, expected, rtol=2e-2, atol=2e-2)
    for found, gradient in zip(gradients, wanted):
        if gradient.numel():
            assert (found - gradient).abs().max() <= 3e-2 * gradient.abs().max() + 1e-7


@pytest.mark.parametrize("case", [CASES[4], *LARGE], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_hundred_runs_are_equal_bit_for_bit(case, dtype):
    arguments, options = problem(case, dtype, "cuda")
    grad = upstream(case, dtype, "cuda")
    first = loss_and_gradients(run, case, arguments, grad, **options, form="sum")
    for _ in range(99):
        again = loss_and_gradients(run, case, arguments, grad, **options, form="sum")
        assert torch.equal(first[0], again[0])
        assert all(torch.equal(a, b) for a, b in zip(first[1], again[1]))


def losses(features, labels, queue, bacon):
    """Every loss of the family, added up: forward work for one graph."""
    half = features.shape[0] // 2
    total = sup_con_loss(features, labels) + sup_con_loss(features, labels, reduction="pml")
    total = total + info_nce(features[:half], features[half:], queue) + info_nce(features[:half], features[half:])
    total = total + sscl_loss(features[:half], features[half:, None], queue)
    return total + functional.bacon_loss(features, **bacon, progress=0.5)


def test_graph_capture_and_replay():
    g = torch.Generator().manual_seed(0)
    rows, batch, num_classes, dim = 96, 32, 10, 48
    features = torch.randn(rows, dim, generator=g).cuda().requires_grad_()
    labels = torch.randint(0, 5, (rows,), generator=g).cuda()
    queue = torch.randn(500, dim, generator=g).cuda()
    bacon = {
        "labels": labels[:batch] % num_classes,
        "logits": torch.randn(rows - batch, num_classes, generator=g).cuda(),
        "centers": torch.randn(num_classes, dim, generator=g).cuda(),
        "reliable": (torch.rand(rows, generator=g) < 0.6).cuda(),
        "class_counts": torch.arange(num_classes).cuda(),
    }

    def step():
        loss = losses(features, labels, queue, bacon)
        return loss, torch.autograd.grad(loss, features)[0]

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss, gradient = step()
    for seed in (1, 2):
        with torch.no_grad():
            features.copy_(torch.randn(rows, dim, generator=torch.Generator().manual_seed(seed)))
            labels.copy_(torch.randint(0, 5, (rows,), generator=torch.Generator().manual_seed(seed)))
        graph.replay()
        found = loss.clone(), gradient.clone()
        expected = step()
        assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1])


def test_no_host_synchronization():
    arguments, options = problem(LARGE[0], torch.float32, "cuda")
    grad = upstream(LARGE[0], torch.float32, "cuda")
    loss_and_gradients(run, LARGE[0], arguments, grad, **options, form="sum")
    torch.cuda.set_sync_debug_mode("error")
    try:
        loss_and_gradients(run, LARGE[0], arguments, grad, **options, form="sum")
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_compiles_to_one_graph():
    arguments, options = problem(LARGE[1], torch.float32, "cuda")
    linear = torch.nn.Linear(64, 64).cuda()

    def step(rows):
        return run(linear(rows), *arguments[1:], **options, form="mean").mean()

    expected = torch.autograd.grad(step(arguments[0]), linear.weight)[0]
    loss = torch.compile(step, fullgraph=True)(arguments[0])
    torch.testing.assert_close(torch.autograd.grad(loss, linear.weight)[0], expected, rtol=1e-4, atol=1e-7)


def test_memory_is_linear_in_queries_and_queue():
    """No matrix of similarities: 2048 x 65536 in float32 would be 512 MiB."""
    queries = torch.randn(2048, 128, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    positives, queue = torch.randn_like(queries).detach(), torch.randn(65536, 128, device="cuda", dtype=torch.bfloat16)
    info_nce(queries, positives, queue).backward()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    info_nce(queries, positives, queue).backward()
    assert torch.cuda.max_memory_allocated() - before < 32 * 2**20


def test_offsets_beyond_32_bits():
    """A queue whose last element is more than 2^31 elements from its first."""
    queue = torch.zeros(2**24 + 64, 192, device="cuda", dtype=torch.bfloat16)[:, :130]
    tail = torch.randn(64, 130, device="cuda", dtype=torch.bfloat16)
    queue[-64:] = tail
    queries = torch.randn(5, 130, device="cuda", dtype=torch.bfloat16)
    assert queue[2**24 :].storage_offset() > 2**31
    loss = info_nce(queries, queries, queue, temperature=0.05, reduction="none")
    s = torch.nn.functional.normalize(queries.double(), dim=1) @ torch.nn.functional.normalize(tail.double(), dim=1).T
    # The query is its own positive, of similarity 1; the zero vectors have similarity 0.
    expected = (((s - 1) / 0.05).exp().sum(dim=1) + 2**24 * math.exp(-1 / 0.05)).log1p()
    torch.testing.assert_close(loss.double(), expected, rtol=1e-4, atol=1e-6)
