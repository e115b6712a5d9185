"""The memory bank, every backend usable here against a simulation in Python's exact integers."""

import math
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bacon_fast import functional
from bacon_fast.losses import MemoryBank
from bacon_fast.ops import backends

BACKENDS = [name for name, b in backends.BACKENDS["bank_write_"].items() if b.why_not(torch.empty(1)) is None]
needs_native = pytest.mark.skipif(backends.native_error is not None, reason=str(backends.native_error))


class Simulation:
    """One dictionary of features and one of classes; sums are made anew from Python integers whenever asked for."""

    def __init__(self, num_classes, dim):
        self.num_classes, self.dim = num_classes, dim
        self.feature, self.label = {}, {}

    def select(self, slots, labels, gate):
        for s, y, g in zip(slots.tolist(), labels.tolist(), gate.tolist()):
            if g:
                self.label[s] = y

    def write(self, slots, features, gate):
        for s, row, g in zip(slots.tolist(), features.tolist(), gate.tolist()):
            if g and all(math.isfinite(v) for v in row):
                self.feature[s] = [min(max(v, -4096.0), 4096.0) for v in row]

    def members(self, c):
        return [s for s, y in self.label.items() if y == c and s in self.feature]

    def sums(self):
        # round() is half to even, and 2**30 · v is exact in double precision.
        return [
            [sum(round(self.feature[s][d] * 2**30) for s in self.members(c)) for d in range(self.dim)]
            for c in range(self.num_classes)
        ]

    def assert_equal(self, bank):
        n = len(bank.written)
        assert bank.selected_label.tolist() == [self.label.get(s, -1) for s in range(n)]
        assert bank.written.tolist() == [s in self.feature for s in range(n)]
        for s, row in self.feature.items():
            assert bank.features[s].tolist() == row
        labels = list(self.label.values())
        assert bank.class_counts.tolist() == [labels.count(c) for c in range(self.num_classes)]
        assert bank.class_sizes.tolist() == [len(self.members(c)) for c in range(self.num_classes)]
        assert bank.class_sums.tolist() == self.sums()

    def assert_centers(self, bank):
        for c in range(self.num_classes):
            rows = [self.feature[s] for s in self.members(c)]
            assert bank.has_center[c].item() == bool(rows)
            mean = [math.fsum(column) / len(rows) for column in zip(*rows)] if rows else [0.0] * self.dim
            assert bank.centers[c].tolist() == pytest.approx(mean, rel=1e-6, abs=1e-8)


def random_step(generator, rows, num_slots, num_classes, dim):
    return SimpleNamespace(
        slots=torch.randint(num_slots, (rows,), generator=generator),
        labels=torch.randint(num_classes, (rows,), generator=generator),
        features=torch.randn(rows, dim, generator=generator),
        selected=torch.rand(rows, generator=generator) < 0.6,
        reliable=torch.rand(rows, generator=generator) < 0.5,
    )


def state(bank):
    return {name: buffer.clone() for name, buffer in bank.named_buffers()}


def assert_same_state(found, expected):
    for name, buffer in expected.items():
        assert torch.equal(found[name], buffer), name


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("rows, num_slots, num_classes, dim", [(40, 30, 5, 3), (1, 1, 1, 1), (9, 200, 10, 33)])
def test_long_sequences(backend, rows, num_slots, num_classes, dim):
    """With more rows than slots every batch has duplicates, and slots change class all the time."""
    generator = torch.Generator().manual_seed(0)
    bank = MemoryBank(num_slots, num_classes, dim, backend=backend)
    simulation = Simulation(num_classes, dim)
    for step in range(60):
        batch = random_step(generator, rows, num_slots, num_classes, dim)
        bank.select_(batch.slots, batch.labels, batch.selected)
        simulation.select(batch.slots, batch.labels, batch.selected)
        if step % 10 == 0:
            simulation.assert_equal(bank)
        bank.write_(batch.slots, batch.features, batch.reliable)
        simulation.write(batch.slots, batch.features, batch.reliable)
    simulation.assert_equal(bank)
    simulation.assert_centers(bank)


