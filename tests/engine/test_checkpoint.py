"""Checkpoints: written whole or not at all; damaged ones are named and passed over."""

import os

import pytest
import torch

from bacon_fast.engine.checkpoint import (
    CheckpointError,
    list_checkpoints,
    load_latest,
    save_checkpoint,
    write_atomically,
)


def state(step: int) -> dict:
    return {"step": step, "weights": torch.full((1000,), float(step)), "rows": [{"a": None, "b": [1.5]}]}


def test_newest_checkpoint_is_loaded_and_old_ones_are_removed(tmp_path):
    for step in (5, 100, 20, 1_000_000_000):
        save_checkpoint(tmp_path, step, state(step), keep=3)
    assert [p.name for p in list_checkpoints(tmp_path)] == [
        "step-00000020.pt",
        "step-00000100.pt",
        "step-1000000000.pt",
    ]
    path, loaded = load_latest(tmp_path)
    assert path.name == "step-1000000000.pt"
    assert loaded["rows"] == [{"a": None, "b": [1.5]}]
    torch.testing.assert_close(loaded["weights"], state(1_000_000_000)["weights"])


@pytest.mark.parametrize("keep_bytes", [0, 10, 2000])
def test_truncated_checkpoint_is_refused_by_name_and_the_previous_one_used(tmp_path, keep_bytes):
    save_checkpoint(tmp_path, 1, state(1), keep=2)
    newest = save_checkpoint(tmp_path, 2, state(2), keep=2)
    newest.write_bytes(newest.read_bytes()[:keep_bytes])
    with pytest.warns(UserWarning, match=r"checkpoint refused.*step-00000002\.pt"):
        path, loaded = load_latest(tmp_path)
    assert path.name == "step-00000001.pt" and loaded["step"] == 1


def test_no_usable_checkpoint_names_every_refused_file(tmp_path):
    with pytest.raises(CheckpointError, match="no file step"):
        load_latest(tmp_path)
    (tmp_path / "step-00000003.pt").write_bytes(b"not a checkpoint")
    with pytest.warns(UserWarning), pytest.raises(CheckpointError, match=r"step-00000003\.pt"):
        load_latest(tmp_path)


def test_code_in_a_checkpoint_is_not_executed(tmp_path):
    class Evil:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / "executed"),))

    torch.save({"step": Evil()}, tmp_path / "step-00000001.pt")
    with pytest.warns(UserWarning), pytest.raises(CheckpointError, match="step-00000001"):
        load_latest(tmp_path)
    assert not (tmp_path / "executed").exists()


def test_a_failed_write_leaves_the_old_file_and_no_debris(tmp_path):
    target = tmp_path / "file"
    target.write_text("old")

    def fail_half_way(temporary):
        temporary.write_text("ne")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_atomically(target, fail_half_way)
    assert target.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["file"]
