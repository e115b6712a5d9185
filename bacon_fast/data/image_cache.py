"""Images that do not fit into memory: decoded once into one file, which is then mapped."""

import errno
import hashlib
import json
import warnings
from collections.abc import Container, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from bacon_fast.data.images import Interpolation, decode, decoding, in_threads, require_readable
from bacon_fast.files import write_atomically
from bacon_fast.system import lock_file

FOLDER = ".bacon_fast"
"""Where the file lies, below the image folder."""
CHUNK = 1024
"""Files decoded at once."""
FINGERPRINT = ".fingerprint"
"""Suffix of the file beside it, which keeps the fingerprint of the dataset."""
UNREADABLE = ".unreadable"
"""Suffix of the file beside it, if there is one, which names the files whose images are not in it."""
_BLOCK, _PIECE = 1 << 26, 1 << 20
_LOCK, _TEMPORARY = ".lock", ".*.tmp"
_NOT_NOW = (errno.EWOULDBLOCK, errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EROFS, errno.EACCES, errno.EPERM)
DECODING = 4
"""Version of the decoding by `decode`: a file of another version is not used."""


def mapped_files(
    root: Path,
    files: Sequence[Path],
    size: int,
    optional: Container[int] = (),
    interpolation: Interpolation = "bilinear",
) -> tuple[Tensor, dict[int, str], Path]:
    """Files decoded as RGB at size x size, as a memory-mapped tensor.

    The first call writes root/.bacon_fast/<key>.images, N * size * size * 3 bytes and a digest of them. Calls with the
    same files, sizes and times of change find it again. They read it once, to compare the digest, and decode the images
    anew if it does not match. Files of earlier calls stay; they may be deleted when no run reads them. One process at a
    time writes, the others wait. Each call removes what killed writers have left.

    Args:
        root: files below it are known by their path from there.
        optional: indices of files that may be unreadable, and are then left out.

    Returns:
        uint8 [N, size, size, 3] on the CPU, read-only, of which only the parts that are read lie in memory; name and
        reason of each file left out, by index; the file.

    Raises:
        UnreadableImagesError: other files that cannot be decoded.
        OSError: the file cannot be written, for lack of space for instance.
    """
    lines = [f"{DECODING} {size}" if interpolation == "bilinear" else f"{DECODING} {size} {interpolation}"]
    for path in files:
        name = path.relative_to(root) if path.is_relative_to(root) else path
        try:
            status = path.stat()
            lines.append(f"{name} {status.st_size} {status.st_mtime_ns}")
        except FileNotFoundError:  # is unreadable
            lines.append(f"{name} missing")
    key = hashlib.sha256("\n".join(lines).encode(errors="surrogateescape")).hexdigest()[:16]
    path = root / FOLDER / f"{key}.images"
    remove_left_behind(path.parent)
    if not _is_whole(path, len(files), size):
        path.parent.mkdir(exist_ok=True)
        with only_writer(path.parent):
            if not _is_whole(path, len(files), size):  # else another process wrote it while this one waited
                if path.exists():
                    warnings.warn(f"{path}: damaged, decoding the images again", stacklevel=2)
                _decode(files, size, path, optional, interpolation)
    failed = _left_out(path)
    require_readable({i: reason for i, reason in failed.items() if i not in optional})
    return _mapped(path, (len(files) - len(failed), size, size, 3)), failed, path


def _left_out(path: Path) -> dict[int, str]:
    """Name and reason of each file, by its index, whose image is not in `path`."""
    text = recall(path.with_suffix(UNREADABLE))
    return {} if text is None else {int(i): reason for i, reason in json.loads(text).items()}


def remember(path: Path, text: str) -> None:
    """Writes one line to `path`, with its digest; whole or not at all."""
    write_atomically(path, lambda temporary: temporary.write_text(f"{text} {_seal(path, text)}\n"))


def recall(path: Path) -> str | None:
    """The line that `remember` wrote; None if the file is missing or damaged."""
    try:
        text, _, seal = path.read_text().removesuffix("\n").rpartition(" ")
    except (FileNotFoundError, UnicodeDecodeError):
        return None
    return text if seal == _seal(path, text) else None


