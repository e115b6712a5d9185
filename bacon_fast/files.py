"""Files that are written whole or not at all, and JSON records that are read back only as they were written."""

import contextlib
import hashlib
import json
import math
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

REPLACE_AFTER = (0.05, 0.1, 0.2, 0.4)
"""Seconds to wait before each further try to replace a file that is in use."""


@contextlib.contextmanager
def errors_name(path: Path) -> Iterator[None]:
    """Inside, an OSError that names no file, such as one from a full disk, is raised again with the name of `path`."""
    try:
        yield
    except OSError as error:
        if error.filename is not None or error.errno is None:
            raise
        raise OSError(error.errno, f"cannot write: {error.strerror}", str(path)) from error


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Calls `write(temporary_path)` and moves the result to `path`: readers see the old or the new file, never half.

    The folder is made when it is missing. If `write` raises, the old file stays as it was.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with errors_name(path):
            write(temporary)
            with open(temporary, "rb+") as file:
                os.fsync(file.fileno())
            _replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    with contextlib.suppress(OSError):  # some file systems cannot sync a folder; the rename is atomic all the same
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def _replace(temporary: Path, path: Path) -> None:
    """Moves the file. On Windows that is refused while another program has `path` open, which may be over soon."""
    for seconds in REPLACE_AFTER:
        try:
            os.replace(temporary, path)
        except PermissionError:
            time.sleep(seconds)
        else:
            return
    os.replace(temporary, path)


def remove_leftovers(*folders: Path) -> None:
    """Removes the temporary files of `write_atomically` that killed writers left in the folders.

    For who has a folder to himself: the file of a writer that still works would go too.
    """
    for folder in folders:
        for path in folder.glob(".*.tmp"):
            if re.fullmatch(r"\..+\.\d+\.tmp", path.name):
                path.unlink(missing_ok=True)


def to_json(values: object, indent: int | None = None) -> str:
    """JSON text. Raises ValueError for NaN and infinities, which JSON does not have: "not finite: recall.1"."""
    if broken := list(_not_finite(values)):
        more = f" and {len(broken) - 5} more" if len(broken) > 5 else ""
        raise ValueError(f"not finite: {', '.join(broken[:5])}{more}")
    return json.dumps(values, indent=indent, allow_nan=False)


def _not_finite(values: object, name: str = "") -> Iterator[str]:
    """Names of the numbers that are not finite, by the keys and positions that lead to them."""
    if isinstance(values, float) and not math.isfinite(values):
        yield name
    elif isinstance(values, (Mapping, list, tuple)):
        for key, value in values.items() if isinstance(values, Mapping) else enumerate(values):
            yield from _not_finite(value, f"{name}.{key}" if name else str(key))


def digest(values: Mapping) -> str:
    """SHA-256, hexadecimal, of what a record holds, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def write_record(path: Path, values: Mapping, *, key: str = "sha256", indent: int | None = 2) -> None:
    """Writes a JSON object atomically: `values` and, first of all, their digest under `key`.

    Raises ValueError, which names the file, for numbers that are not finite, OSError when the disk refuses.
    """
    try:
        text = to_json({key: digest(values), **values}, indent) + "\n"
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    write_atomically(path, lambda temporary: temporary.write_text(text))


def read_record(path: Path, *, key: str = "sha256") -> dict:
    """The values in a file that `write_record` wrote.

    Raises:
        ValueError: names the file, which was damaged, to a single bit, or changed, or is no record.
        OSError: it is not there, or cannot be read.
    """
    try:
        values = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"{path}: expected a JSON object, found other content: {reason}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path}: expected a JSON object, found a {type(values).__name__}")
    if key not in values:
        raise ValueError(f"{path}: expected a digest of its content as {key!r}, found none")
    recorded = values.pop(key)
    if recorded != digest(values):
        raise ValueError(f"{path}: its content does not have the digest in it ({key}): the file is damaged or changed")
    return values
