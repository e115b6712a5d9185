"""What a run writes while it trains: metrics.jsonl, metrics.csv, TensorBoard events, a progress bar or plain lines."""

import csv
import io
import json
import math
import sys
import threading
import warnings
from collections.abc import Callable
from pathlib import Path

from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from bacon_fast.engine.lock import DirectoryLock
from bacon_fast.files import errors_name, write_atomically

RowHook = Callable[[dict], object]
"""Called with the rows of a run, as they are logged."""


class Rows:
    """Rows of a run in memory. Ranks other than 0 keep nothing else.

    A row is a dict with "step" and "kind" ("train" or "eval"); its other values are numbers, lists or None.
    """

    def __init__(self, rows: list[dict] | None = None) -> None:
        self.rows = list(rows or [])

    def train_rows(self) -> list[dict]:
        return [row for row in self.rows if row["kind"] == "train"]

    def eval_rows(self) -> list[dict]:
        return [row for row in self.rows if row["kind"] == "eval"]

    def log(self, row: dict) -> None:
        """Adds a row. Numbers that are not finite become null (JSON has none)."""
        self.rows.append({k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()})

    def advance(self) -> None:
        """One step is done."""

    def show_train(self, row: dict, left: float) -> None:
        """Losses, pseudo-labels, bank, speed: in the bar, or as a plain line when there is no terminal.

        left: seconds to the end of the run, about.
        """

    def show_eval(self, row: dict) -> None:
        """The accuracies of an evaluation, as a line."""

    def close(self) -> None:
        """Ends the log."""


class Progress:
    """What a person sees of one run or of several that take turns: a bar on a terminal, else plain lines on stderr."""

    def __init__(self) -> None:
        self.bar: tqdm | None = None
        self._shown: dict[str, str] = {}
        self._total = self._start = 0

    def add(self, steps: int, start: int) -> None:
        """Adds a run of `steps` steps, `start` of which are done; before the first step of any run."""
        self._total += steps
        self._start += start

    def advance(self) -> None:
        """One step of one run is done."""
        if self.bar is None and sys.stderr.isatty():  # not before: what is printed until then has lines of its own
            # Without smoothing the rate is that of the whole time, evaluations included, and so is the ETA.
            options = {"unit": "step", "dynamic_ncols": True, "smoothing": 0}
            self.bar = tqdm(total=self._total, initial=self._start, **options)
        if self.bar is not None:
            self.bar.update()

    def show(self, values: dict[str, str]) -> None:
        """Keeps these values beside the bar."""
        self._shown |= values
        self.bar.set_postfix(self._shown, refresh=False)

    def say(self, text: str) -> None:
        """Prints a line to stderr, above the bar when there is one."""
        if self.bar is None:
            print(text, file=sys.stderr, flush=True)
        else:
            self.bar.write(text, file=sys.stderr)

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()