def _seal(path: Path, text: str) -> str:
    return hashlib.sha256(f"{path.name} {text}".encode()).hexdigest()  # with the name: it is of no other file


def remove_left_behind(folder: Path) -> None:
    """Removes the temporary files that killed writers left in `folder`, unless somebody writes there now."""
    if next(folder.glob(_TEMPORARY), None) is None:
        return
    try:
        with open(folder / _LOCK, "ab") as lock:
            lock_file(lock.fileno())
            _remove_temporary(folder)
    except OSError as error:  # a writer at work, no locks, a file system that is read-only: leave them
        if error.errno not in _NOT_NOW:
            raise


@contextmanager
def only_writer(folder: Path) -> Iterator[None]:
    """Waits until no other process writes into `folder`, and removes what killed writers have left there."""
    with open(folder / _LOCK, "ab") as lock:
        locked = True
        try:
            lock_file(lock.fileno())
        except BlockingIOError:
            warnings.warn(f"{folder}: waiting for another process, which decodes images into it", stacklevel=4)
            lock_file(lock.fileno(), wait=True)
        except OSError:  # a file system without locks: two writers do the work twice, each into a file of its own
            locked = False
        if locked:
            _remove_temporary(folder)
        yield


def _remove_temporary(folder: Path) -> None:
    for left in folder.glob(_TEMPORARY):
        left.unlink(missing_ok=True)


def _mapped(path: Path, shape: tuple[int, ...]) -> Tensor:
    # Mapped read-only: a private writable mapping, as torch.from_file makes, is refused when it exceeds the memory.
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The given NumPy array is not writable")
        return torch.from_numpy(np.memmap(path, np.uint8, "r", shape=shape))


def _is_whole(path: Path, files: int, size: int) -> bool:
    """Whether `path` holds the images of so many files, less those left out, and their digest."""
    if not path.is_file():
        return False
    pixels = (files - len(_left_out(path))) * size * size * 3
    if path.stat().st_size != pixels + hashlib.sha256().digest_size:
        return False
    with open(path, "rb") as file:
        file.seek(pixels)
        return file.read() == digest_of(path, pixels)


def digest_of(path: Path, size: int) -> bytes:
    """sha256 of the sha256s of blocks of the file's first `size` bytes, which one thread a core reads."""

    def of_block(start: int) -> bytes:
        digest, left = hashlib.sha256(), min(_BLOCK, size - start)
        with open(path, "rb") as file:
            file.seek(start)
            while left and (piece := file.read(min(left, _PIECE))):
                digest.update(piece)
                left -= len(piece)
        return digest.digest()

    return hashlib.sha256(b"".join(in_threads(of_block, range(0, size, _BLOCK)))).digest()


def _decode(
    files: Sequence[Path], size: int, path: Path, optional: Container[int], interpolation: Interpolation
) -> None:
    """Writes `path`, and the files beside it."""
    failed: dict[int, str] = {}

    def write(temporary: Path) -> None:
        rows = np.empty((min(CHUNK, len(files)), size, size, 3), dtype=np.uint8)
        with open(temporary, "wb") as output, decoding(len(files)) as done:
            for start in range(0, len(files), CHUNK):
                chunk = files[start : start + CHUNK]
                broken = decode(chunk, rows, interpolation=interpolation, done=done)
                readable = [i for i in range(len(chunk)) if i not in broken]
                output.write(rows[readable].data if broken else rows[: len(chunk)].data)
                failed.update({start + i: reason for i, reason in broken.items()})
            # Only now: the user wants to know all of them.
            require_readable({i: reason for i, reason in failed.items() if i not in optional})
            output.flush()
            output.write(digest_of(temporary, output.tell()))
        left_out.unlink(missing_ok=True)
        if failed:  # before the images are there: with these, they are whole
            remember(left_out, json.dumps(failed))

    left_out = path.with_suffix(UNREADABLE)
    path.with_suffix(FINGERPRINT).unlink(missing_ok=True)  # another version of Pillow may decode to other pixels
    write_atomically(path, write)
