"""SsCL on a GPU: distortion, window and step as on a CPU, without the host waiting, and captured as a graph."""

import copy

import pytest
import torch

from bacon_fast.data.pool import HostPool, Window
from bacon_fast.data.simclr import SimCLRDistortion
from bacon_fast.methods.outputs import Batch
from bacon_fast.methods.sscl.method import SsCL
from bacon_fast.models.heads import projection_head
from bacon_fast.models.network import Network

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")

K, B, U, SIDE, LABELED, UNLABELED = 4, 8, 16, 16, 20, 40
LABELS = torch.arange(LABELED) % 3  # class 3 has no labeled image


def build() -> SsCL:
    torch.manual_seed(0)
    network = Network("wrn-10-1", K, balanced_head=False, bn_momentum=0.05)
    distortion = SimCLRDistortion((0.5,) * 3, (0.25,) * 3, seed=3)
    method = SsCL(
        network,
        projection_head(64, 16, 2),
        distortion,
        num_labeled=LABELED,
        num_unlabeled=UNLABELED,
        threshold=0.3,
        lambda_u=1.0,
        lambda_con=1.0,
        soft=False,
        momentum=0.9,
        queue_size=50,
        extra_keys=3,
        gamma=5.0,
        margin=-0.25,
        form="prod",
        mask_queue=False,
        calibration="ratio",
        temperature=0.1,
        refresh_every=10,
        seed=3,
    )
    unit = torch.nn.functional.normalize
    method.bank.fill_(unit(torch.randn(LABELED, 16), dim=1), LABELS)
    present = torch.tensor([True, True, True, False])
    assigned = torch.arange(UNLABELED) % K
    method.prototypes.set_(unit(torch.rand(K, 64), dim=1), present, unit(torch.rand(UNLABELED, 64), dim=1), assigned)
    return method


def make_batch(step: int, device: str) -> Batch:
    generator = torch.Generator().manual_seed(step)
    labeled = torch.randint(0, LABELED, (B,), generator=generator)
    tensors = (
        torch.randn(B + 2 * U, 3, SIDE, SIDE, generator=generator),
        LABELS[labeled],
        labeled,
        torch.randint(0, UNLABELED, (U,), generator=generator),
        torch.full((U,), -1),
    )
    return Batch(*(t.to(device) for t in tensors))


@pytest.mark.parametrize("side", [32, 96])
def test_the_distortion_is_that_of_the_cpu(side):
    images = torch.rand(32, 3, side, side, generator=torch.Generator().manual_seed(1)) - 0.5
    distortion = SimCLRDistortion((0.5,) * 3, (1.0,) * 3, seed=5)
    slots = torch.arange(7, 39)
    expected = distortion(images, 4, slots)
    found = copy.deepcopy(distortion).cuda()(images.cuda(), torch.tensor(4, device="cuda"), slots.cuda())
    torch.testing.assert_close(found.cpu(), expected, rtol=0, atol=1e-4)


def test_steps_are_those_of_the_cpu_and_never_wait():
    runs = {}
    for device in ("cpu", "cuda"):
        method, losses = build().to(device), []
        steps = [(make_batch(s, device), torch.tensor(s, device=device)) for s in range(5)]
        for batch, step in steps[:1]:
            method(batch, step, None).total.backward()  # compiles kernels, which may wait
        torch.cuda.set_sync_debug_mode("error" if device == "cuda" else "default")
        try:
            for batch, step in steps[1:]:
                output = method(batch, step, None)
                output.total.backward()
                losses.append(output.total.detach())
        finally:
            torch.cuda.set_sync_debug_mode("default")
        runs[device] = torch.stack(losses).cpu(), method.queue.keys.cpu(), method.bank.keys.cpu()
    torch.testing.assert_close(runs["cuda"], runs["cpu"], rtol=2e-3, atol=2e-3)


def test_a_captured_step_updates_the_same_state():
    eager, captured = build().cuda(), build().cuda()
    batch, step = make_batch(0, "cuda"), torch.zeros((), dtype=torch.int64, device="cuda")
    stream = torch.cuda.Stream()
    start = copy.deepcopy(captured.state_dict())
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        captured(batch, step, None).total.backward()
        captured.zero_grad(set_to_none=True)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            output = captured(batch, step, None)
            output.total.backward()
        captured.load_state_dict(start)
        for s in range(4):
            step.fill_(s)
            graph.replay()
    torch.cuda.current_stream().wait_stream(stream)
    for s in range(4):
        expected = eager(batch, torch.tensor(s, device="cuda"), None)
    torch.testing.assert_close(output.total, expected.total, rtol=1e-4, atol=1e-4)
    assert captured.queue.position == eager.queue.position == 4 * U % 50
    for name, value in eager.state_dict().items():
        torch.testing.assert_close(captured.state_dict()[name], value, rtol=1e-3, atol=1e-4, msg=name)


def test_the_window_holds_each_steps_rows_while_earlier_work_still_runs():
    images = torch.arange(100, dtype=torch.uint8)[:, None, None, None].expand(100, 64, 64, 3).contiguous()
    pool = HostPool(images, torch.device("cuda"))
    assert pool[torch.tensor([3, 1], device="cuda")][:, 0, 0, 0].tolist() == [3, 1]
    window, seen, rows = Window(pool, 32), [], []
    busy = torch.randn(2000, 2000, device="cuda")
    for step in range(12):
        rows.append(torch.randint(0, 100, (32,), generator=torch.Generator().manual_seed(step)))
        window.load(rows[-1], step)
        busy = busy @ busy / busy.norm()  # the device falls behind the host
        seen.append(window.images[:, 5, 6, 1].clone())
    assert torch.equal(torch.stack(seen).cpu(), torch.stack(rows).to(torch.uint8))
