"""Epochs of the index sampler: complete, shuffled, and a pure function of (seed, step)."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare

from bacon_fast.data.loader import IndexSampler
from bacon_fast.data.philox import Stream


@settings(max_examples=30, deadline=None)
@given(n=st.integers(1, 40), batch=st.integers(1, 100), seed=st.integers(0, 2**64 - 1))
def test_batches_are_slices_of_complete_epochs(n, batch, seed):
    sampler = IndexSampler(n, batch, seed, Stream.SAMPLER_LABELED)
    steps = 3 * n // batch + 2
    seen = torch.cat([sampler.indices(step) for step in range(steps)])
    assert seen.shape == (steps * batch,) and seen.dtype == torch.int64
    for epoch in range(len(seen) // n):
        assert seen[epoch * n : (epoch + 1) * n].sort().values.equal(torch.arange(n))


def test_any_step_can_be_asked_first():
    """A resumed run needs no sampler state: a fresh sampler at step t gives what an old one gives."""
    old = IndexSampler(103, 64, 7, Stream.SAMPLER_LABELED)
    history = [old.indices(step) for step in range(20)]
    for step in (19, 3, 7, 0):
        assert IndexSampler(103, 64, 7, Stream.SAMPLER_LABELED).indices(step).equal(history[step])
        assert old.indices(step).equal(history[step])


def test_batches_do_not_change_when_a_later_epoch_begins():
    sampler = IndexSampler(10, 10, 0, Stream.SAMPLER_LABELED)
    first = sampler.indices(0)
    copy = first.clone()
    sampler.indices(1)
    assert first.equal(copy)


def test_permutations_are_rewritten_only_at_epoch_borders(monkeypatch):
    sampler = IndexSampler(1000, 10, 0, Stream.SAMPLER_LABELED)
    address, drawn = sampler.order.data_ptr(), []
    original = sampler.permutation
    monkeypatch.setattr(sampler, "permutation", lambda epoch: drawn.append(epoch) or original(epoch))
    for step in range(250):
        sampler.indices(step)
    assert drawn == [0, 1, 2, 3]  # the current epoch and the next; each once
    assert sampler.order.data_ptr() == address


def test_rows_bring_the_columns_of_their_samples():
    columns = torch.stack([torch.arange(10) ** 2, -torch.arange(10)])
    sampler = IndexSampler(10, 7, 3, Stream.SAMPLER_LABELED, columns)
    for step in (0, 1, 5, 2):
        sampler.prepare(step)
        positions, squares, negatives = sampler.rows(torch.tensor(step), slice(2, 6))
        assert positions.equal(sampler.indices(step)[2:6])
        assert squares.equal(positions**2) and negatives.equal(-positions)
    with pytest.raises(ValueError, match=r"columns: expected int64 \[C, 9\]"):
        IndexSampler(9, 7, 3, Stream.SAMPLER_LABELED, columns)


def test_streams_seeds_and_epochs_shuffle_differently():
    def order(seed, stream, step):
        return IndexSampler(50, 50, seed, stream).indices(step)

    base = order(0, Stream.SAMPLER_LABELED, 0)
    assert not base.equal(torch.arange(50))
    assert not base.equal(order(1, Stream.SAMPLER_LABELED, 0))
    assert not base.equal(order(0, Stream.SAMPLER_UNLABELED, 0))
    assert not base.equal(order(0, Stream.SAMPLER_LABELED, 1))


def test_every_position_is_equally_likely_first():
    first = [IndexSampler(8, 1, seed, Stream.SAMPLER_LABELED).indices(0).item() for seed in range(1600)]
    assert chisquare(torch.bincount(torch.tensor(first), minlength=8).numpy()).pvalue > 1e-4


def test_state_dict_is_empty_and_moving_keeps_the_order():
    sampler = IndexSampler(30, 8, 0, Stream.SAMPLER_LABELED)
    before = sampler.indices(2)
    assert not sampler.state_dict()
    assert sampler.to_empty(device="cpu").indices(2).equal(before)


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        ((0, 1, 0), "num_samples"),
        ((1, 0, 0), "batch_size"),
        ((1, 1, -1), "seed"),
    ],
)
def test_bad_arguments(arguments, name):
    with pytest.raises(ValueError, match=f"{name}: expected"):
        IndexSampler(*arguments, Stream.SAMPLER_LABELED)


def test_negative_step():
    with pytest.raises(ValueError, match="step: expected at least 0, found -1"):
        IndexSampler(3, 2, 0, Stream.SAMPLER_LABELED).indices(-1)
