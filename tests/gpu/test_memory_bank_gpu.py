"""The memory bank on a GPU, bit for bit against the reference on the CPU; in CUDA graphs, and run after run."""

import pytest
import torch

from bacon_fast.losses import BaConLoss, MemoryBank
from bacon_fast.ops import backends

why_not = (
    "no CUDA device"
    if not torch.cuda.is_available()
    else backends.BACKENDS["bank_write_"]["cuda"].why_not(torch.empty(1, device="cuda"))
)
pytestmark = pytest.mark.skipif(why_not is not None, reason=str(why_not))


def random_step(generator, rows, num_slots, num_classes, dim):
    features = torch.randn(rows, dim, generator=generator) * torch.logspace(-5, 4, rows)[:, None]
    features[torch.rand(rows, generator=generator) < 0.1, dim - 1] = float("nan")
    return (
        torch.randint(num_slots, (rows,), generator=generator),
        torch.randint(num_classes, (rows,), generator=generator),
        torch.rand(rows, generator=generator) < 0.6,
        features,
        torch.rand(rows, generator=generator) < 0.5,
    )


def apply(bank, slots, labels, selected, features, reliable):
    bank.select_(slots, labels, selected)
    bank.write_(slots, features, reliable)


def assert_same_state(found, expected):
    for name, buffer in expected.named_buffers():
        assert torch.equal(found.get_buffer(name).cpu(), buffer.cpu()), name


@pytest.mark.parametrize(
    "rows, num_slots, num_classes, dim",
    [(1, 1, 1, 1), (40, 30, 5, 3), (192, 500, 10, 32), (300, 40, 3, 33), (7168, 5000, 1000, 128)],
)
def test_equals_the_reference_bit_for_bit(rows, num_slots, num_classes, dim):
    generator = torch.Generator().manual_seed(0)
    expected = MemoryBank(num_slots, num_classes, dim, backend="reference")
    found = MemoryBank(num_slots, num_classes, dim, backend="cuda").cuda()
    for _ in range(8):
        step = random_step(generator, rows, num_slots, num_classes, dim)
        apply(expected, *step)
        apply(found, *(tensor.cuda() for tensor in step))
        assert_same_state(found, expected)


@pytest.mark.parametrize("label", [4, -2, 10**12, -(10**12)])
def test_a_slot_of_a_class_that_does_not_exist_is_left_alone_and_makes_the_centers_nan(label, monkeypatch):
    monkeypatch.setattr("bacon_fast.reference.memory_bank.check_values", lambda *_: None)
    generator = torch.Generator().manual_seed(0)
    expected = MemoryBank(30, 4, 5, backend="reference")
    apply(expected, *random_step(generator, 60, 30, 4, 5))
    expected.selected_label[7] = label
    # The native code keeps the sums that it has; the reference makes them anew, without the damaged slot.
    nothing = torch.empty(0, dtype=torch.int64)
    apply(expected, nothing, nothing, nothing.bool(), torch.empty(0, 5), nothing.bool())
    found = MemoryBank(30, 4, 5, backend="cuda").cuda()
    found.load_state_dict(expected.state_dict())
    for _ in range(4):
        slots, *rest = random_step(generator, 20, 30, 4, 5)
        slots[3] = 7
        apply(expected, slots, *rest)
        apply(found, *(tensor.cuda() for tensor in (slots, *rest)))
        for name, buffer in expected.named_buffers():
            torch.testing.assert_close(found.get_buffer(name).cpu(), buffer, rtol=0, atol=0, equal_nan=True)
        assert found.centers.isnan().all() and found.selected_label[7] == label


def test_the_result_does_not_vary_over_100_runs():
    step = [tensor.cuda() for tensor in random_step(torch.Generator().manual_seed(1), 2000, 300, 10, 64)]
    first = MemoryBank(300, 10, 64).cuda()
    apply(first, *step)
    for _ in range(100):
        again = MemoryBank(300, 10, 64).cuda()
        apply(again, *step)
        assert_same_state(again, first)


