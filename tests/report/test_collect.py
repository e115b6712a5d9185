"""The report gets what the run did."""

import numpy as np
import pytest
from PIL import Image
from run_cases import tiny

from bacon_fast.cli import format_summary
from bacon_fast.engine.trainer import Trainer
from bacon_fast.redraw import redraw
from bacon_fast.report.collect import collect
from bacon_fast.report.page import write_report
from bacon_fast.run import Run


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
    wrong = trainer.dataset.test_images.numpy()
    for mistake in data.mistakes:
        ((i,),) = np.nonzero((wrong == mistake.image).all(axis=(1, 2, 3)))
        assert mistake.truth == test_labels[i] != mistake.predicted
    sure = [mistake.probability for mistake in data.mistakes]
    assert len(sure) == 12 and sure == sorted(sure, reverse=True) and all(0 < p <= 1 for p in sure)


def choice_of(page: str) -> str:
    """The sentence under the header."""
    return page.split('<p class="facts">')[2].partition("</p>")[0]


@pytest.mark.parametrize("measured", ["nothing", "validation", "test"])
def test_the_report_says_what_was_measured_on(tmp_path, measured):
    generator = np.random.default_rng(0)
    for part in ("train", "test") if measured == "test" else ("train",):
        for c in ("ant", "bee", "cat"):
            (tmp_path / "data" / part / c).mkdir(parents=True)
            for i in range(10):
                image = generator.integers(0, 256, (16, 16, 3), dtype=np.uint8)
                Image.fromarray(image).save(tmp_path / "data" / part / c / f"{i}.png")
    options = {"dataset": "folder", "data_dir": tmp_path / "data", "protocol": "as-is"}
    if measured != "nothing":
        options |= {"validation": 0.3, "select": "validation"}
    trainer = Trainer(tiny(tmp_path / "run", steps=4, eval_every=2, **options))
    summary = trainer.fit()
    data = collect(trainer, summary)
    page = write_report(tmp_path / "run", data).read_text()
    assert choice_of(redraw(tmp_path / "run").read_text()) == choice_of(page)
    assert "<h1>fixmatch+abc+bacon on data</h1>" in page, "the folder's name"
    if measured == "nothing":
        assert summary["evaluated_on"] is None and "bacc" not in summary and data.confusion is None
        assert "Last averaged weights, not evaluated: no test images (--test)" in page
        assert 'alt="Curves over training steps: ' in page and "Last evaluation" not in page
        assert "not evaluated" in (text := format_summary(summary, trainer.split.labeled_counts, None))
        assert "bee" in text and "top-1" not in text
        with pytest.raises(ValueError, match="expected test images, or the run's validation images, found none"):
            Run.open(tmp_path / "run", "cpu").evaluate()
        return
    assert summary["evaluated_on"] == measured and data.confusion.sum() == (30 if measured == "test" else 9)
    assert data.confusion.trace() / data.confusion.sum() == summary["top1"]
    where = "test" if measured == "test" else "the same images: optimistic"
    error = summary["validation"]["bacc_error"]
    assert f"Chosen by validation log-loss (9 images, bACC ±{error:.2f}), reported on {where}." in page
    assert "Chosen by validation" in page and f"{measured.capitalize()} images in feature space" in page
    assert ("on the test set" in page) is (measured == "test")
    assert ("best_on_test" in summary) is (measured == "test")
    assert "best (chosen on validation)" in format_summary(summary, trainer.split.labeled_counts, None)
