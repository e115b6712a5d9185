"""Evaluation in batches: as many images as there is room for, and the same answers."""

import pytest
import torch
from torch import nn

from bacon_fast.data.augment import Augment
from bacon_fast.engine import evaluation
from bacon_fast.engine.evaluation import predict
from bacon_fast.models.spec import NetworkSpec, build_network

CPU = torch.device("cpu")


def augment(side: int, **more) -> Augment:
    return Augment((side, side), mean=(0.5,) * 3, std=(0.25,) * 3, **more)


class Counts(nn.Module):
    """Notes the sizes of the batches that it is asked for."""

    def __init__(self):
        super().__init__()
        self.sizes: list[int] = []

    def predict(self, images):
        self.sizes.append(len(images))
        rows = images.flatten(1)[:, :3]
        return rows, rows


@pytest.mark.parametrize(
    ("side", "count", "sizes"),
    [
        (32, 1100, [500, 500, 100]),
        (64, 501, [500, 1]),
        (224, 100, [41, 41, 18]),
        (2048, 2, [1, 1]),
    ],
)
def test_a_batch_has_at_most_two_million_pixels(side, count, sizes):
    network, normalize = Counts(), augment(side)
    images = torch.zeros(1, side, side, 3, dtype=torch.uint8).expand(count, -1, -1, -1)
    features, logits = predict(network, normalize, images, CPU)
    assert network.sizes == sizes and len(features) == len(logits) == count


def test_the_window_counts_and_not_the_stored_image():
    network = Counts()
    images = torch.zeros(1, 1024, 1024, 3, dtype=torch.uint8).expand(3, -1, -1, -1)
    predict(network, augment(64, source_size=(1024, 1024)), images, CPU)
    assert network.sizes == [3]


def test_kept_features_are_as_many_as_before():
    network = Counts()
    features, _ = predict(network, augment(2048), torch.rand(700, 8).half(), CPU)
    assert network.sizes == [500, 200] and features.dtype == torch.float32


def test_smaller_batches_give_the_same_numbers(monkeypatch):
    torch.manual_seed(0)
    network = build_network(NetworkSpec("wrn-10-1", num_classes=5, bn_momentum=0.1))
    images = torch.randint(256, (23, 32, 32, 3), dtype=torch.uint8)
    whole = predict(network, augment(32), images, CPU)
    monkeypatch.setattr(evaluation, "EVALUATION_PIXELS", 5 * 32 * 32 + 7)
    for found, expected in zip(predict(network, augment(32), images, CPU), whole, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
