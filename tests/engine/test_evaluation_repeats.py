"""Evaluation's sums: in an order that does not change from run to run, on a GPU too, and right."""

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from bacon_fast.engine.evaluation import SUM_ROWS, calibration_bins, intra_class_variance


class Operations(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        self.names.add(function.overloadpacket.__name__)
        return function(*arguments, **(options or {}))


@pytest.mark.parametrize("images", [7, 2 * SUM_ROWS + 5])
def test_sums_are_products_and_right(images):
    rng = np.random.default_rng(0)
    labels, logits = rng.integers(0, 4, images), rng.normal(size=(images, 6)) * 3
    features = rng.normal(size=(images, 8)) + labels[:, None]
    with Operations() as operations:
        bins = calibration_bins(torch.tensor(logits), torch.tensor(labels))
        variance = intra_class_variance(torch.tensor(features), torch.tensor(labels), 6)
    # What CUDA adds by atomics of floating-point numbers.
    unordered = {"index_add", "index_add_", "scatter_add", "scatter_add_", "index_put_", "bincount", "histc"}
    assert "mm" in operations.names and not operations.names & unordered

    probability = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    confidence, right = probability.max(1), probability.argmax(1) == labels
    bin_of = np.ceil(confidence * 15).astype(int) - 1
    expected = [np.bincount(bin_of, weights, 15) for weights in (np.ones(images), confidence, right)]
    np.testing.assert_allclose(bins.numpy(), np.stack(expected, 1), rtol=1e-12)
    unit = features / np.linalg.norm(features, axis=1, keepdims=True)
    spread = [unit[labels == c].var(axis=0).sum() for c in np.unique(labels)]
    assert variance.item() == pytest.approx(np.mean(spread), rel=1e-12)
