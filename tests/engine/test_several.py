"""Several runs in one process: each equals the same run alone."""

import io
import os
import re
import signal
import sys
from pathlib import Path

import pytest
import torch
from run_cases import assert_equal_states, final_state, tiny

from bacon_fast.cli import format_seeds, parse, parse_runs, train
from bacon_fast.engine import build
from bacon_fast.engine.checkpoint import CheckpointError
from bacon_fast.engine.config import Config
from bacon_fast.engine.logger import Progress
from bacon_fast.engine.several import fit_together
from bacon_fast.engine.trainer import DivergedError, StoppedError, Trainer

SEEDS = (0, 3)


def seeds(folder: Path, **changes) -> list[Config]:
    return [tiny(folder / str(seed), seed=seed, **changes) for seed in SEEDS]


def assert_same_runs(one: list[Config], two: list[Config]) -> None:
    for a, b in zip(one, two, strict=True):
        states = final_state(a.run.run_dir), final_state(b.run.run_dir)
        for state in states:
            state["rows"] = [row for row in state["rows"] if row["kind"] == "eval"]
        assert_equal_states(*states)


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> list[Config]:
    configs = seeds(tmp_path_factory.mktemp("alone"))
    for config in configs:
        Trainer(config).fit()
    return configs


def test_runs_that_take_turns_end_bit_for_bit_as_alone(tmp_path, alone, capsys):
    configs = seeds(tmp_path)
    torch.manual_seed(99)  # the runs draw nothing from torch's generator but their initialization
    outcomes = fit_together(configs)
    assert_same_runs(configs, alone)
    assert not torch.equal(*(outcome.trainer.method.network.head.weight for outcome in outcomes))
    for config, outcome in zip(configs, outcomes):
        assert outcome.error is None and outcome.summary["seed"] == config.seed
        for name in ("summary.json", "metrics.csv", "metrics.jsonl", "config.json", "split.json"):
            assert (config.run.run_dir / name).exists()
    lines = capsys.readouterr().err.splitlines()
    assert all(re.match(r"seed [03]: (step \d|labeled \d)", line) for line in lines)
    for step in ("3/12", "12/12"):
        assert [line.split(":")[0] for line in lines if f"step {step} " in line] == ["seed 0", "seed 3"]


def test_a_signal_saves_all_and_each_goes_on_from_its_own_step(tmp_path, alone, monkeypatch):
    configs, evaluate = seeds(tmp_path), Trainer._evaluate

    def interrupted(trainer: Trainer) -> None:
        evaluate(trainer)
        if trainer.config.seed == SEEDS[1] and trainer.step == 4:
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(Trainer, "_evaluate", interrupted)
    with pytest.raises(StoppedError, match=r"(?s)stopped at step 4: saved .*stopped at step 5: saved ") as stop:
        fit_together(configs)
    assert stop.value.signum == signal.SIGINT
    # The second run got the signal after its step 4, the first one after its step 5.
    assert [final_state(config.run.run_dir)["step"] for config in configs] == [5, 4]
    monkeypatch.undo()
    fit_together([config.replace(resume=True) for config in configs])
    assert_same_runs(configs, alone)


def test_under_resume_a_run_that_does_not_exist_begins(tmp_path, alone):
    configs = seeds(tmp_path, resume=True)
    with pytest.raises(CheckpointError, match="nothing to resume"):
        fit_together(configs)
    Trainer(configs[0].replace(resume=False)).fit()
    fit_together(configs)
    assert_same_runs(configs, alone)


def test_a_run_that_diverges_leaves_the_others_alone(tmp_path, alone, capsys):
    first, second = seeds(tmp_path)
    broken, good = fit_together([first.replace(lr=1e25), second])
    assert broken.summary is None and isinstance(broken.error, DivergedError)
    assert good.error is None and good.summary["steps"] == 12
    assert_same_runs([second], alone[1:])
    assert "seed 0: stopped: the loss is not finite since step 2" in capsys.readouterr().err


