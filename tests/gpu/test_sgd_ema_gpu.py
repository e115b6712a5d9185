"""The fused step of SGD and the moving average on a GPU: as on a CPU, in one launch, in a CUDA graph."""

import pytest
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from bacon_fast import _C
from bacon_fast.functional import sgd_ema_
from bacon_fast.models.network import Network

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
    pytest.mark.skipif(not _C.built_with_cuda, reason="bacon_fast._C was built without CUDA"),
]
SHAPES = [(), (1,), (4095,), (4097,), (64, 129), (0,), (7, 5, 3, 3), (100_000,)]


class Problem:
    """Arguments of a step on one device."""

    def __init__(self, device: str, shapes: list[tuple], dtype: torch.dtype = torch.float32) -> None:
        generator = torch.Generator().manual_seed(0)

        def draw(shape) -> Tensor:
            tensor = torch.randn(shape, generator=generator).to(device, dtype)
            return tensor.to(memory_format=torch.channels_last) if tensor.dim() == 4 else tensor

        self.parameters, self.gradients, self.momenta, self.averages = ([draw(s) for s in shapes] for _ in range(4))
        self.decays = [0.01 * (i % 3) for i in range(len(shapes))]
        self.copied = [torch.arange(5, device=device), torch.rand(3000, generator=generator).to(device)]
        self.copies = [torch.zeros_like(t) for t in self.copied]
        self.rate = torch.tensor(0.1, device=device)
        self.scale, self.found_inf = torch.tensor(8.0, device=device), torch.zeros((), device=device)

    def step(self, **options) -> None:
        gradients = [g if i % 4 else None for i, g in enumerate(self.gradients)]
        averages = [a if i % 5 else None for i, a in enumerate(self.averages)]
        sgd_ema_(
            self.parameters,
            gradients,
            self.momenta,
            averages,
            self.decays,
            self.copies,
            self.copied,
            rate=self.rate,
            grad_scale=self.scale,
            found_inf=self.found_inf,
            **options,
        )

    def state(self) -> list[Tensor]:
        return [t.clone() for t in self.parameters + self.momenta + self.averages + self.copies]


@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(torch.float32, 1e-6), (torch.float64, 1e-12), (torch.bfloat16, 2e-2), (torch.float16, 2e-3)],
)
def test_equals_the_cpu(dtype, tolerance):
    found, expected = Problem("cuda", SHAPES, dtype), Problem("cpu", SHAPES, dtype)
    for overflow in (0.0, 0.0, 1.0, 0.0):
        for problem in (found, expected):
            problem.found_inf.fill_(overflow)
            problem.step()
        for a, b in zip(found.state(), expected.state()):
            torch.testing.assert_close(a.cpu(), b, rtol=tolerance, atol=tolerance)


def test_more_tensors_than_one_launch_takes():
    shapes = [(i % 9 + 1,) for i in range(1200)]
    found, expected = Problem("cuda", shapes), Problem("cpu", shapes)
    found.step()
    expected.step()
    for a, b in zip(found.state(), expected.state()):
        torch.testing.assert_close(a.cpu(), b, rtol=1e-6, atol=1e-6)


def test_replays_read_rate_and_overflow_on_the_device():
    captured, eager = Problem("cuda", SHAPES), Problem("cuda", SHAPES)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured.step()
    for rate, overflow in ((0.1, 0.0), (0.3, 0.0), (0.3, 1.0), (0.2, 0.0)):
        for problem in (captured, eager):
            problem.rate.fill_(rate)
            problem.found_inf.fill_(overflow)
        graph.replay()
        eager.step()
        assert all(torch.equal(a, b) for a, b in zip(captured.state(), eager.state()))


def test_a_network_is_one_launch():
    network = Network("wrn-28-2", 10, balanced_head=True, bn_momentum=0.001).cuda()
    parameters, buffers = [p.detach() for p in network.parameters()], list(network.buffers())
    copies = [torch.empty_like(t) for t in parameters for _ in range(3)]
    gradients, momenta, averages = copies[::3], copies[1::3], copies[2::3]
    into, rate = [torch.empty_like(t) for t in buffers], torch.zeros((), device="cuda")
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        decays = [0.0] * len(parameters)
        sgd_ema_(parameters, gradients, momenta, averages, decays, into, buffers, rate=rate)
        torch.cuda.synchronize()
    launches = [e.name for e in profiler.events() if e.name.startswith(("cudaLaunch", "cudaMemcpy", "cudaMemset"))]
    assert len(launches) == 1 and "Kernel" in launches[0], launches
    assert all(torch.equal(a, b) for a, b in zip(into, buffers))
