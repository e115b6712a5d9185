"""A step's batch: the right images with the right labels, by every backend."""

import dataclasses

import numpy as np
import pytest
import torch
from PIL import Image

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


def build(data, views, **changes):
    config = PRESETS["digits"].config().replace(batch_size=5, unlabeled_ratio=3, seed=3, **changes)
    return Batches(config, data[1], data[0], CPU, views)


def batch_of(batches, step):
    batches.prepare(step)
    return batches.batch(torch.tensor(step))


@pytest.mark.parametrize("step", [0, 7, 500])
def test_labels_belong_to_the_images(data, step):
    dataset, split = data
    batches = build(data, ("weak", "strong"), randaugment_ops=0, cutout=False)
    batch = batch_of(batches, step)
    labels = dataset.train_labels.numpy()
    labeled, unlabeled = split.labeled[batch.labeled_slots], split.unlabeled[batch.unlabeled_slots]
    assert batch.labels.tolist() == labels[labeled].tolist()
    assert batch.true_labels.tolist() == labels[unlabeled].tolist()
    assert batch.images.shape == (5 + 2 * 15, 3, *dataset.train_images.shape[1:3])
    assert len(batch.labeled_images) == 5 and len(batch.view(0)) == len(batch.view(1)) == 15
    # Without operations every view is a crop of the reflected image: undo the normalization and look for it with numpy.
    mean, std = (np.asarray(v).reshape(3, 1, 1) for v in (dataset.mean, dataset.std))
    for images, rows in ((batch.labeled_images, labeled), (batch.view(0), unlabeled), (batch.view(1), unlabeled)):
        for view, row in zip(images, rows):
            pixels = np.rint((view.numpy() * std + mean) * 255).astype(np.uint8).transpose(1, 2, 0)
            padding = batches.augment.padding
            source = dataset.pool()[row].numpy()
            padded = np.pad(source, ((padding, padding), (padding, padding), (0, 0)), mode="reflect")
            height, width = source.shape[:2]
            crops = [
                padded[top : top + height, left : left + width]
                for top in range(2 * padding + 1)
                for left in range(2 * padding + 1)
            ]
            assert any(np.array_equal(pixels, crop) for crop in crops)


def test_views_come_from_streams_of_their_own(data):
    batches = build(data, ("weak", "strong", "strong"))
    batch = batch_of(batches, 4)
    pool, unlabeled = batches.pool, batches.unlabeled[batch.unlabeled_slots]
    for view, stream in enumerate((Stream.UNLABELED_WEAK, Stream.STRONG_0, Stream.STRONG_1)):
        make = batches.augment.weak if view == 0 else batches.augment.strong
        expected = batches.augment.normalize(make(pool[unlabeled], 3, 4, stream))
        assert torch.equal(batch.view(view), expected)


def test_a_supervised_batch_has_labeled_rows_only(data):
    batch = batch_of(build(data, ()), 0)
    assert (len(batch.images), batch.num_labeled, batch.num_unlabeled) == (5, 5, 0)


def test_true_labels_are_of_unlabeled_images_whose_class_is_known(tmp_path):
    """Not of images without a class, nor of labeled images in the pool: these say nothing of the method."""
    rng = np.random.default_rng(0)
    for folder, count in (("train/a", 6), ("train/b", 6), ("test/a", 1), ("test/b", 1), ("unlabeled", 5)):
        (tmp_path / folder).mkdir(parents=True)
        for k in range(count):
            Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(tmp_path / folder / f"{k}.png")
    dataset = load_dataset("folder", data_dir=tmp_path)
    split = make_split(dataset, dataclasses.replace(PROTOCOLS["as-is"], labeled_head=2), 0)
    batches = build((dataset, split), ("weak", "strong"))
    known = {row: int(label) for row, label in enumerate(dataset.train_labels) if row not in split.labeled}
    assert batches.true_labels.tolist() == [known.get(int(row), -1) for row in split.unlabeled]
    assert (batches.true_labels == -1).sum() == 5 + 4
    everything = build((dataset, make_split(dataset, PROTOCOLS["as-is"], 0)), ("weak", "strong"))
    assert (everything.true_labels == -1).all()


def test_another_labeled_set(data):
    batches = build(data, ("weak", "strong"))
    batches.set_labeled(torch.arange(7), torch.arange(7) % 4)
    batch = batch_of(batches, 0)
    assert batch.labels.tolist() == (batch.labeled_slots % 4).tolist() and batch.labeled_slots.max() < 7


def test_no_unlabeled_images_are_refused(data):
    empty = dataclasses.replace(data[1], unlabeled=np.empty(0, dtype=np.int64), unlabeled_counts=None)
    with pytest.raises(ValueError, match="needs unlabeled images"):
        build((data[0], empty), ("weak", "strong"))
