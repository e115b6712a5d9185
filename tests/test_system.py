"""What differs between operating systems, on a machine that is made to look like another one."""

import errno
import io
import os
import sys

import pytest
import torch

from bacon_fast import files, info, system
from bacon_fast.cli import with_clear_errors
from bacon_fast.engine.build import resolve_device
from bacon_fast.engine.lock import DirectoryLock
from bacon_fast.reproduce.__main__ import Arguments, reproduce


def test_cores_and_memory_are_those_the_system_tells(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {1, 5, 7})
    monkeypatch.setattr(os, "sysconf", {"SC_PAGE_SIZE": 4096, "SC_PHYS_PAGES": 1000}.__getitem__)
    assert (system.usable_cores(), system.physical_memory()) == (3, 4_096_000)
    monkeypatch.delattr(os, "sched_getaffinity")
    monkeypatch.delattr(os, "sysconf")
    monkeypatch.setattr(os, "cpu_count", lambda: 6)
    assert (system.usable_cores(), system.physical_memory()) == (6, None)
    monkeypatch.setattr(os, "cpu_count", lambda: None)
    assert system.usable_cores() == 1


def test_a_system_without_locks_lets_everybody_in_and_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(system, "fcntl", None)
    monkeypatch.setattr(system, "msvcrt", None, raising=False)
    for _ in range(2):
        with pytest.warns(UserWarning, match=f"out: cannot lock {tmp_path}"):
            DirectoryLock(tmp_path, "out")


def test_windows_locks_are_waited_for(tmp_path, monkeypatch):
    class Locks:
        LK_NBLCK, refusals = 2, 2

        def locking(self, descriptor: int, mode: int, count: int) -> None:
            if self.refusals:
                self.refusals -= 1
                raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(system, "fcntl", None)
    monkeypatch.setattr(system, "_WAIT_SECONDS", 0)
    monkeypatch.setattr(system, "msvcrt", Locks(), raising=False)
    with open(tmp_path / "lock", "w") as file:
        with pytest.raises(BlockingIOError):
            system.lock_file(file.fileno())
        system.lock_file(file.fileno(), wait=True)
    assert system.msvcrt.refusals == 0


def test_a_file_that_another_program_reads_is_replaced_when_it_is_free(tmp_path, monkeypatch):
    replace, refusals = os.replace, [2]

    def refuse(source, target):
        if refusals[0]:
            refusals[0] -= 1
            raise PermissionError(errno.EACCES, "in use", str(source), None, str(target))
        replace(source, target)

    monkeypatch.setattr(os, "replace", refuse)
    monkeypatch.setattr(files, "REPLACE_AFTER", (0, 0))
    path = tmp_path / "table.csv"
    files.write_atomically(path, lambda temporary: temporary.write_text("new"))
    assert path.read_text() == "new" and refusals == [0]
    refusals[0] = 3
    with pytest.raises(PermissionError):
        files.write_atomically(path, lambda temporary: temporary.write_text("newer"))
    assert path.read_text() == "new" and list(tmp_path.iterdir()) == [path]


def test_what_stdout_cannot_show_is_escaped(monkeypatch):
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, "cp1252"))
    with_clear_errors(lambda: print("recall ± 猫", flush=True))
    assert raw.getvalue() == "recall ± \\u732b\n".encode("cp1252")


def test_mps_is_refused_with_its_reason(monkeypatch):
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    with pytest.raises(ValueError, match=r"device: expected cpu on this machine, found mps, which has no float64"):
        resolve_device("mps")
    assert resolve_device("auto").type != "mps"
    assert "mps           not used: it has no float64" in info.report()


def test_reproduce_says_in_one_line_that_it_needs_linux(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "platform", "darwin")
    with pytest.raises(ValueError, match=r"^reproduce needs Linux, and this is darwin; .*[^\n]$"):
        reproduce(Arguments("digits", out=tmp_path / "out"), "bacon-fast reproduce digits")
    assert not (tmp_path / "out").exists()
