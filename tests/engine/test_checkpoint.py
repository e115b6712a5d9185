"""Checkpoints: written whole or not at all; damaged ones are named and passed over."""

import errno
import os
import random
import resource

import pytest
import torch

from bacon_fast.engine.checkpoint import (
    CheckpointError,
    list_checkpoints,
    load_latest,
    save_checkpoint,
    set_aside_after,
)
from bacon_fast.engine.config import FORMAT


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


@pytest.mark.parametrize("keep_bytes", [0, 10, 2000, 5000])  # torch raises another error for each
def test_truncated_checkpoint_is_refused_by_name_and_the_previous_one_used(tmp_path, keep_bytes):
    save_checkpoint(tmp_path, 1, state(1), keep=2)
    newest = save_checkpoint(tmp_path, 2, state(2), keep=2)
    newest.write_bytes(newest.read_bytes()[:keep_bytes])
    with pytest.warns(UserWarning, match=r"checkpoint refused.*step-00000002\.pt"):
        path, loaded = load_latest(tmp_path)
    assert path.name == "step-00000001.pt" and loaded["step"] == 1


def test_a_flipped_bit_is_never_used(tmp_path):
    generator = random.Random(0)
    save_checkpoint(tmp_path, 1, state(1), keep=2)
    newest = save_checkpoint(tmp_path, 2, state(2), keep=2)
    whole = newest.read_bytes()
    for bit in generator.sample(range(8 * len(whole)), 200):
        damaged = bytearray(whole)
        damaged[bit // 8] ^= 1 << bit % 8
        newest.write_bytes(damaged)
        with pytest.warns(UserWarning, match=r"checkpoint refused.*step-00000002\.pt"):
            path, _ = load_latest(tmp_path)
        assert path.name == "step-00000001.pt", f"bit {bit} of {8 * len(whole)}"
    newest.write_bytes(whole)
    assert load_latest(tmp_path)[1]["step"] == 2


def test_a_checkpoint_without_a_digest_is_refused(tmp_path):
    torch.save(state(1) | {"format": FORMAT}, tmp_path / "step-00000001.pt")
    with pytest.warns(UserWarning), pytest.raises(CheckpointError, match=r"step-00000001\.pt: expected a digest"):
        load_latest(tmp_path)


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


@pytest.mark.parametrize("allowed", [0, 300, 3_000, 30_000])  # bytes: torch notices at different places
def test_a_full_disk_is_named_and_earlier_checkpoints_stay(tmp_path, allowed):
    big = state(2) | {"more": torch.zeros(100_000)}
    save_checkpoint(tmp_path, 1, state(1), keep=1)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (allowed, hard))
    try:
        with pytest.raises(
            OSError, match=r"cannot write the checkpoint: File too large: .*step-00000002\.pt"
        ) as refusal:
            save_checkpoint(tmp_path, 2, big, keep=1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert refusal.value.errno == errno.EFBIG
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001.pt"]
    assert load_latest(tmp_path)[1]["step"] == 1


def test_what_cannot_be_saved_is_no_matter_of_the_disk(tmp_path):
    with pytest.raises(RuntimeError, match="unexpected kind"):
        save_checkpoint(tmp_path, 1, {"state": Unsavable()}, keep=1)
    assert list(tmp_path.iterdir()) == []


class Unsavable:
    def __reduce__(self):
        raise RuntimeError("unexpected kind")


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (OSError(errno.EIO, "Input/output error"), OSError),
        (PermissionError(errno.EACCES, "Permission denied"), PermissionError),
        (MemoryError(), MemoryError),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"), torch.OutOfMemoryError),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"), RuntimeError),
    ],
)
def test_an_error_that_says_nothing_about_the_file_refuses_none(tmp_path, monkeypatch, error, expected):
    for step in (1, 2):
        save_checkpoint(tmp_path, step, state(step), keep=2)
    load, read = torch.load, []

    def once(path, **options):
        read.append(path)
        if len(read) == 1:
            raise error
        return load(path, **options)

    monkeypatch.setattr(torch, "load", once)
    with pytest.raises(expected) as passed:
        load_latest(tmp_path)
    if expected in (OSError, PermissionError):
        assert passed.value.filename == str(tmp_path / "step-00000002.pt") and passed.value.errno == error.errno
    assert load_latest(tmp_path)[1]["step"] == 2


def test_a_checkpoint_that_vanishes_before_it_is_read_is_passed_over(tmp_path):
    save_checkpoint(tmp_path, 1, state(1), keep=1)
    (tmp_path / "step-00000002.pt").symlink_to(tmp_path / "gone")
    with pytest.warns(UserWarning, match=r"step-00000002\.pt"):
        assert load_latest(tmp_path)[1]["step"] == 1


def test_damaged_checkpoints_are_kept_under_another_name(tmp_path):
    for step in (1, 2, 3):
        save_checkpoint(tmp_path, step, state(step), keep=9)
    with pytest.warns(
        UserWarning, match=r"damaged checkpoint .*step-00000003\.pt renamed to step-00000003\.pt\.damaged"
    ):
        set_aside_after(tmp_path, 2)
    names = ["step-00000001.pt", "step-00000002.pt", "step-00000003.pt.damaged"]
    assert sorted(path.name for path in tmp_path.iterdir()) == names
    assert [path.name for path in list_checkpoints(tmp_path)] == names[:2]