class RunLogger(Rows):
    """Rows of a run, in memory and on disk.

    The files are rewritten from the checkpoint's rows on resume, so that steps lost in a crash do not appear twice.

    Args:
        run_dir: existing directory.
        steps: length of the run.
        start: completed steps (resume).
        rows: rows of the run up to `start`.
        progress: a display that runs share; `name` tells them apart. None: its own.
        lock: on `run_dir`; `close` releases it.
        on_row: called with each new row, after it is written. An error in it does not stop the run: the first one is a
            warning.
    """

    def __init__(
        self,
        run_dir: Path,
        steps: int,
        start: int = 0,
        rows: list[dict] | None = None,
        progress: Progress | None = None,
        name: str = "",
        lock: DirectoryLock | None = None,
        on_row: RowHook | None = None,
    ) -> None:
        super().__init__(rows)
        self.run_dir, self.steps, self.name, self._lock = run_dir, steps, name, lock
        self._on_row, self._hook_failed = on_row, False
        text = "".join(json.dumps(row) + "\n" for row in self.rows)
        write_atomically(run_dir / "metrics.jsonl", lambda temporary: temporary.write_text(text))
        self._write_csv()
        self._open_board()
        self.progress, self._shares_progress = progress or Progress(), progress is not None
        self.progress.add(steps, start)

    def advance(self) -> None:
        self.progress.advance()

    def log(self, row: dict) -> None:
        """Adds a row to every file."""
        super().log(row)
        row = self.rows[-1]
        path = self.run_dir / "metrics.jsonl"
        with errors_name(path), open(path, "a") as file:
            file.write(json.dumps(row) + "\n")
        self._add_to_board(row)
        if row["kind"] == "eval":
            self._write_csv()
        if self._on_row is not None:
            self._call_hook(dict(row))

    def _call_hook(self, row: dict) -> None:
        try:
            self._on_row(row)
        except Exception as error:  # whatever it is, the run is worth more
            if not self._hook_failed:
                text = f"on_row: {type(error).__name__}: {error}; the run goes on, and further errors are not shown"
                warnings.warn(text, stacklevel=2)
            self._hook_failed = True

    def _open_board(self) -> None:
        """Writes TensorBoard's events anew from the rows.

        TensorBoard forgets lost steps by a purge mark in a further file, and relies on the order of the files' times.
        That fails where the clock went back, and a run killed before its first checkpoint has no mark at all.
        """
        folder = self.run_dir / "tensorboard"
        for earlier in folder.glob("events.out.tfevents.*"):
            earlier.unlink()
        self.board = SummaryWriter(str(folder))
        for row in self.rows:
            self._add_to_board(row)

    def _add_to_board(self, row: dict) -> None:
        with errors_name(self.run_dir / "tensorboard"):  # an error of the writing thread is raised here
            for name, value in row.items():
                if isinstance(value, (int, float)) and name != "step":
                    self.board.add_scalar(f"{row['kind']}/{name}", value, row["step"])

    def say(self, text: str) -> None:
        """Prints a line to stderr, with the run's name if it has one."""
        self.progress.say(f"{self.name}: {text}" if self.name else text)

    def show_train(self, row: dict, left: float) -> None:
        parts = {"loss": f"{row['loss/total']:.3f}"}
        for name in ("pseudo_rate", "pseudo_accuracy", "reliable"):  # what fits a line of 110 columns
            if (value := row.get(f"stats/{name}")) is not None:
                parts[name] = f"{100 * value:.0f}%"
        if self.progress.bar is not None:
            self.progress.show({self.name or "loss": parts["loss"]})
            return
        text = " ".join(f"{k}={v}" for k, v in parts.items())
        speed = format_speed(row["steps_per_second"])
        self.say(f"step {row['step']}/{self.steps} {text} {speed} ETA {format_seconds(left)}")

    def show_eval(self, row: dict) -> None:
        text = f"step {row['step']}: top-1 {row['top1']:.4f}  bACC {row['bacc']:.4f}  GM {row['gm']:.4f}"
        if (loss := row.get("validation_log_loss")) is not None:
            text += f"  validation log-loss {loss:.4f}"
        self.say(text)

    def close(self) -> None:
        try:
            with errors_name(self.run_dir / "tensorboard"):
                self.board.close()
        finally:
            if not self._shares_progress:
                self.progress.close()
            if self._lock is not None:
                self._lock.release()

    def _write_csv(self) -> None:
        rows = [{k: v for k, v in row.items() if isinstance(v, (int, float))} for row in self.eval_rows()]
        names = list(dict.fromkeys(name for row in rows for name in row))
        buffer = io.StringIO()
        writer = csv.DictWriter(buffer, names)
        writer.writeheader()
        writer.writerows(rows)
        text = buffer.getvalue()
        try:
            write_atomically(self.run_dir / "metrics.csv", lambda temporary: temporary.write_text(text, newline=""))
        except PermissionError as error:  # a spreadsheet on Windows has it open; metrics.jsonl holds the rows
            warnings.warn(f"{error}; the next evaluation writes it again", stacklevel=2)


def _silence_board_threads(previous: Callable[[threading.ExceptHookArgs], object]) -> None:
    """Lets TensorBoard's writing threads end without a traceback: `SummaryWriter` raises their error in our thread."""

    def hook(arguments: threading.ExceptHookArgs) -> None:
        if not (isinstance(arguments.exc_value, OSError) and type(arguments.thread).__name__ == "_AsyncWriterThread"):
            previous(arguments)

    threading.excepthook = hook


_silence_board_threads(threading.excepthook)


def format_speed(steps_per_second: float) -> str:
    """12.34 -> '12.3 steps/s'; below one step a second 0.04 -> '25.0 s/step'."""
    return f"{steps_per_second:.1f} steps/s" if steps_per_second >= 1 else f"{1 / steps_per_second:.1f} s/step"


def format_seconds(seconds: float) -> str:
    """3725.0 -> '1:02:05'; '?' when unknown."""
    if not math.isfinite(seconds):
        return "?"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
