"""The report gets what the run did."""

import numpy as np
import pytest
from run_cases import tiny

from bacon_fast.engine.trainer import Trainer
from bacon_fast.report.collect import collect


def test_a_run_gives_the_values_of_its_report(tmp_path):
    trainer = Trainer(tiny(tmp_path / "run"))
    summary = trainer.fit()
    data = collect(trainer, summary)
    test_labels = trainer.dataset.test_labels.numpy()
    assert data.summary is summary and [row["step"] for row in data.history] == [4, 8, 12]
    assert np.array_equal(data.confusion.sum(axis=1), np.bincount(test_labels, minlength=10))
    assert data.confusion.trace() / data.confusion.sum() == summary["top1"]
    assert np.array_equal(data.feature_labels, test_labels) and len(data.features) == len(test_labels)
    assert data.projections.shape == (len(test_labels), 32)
    # BaCon's base temperature is the negatives', and bounds that of each class's positives (methods.md E.3).
    assert data.base_temperature == 0.1 and max(data.temperatures) == pytest.approx(0.1)
    assert data.temperatures == data.temperature_history[-1]["temperatures"]
    images = trainer.dataset.pool().numpy()
    assert len(data.original_samples) == 10
    assert all((images == sample).all(axis=(1, 2, 3)).any() for sample in data.original_samples)
    assert data.weak_samples.shape == data.strong_samples.shape == data.original_samples.shape
    assert not np.array_equal(data.weak_samples, data.strong_samples)
