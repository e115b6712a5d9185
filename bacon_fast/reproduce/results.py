"""Results of the runs of a table: each cell's accuracies over its seeds."""

import json
import statistics
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from bacon_fast.data.longtail import Split
from bacon_fast.engine.config import Config
from bacon_fast.engine.metrics import MEAN_WINDOW, class_groups, last_network
from bacon_fast.reproduce.matrix import Cell, Run
from bacon_fast.reproduce.published import Source, Value
from bacon_fast.reproduce.runner import log_file


@dataclass(frozen=True)
class Spread:
    """Mean and sample standard deviation of n numbers; None for fewer than two."""

    mean: float
    deviation: float | None
    count: int

    def __str__(self) -> str:
        return f"{self.mean:.2f}" if self.deviation is None else f"{self.mean:.2f} ± {self.deviation:.2f}"


def spread(values: Sequence[float]) -> Spread | None:
    """None for no values."""
    if not values:
        return None
    return Spread(statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None, len(values))


@dataclass(frozen=True)
class Result:
    """A cell with its finished runs and their summaries, seed by seed, and why there are not more."""

    cell: Cell
    finished: tuple[Run, ...]
    summaries: tuple[dict, ...]
    problem: str | None

    @property
    def config(self) -> Config | None:
        """Of the first seed; all agree but for the seed. None when the cell has no runs."""
        return self.cell.runs[0].config if self.cell.runs else None

    @property
    def seeds(self) -> list[int]:
        """Of the finished runs."""
        return [run.config.seed for run in self.finished]

    @property
    def averaged(self) -> int:
        """Evaluations behind a "mean of last 20": fewer where a run, or the last network of one, has fewer."""
        return min((summary["mean_last_20"]["evaluations"] for summary in self.summaries), default=MEAN_WINDOW)

    def accuracy(self, reading: str, metric: str) -> Spread | None:
        """Over the seeds, in percent.

        Args:
            reading: of READINGS.
            metric: "top1", "bacc", "gm", "many", "medium", "few", or "error", which is 100 - top-1.
        """
        name = "top1" if metric == "error" else metric
        fractions = [summary[reading][name] for summary in self.summaries]
        if None in fractions:  # a group without test images
            return None
        return spread([100 - 100 * f if metric == "error" else 100 * f for f in fractions])

    def pseudo_precision(self) -> Spread | None:
        """Of the pseudo-labels of the rarest third of the classes, mean of the last 20 evaluations, in percent.

        A seed counts with the mean over those of the classes that got pseudo-labels; None where no seed has any.
        """
        means = []
        for run in self.finished:
            classes = pseudo_precision(run)["mean_last_20"]
            counts = Split.load(run.folder / "split.json").labeled_counts
            groups = class_groups(len(counts), counts)
            if found := [p for p, group in zip(classes, groups) if group == "few" and p is not None]:
                means.append(100 * statistics.fmean(found))
        return spread(means)

    def recalls(self) -> list[float | None]:
        """Recall of each class [K] after the last step, mean over the seeds, as fractions; [] without runs."""
        columns = zip(*(summary["last"]["per_class"] for summary in self.summaries))
        return [None if None in column else statistics.fmean(column) for column in columns]

    def published(self, source: Source | None) -> Value | None:
        """The same method under the same protocol in `source`; none for a variation of a method."""
        if source is None or self.cell.row.name != self.cell.row.method:
            return None
        return source.values.get(self.cell.protocol, {}).get(self.cell.row.method)


def pseudo_precision(run: Run) -> dict[str, list[float | None]]:
    """Precision of each class's pseudo-labels [K], by reading: "last", and "mean_last_20".

    An evaluation has that of the training since the one before it. The mean is over the evaluations before which the
    class got pseudo-labels. None for a class without any, [] for a run without the record.
    """
    rows = (json.loads(line) for line in (run.folder / "metrics.jsonl").read_text().splitlines())
    rows = [row for row in rows if row["kind"] == "eval"]
    if not rows:  # the file lost them; the summary stands
        return {"last": [], "mean_last_20": []}
    tail = [row["pseudo_precision"] for row in last_network(rows) if "pseudo_precision" in row]
    classes = [[p for p in column if p is not None] for column in zip(*tail)]
    return {
        "last": rows[-1].get("pseudo_precision", []),
        "mean_last_20": [statistics.fmean(column) if column else None for column in classes],
    }


def collect(cells: Sequence[Cell], failed: Collection[str]) -> list[Result]:
    """Results of the cells; `failed` are names of runs whose process ended with an error in this call."""
    return [_result(cell, failed) for cell in cells]


def _result(cell: Cell, failed: Collection[str]) -> Result:
    finished = tuple(run for run in cell.runs if run.state == "done")
    problems = []
    for run in cell.runs:
        if run.name in failed:
            problems.append(f"seed {run.config.seed} failed, see {log_file(run)}")
        elif run.state == "started":
            problems.append(f"seed {run.config.seed} stopped at step {run.step():,}")
        elif run.state == "new":
            problems.append(f"seed {run.config.seed} not run")
    problem = cell.missing or ", ".join(problems) or None
    return Result(cell, finished, tuple(run.summary() for run in finished), problem)
