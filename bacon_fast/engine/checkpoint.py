"""Crash-safe checkpoints: written whole or not at all, refused by name when damaged, the previous one used instead."""

import contextlib
import os
import re
import warnings
from pathlib import Path

import torch

_NAME = re.compile(r"step-(\d+)\.pt")


class CheckpointError(RuntimeError):
    """No usable checkpoint; the message says which files were tried and why each was refused."""


def write_atomically(path: Path, write) -> None:
    """Calls `write(temporary_path)` and moves the result to `path`: readers see the old file or the new, never half."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        write(temporary)
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    with contextlib.suppress(OSError):  # some file systems cannot sync a folder; the rename is atomic all the same
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def save_checkpoint(folder: Path, step: int, state: dict, keep: int) -> Path:
    """Writes `folder/step-<step>.pt` and removes all but the newest `keep` checkpoints.

    Args:
        folder: created when missing.
        state: tensors, numbers, strings, lists and dicts only, so that it loads with `weights_only=True`.
    """
    path = folder / f"step-{step:08d}.pt"
    try:
        write_atomically(path, lambda temporary: torch.save(state, temporary))
    except RuntimeError as error:  # torch's way to say that the file system refused
        raise CheckpointError(f"cannot write {path}: {str(error).splitlines()[0]}") from error
    for old in list_checkpoints(folder)[:-keep]:
        old.unlink(missing_ok=True)
    return path


def discard_after(folder: Path, step: int) -> None:
    """Removes what a crash left behind: half-written temporary files, and damaged checkpoints newer than `step`.

    A damaged file would otherwise take the place of a good one among the newest that are kept.
    """
    for path in folder.glob(".step-*.tmp"):
        path.unlink(missing_ok=True)
    for path in list_checkpoints(folder):
        if int(_NAME.fullmatch(path.name).group(1)) > step:
            path.unlink(missing_ok=True)


def list_checkpoints(folder: Path) -> list[Path]:
    """Checkpoint files in `folder`, oldest first."""
    found = [p for p in folder.glob("step-*.pt") if _NAME.fullmatch(p.name)] if folder.is_dir() else []
    return sorted(found, key=lambda p: int(_NAME.fullmatch(p.name).group(1)))


def load_checkpoint(path: Path) -> dict:
    """The state in `path`, on the CPU. Raises CheckpointError when it cannot be read."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many types for a damaged archive
        reason = (str(error).splitlines() or ["empty file"])[0][:200]
        raise CheckpointError(f"{path}: {type(error).__name__}: {reason}") from error


def load_latest(folder: Path, map_location: torch.device | str = "cpu") -> tuple[Path, dict]:
    """Newest readable checkpoint in `folder`. Each damaged one is named in a warning and passed over.

    Raises:
        CheckpointError: there is none, or none can be read.
    """
    refused = []
    for path in reversed(list_checkpoints(folder)):
        try:
            return path, torch.load(path, map_location=map_location, weights_only=True)
        except Exception as error:  # torch raises many types for a damaged archive
            reason = (str(error).splitlines() or ["empty file"])[0][:200]
            refused.append(f"{path}: {type(error).__name__}: {reason}")
            warnings.warn(f"checkpoint refused, trying the one before: {refused[-1]}", stacklevel=2)
    detail = "; ".join(refused) if refused else f"no file step-*.pt in {folder}"
    raise CheckpointError(f"no usable checkpoint: {detail}")
