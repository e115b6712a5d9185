"""How long a table will take: each kind of run is tried for a moment before the first one starts."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Sequence
from pathlib import Path

from bacon_fast.engine.config import Config
from bacon_fast.engine.trainer import StoppedError, Trainer
from bacon_fast.files import read_record, write_atomically, write_record
from bacon_fast.reproduce.matrix import Run
from bacon_fast.reproduce.slots import Slot

# These values decide the speed. Runs that agree in all of them are measured once.
FIELDS = (
    "method", "dataset", "image_size", "backbone", "batch_size", "unlabeled_ratio", "precision", "compile", "graph",
)  # fmt: skip
# A measurement ends with its third log row, after a second at least, and with its second after a minute.
LOG_EVERY, ROWS = 10, 3
MEASURED_SECONDS, LONGEST_SECONDS = 1.0, 60.0


@dataclasses.dataclass(frozen=True)
class Speed:
    """Seconds to build a run, for a step, and for an evaluation."""

    setup: float
    step: float
    evaluation: float

    def seconds(self, run: Run) -> float:
        """What is left of the run, about."""
        left = run.config.steps - run.step()
        return self.setup + left * self.step + left / run.config.log.eval_every * self.evaluation


def key(config: Config, jobs: int) -> str:
    """Runs with the same key are as fast as each other."""
    flat = config.flat()
    values = [flat[name] for name in FIELDS]
    return " ".join([*(str(value) for value in values if value not in (None, False)), f"({jobs} at once)"])


def load(out: Path) -> dict[str, Speed]:
    """Speeds that earlier calls measured. Without those of a damaged file, which a warning names."""
    path = out / "speed.json"
    try:
        return {name: Speed(**values) for name, values in read_record(path).items()} if path.exists() else {}
    except ValueError as error:
        warnings.warn(f"{error}; speeds are measured again", stacklevel=2)
        return {}


def estimate(runs: Sequence[Run], speeds: dict[str, Speed], jobs: int) -> float | None:
    """About how many seconds all remaining steps take with `jobs` runs at once; None if a speed is not known."""
    left = [run for run in runs if run.state != "done"]
    if any(key(run.config, jobs) not in speeds for run in left):
        return None
    seconds = [speeds[key(run.config, jobs)].seconds(run) for run in left]
    return max(sum(seconds) / jobs, max(seconds, default=0.0))


def calibrate(runs: Sequence[Run], slots: Sequence[Slot], out: Path) -> dict[str, Speed]:
    """Measures what is not known yet, with all slots at work, and keeps it in `out`/speed.json.

    A kind of run that fails is left out. The run itself will report the error.
    """
    speeds = load(out)
    configs = {key(run.config, len(slots)): run.config for run in runs if run.state != "done"}
    unknown = [name for name in configs if name not in speeds]
    shares = [unknown[i :: len(slots)] for i in range(len(slots))]
    command = [sys.executable, "-m", "bacon_fast.reproduce.speed"]
    with tempfile.TemporaryDirectory() as folder:
        processes, files = [], [Path(folder) / f"{i}.json" for i in range(len(slots))]
        try:
            for slot, share, file in zip(slots, shares, files):
                if share:
                    file.write_text(json.dumps([configs[name].to_dict() for name in share]))
                    processes.append(slot.start([*command, str(file)], subprocess.DEVNULL))
            for process in processes:
                process.wait()
        finally:
            for process in processes:
                process.kill()
                process.wait()
        for share, file in zip(shares, files):
            written = file.with_suffix(".speeds")
            measured = json.loads(written.read_text()) if written.exists() else []
            speeds |= {name: Speed(**values) for name, values in zip(share, measured) if values is not None}
    write_record(out / "speed.json", {name: dataclasses.asdict(speed) for name, speed in speeds.items()})
    return speeds


def measure(config: Config, folder: Path) -> Speed:
    """The speed of a run's first steps in the empty `folder`. Stops the run by sending SIGTERM to this process."""
    started = time.perf_counter()
    quiet = {"log_every": LOG_EVERY, "eval_every": config.steps, "checkpoint_every": config.steps, "report": False}
    trainer = Trainer(config.replace(run_dir=folder, resume=False, **quiet))
    setup = time.perf_counter() - started
    finished = threading.Event()
    threading.Thread(target=_stop_soon, args=(folder / "metrics.jsonl", finished), daemon=True).start()
    try:
        trainer.fit()
    except StoppedError:
        pass
    finally:
        finished.set()
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    times = [(0, 0.0)] + [(r["step"], r["train_seconds"]) for r in rows if r["kind"] == "train"]
    # Work that happens once, such as allocation, compilation and capture, lies before the first row.
    (first_step, first_time), (last_step, last_time) = times[min(1, len(times) - 2)], times[-1]
    started = time.perf_counter()
    trainer.evaluation()
    evaluation = time.perf_counter() - started
    return Speed(setup + first_time, (last_time - first_time) / (last_step - first_step), evaluation)


def _stop_soon(log: Path, finished: threading.Event) -> None:
    """Asks the run of this process that writes `log` to stop when it has logged enough."""
    begin, first_row = time.perf_counter(), None
    while not finished.wait(0.05):
        rows, now = log.read_text().count("\n"), time.perf_counter()
        if rows and first_row is None:
            first_row = now
        enough = rows >= ROWS and now - first_row >= MEASURED_SECONDS
        if enough or (rows >= 2 and now - begin >= LONGEST_SECONDS):
            os.kill(os.getpid(), signal.SIGTERM)
            return


def main() -> None:
    """Measures the configurations in the JSON file argv[1]; writes the speeds, null where one failed, beside it."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # the run has its own handler; outside of it, one comes too late
    path, speeds = Path(sys.argv[1]), []
    for number, values in enumerate(json.loads(path.read_text())):
        folder = path.with_suffix(f".{number}")
        folder.mkdir()
        try:
            speeds.append(dataclasses.asdict(measure(Config.from_dict(values), folder)))
        except Exception as error:  # whatever it is, the run itself will report it
            print(f"{values['method']}: {error!r}", file=sys.stderr)
            speeds.append(None)
    write_atomically(path.with_suffix(".speeds"), lambda file: file.write_text(json.dumps(speeds)))


if __name__ == "__main__":
    main()
