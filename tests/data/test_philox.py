"""Philox4x32-10 against the published known-answer vectors of Random123, and the properties of draws built on it."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare

from bacon_fast.data.philox import Stream, philox, sort_keys, to_range, to_uniform, uniform
from bacon_fast.ops import backends
from bacon_fast.reference.philox import philox4x32

BACKENDS = [n for n, b in backends.BACKENDS["philox"].items() if b.why_not(torch.empty(0)) is None]

# Random123 (Salmon et al.), tests/kat_vectors, "philox4x32 10": counter, key, answer.
KNOWN_ANSWERS = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]


def words(text: str) -> list[int]:
    return [int(word, 16) for word in text.split()]


@pytest.mark.parametrize(("counter", "key", "answer"), KNOWN_ANSWERS)
def test_known_answers(counter, key, answer):
    result = philox4x32(tuple(torch.tensor(word) for word in words(counter)), tuple(words(key)))
    assert result.tolist() == words(answer)


@pytest.mark.parametrize("backend", BACKENDS)
def test_counter_layout_gives_the_known_answer(backend):
    """The third vector through the public function: slot, step, view and block in their documented places."""
    slot, step, view, block = words("243f6a88 85a308d3 13198a2e 00000000")
    low, high = words("a4093822 299f31d0")
    expected = philox4x32(tuple(torch.tensor(w) for w in (slot, step, view, block)), (low, high))
    assert philox(low | high << 32, step, view, torch.tensor([slot]), 4, backend=backend)[0].equal(expected)
    assert philox(0, 0, 0, torch.tensor([0]), 4, backend=backend)[0].tolist() == words(KNOWN_ANSWERS[0][2])
    first, second, *_ = words(KNOWN_ANSWERS[0][2])
    assert sort_keys(0, torch.tensor(0), 0, 1, backend=backend).tolist() == [(first << 31) | (second >> 1)]


@pytest.mark.parametrize("backend", [name for name in BACKENDS if name != "reference"])
@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**64 - 1),
    step=st.integers(0, 2**32 - 1),
    view=st.integers(0, 2**32 - 1),
    slots=st.lists(st.integers(0, 2**33), max_size=20),
    count=st.integers(1, 11),
)
def test_backends_draw_the_same_bits(backend, seed, step, view, slots, count):
    slots = torch.tensor([*slots, 0]).repeat_interleave(2)[1::2]  # not contiguous
    expected = philox(seed, step, view, slots, count, backend="reference")
    assert philox(seed, step, view, slots, count, backend=backend).equal(expected)
    at = torch.tensor(step)
    keys = sort_keys(seed, at, view, 2 * count, backend=backend)
    assert keys.equal(sort_keys(seed, at, view, 2 * count, backend="reference")) and keys.min() >= 0
    assert sort_keys(seed, at, view, 0, backend=backend).shape == (0,)


def test_many_slots_take_several_threads():
    slots = torch.arange(40_000)
    assert philox(3, 4, 5, slots, 6).equal(philox(3, 4, 5, slots, 6, backend="reference"))


@pytest.mark.parametrize(("name", "last"), [("philox", (torch.arange(5), 6)), ("philox_sort_keys", (6,))])
def test_the_ops_keep_the_rules_of_torch(name, last):
    torch.library.opcheck(getattr(torch.ops.bacon_fast, name), (-1, torch.tensor(9), 3, *last))


def test_draws_can_be_compiled():
    def draw(step: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
        return philox(2**64 - 1, step, Stream.MIXUP, slots, 2)

    step, slots = torch.tensor(8), torch.arange(6)
    compiled = torch.compile(draw, backend="aot_eager", fullgraph=True)
    assert compiled(step, slots).equal(draw(step, slots))


def test_words_extend_and_slots_are_independent_of_their_neighbors():
    slots = torch.tensor([7, 3, 7, 100_000])
    long = philox(5, 9, Stream.MIXUP, slots, 11)
    assert long.shape == (4, 11)
    assert long[:, :6].equal(philox(5, 9, Stream.MIXUP, slots, 6))
    assert long[0].equal(long[2])
    assert not long[0].equal(long[1])
    assert long[3:].equal(philox(5, 9, Stream.MIXUP, slots[3:], 11))


@pytest.mark.parametrize("changed", [{"seed": 6}, {"seed": 5 + 2**32}, {"step": 10}, {"view": 0}])
def test_every_part_of_the_counter_matters(changed):
    arguments = {"seed": 5, "step": 9, "view": 4, "slot": torch.arange(100), "words": 4}
    assert (philox(**arguments) != philox(**arguments | changed)).all(1).all()


def test_step_may_be_a_tensor():
    slots = torch.arange(8)
    assert philox(1, torch.tensor(12345), 2, slots, 3).equal(philox(1, 12345, 2, slots, 3))


def test_streams_are_distinct():
    assert len(set(Stream)) == len(Stream.__members__)


def test_uniform_is_exact_and_below_one():
    edges = torch.tensor([0, 1, 255, 256, 2**31, 2**32 - 1])
    assert to_uniform(edges).tolist() == [w / 2**32 for w in edges.tolist()]
    assert to_uniform(edges, torch.float32).tolist() == [(w // 256) / 2**24 for w in edges.tolist()]
    assert to_uniform(edges, torch.float32).max() < 1
    assert to_range(edges, 14).tolist() == [w * 14 // 2**32 for w in edges.tolist()]


def test_draws_are_uniform():
    draws = uniform(3, 17, Stream.ABC_LABELED, torch.arange(200_000))
    assert draws.dtype == torch.float32 and draws.shape == (200_000,)
    assert chisquare(torch.histc(draws, 64, 0, 1).numpy()).pvalue > 1e-4
    integers = to_range(philox(3, 17, 0, torch.arange(200_000), 1)[:, 0], 14)
    assert chisquare(torch.bincount(integers, minlength=14).numpy()).pvalue > 1e-4


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"seed": -1}, ValueError, "seed: expected"),
        ({"seed": 2**64}, ValueError, "seed: expected"),
        ({"seed": 1.0}, TypeError, "seed: expected an integer, found float"),
        ({"step": -1}, ValueError, "step: expected"),
        ({"step": torch.zeros(1, dtype=torch.int64)}, ValueError, "step: expected a 0-d int64 tensor"),
        ({"step": torch.zeros(())}, ValueError, "step: expected a 0-d int64 tensor"),
        ({"view": -1}, ValueError, "view: expected"),
        ({"slot": torch.zeros(2)}, TypeError, "slot: expected int64"),
        ({"words": 0}, ValueError, "words: expected at least 1"),
    ],
)
def test_bad_arguments(arguments, error, message):
    good = {"seed": 0, "step": 0, "view": 0, "slot": torch.arange(2), "words": 1}
    with pytest.raises(error, match=message):
        philox(**good | arguments)


def test_uniform_refuses_half_precision():
    with pytest.raises(TypeError, match="dtype: expected"):
        uniform(0, 0, 0, torch.arange(2), dtype=torch.float16)
