"""Crash-safe checkpoints. A file is written whole or not at all; a damaged one is named, and the one before is used.

A file is torch's archive, then a line with the SHA-256 of all bytes before it. torch's reader does not compare the
archive's own checksums: without the line, a flipped bit of a weight would be used in silence.
"""

import contextlib
import errno
import hashlib
import os
import re
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import torch

from bacon_fast.engine.config import FORMAT, require_format
from bacon_fast.engine.memory import is_out_of_memory
from bacon_fast.files import write_atomically

_NAME = re.compile(r"step-(\d+)\.pt")
_MARK = b"\nbacon_fast sha256 "
_TAIL_BYTES = len(_MARK) + 64 + 1  # mark, hexadecimal digest, end of line


class CheckpointError(RuntimeError):
    """No usable checkpoint; the message says which files were tried and why each was refused."""


def save_checkpoint(folder: Path, step: int, state: dict, keep: int) -> Path:
    """Writes `folder/step-<step>.pt` and removes all but the newest `keep` checkpoints.

    Args:
        folder: created when missing.
        state: tensors, numbers, strings, lists and dicts only, so that it loads with `weights_only=True`. The number of
            the format is added as "format".

    Raises:
        OSError: the file system refused, such as a full disk; it names the file. Earlier checkpoints stay.
    """
    path = folder / f"step-{step:08d}.pt"
    try:
        write_atomically(path, lambda temporary: _write(state, temporary))
    except (OSError, RuntimeError) as error:
        refusal: BaseException | None = error
        while refusal is not None and not isinstance(refusal, OSError):
            refusal = refusal.__context__
        if refusal is None:
            raise
        raise OSError(refusal.errno, f"cannot write the checkpoint: {os.strerror(refusal.errno)}", str(path)) from error
    for old in list_checkpoints(folder)[:-keep]:
        old.unlink(missing_ok=True)
    return path


def _write(state: dict, path: Path) -> None:
    # Through a Python file, which says why a write fails. torch only learns where its archive broke off, and raises a
    # RuntimeError with the reason as its context.
    with open(path, "wb") as file:
        hashed = _HashingWriter(file)
        torch.save({"format": FORMAT, **state}, hashed)
        file.write(_MARK + hashed.digest.hexdigest().encode() + b"\n")


class _HashingWriter:
    """Passes data on and hashes it on the way: the digest belongs to what was meant to be written."""

    def __init__(self, file: IO[bytes]) -> None:
        self.file, self.digest, self.flush = file, hashlib.sha256(), file.flush

    def write(self, data: bytes) -> int:
        self.digest.update(data)
        return self.file.write(data)


def _digest(path: Path, size: int) -> bytes:
    """Hexadecimal SHA-256 of the first `size` bytes."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while size > 0 and (block := file.read(min(size, 1 << 20))):
            digest.update(block)
            size -= len(block)
    return digest.hexdigest().encode()


def _has_digest(path: Path) -> bool:
    """Whether the file ends with a digest. Raises CheckpointError if it is not the digest of the bytes before it."""
    size = path.stat().st_size - _TAIL_BYTES
    with open(path, "rb") as file:
        file.seek(max(size, 0))
        tail = file.read()
    if size < 0 or not (tail.startswith(_MARK) and tail.endswith(b"\n")):
        return False
    if tail[len(_MARK) : -1] != _digest(path, size):
        raise CheckpointError(f"{path}: the content does not match the digest at the end: the file is damaged")
    return True


def set_aside_after(folder: Path, step: int) -> None:
    """Renames checkpoints newer than `step`, which are damaged, to *.damaged.

    Otherwise a damaged file would count as one of the newest checkpoints, in place of a good one.
    """
    for path in list_checkpoints(folder):
        if int(_NAME.fullmatch(path.name).group(1)) > step:
            kept = path.replace(path.with_name(f"{path.name}.damaged"))
            warnings.warn(f"damaged checkpoint {path} renamed to {kept.name}", stacklevel=2)


def list_checkpoints(folder: Path) -> list[Path]:
    """Checkpoint files in `folder`, oldest first."""
    found = [p for p in folder.glob("step-*.pt") if _NAME.fullmatch(p.name)] if folder.is_dir() else []
    return sorted(found, key=lambda p: int(_NAME.fullmatch(p.name).group(1)))


def saved_step(folder: Path) -> int:
    """Step of the newest checkpoint in `folder`, by its name; 0 without any."""
    found = list_checkpoints(folder)
    return int(_NAME.fullmatch(found[-1].name).group(1)) if found else 0


def load_checkpoint(path: Path, map_location: torch.device | str = "cpu") -> dict:
    """The state in `path`.

    Raises:
        CheckpointError: the file is gone, or damaged by as little as one bit.
        ValueError: it is of another format.
        OSError: it could not be read this time. Neither this nor exhausted memory says anything about the file.
    """
    try:
        has_digest = _has_digest(path)
        state = torch.load(path, map_location=map_location, weights_only=True)
    except CheckpointError:
        raise
    except Exception as error:  # torch raises many types for a damaged archive
        # In a file that was cut short, torch seeks to before its beginning: EINVAL.
        if isinstance(error, OSError) and error.errno not in (errno.EINVAL, errno.ENOENT):
            raise OSError(error.errno, error.strerror, str(path)) from error
        if is_out_of_memory(error):
            raise
        reason = (str(error).splitlines() or ["empty file"])[0][:200]
        raise CheckpointError(f"{path}: {type(error).__name__}: {reason}") from error
    require_format(state, path)
    if not has_digest:
        raise CheckpointError(f"{path}: expected a digest at the end, found none: the file is damaged")
    if type(state.get("step")) is not int or state["step"] != int(_NAME.fullmatch(path.name).group(1)):
        raise CheckpointError(f"{path}: expected the state after the step in its name, found {state.get('step')!r}")
    return state


@contextlib.contextmanager
def content_of(path: Path) -> Iterator[None]:
    """Inside, what the content of the checkpoint `path` causes is raised as a CheckpointError that names the file.

    For whole files, of the right format, in which entries are missing, of another type, or of shapes that do not fit.
    """
    try:
        yield
    except (KeyError, IndexError, AttributeError, TypeError, ValueError, RuntimeError) as error:
        if is_out_of_memory(error) or isinstance(error, CheckpointError):
            raise
        reason = f"no entry {error}" if isinstance(error, KeyError) else " ".join(str(error).split())[:300]
        raise CheckpointError(f"{path}: its content does not fit: {reason or type(error).__name__}") from error


def load_latest(folder: Path, map_location: torch.device | str = "cpu") -> tuple[Path, dict]:
    """Newest readable checkpoint in `folder`. Each damaged one is named in a warning and passed over.

    Raises:
        CheckpointError: there is none, or all are damaged.
        OSError, ValueError: see `load_checkpoint`.
    """
    refused = []
    for path in reversed(list_checkpoints(folder)):
        try:
            return path, load_checkpoint(path, map_location)
        except CheckpointError as error:
            refused.append(str(error))
            warnings.warn(f"checkpoint refused, trying the one before: {error}", stacklevel=2)
    detail = "; ".join(refused) if refused else f"no file step-*.pt in {folder}"
    raise CheckpointError(f"no usable checkpoint: {detail}")
