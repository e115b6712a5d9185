"""The small operations of a step on a GPU, bit for bit against their references on the CPU; casts against autocast."""

import pytest
import torch

from bacon_fast.data.philox import Stream, philox, sort_keys
from bacon_fast.models.half import HalfCopies
from bacon_fast.models.network import Network
from bacon_fast.ops import backends
from bacon_fast.ops.records import MAX_VALUES, add_values_, count_pairs_
from bacon_fast.ops.ring_rows import ring_rows

why_not = (
    "no CUDA device"
    if not torch.cuda.is_available()
    else backends.BACKENDS["philox"]["cuda"].why_not(torch.empty(1, device="cuda"))
)
pytestmark = pytest.mark.skipif(why_not is not None, reason=str(why_not))


@pytest.mark.parametrize("words", [1, 2, 4, 11])
def test_draws(words):
    seed, step, slots = 2**64 - 3, torch.tensor(2**32 - 1), torch.arange(5001)
    expected = philox(seed, step, Stream.MIXUP, slots, words, backend="reference")
    assert philox(seed, step.cuda(), Stream.MIXUP, slots.cuda(), words, backend="cuda").cpu().equal(expected)
    keys = sort_keys(seed, step.cuda(), Stream.SPLIT, 7443, backend="cuda")
    assert keys.cpu().equal(sort_keys(seed, step, Stream.SPLIT, 7443, backend="reference"))


def test_rows_and_records():
    ring, step = torch.randint(100, (3, 1001)), torch.tensor(12_345)
    options = {"stride": 128, "first": 3, "count": 120}
    expected = ring_rows(ring, step, **options, backend="reference")
    assert ring_rows(ring.cuda(), step.cuda(), **options, backend="cuda").cpu().equal(expected)

    pseudo, true, states = torch.randint(-1, 10, (500,)), torch.randint(-1, 10, (500,)), []
    values = [torch.tensor(float(i)).to((torch.float32, torch.bfloat16, torch.int64)[i % 3]) for i in range(MAX_VALUES)]
    for device, backend in (("cpu", "reference"), ("cuda", "cuda")):
        pairs = torch.zeros(111, dtype=torch.int64, device=device)
        sums, finite = torch.zeros(MAX_VALUES + 1, device=device), torch.zeros((), device=device)
        for _ in range(3):
            count_pairs_(pairs, pseudo.to(device), true.to(device), 10, backend=backend)
            add_values_(sums, finite, [value.to(device) for value in values], backend=backend)
        states.append([tensor.cpu() for tensor in (pairs, sums, finite)])
    assert all(a.equal(b) for a, b in zip(*states))


def test_casts_are_autocasts_in_two_launches_each_way(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    torch.manual_seed(0)
    net = Network("wrn-28-2", 10, balanced_head=True, bn_momentum=0.1).cuda().to(memory_format=torch.channels_last)
    images = torch.randn(32, 3, 32, 32, device="cuda").to(memory_format=torch.channels_last)
    copies, gradients = HalfCopies(net, torch.bfloat16), []

    def step(half: bool) -> None:
        with torch.autocast("cuda", dtype=torch.bfloat16):
            if half:
                with copies:
                    outputs = net(images)
            else:
                outputs = net(images)
        net.zero_grad(set_to_none=True)
        sum(output.float().square().mean() for output in outputs).backward()

    for half in (False, True):
        step(half)
        gradients.append([p.grad.clone() for p in net.parameters()])
    assert all(a.equal(b) for a, b in zip(*gradients))
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        step(True)
    casts = [event for event in profile.events() if "multi_tensor_apply" in event.name]
    assert 2 <= len(casts) <= 4  # a launch takes up to 110 tensors and 320 pieces
