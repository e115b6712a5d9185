"""Run by test_other_systems.py: the package on a machine that has msvcrt's locks and lacks what Linux has.

Arguments: an empty folder. The rest of the standard library and torch go first: they know this machine's system.
"""

import errno
import fcntl
import multiprocessing.util  # noqa: F401  it and subprocess look for msvcrt
import os
import subprocess  # noqa: F401
import sys
import tempfile  # noqa: F401
import types
from pathlib import Path

flock, LOCK = fcntl.flock, fcntl.LOCK_EX | fcntl.LOCK_NB


def locking(descriptor: int, mode: int, count: int) -> None:
    """msvcrt.locking(descriptor, LK_NBLCK, 1): the byte at the current position."""
    assert (mode, count, os.lseek(descriptor, 0, os.SEEK_CUR)) == (2, 1, 0)
    try:
        flock(descriptor, LOCK)
    except BlockingIOError:
        raise PermissionError(errno.EACCES, "Permission denied") from None


sys.modules["msvcrt"] = types.SimpleNamespace(LK_NBLCK=2, locking=locking)
for module in ("fcntl", "triton", "bacon_fast._C"):
    sys.modules[module] = None
for name in ("sched_getaffinity", "sched_setaffinity", "sysconf"):
    delattr(os, name)

import numpy as np  # noqa: E402
from PIL import Image  # noqa: E402

from bacon_fast import system  # noqa: E402
from bacon_fast.__main__ import main  # noqa: E402
from bacon_fast.engine.lock import DirectoryLock  # noqa: E402

assert system.fcntl is None and system.usable_cores() == os.cpu_count() and system.physical_memory() is None

os.chdir(sys.argv[1])
lock = DirectoryLock(Path("locked"), "out")
try:
    DirectoryLock(Path("locked"), "out")
except ValueError as error:
    print(error)
lock.release()
assert not Path("locked").exists(), "the file is closed before it is removed"

generator = np.random.default_rng(0)
for part, each in (("train/dark", 6), ("train/light", 6), ("test/dark", 2), ("test/light", 2), ("unlabeled", 8)):
    Path("photos", part).mkdir(parents=True)
    for i in range(each):
        pixels = generator.integers(0, 120, (9, 9, 3)) + (120 if "light" in part else 0)
        Image.fromarray(pixels.astype(np.uint8)).save(f"photos/{part}/{i}.png")

short = ["--steps", "3", "--log-every", "1", "--batch-size", "8", "--backbone", "wrn-10-1", "--threads", "1"]
main(["info"])
main(["train", "digits", *short, "--no-report", "--run-dir", "built-in"])
main(["train", "folder", *short, "--data-dir", "photos", "--image-size", "8", "--images", "mapped", "--run-dir", "own"])
main(["evaluate", "own"])
main(["predict", "own", "photos/test/dark/0.png", "photos/test/light/1.png"])
