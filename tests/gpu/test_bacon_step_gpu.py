"""BaCon's fused step on a GPU: against the reference on the CPU, in a CUDA graph, and run after run."""

import pytest
import torch
from bacon_step_cases import SHAPES, assert_same_state, batch, module, take

from bacon_fast.kernels.bacon_step_design import use_design

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
LARGE = {
    "paper": (64, 128, 32, 10, 500, 900),
    "hundred": (64, 128, 64, 100, 500, 900),
    "largest": (300, 724, 128, 1000, 900, 3000),
}


@pytest.mark.parametrize("neg_mode", ["authors", "paper"])
@pytest.mark.parametrize("variant", ["fixed", "official", "blog"])
@pytest.mark.parametrize("name", [*SHAPES, *LARGE])
def test_steps_equal_the_reference(name, variant, neg_mode):
    shape = (SHAPES | LARGE)[name]
    options = {"variant": variant, "neg_mode": neg_mode}
    found, expected = module(shape, None, "cuda", **options), module(shape, "reference", **options)
    rounding = 1e-6 if variant == "blog" else 0.0  # it normalizes what the bank holds, on another device
    for seed in range(4):
        loss, gradient, stats = take(found, batch(shape, seed, device="cuda"), upstream=3.0)
        expected_loss, expected_gradient, expected_stats = take(expected, batch(shape, seed), upstream=3.0)
        torch.testing.assert_close(loss.cpu(), expected_loss, rtol=2e-5, atol=2e-5)
        torch.testing.assert_close(gradient.cpu(), expected_gradient, rtol=1e-4, atol=2e-5)
        assert_same_state(found, expected, rounding)
        for key, value in expected_stats.items():
            torch.testing.assert_close(stats[key].cpu(), value)


@pytest.mark.parametrize("name", LARGE)
def test_the_old_design_equals_the_reference(name):
    """Two launches by rows, kept until both have been measured."""
    found, expected = module(LARGE[name], None, "cuda"), module(LARGE[name], "reference")
    for seed in range(2):
        with use_design("rows"):
            loss, gradient, _ = take(found, batch(LARGE[name], seed, device="cuda"))
        expected_loss, expected_gradient, _ = take(expected, batch(LARGE[name], seed))
        torch.testing.assert_close(loss.cpu(), expected_loss, rtol=2e-5, atol=2e-5)
        torch.testing.assert_close(gradient.cpu(), expected_gradient, rtol=1e-4, atol=2e-5)
        assert_same_state(found, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype):
    shape = LARGE["paper"]
    found, expected = module(shape, None, "cuda"), module(shape, "reference")
    for seed in range(3):
        loss, gradient, _ = take(found, batch(shape, seed, dtype, "cuda"))
        expected_loss, expected_gradient, _ = take(expected, batch(shape, seed, dtype))
        torch.testing.assert_close(loss.cpu(), expected_loss, rtol=1e-2, atol=1e-3)
        torch.testing.assert_close(gradient.cpu().float(), expected_gradient.float(), rtol=5e-2, atol=2e-3)
        assert_same_state(found, expected)


@pytest.mark.parametrize("name", LARGE)
def test_100_runs_agree_bit_for_bit(name):
    shape = LARGE[name]
    steps = [batch(shape, seed, device="cuda") for seed in range(2)]
    first = module(shape, None, "cuda")
    expected = [take(first, step) for step in steps]
    for _ in range(100):
        again = module(shape, None, "cuda")
        for step, (loss, gradient, _) in zip(steps, expected):
            found_loss, found_gradient, _ = take(again, step)
            assert torch.equal(found_loss, loss) and torch.equal(found_gradient, gradient)
        assert_same_state(again, first)


def test_replays_in_a_cuda_graph():
    shape = LARGE["paper"]
    captured, eager = module(shape, None, "cuda"), module(shape, None, "cuda")
    static, progress = batch(shape, 0, device="cuda"), torch.zeros((), device="cuda")
    take(module(shape, None, "cuda"), static, progress=progress)  # compiles the kernels
    state = {name: buffer.clone() for name, buffer in captured.named_buffers()}
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss, gradient, _ = take(captured, static, progress=progress)
    for name, buffer in captured.named_buffers():
        buffer.copy_(state[name])
    for seed in range(5):
        step = batch(shape, seed, device="cuda")
        for name, tensor in static.items():
            tensor.copy_(step[name])
        progress.fill_(seed / 5)
        graph.replay()
        expected_loss, expected_gradient, _ = take(eager, step, progress=progress)
        assert torch.equal(loss, expected_loss) and torch.equal(gradient, expected_gradient)
        assert_same_state(captured, eager)