row = st.tuples(
    st.integers(0, 4),  # slot
    st.integers(0, 2),  # class
    st.booleans(),  # selected
    st.booleans(),  # reliable
    st.lists(st.floats(allow_nan=True, allow_infinity=True, width=32), min_size=2, max_size=2),
)


@pytest.mark.parametrize("backend", BACKENDS)
@settings(max_examples=60, deadline=None)
@given(st.lists(st.lists(row, max_size=6), max_size=6))
def test_any_sequence_of_any_values(backend, steps):
    bank, simulation = MemoryBank(5, 3, 2, backend=backend), Simulation(3, 2)
    for rows in steps:
        slots, labels, selected, reliable, features = zip(*rows) if rows else ((),) * 5
        slots, labels = torch.tensor(slots, dtype=torch.long), torch.tensor(labels, dtype=torch.long)
        selected, reliable = torch.tensor(selected, dtype=torch.bool), torch.tensor(reliable, dtype=torch.bool)
        features = torch.tensor(features, dtype=torch.float32).reshape(-1, 2)
        bank.select_(slots, labels, selected)
        simulation.select(slots, labels, selected)
        bank.write_(slots, features, reliable)
        simulation.write(slots, features, reliable)
        simulation.assert_equal(bank)
        simulation.assert_centers(bank)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_last_row_of_a_slot_wins(backend):
    bank = MemoryBank(4, 3, 1, backend=backend)
    slots = torch.tensor([2, 2, 1, 2, 2])
    bank.select_(slots, torch.tensor([0, 1, 0, 2, 0]), torch.tensor([True, True, True, True, False]))
    assert bank.selected_label.tolist() == [-1, 0, 2, -1]
    assert bank.class_counts.tolist() == [1, 0, 1]
    features = torch.tensor([[1.0], [2.0], [3.0], [4.0], [float("nan")]])
    bank.write_(slots, features, torch.tensor([True, True, False, True, True]))
    assert bank.features.flatten().tolist() == [0, 0, 4, 0]
    assert bank.centers.flatten().tolist() == [0, 0, 4] and bank.has_center.tolist() == [False, False, True]


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_batch_may_lie_in_the_buffers(backend):
    """What is read is what was there before the call."""
    turned, every = torch.tensor([1, 2, 3, 0]), torch.ones(4, dtype=torch.bool)
    features, labels = torch.arange(8.0).view(4, 2), torch.tensor([0, 0, 1, 2])
    for alias in (False, True):
        bank = MemoryBank(4, 3, 2, backend=backend)
        bank.select_(torch.arange(4), labels, every)
        bank.write_(torch.arange(4), features, torch.tensor([True, False, True, True]))
        bank.features[1] = features[1]  # of a slot that is not written
        rows, gate = (bank.features, bank.written) if alias else (bank.features.clone(), bank.written.clone())
        bank.write_(turned, rows, gate)
        assert bank.features.tolist() == features[[3, 0, 2, 2]].tolist()
        assert bank.written.tolist() == [True, True, True, True]
        bank.select_(turned, bank.selected_label if alias else bank.selected_label.clone(), every)
        assert bank.selected_label.tolist() == labels[[3, 0, 1, 2]].tolist()


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_slot_that_changes_class_takes_its_feature_along(backend):
    bank = MemoryBank(3, 2, 2, backend=backend)
    every = torch.ones(2, dtype=torch.bool)
    bank.select_(torch.tensor([0, 1]), torch.tensor([0, 0]), every)
    bank.write_(torch.tensor([0, 1]), torch.tensor([[1.0, 2.0], [3.0, 6.0]]), every)
    assert bank.centers[0].tolist() == [2, 4]
    bank.select_(torch.tensor([1]), torch.tensor([1]), every[:1])
    assert bank.centers[0].tolist() == [2, 4], "centers move with the next write, not before the loss"
    bank.write_(torch.tensor([], dtype=torch.long), torch.empty(0, 2), every[:0])
    assert bank.centers.tolist() == [[1, 2], [3, 6]]