def test_no_drift_after_a_million_writes():
    generator = torch.Generator().manual_seed(2)
    bank, writes = MemoryBank(2000, 10, 4).cuda(), 0
    while writes < 1_000_000:
        step = random_step(generator, 5000, 2000, 10, 4)
        apply(bank, *(tensor.cuda() for tensor in step))
        writes += int(step[4].sum())
    recomputed = MemoryBank(2000, 10, 4, backend="reference").cuda()
    recomputed.load_state_dict(bank.state_dict())
    nothing = torch.empty(0, dtype=torch.long, device="cuda")
    apply(recomputed, nothing, nothing, nothing.bool(), torch.empty(0, 4, device="cuda"), nothing.bool())
    assert_same_state(recomputed, bank)


def test_captured_in_a_graph_and_replayed():
    generator = torch.Generator().manual_seed(3)
    steps = [random_step(generator, 192, 500, 10, 32) for _ in range(5)]
    inputs = [tensor.cuda() for tensor in steps[0]]
    captured, expected = MemoryBank(500, 10, 32).cuda(), MemoryBank(500, 10, 32, backend="reference")
    empty = captured.state_dict()
    empty = {name: buffer.clone() for name, buffer in empty.items()}
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        apply(captured, *inputs)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        apply(captured, *inputs)
    captured.load_state_dict(empty)
    for step in steps:
        for tensor, value in zip(inputs, step):
            tensor.copy_(value)
        graph.replay()
        apply(expected, *step)
    assert_same_state(captured, expected)


def test_opcheck():
    bank = MemoryBank(12, 3, 4).cuda()
    generator = torch.Generator().manual_seed(4)
    slots, labels, selected, features, reliable = (t.cuda() for t in random_step(generator, 10, 12, 3, 4))
    torch.library.opcheck(
        torch.ops.bacon_fast.bank_select_,
        (
            bank.selected_label,
            bank.class_counts,
            bank.class_sums,
            bank.class_sizes,
            bank.features,
            bank.written,
            slots,
            labels,
            selected,
        ),
    )
    torch.library.opcheck(
        torch.ops.bacon_fast.bank_write_,
        (
            bank.features,
            bank.written,
            bank.class_sums,
            bank.class_sizes,
            bank.centers,
            bank.has_center,
            bank.selected_label,
            slots,
            features,
            reliable,
        ),
    )


@pytest.mark.parametrize("variant", ["fixed", "official"])
def test_steps_of_the_loss_do_not_synchronize_and_equal_the_cpu(variant):
    torch.manual_seed(0)
    modules = [BaConLoss(16, 10, 50, 80, variant=variant, backend="reference") for _ in range(2)]
    modules[1].load_state_dict(modules[0].state_dict())
    modules[1].cuda()
    modules[1].bank.backend = "cuda"
    generator = torch.Generator().manual_seed(5)
    for _ in range(6):
        arguments = (
            torch.randn(24, 16, generator=generator),
            torch.randint(10, (8,), generator=generator),
            torch.randn(24, 10, generator=generator) * 20,
            torch.randint(50, (8,), generator=generator),
            torch.randint(80, (16,), generator=generator),
        )
        expected = modules[0](*arguments, progress=torch.tensor(0.5), active=True).loss
        on_device = [tensor.cuda() for tensor in arguments]
        progress = torch.tensor(0.5, device="cuda")
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            found = modules[1](*on_device, progress=progress, active=True).loss
            found.backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        torch.testing.assert_close(found.cpu(), expected, rtol=1e-4, atol=1e-5)
    for name in ("selected_label", "class_counts", "class_sizes", "written"):
        assert torch.equal(modules[1].bank.get_buffer(name).cpu(), modules[0].bank.get_buffer(name))
    torch.testing.assert_close(modules[1].bank.centers.cpu(), modules[0].bank.centers, rtol=1e-4, atol=1e-5)
