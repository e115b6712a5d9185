"""The runs of a table as processes: several at once, each resumable. A failure does not stop the others."""

import contextlib
import os
import subprocess
import sys
import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from tqdm import tqdm

from bacon_fast.engine.interrupt import StopRequest
from bacon_fast.engine.lock import DirectoryLock
from bacon_fast.engine.logger import format_speed
from bacon_fast.engine.trainer import StoppedError
from bacon_fast.files import remove_leftovers
from bacon_fast.reproduce.matrix import Run, command_words
from bacon_fast.reproduce.slots import Slot

POLL_SECONDS = 0.2
LOG_LINES = 15


@dataclass(frozen=True)
class Failure:
    """A run whose process ended with an error."""

    run: Run
    status: int

    def __str__(self) -> str:
        log = log_file(self.run)
        with open(log, "rb") as file:
            file.seek(max(0, file.seek(0, 2) - 16384))
            lines = file.read().decode(errors="replace").splitlines()[-LOG_LINES:]
        text = "\n".join(f"    {line}" for line in lines)
        return f"{self.run.name} ended with status {self.status}; the end of {log}:\n{text}"


def log_file(run: Run) -> Path:
    """What the run's processes printed."""
    return run.folder / "train.log"


@contextlib.contextmanager
def lock(out: Path) -> Iterator[int]:
    """Holds `out` for this process and all that inherit the descriptor it yields.

    Raises:
        ValueError: another call, or a run that a killed one left behind, still works there.
    """
    held = DirectoryLock(out, "out")
    remove_leftovers(out)
    try:
        yield held.descriptor
    finally:
        held.release()


def execute(runs: Sequence[Run], slots: Sequence[Slot], lock_descriptor: int) -> list[Failure]:
    """Does all runs that are not done, in order, as many at once as there are slots.

    Returns:
        The runs that failed.

    Raises:
        StoppedError: a signal asked to stop; the runs saved their state and a second call continues them.
    """
    waiting = deque(run for run in runs if run.state != "done")
    running: dict[int, tuple[Run, subprocess.Popen]] = {}
    failures = []
    asked = False
    with StopRequest() as stop, Progress(runs) as progress:
        try:
            while running or (waiting and not asked):
                if stop.signum is not None and not asked:
                    asked = True
                    progress.say("stopping: the runs save their state; once more to stop at once")
                    for _, process in running.values():
                        process.terminate()
                for index, slot in enumerate(slots):
                    if index not in running and waiting and not asked:
                        run = waiting.popleft()
                        running[index] = run, _start(run, slot, lock_descriptor)
                time.sleep(POLL_SECONDS)
                for index, (run, process) in list(running.items()):
                    status = process.poll()
                    if status is None:
                        continue
                    del running[index]
                    if status == 0 and run.state == "done":
                        progress.finished(run)
                    elif not asked:
                        failures.append(Failure(run, status))
                        progress.say(str(failures[-1]))
                progress.update([run for run, _ in running.values()])
        finally:  # a second signal, or a bug: no process may run on unattended
            for _, process in running.values():
                process.kill()
            for _, process in running.values():
                process.wait()
    if asked:
        raise StoppedError("stopped; the same command continues", stop.signum)
    return failures


def _start(run: Run, slot: Slot, lock_descriptor: int) -> subprocess.Popen:
    words = command_words(run.config)
    if run.state == "started":
        words.append("--resume")
    run.folder.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "bacon_fast.reproduce.worker", str(os.getpid()), *words]
    with open(log_file(run), "ab") as log:
        log.write(f"$ train.py {' '.join(words)}\n".encode())
        log.flush()
        return slot.start(command, log, pass_fds=(lock_descriptor,))


class Progress:
    """One bar over the steps of all runs on a terminal, else a line for each finished run."""

    def __init__(self, runs: Sequence[Run], stream: IO[str] | None = None) -> None:
        self.runs, self.stream = runs, stream or sys.stderr
        self.total = sum(run.config.steps for run in runs)
        self.steps = {run.name: self._steps(run) for run in runs}
        self.done = sum(run.state == "done" for run in runs)
        self.bar = None
        if self.stream.isatty():
            self.bar = tqdm(
                total=self.total, initial=sum(self.steps.values()), unit="step", file=self.stream, dynamic_ncols=True,
                smoothing=0.02,
            )  # fmt: skip

    @staticmethod
    def _steps(run: Run) -> int:
        return run.config.steps if run.state == "done" else run.step()

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *exception) -> None:
        if self.bar is not None:
            self.bar.close()

    def update(self, running: Sequence[Run]) -> None:
        if self.bar is None:
            return
        self.steps |= {run.name: run.step() for run in running}
        self.bar.set_postfix_str(f"{self.done}/{len(self.runs)} runs", refresh=False)
        # Set rather than added: a resumed run goes back to its checkpoint.
        self.bar.update(sum(self.steps.values()) - self.bar.n)

    def finished(self, run: Run) -> None:
        self.done += 1
        self.steps[run.name] = run.config.steps
        summary = run.summary()
        self.say(
            f"{self.done}/{len(self.runs)} {run.name}: bACC {100 * summary['last']['bacc']:.2f}, "
            f"{format_speed(summary['steps_per_second'])}"
        )

    def say(self, text: str) -> None:
        if self.bar is None:
            print(text, file=self.stream, flush=True)
        else:
            self.bar.write(text, file=self.stream)