@pytest.mark.parametrize("backend", BACKENDS)
def test_written_before_selected_counts_once_selected(backend):
    bank = MemoryBank(2, 2, 1, backend=backend)
    one, true = torch.tensor([1]), torch.tensor([True])
    bank.write_(one, torch.tensor([[5.0]]), true)
    assert not bank.has_center.any() and bank.written.tolist() == [False, True]
    bank.select_(one, torch.tensor([1]), true)
    bank.write_(one, torch.tensor([[7.0]]), ~true)
    assert bank.centers.flatten().tolist() == [0, 5] and bank.class_sizes.tolist() == [0, 1]


@pytest.mark.parametrize("backend", BACKENDS)
def test_features_are_clamped_and_half_precision_is_welcome(backend):
    bank = MemoryBank(1, 1, 3, backend=backend)
    zero, true = torch.tensor([0]), torch.tensor([True])
    bank.select_(zero, zero, true)
    bank.write_(zero, torch.tensor([[-1e30, 0.3, 5e3]], dtype=torch.bfloat16), true)
    assert bank.centers[0].tolist() == [-4096.0, torch.tensor(0.3, dtype=torch.bfloat16).item(), 4096.0]


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_order_of_the_rows_does_not_matter(backend):
    generator = torch.Generator().manual_seed(1)
    states = []
    batches = [random_step(generator, 50, 50, 4, 7) for _ in range(5)]
    for batch in batches:
        batch.slots = torch.randperm(50, generator=generator)
        batch.features *= torch.logspace(-6, 3, 50)[:, None]  # float sums would depend on the order
    for permute in (False, True):
        bank = MemoryBank(50, 4, 7, backend=backend)
        for batch in batches:
            order = torch.randperm(50, generator=generator) if permute else torch.arange(50)
            bank.select_(batch.slots[order], batch.labels[order], batch.selected[order])
            bank.write_(batch.slots[order], batch.features[order], batch.reliable[order])
        states.append(state(bank))
    assert_same_state(*states)


@needs_native
def test_no_drift_after_a_million_writes():
    generator = torch.Generator().manual_seed(2)
    bank, rows = MemoryBank(2000, 10, 4), 2500
    writes = 0
    while writes < 1_000_000:
        batch = random_step(generator, rows, 2000, 10, 4)
        bank.select_(batch.slots, batch.labels, batch.selected)
        bank.write_(batch.slots, batch.features * 100, batch.reliable)
        writes += int(batch.reliable.sum())
    expected = torch.zeros(10, 4, dtype=torch.float64)
    expected.index_add_(0, bank.selected_label, bank.features.double())
    torch.testing.assert_close(bank.centers, (expected / bank.class_sizes[:, None]).float(), rtol=1e-6, atol=1e-8)
    incremental = state(bank)
    nothing = torch.empty(0, dtype=torch.long)
    bank.backend = "reference"  # recomputes every sum from the features
    bank.select_(nothing, nothing, nothing.bool())
    bank.write_(nothing, torch.empty(0, 4), nothing.bool())
    assert_same_state(state(bank), incremental)


@needs_native
def test_native_and_reference_agree_bit_for_bit():
    generator = torch.Generator().manual_seed(3)
    banks = [MemoryBank(300, 20, 16, backend=name) for name in ("cpp", "reference")]
    for _ in range(30):
        batch = random_step(generator, 64, 300, 20, 16)
        strided = torch.stack([batch.features, batch.features], 2)[..., 0]
        for bank in banks:
            bank.select_(batch.slots, batch.labels, batch.selected)
            bank.write_(batch.slots, strided, batch.reliable)
    assert_same_state(state(banks[0]), state(banks[1]))


def test_starting_with_ones_pulls_centers_toward_them():
    """Oddity 3 of methods.md E.6: a selected slot counts with a vector of ones until it is reliable."""
    bank = MemoryBank(4, 2, 3, start_with_ones=True)
    true = torch.ones(3, dtype=torch.bool)
    bank.select_(torch.tensor([0, 1, 2]), torch.tensor([0, 0, 1]), true)
    bank.write_(torch.tensor([0]), torch.tensor([[4.0, 4.0, 4.0]]), true[:1])
    assert bank.centers.tolist() == [[2.5] * 3, [1.0] * 3]


