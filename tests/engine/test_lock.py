"""A directory has one user at a time, however that user ends."""

import errno
import fcntl
import os
import subprocess
import sys
from pathlib import Path

import pytest

from bacon_fast.engine.lock import DirectoryLock

HOLD = """
import sys, time
from pathlib import Path
from bacon_fast.engine.lock import DirectoryLock
lock = DirectoryLock(Path(sys.argv[1]), "out")
print("held", flush=True)
time.sleep(600)
"""


def is_free(folder: Path) -> bool:
    try:
        DirectoryLock(folder, "out").release()
    except ValueError:
        return False
    return True


def test_the_second_is_refused_until_the_first_gives_back(tmp_path):
    first = DirectoryLock(tmp_path, "out")
    with pytest.raises(ValueError, match=f"^out: {tmp_path} is in use by another command"):
        DirectoryLock(tmp_path, "out")
    first.release()
    second = DirectoryLock(tmp_path, "out")
    first.release()  # once is enough: this must not give back what is another's
    assert not is_free(tmp_path)
    del second
    assert is_free(tmp_path)


def test_a_killed_holder_leaves_the_directory_free(tmp_path):
    holder = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout.readline() == "held\n"
        assert not is_free(tmp_path)
    finally:
        holder.kill()
        holder.communicate()
    assert is_free(tmp_path)


def test_who_inherits_the_descriptor_holds_the_directory(tmp_path):
    (tmp_path / "log").touch()
    lock = DirectoryLock(tmp_path, "out")
    child = subprocess.Popen(["sleep", "600"], pass_fds=(lock.descriptor,))
    try:
        del lock
        assert not is_free(tmp_path)
    finally:
        child.kill()
        child.wait()
    assert is_free(tmp_path)


def test_directories_made_for_nothing_are_removed(tmp_path):
    DirectoryLock(tmp_path / "a" / "b", "out").release()
    assert list(tmp_path.iterdir()) == []
    existing, used = tmp_path / "existing", tmp_path / "used" / "run"
    existing.mkdir()
    DirectoryLock(existing / "run", "out").release()
    DirectoryLock(existing, "out").release()
    assert existing.is_dir() and list(existing.iterdir()) == []
    lock = DirectoryLock(used, "out")
    (used / "result").touch()
    lock.release()
    assert (used / "result").exists()


def test_a_file_that_its_holder_removes_is_not_the_lock(tmp_path, monkeypatch):
    """Another command opens the file; before it locks it, the holder ends and removes the file."""
    flock, opened = fcntl.flock, []

    def late(descriptor: int, operation: int) -> None:
        if not opened:
            (tmp_path / ".lock").unlink()
        opened.append(descriptor)
        flock(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", late)
    lock = DirectoryLock(tmp_path, "out")
    assert len(opened) == 2
    assert not is_free(tmp_path), "a file nobody else can find protects nothing"
    lock.release()


def test_a_file_system_without_locks_lets_everybody_in_and_says_so(tmp_path, monkeypatch):
    def refuse(descriptor: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", refuse)
    for _ in range(2):
        with pytest.warns(UserWarning, match=f"out: cannot lock {tmp_path} .*No locks available"):
            DirectoryLock(tmp_path, "out")


def test_other_errors_pass_and_hold_nothing(tmp_path, monkeypatch):
    def fail(descriptor: int, operation: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with monkeypatch.context() as broken, pytest.raises(OSError, match="Input/output error"):
        broken.setattr(fcntl, "flock", fail)
        DirectoryLock(tmp_path, "out")
    assert is_free(tmp_path)
    with pytest.raises(OSError, match="/dev/null/run"):
        DirectoryLock(Path("/dev/null/run"), "out")
