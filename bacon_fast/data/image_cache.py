"""Image files too many for memory: decoded once into one file, which is mapped instead of read."""

import fcntl
import hashlib
import math
import os
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from bacon_fast.data.images import UnreadableImagesError, read_files

FOLDER = ".bacon_fast"
"""Where the file lies, below the image folder."""
CHUNK = 1024
"""Files decoded at once."""
DECODING = 3
"""Of the pixels that `read_files` makes of a file: files decoded by another one are not used."""


def mapped_files(root: Path, files: Sequence[Path], size: int) -> tuple[Tensor, Path]:
    """Files below `root`, decoded as RGB at size x size, as a memory-mapped tensor.

    The first call writes root/.bacon_fast/<key>.images, N * size * size * 3 bytes, which calls with the same files,
    sizes and times of change find again. Files of earlier calls stay; they may be deleted when no run reads them. One
    process at a time writes, the others wait, and removes what writers that were killed have left.

    Returns:
        uint8 [N, size, size, 3] on the CPU, read-only, of which only what is read lies in memory; and the file.

    Raises:
        ValueError: files that cannot be decoded. OSError: the file cannot be written, for lack of space for instance.
    """
    lines = [f"{DECODING} {size}"]
    for path in files:
        status = path.stat()
        lines.append(f"{path.relative_to(root)} {status.st_size} {status.st_mtime_ns}")
    key = hashlib.sha256("\n".join(lines).encode(errors="surrogateescape")).hexdigest()[:16]
    path = root / FOLDER / f"{key}.images"
    shape = (len(files), size, size, 3)
    if not _is_whole(path, shape):
        path.parent.mkdir(exist_ok=True)
        with _only_writer(path.parent):
            if not _is_whole(path, shape):  # else another process wrote it while this one waited
                _decode(files, size, path)
    return _mapped(path, shape), path


def _mapped(path: Path, shape: tuple[int, ...]) -> Tensor:
    # Mapped read-only: a private writable mapping, as torch.from_file makes, is refused when it exceeds the memory.
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The given NumPy array is not writable")
        return torch.from_numpy(np.memmap(path, np.uint8, "r", shape=shape))


def _is_whole(path: Path, shape: tuple[int, ...]) -> bool:
    return path.is_file() and path.stat().st_size == math.prod(shape)


@contextmanager
def _only_writer(folder: Path) -> Iterator[None]:
    """Waits until no other process writes into `folder`, and removes what killed ones have left there."""
    with open(folder / ".lock", "ab") as lock:
        locked = True
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            warnings.warn(f"{folder}: waiting for another process, which decodes images into it", stacklevel=4)
            fcntl.flock(lock, fcntl.LOCK_EX)
        except OSError:  # a file system without locks: two writers do the work twice, each into a file of its own
            locked = False
        if locked:
            for left in folder.glob(".*.images.*.tmp"):
                left.unlink()
        yield


def _decode(files: Sequence[Path], size: int, path: Path) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    failed = []
    try:
        with open(temporary, "wb") as output:
            for start in tqdm(range(0, len(files), CHUNK), f"decoding {len(files)} images", leave=False):
                try:
                    output.write(read_files(files[start : start + CHUNK], size).numpy().data)
                except UnreadableImagesError as error:  # go on: who repairs these wants to know of all
                    failed += error.failed
            if failed:
                raise UnreadableImagesError(failed)
            output.flush()
            os.fsync(output.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