def test_state_dict_round_trip():
    generator = torch.Generator().manual_seed(4)
    banks = [MemoryBank(30, 4, 5) for _ in range(2)]
    batches = [random_step(generator, 20, 30, 4, 5) for _ in range(6)]
    for batch in batches[:3]:
        banks[0].select_(batch.slots, batch.labels, batch.selected)
        banks[0].write_(batch.slots, batch.features, batch.reliable)
    assert set(banks[0].state_dict()) == {name for name, _ in banks[0].named_buffers()}
    banks[1].load_state_dict(banks[0].state_dict())
    for batch in batches[3:]:
        for bank in banks:
            bank.select_(batch.slots, batch.labels, batch.selected)
            bank.write_(batch.slots, batch.features, batch.reliable)
    assert_same_state(state(banks[1]), state(banks[0]))


def test_buffers_keep_their_dtype_and_address():
    bank = MemoryBank(30, 4, 5)
    addresses = {name: buffer.data_ptr() for name, buffer in bank.named_buffers()}
    batch = random_step(torch.Generator().manual_seed(5), 20, 30, 4, 5)
    bank.select_(batch.slots, batch.labels, batch.selected)
    bank.write_(batch.slots, batch.features, batch.reliable)
    assert {name: buffer.data_ptr() for name, buffer in bank.named_buffers()} == addresses
    before = state(bank)
    bank.to(torch.bfloat16).double()
    assert_same_state(state(bank), before)


@needs_native
def test_opcheck():
    bank = MemoryBank(12, 3, 4)
    batch = random_step(torch.Generator().manual_seed(6), 10, 12, 3, 4)
    sums = (bank.class_sums, bank.class_sizes)
    torch.library.opcheck(
        torch.ops.bacon_fast.bank_select_,
        (
            bank.selected_label,
            bank.class_counts,
            *sums,
            bank.features,
            bank.written,
            batch.slots,
            batch.labels,
            batch.selected,
        ),
    )
    torch.library.opcheck(
        torch.ops.bacon_fast.bank_write_,
        (
            bank.features,
            bank.written,
            *sums,
            bank.centers,
            bank.has_center,
            bank.selected_label,
            batch.slots,
            batch.features,
            batch.reliable,
        ),
    )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("slot, label", [(30, 0), (-1, 0), (0, 4), (0, -1)])
def test_out_of_range_changes_nothing(backend, slot, label):
    bank = MemoryBank(30, 4, 5, backend=backend)
    before = state(bank)
    slots, labels, gate = torch.tensor([1, slot]), torch.tensor([2, label]), torch.ones(2, dtype=torch.bool)
    slots_message = rf"slots: expected values in 0\.\.29, found {slot}"
    message = rf"labels: expected classes in 0\.\.3, found {label}" if slot == 0 else slots_message
    with pytest.raises(ValueError, match=message):
        bank.select_(slots, labels, gate)
    if slot != 0:
        with pytest.raises(ValueError, match=slots_message):
            bank.write_(slots, torch.ones(2, 5), gate)
    assert_same_state(state(bank), before)


def damaged_bank(label: int, **options) -> MemoryBank:
    """As a damaged checkpoint may leave it: slot 7, which holds a feature, is of no class that exists."""
    bank, every = MemoryBank(30, 4, 5, **options), torch.ones(3, dtype=torch.bool)
    slots = torch.tensor([1, 7, 8])
    bank.select_(slots, torch.tensor([2, 3, 0]), every)
    bank.write_(slots, torch.arange(15.0).view(3, 5), every)
    bank.selected_label[7] = label
    return bank


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("label", [4, -2, 10**12, -(10**12)])
def test_a_slot_of_a_class_that_does_not_exist_is_named_and_nothing_changes(backend, label):
    bank = damaged_bank(label, backend=backend)
    before = state(bank)
    slots, gate = torch.tensor([1, 7]), torch.ones(2, dtype=torch.bool)
    message = rf"selected_label: expected classes in -1\.\.3, found {label}"
    with pytest.raises(ValueError, match=message):
        bank.select_(slots, torch.tensor([0, 1]), gate)
    with pytest.raises(ValueError, match=message):
        bank.write_(slots, torch.ones(2, 5), gate)
    assert_same_state(state(bank), before)
    bank.select_(torch.tensor([1]), torch.tensor([0]), gate[:1])  # another slot
    bank.write_(torch.tensor([1]), torch.ones(1, 5), gate[:1])
    assert bank.class_sizes.tolist()[:3] == [2, 0, 0] and bank.selected_label[7] == label
    assert bank.centers[0].tolist() == [(v + 1) / 2 for v in range(10, 15)]


