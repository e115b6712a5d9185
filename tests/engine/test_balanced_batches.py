"""The other labeled rows of a batch: their images, their views, and that the rest of it does not change."""

import pytest
import torch

from bacon_fast.data.augment import ViewRequest
from bacon_fast.data.datasets import load_dataset
from bacon_fast.data.longtail import PROTOCOLS, make_split
from bacon_fast.data.philox import Stream
from bacon_fast.engine.batches import Batches
from bacon_fast.engine.presets import PRESETS

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def data():
    dataset = load_dataset("digits")
    return dataset, make_split(dataset, PROTOCOLS["digits"], 3)


def batch(data, step: int = 7, balanced_view: bool = True, labeled_strong_view: bool = False, **changes):
    config = PRESETS["digits"].config().replace(batch_size=6, unlabeled_ratio=2, seed=3, **changes)
    batches = Batches(config, data[1], data[0], CPU, ("weak", "strong"), balanced_view, labeled_strong_view)
    batches.prepare(step)
    return batches, batches.batch(torch.tensor(step))


def test_rows_are_strong_views_of_class_balanced_draws(data):
    batches, made = batch(data)
    slots = batches.balanced_sampler.indices(7)
    assert torch.equal(made.balanced_labels, batches.labels[slots])
    request = ViewRequest(batches.labeled[slots], Stream.LABELED_STRONG, strong=True)
    expected = batches.augment.views(batches.pool, [request], 3, torch.tensor(7), channels_last=True)
    assert torch.equal(made.balanced_images, expected)


def test_the_rest_of_the_batch_is_what_it_is_without_them(data):
    (_, with_them), (_, without) = batch(data), batch(data, balanced_view=False)
    assert torch.equal(with_them.images, without.images) and torch.equal(with_them.labels, without.labels)
    assert without.balanced_images is None and without.balanced_labels is None


@pytest.mark.parametrize("balanced_view", [False, True])
def test_strong_views_of_the_labeled_rows_are_of_the_same_images_by_draws_of_their_own(data, balanced_view):
    batches, made = batch(data, balanced_view=balanced_view, labeled_strong_view=True)
    _, without = batch(data, balanced_view=balanced_view)
    request = ViewRequest(batches.labeled[made.labeled_slots], Stream.LABELED_STRONG_VIEW, strong=True)
    expected = batches.augment.views(batches.pool, [request], 3, torch.tensor(7), channels_last=True)
    assert torch.equal(made.labeled_strong_images, expected)
    assert without.labeled_strong_images is None
    for name in ("images", "labels", "labeled_slots", "unlabeled_slots"):
        assert torch.equal(getattr(made, name), getattr(without, name)), name
    if balanced_view:
        assert torch.equal(made.balanced_images, without.balanced_images)
        assert not torch.equal(made.balanced_images, made.labeled_strong_images)
