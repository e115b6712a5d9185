"""Pseudo-label quality, calibration and spread against scikit-learn and plain loops."""

import numpy as np
import pytest
import torch
from sklearn.metrics import precision_recall_fscore_support

from bacon_fast.engine.diagnostics import Diagnostics, pseudo_label_quality
from bacon_fast.engine.evaluation import calibration_bins, calibration_error, intra_class_variance
from bacon_fast.losses.bank import MemoryBank

K = 5


def rows(seed, n=200):
    generator = torch.Generator().manual_seed(seed)
    pseudo = torch.randint(-1, K, (n,), generator=generator)
    true = torch.where(
        torch.rand(n, generator=generator) < 0.5, pseudo, torch.randint(-1, K, (n,), generator=generator)
    )
    return pseudo, true


def test_precision_and_recall_are_those_of_scikit_learn():
    diagnostics, steps = Diagnostics(K), [rows(0), rows(1)]
    for pseudo, true in steps:
        diagnostics.update(pseudo, true)
    values = diagnostics.read()
    pseudo, true = (torch.cat(part) for part in zip(*steps))
    known = true >= 0
    pseudo, true = pseudo[known].numpy(), true[known].numpy()
    precision, recall, *_ = precision_recall_fscore_support(true, pseudo, labels=range(K), zero_division=0)
    np.testing.assert_allclose(values["pseudo_precision"], precision)
    np.testing.assert_allclose(values["pseudo_recall"], recall)
    expected = np.array([[np.sum((true == i) & (pseudo == j)) for j in (*range(K), -1)] for i in range(K)])
    assert np.array_equal(diagnostics.window.numpy(), expected)
    assert values.keys() == {"pseudo_precision", "pseudo_recall"}


def test_a_read_starts_afresh_and_unknown_rows_do_not_count():
    diagnostics = Diagnostics(K)
    diagnostics.update(*rows(0))
    diagnostics.read()
    assert diagnostics.read() == {}
    diagnostics.update(torch.tensor([1, -1]), torch.tensor([-1, -1]))
    assert diagnostics.read() == {}


def test_a_class_without_rows_has_no_quality():
    counts = np.array([[2, 1, 1], [0, 0, 0]])
    assert pseudo_label_quality(counts) == ([1.0, 0.0], [0.5, None])
    assert pseudo_label_quality(np.array([[2, 0, 0], [1, 0, 1]])) == ([2 / 3, None], [1.0, 0.0])


def test_center_drift_and_class_counts():
    bank = MemoryBank(6, 3, 2)
    diagnostics = Diagnostics(3, bank)

    def write(features):
        slots = torch.arange(len(features))
        labels = slots % 2
        gate = torch.ones(len(features), dtype=torch.bool)
        bank.select_(slots, labels, gate)
        bank.write_(slots, features, gate)

    write(torch.tensor([[1.0, 0.0], [0.0, 2.0]]))
    assert diagnostics.read() == {"class_count_estimate": [1, 1, 0]}  # nothing to compare with yet
    write(torch.tensor([[0.0, 3.0], [0.0, 1.0]]))
    values = diagnostics.read()
    assert values["center_drift"] == pytest.approx((1.0 + 0.0) / 2, abs=1e-6)
    assert not any("bank" in name for name in diagnostics.state_dict()), "the bank is saved once, by its loss"


def test_calibration_error_against_a_loop():
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(500, K, generator=generator)
    labels = torch.randint(0, K, (500,), generator=generator)
    probability = torch.softmax(logits.double(), 1).numpy()
    confidence, right = probability.max(1), probability.argmax(1) == labels.numpy()
    expected = 0.0
    for m in range(15):
        inside = (confidence > m / 15) & (confidence <= (m + 1) / 15)
        if inside.any():
            expected += inside.mean() * abs(right[inside].mean() - confidence[inside].mean())
    bins = calibration_bins(logits, labels)
    assert bins[:, 0].sum() == 500
    assert calibration_error(bins) == pytest.approx(expected, rel=1e-9)


def test_a_certain_and_right_network_is_calibrated():
    labels = torch.arange(K)
    assert calibration_error(calibration_bins(1e4 * torch.eye(K), labels)) == 0
    assert calibration_error(calibration_bins(1e4 * torch.eye(K), labels.flip(0))) == pytest.approx(1 - 1 / K)


def test_intra_class_variance_against_numpy():
    rng = np.random.default_rng(0)
    features, labels = rng.normal(size=(40, 6)), rng.integers(0, 3, 40)
    unit = features / np.linalg.norm(features, axis=1, keepdims=True)
    expected = np.mean([unit[labels == c].var(axis=0).sum() for c in range(3)])
    found = intra_class_variance(torch.tensor(features), torch.tensor(labels), 5)  # classes 3 and 4 are absent
    assert float(found) == pytest.approx(expected, rel=1e-9)