@pytest.mark.parametrize("label", [4, -2, 10**12])
def test_where_values_cannot_be_looked_at_it_is_left_alone_and_centers_are_nan(label, monkeypatch):
    """As on a GPU, and as in csrc/bank/cuda.cu, which tests/gpu compares with this."""
    monkeypatch.setattr("bacon_fast.reference.memory_bank.check_values", lambda *_: None)
    bank = damaged_bank(label, backend="reference")
    slots, gate = torch.tensor([1, 7]), torch.ones(2, dtype=torch.bool)
    kept = bank.features[7].clone()
    bank.select_(slots, torch.tensor([0, 1]), gate)
    assert bank.selected_label[[1, 7, 8]].tolist() == [0, label, 0] and bank.class_counts.tolist() == [2, 0, 0, 0]
    bank.write_(slots, torch.ones(2, 5), gate)
    assert bank.centers.isnan().all() and torch.equal(bank.features[7], kept) and bank.features[1].eq(1).all()
    bank.write_(slots[:1], torch.ones(1, 5), gate[:1])
    assert bank.centers.isfinite().all() and bank.class_sizes.tolist() == [2, 0, 0, 0]


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_label_of_a_row_that_is_not_gated_does_not_matter(backend):
    bank = MemoryBank(30, 4, 5, backend=backend)
    bank.select_(torch.tensor([1, 2]), torch.tensor([2, -1]), torch.tensor([True, False]))
    assert bank.class_counts.tolist() == [0, 0, 1, 0]


@pytest.mark.parametrize(
    "change, error, message",
    [
        (
            {"slots": torch.zeros(3, dtype=torch.int32)},
            TypeError,
            "slots: expected dtype torch.int64, found torch.int32",
        ),
        ({"features": torch.zeros(3, 4)}, ValueError, r"features: expected shape \[3, 5\], found \[3, 4\]"),
        ({"gate": torch.zeros(2, dtype=torch.bool)}, ValueError, r"gate: expected shape \[3\], found \[2\]"),
        ({"gate": torch.zeros(3)}, TypeError, "gate: expected dtype torch.bool"),
    ],
    ids=["slots", "features", "gate-shape", "gate-dtype"],
)
def test_bad_batches_are_named(change, error, message):
    bank = MemoryBank(30, 4, 5)
    batch = {
        "slots": torch.zeros(3, dtype=torch.long),
        "features": torch.zeros(3, 5),
        "gate": torch.zeros(3, dtype=torch.bool),
    }
    with pytest.raises(error, match=message):
        bank.write_(**(batch | change))


def test_bad_buffers_are_named():
    bank = MemoryBank(30, 4, 5)
    rows = torch.zeros(3, dtype=torch.long)
    with pytest.raises(TypeError, match=r"class_sums: expected dtype torch\.int64, found torch\.float32"):
        functional.bank_select_(
            bank.selected_label,
            bank.class_counts,
            bank.class_sums.float(),
            bank.class_sizes,
            bank.features,
            bank.written,
            rows,
            rows,
            rows.bool(),
        )
    with pytest.raises(ValueError, match="num_slots: expected a positive integer, found 0"):
        MemoryBank(0, 4, 5)


def test_falls_back_to_the_reference_without_the_extension(monkeypatch):
    monkeypatch.setattr(backends, "native_error", "the native extension bacon_fast._C is not usable: not built")
    bank = MemoryBank(3, 2, 1)
    one, true = torch.tensor([1]), torch.tensor([True])
    bank.select_(one, one, true)
    bank.write_(one, torch.tensor([[2.0]]), true)
    assert bank.centers.flatten().tolist() == [0, 2]
    bank.backend = "cpp"
    with pytest.raises(RuntimeError, match="backend 'cpp' cannot run bank_select_ here: the native extension"):
        bank.select_(one, one, true)
