"""The run directory: one run at a time, and nothing left behind by a start that fails."""

import json
from pathlib import Path

import pytest
import torch
from run_cases import assert_equal_states, final_state, tiny

from bacon_fast.engine import build
from bacon_fast.engine.checkpoint import CheckpointError, list_checkpoints
from bacon_fast.engine.trainer import DivergedError, StoppedError, Trainer

ROOT = Path(__file__).resolve().parents[2]


def test_two_runs_that_start_together_do_not_share_a_directory(tmp_path, monkeypatch):
    load, refusals = build.build_dataset, []

    def slowly(*inputs):
        if not refusals:  # while the first run loads, the second one starts
            with pytest.raises(ValueError, match=r"^run_dir: .*run is in use by another command") as refusal:
                Trainer(tiny(tmp_path / "run", seed=1, method="supervised"))
            refusals.append(refusal)
        return load(*inputs)

    monkeypatch.setattr(build, "build_dataset", slowly)
    Trainer(tiny(tmp_path / "run", steps=2)).fit()
    assert len(refusals) == 1
    assert json.loads((tmp_path / "run" / "config.json").read_text())["method"] == "fixmatch+abc+bacon"
    assert json.loads((tmp_path / "run" / "split.json").read_text())["seed"] == 0


def test_a_run_that_still_trains_is_not_resumed(tmp_path, monkeypatch):
    Trainer(tiny(tmp_path / "alone")).fit()
    first, save, saves = Trainer(tiny(tmp_path / "run")), torch.save, []

    def interrupted(state, file):
        save(state, file)
        saves.append(file)
        if len(saves) == 2:  # its temporary file is there
            with pytest.raises(ValueError, match="is in use by another command"):
                Trainer(tiny(tmp_path / "run", resume=True))

    monkeypatch.setattr(torch, "save", interrupted)
    first.fit()
    assert len(saves) == 3
    assert_equal_states(final_state(tmp_path / "run")["method"], final_state(tmp_path / "alone")["method"])


@pytest.mark.parametrize("end", ["finished", "diverged", "stopped", "dropped"])
def test_the_directory_is_free_when_a_run_ended(tmp_path, end, monkeypatch):
    changes = {"method": "supervised", "steps": 2, "log_every": 1, "checkpoint_every": 1}
    trainer = Trainer(tiny(tmp_path / "run", **changes))
    if end == "finished":
        trainer.fit()
    elif end == "diverged":
        monkeypatch.setattr(trainer.meter, "steps", lambda: (1, 0))
        with pytest.raises(DivergedError):
            trainer.fit()
    elif end == "stopped":
        monkeypatch.setattr(trainer, "advance", lambda stop: (_ for _ in ()).throw(StoppedError("stopped", 15)))
        with pytest.raises(StoppedError):
            trainer.fit()
    else:
        del trainer
    Trainer(tiny(tmp_path / "run", **changes, resume=True)).fit()
    assert len(list_checkpoints(tmp_path / "run" / "checkpoints")) == 2


def test_the_directory_is_locked_until_the_summary_is_written(tmp_path, monkeypatch):
    trainer, finish, refused = Trainer(tiny(tmp_path / "run", steps=1)), Trainer.finish, []

    def watched(trainer):
        with pytest.raises(ValueError, match="is in use"):
            Trainer(tiny(tmp_path / "run", steps=1, resume=True))
        refused.append(True)
        return finish(trainer)

    monkeypatch.setattr(Trainer, "finish", watched)
    trainer.fit()
    assert refused


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"dataset": "folder", "image_size": 8}, "data_dir"),
        ({"labeled_head": 500}, "found"),
        ({"split": ROOT / "README.md"}, "README.md: expected a JSON object"),
    ],
)
def test_a_failed_start_leaves_no_directory(tmp_path, changes, expected):
    with pytest.raises(ValueError, match=expected):
        Trainer(tiny(tmp_path / "runs" / "run", **changes))
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(CheckpointError, match="nothing to resume"):
        Trainer(tiny(tmp_path / "runs" / "run", resume=True))
    assert list(tmp_path.iterdir()) == []


def test_a_failed_start_leaves_a_directory_of_others_alone(tmp_path):
    (tmp_path / "notes").touch()
    with pytest.raises(ValueError, match="data_dir"):
        Trainer(tiny(tmp_path, dataset="folder", image_size=8))
    assert "notes" in {path.name for path in tmp_path.iterdir()}
    Trainer(tiny(tmp_path, steps=1)).fit()