def test_no_directory_is_touched_when_one_holds_a_run(tmp_path):
    first, second = seeds(tmp_path)
    second.run.run_dir.mkdir()
    (second.run.run_dir / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="holds a run already"):
        fit_together([first, second])
    assert not first.run.run_dir.exists()
    with pytest.raises(ValueError, match=r"image_size: .*None.*8|image_size: .*8.*None"):
        fit_together([first, second.replace(image_size=8)])
    with pytest.raises(ValueError, match="backbone: expected the same in all runs"):
        fit_together([first, second.replace(backbone="wrn-10-2")])


def test_runs_of_one_dataset_resize_alike(tmp_path, monkeypatch):
    """As the checkpoint of an older version might have it otherwise."""
    monkeypatch.setattr(build, "interpolation", lambda config: "bicubic" if config.seed else "bilinear")
    with pytest.raises(ValueError, match="resume: expected runs whose images are resized alike"):
        fit_together(seeds(tmp_path))


def test_the_bar_counts_all_runs(monkeypatch):
    screen = io.StringIO()
    screen.isatty = lambda: True
    monkeypatch.setattr(sys, "stderr", screen)
    progress = Progress()
    progress.add(100, 10)
    progress.add(100, 0)
    for _ in range(3):
        progress.advance()
    progress.show({"seed 0": "1.5"})
    progress.show({"seed 1": "2.5"})
    assert (progress.bar.total, progress.bar.n, progress.bar.initial) == (200, 13, 10)
    assert "seed 0=1.5" in str(progress.bar) and "seed 1=2.5" in str(progress.bar)
    progress.close()


def test_seeds_on_the_command_line(tmp_path, capsys):
    folder = tmp_path / "run"
    words = ["digits", "--run-dir", str(folder), "--seeds", "0,1", "--method", "supervised", "--steps", "4"]
    words += ["--batch-size", "8", "--threads", "1", "--eval-every", "2", "--no-report"]
    train(words)
    printed = capsys.readouterr().out
    assert f"run directory: {folder}-seed0\nrun directory: {folder}-seed1" in printed
    assert printed.count("last evaluation") == 3 and "over 2 seeds (0, 1)" in printed and "±" in printed
    with pytest.raises(SystemExit) as stop:
        train([*words, "--resume", "--lr", "0.5"])
    assert stop.value.code == 2 and "lr: checkpoint" in capsys.readouterr().err


def test_a_diverged_run_shows_in_the_status(tmp_path, capsys):
    words = ["digits", "--run-dir", str(tmp_path / "run"), "--seeds", "0,1", "--method", "supervised", "--steps", "4"]
    with pytest.raises(SystemExit) as stop:
        train([*words, "--batch-size", "8", "--threads", "1", "--no-report", "--lr", "1e25"])
    assert stop.value.code == 2
    assert "2 of 2 runs diverged\nseed 0: the loss is not finite since step " in capsys.readouterr().err


def test_means_and_deviations_over_seeds():
    values = ((0.5, 0.25), (0.7, 0.35))
    readings = [{"top1": a, "bacc": b, "gm": 0.1} for a, b in values]
    summaries = [{"seed": i, "last": r, "mean_last_20": r, "best_on_test": r} for i, r in enumerate(readings)]
    # sqrt(2) * 0.1 and sqrt(2) * 0.05
    assert "0.6000 ± 0.1414" in format_seeds(summaries) and "0.3000 ± 0.0707" in format_seeds(summaries)
    assert "0.1000 ± 0.0000" in format_seeds(summaries)


@pytest.mark.parametrize(
    ("words", "expected"),
    [(["--seeds", "0,0"], "different"), (["--seeds", "a"], "'a'"), (["--seeds", "1", "--seed", "2"], "--seed")],
)
def test_wrong_seeds_are_named(words, expected):
    with pytest.raises(ValueError, match=f"seeds: .*{expected}"):
        parse_runs(["digits", *words])


def test_one_seed_is_one_run():
    (config,) = parse_runs(["--seeds", "7", "--run-dir", "x"])
    assert type(config) is Config and config.seed == 7 and config.run.run_dir == Path("x-seed7")
    assert parse(["--seeds", "7", "--run-dir", "x"]) == config
    with pytest.raises(ValueError, match="seeds: expected one"):
        parse(["--seeds", "7,8"])
