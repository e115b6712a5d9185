"""Class-balanced draws: their distribution, their counters, classes without samples, parts of a batch."""

import pytest
import torch
from scipy.stats import chisquare

from bacon_fast.data.loader import ClassBalancedSampler
from bacon_fast.data.philox import Stream, philox

LABELS = torch.tensor([2, 0, 0, 4, 0, 2, 0, 0, 4, 0])  # of five classes two have no sample


def sampler(batch_size: int = 8, **changes) -> ClassBalancedSampler:
    return ClassBalancedSampler(LABELS, batch_size, **({"seed": 1, "stream": Stream.SAMPLER_BALANCED} | changes))


def test_every_class_is_drawn_alike_and_every_sample_of_a_class():
    drawn = torch.cat([sampler(3000).indices(step) for step in range(4)])
    assert chisquare(LABELS[drawn].bincount()[[0, 2, 4]]).pvalue > 0.001
    for c in (0, 2, 4):
        rows = (c == LABELS).nonzero()[:, 0]
        assert chisquare([(drawn == row).sum().item() for row in rows]).pvalue > 0.001


def test_a_draw_is_its_counter():
    of_class = {c: [row for row in range(10) if LABELS[row] == c] for c in (0, 2, 4)}
    for row, position in enumerate(sampler().indices(6).tolist()):
        first, second = philox(1, 6, Stream.SAMPLER_BALANCED, torch.tensor([row]), 2)[0].tolist()
        rows = of_class[[0, 2, 4][first * 3 >> 32]]
        assert position == rows[second * len(rows) >> 32]


def test_parts_make_the_batch_and_steps_differ():
    whole = sampler().indices(3)
    step = torch.tensor(3)
    assert torch.equal(torch.cat([sampler().batch(step, slice(0, 5)), sampler().batch(step, slice(5, 8))]), whole)
    assert not torch.equal(sampler().indices(4), whole) and not torch.equal(sampler(seed=2).indices(3), whole)


def test_one_sample():
    assert ClassBalancedSampler(torch.tensor([3]), 4, 0, 0).indices(0).tolist() == [0] * 4


@pytest.mark.parametrize(("labels", "size", "name"), [(LABELS[:0], 4, "labels"), (LABELS, 0, "batch_size")])
def test_nothing_to_draw_from_is_refused(labels, size, name):
    with pytest.raises(ValueError, match=name):
        ClassBalancedSampler(labels, size, 0, 0)
