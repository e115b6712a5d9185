"""--resume on the command line: the run's own configuration, more steps, several seeds, and what is refused."""

import shutil
from pathlib import Path

import pytest
from run_cases import assert_equal_states, final_state, tiny

from bacon_fast.cli import parse, parse_runs, train
from bacon_fast.engine.checkpoint import CheckpointError, list_checkpoints
from bacon_fast.engine.config import Config
from bacon_fast.engine.trainer import Trainer
from bacon_fast.files import read_record
from bacon_fast.methods import METHODS

FREE = [method for method in METHODS if not Config.of(method).runs_on_length()]


def short(run_dir: Path, method: str = "supervised", **changes) -> Config:
    values = {"steps": 4, "eval_every": 2, "log_every": 2, "checkpoint_every": 2, "lr": 0.02}
    return tiny(run_dir, method=method, **(values | changes))


def test_a_run_is_continued_with_its_own_configuration(tmp_path, monkeypatch):
    Trainer(short(tmp_path / "other", seed=5)).logger.close()
    Trainer(short(tmp_path / "run", split=tmp_path / "other" / "split.json")).fit()
    whole = final_state(tmp_path / "run")
    shutil.rmtree(tmp_path / "other")  # its split stands in the run
    list_checkpoints(tmp_path / "run" / "checkpoints")[-1].unlink()
    monkeypatch.chdir(tmp_path)
    with pytest.warns(UserWarning, match=r"step-00000002\.pt is used"):
        train(["--resume", "--run-dir=run", "--log-every", "1"])
    config = Config.read(tmp_path / "run" / "config.json")
    assert (config.optimizer.lr, config.steps, config.views.batch_size, config.log.log_every) == (0.02, 4, 8, 1)
    for part in ("method", "ema", "optimizer"):
        assert_equal_states(final_state(tmp_path / "run")[part], whole[part])


def test_what_is_changed_beside_it_is_named(tmp_path, capsys):
    Trainer(short(tmp_path / "run")).fit()
    words = ["--run-dir", str(tmp_path / "run"), "--resume"]
    for more, expected in (
        (["--lr", "0.5"], "lr: checkpoint 0.02, now 0.5"),
        (["--method", "ssc"], "method: expected supervised, that of the run in"),
        (["--steps", "3"], "steps: checkpoint 4, now 3"),
    ):
        with pytest.raises(SystemExit) as stop:
            train([*words, *more])
        assert stop.value.code == 2 and expected in capsys.readouterr().err
    # With a preset, all is as the words say.
    assert parse(["digits", *words]).optimizer.lr == 0.03
    assert parse(["--run-dir", str(tmp_path / "none"), "--resume"]).optimizer.lr == 0.03, "nothing to read there"


def test_several_seeds_continue_with_their_configuration(tmp_path):
    for seed in (3, 4):
        Trainer(short(tmp_path / f"run-seed{seed}", seed=seed)).logger.close()
    configs = parse_runs(["--run-dir", str(tmp_path / "run"), "--resume", "--seeds", "2,3,4"])
    assert [(config.seed, config.optimizer.lr, config.run.run_dir.name) for config in configs] == [
        (seed, 0.02, f"run-seed{seed}") for seed in (2, 3, 4)
    ]


@pytest.mark.parametrize("method", FREE)
def test_a_longer_run_is_the_run_of_that_length(tmp_path, method, capsys):
    Trainer(short(tmp_path / "whole", method, steps=8)).fit()
    Trainer(short(tmp_path / "run", method)).fit()
    train(["--resume", "--run-dir", str(tmp_path / "run"), "--steps", "8"])
    assert "steps: 8 in the place of 4; nothing else changes\n" in capsys.readouterr().out
    assert_equal_states(final_state(tmp_path / "run"), final_state(tmp_path / "whole"))
    assert read_record(tmp_path / "run" / "summary.json")["steps"] == 8


@pytest.mark.parametrize(
    ("method", "schedule", "bound"),
    [("supervised", "cosine", "lr_schedule cosine"), ("fixmatch+abc+bacon", "constant", "abc, bacon")],
)
def test_a_longer_run_is_refused_where_something_runs_on_its_length(tmp_path, method, schedule, bound):
    Trainer(short(tmp_path / "run", method, lr_schedule=schedule)).logger.close()
    with pytest.raises(CheckpointError, match=rf"steps: checkpoint 4, now 8\n.*: {bound} run on t/T$"):
        Trainer(short(tmp_path / "run", method, lr_schedule=schedule, steps=8, resume=True))


def test_only_parts_that_do_not_read_the_length_say_so():
    """By the source of the parts, as a run of another length need not show it."""
    from bacon_fast.methods import PARTS

    for part in PARTS.values():
        if not part.options.runs_on_length:
            source = Path(__import__(part.options.__module__, fromlist=["x"]).__file__).read_text()
            assert "setup.steps" not in source and "epochs" not in source, part.name


@pytest.mark.parametrize("words", [["--run-dir", ""], ["--run-dir="], ["digits", "--split", "", "--run-dir", "x"]])
def test_an_option_without_a_value_is_named(words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        train(words)
    text = capsys.readouterr().err
    assert stop.value.code == 2 and "expected a value, found ''" in text and text.count("\n") == 1
    assert list(tmp_path.iterdir()) == []
