"""What a person sees of a run while it trains."""

import io
import sys
import time

import pytest
from run_cases import tiny

from bacon_fast.engine.logger import Progress, format_seconds, format_speed
from bacon_fast.engine.trainer import Trainer


def test_slow_steps_are_shown_by_their_seconds():
    assert format_speed(12.34) == "12.3 steps/s" and format_speed(1.0) == "1.0 steps/s"
    assert format_speed(0.04) == "25.0 s/step" and format_speed(0.5) == "2.0 s/step"


def test_the_remaining_time_counts_the_evaluations(tmp_path, monkeypatch):
    trainer = Trainer(tiny(tmp_path / "run", method="supervised", steps=10, eval_every=4, log_every=1))
    evaluation, shown = trainer.evaluation, []

    def slowly(part):
        time.sleep(0.2)
        return evaluation(part)

    monkeypatch.setattr(trainer, "evaluation", slowly)
    monkeypatch.setattr(trainer.logger, "show_train", lambda row, left: shown.append((row, left)))
    trainer.fit()
    for row, left in shown:
        ahead = sum(step >= row["step"] for step in (4, 8, 10)) if row["step"] > 4 else 0  # not known before the first
        seconds = left - (10 - row["step"]) / row["steps_per_second"]
        assert 0.2 * ahead <= seconds + 1e-9 and (ahead > 0) == (seconds > 1e-9)
        assert seconds < (ahead + 1) * 2


def test_the_bar_begins_with_the_first_step(monkeypatch):
    """What a command prints before, such as the run's directory, has lines of its own."""
    screen = io.StringIO()
    screen.isatty = lambda: True
    monkeypatch.setattr(sys, "stderr", screen)
    progress = Progress()
    progress.add(10, 0)
    progress.say("a line")
    assert screen.getvalue() == "a line\n"
    progress.advance()
    progress.close()
    assert "/10" in screen.getvalue()


def test_a_progress_line_fits_110_columns(tmp_path, capsys):
    trainer = Trainer(tiny(tmp_path / "run", steps=300_000))
    names = ("pseudo_rate", "pseudo_accuracy", "reliable", "bank_fill")
    row = {"step": 299_900, "loss/total": 12.345, "steps_per_second": 123.4, **{f"stats/{name}": 1.0 for name in names}}
    trainer.logger.show_train(row, 36_000.0)
    trainer.logger.close()
    line = capsys.readouterr().err.splitlines()[-1]  # behind the one about the images
    assert len(line) <= 110 and line.endswith(f"123.4 steps/s ETA {format_seconds(36_000.0)}") and "loss=12.345" in line


@pytest.mark.parametrize("seconds", [float("nan"), float("inf")])
def test_an_unknown_time_is_a_question_mark(seconds):
    assert format_seconds(seconds) == "?"
