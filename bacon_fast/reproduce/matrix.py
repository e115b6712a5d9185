"""From a table and the options of a call to runs: their configurations, directories and states."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

from bacon_fast.data.datasets import ImageDataset
from bacon_fast.data.longtail import Split
from bacon_fast.engine.build import build_dataset, split_overrides
from bacon_fast.engine.config import METHODS, Config
from bacon_fast.engine.presets import PRESETS
from bacon_fast.reproduce.tables import Column, Row, Table

# A shortened run is still evaluated this often, so that the mean of the last 20 is one of its second half (of what its
# last network has, where methods start again: CReST).
EVALUATIONS = 40
LOG_ROWS = 40

# Fields that the table, or an option of its own, gives to each run.
GIVEN = ("method", "seed", "run_dir", "resume", "dataset", "data_dir", "device")


@dataclass(frozen=True)
class Options:
    """What a call changes in every run of a table.

    Attributes:
        budget: in (0, 1], factor of the steps.
        dataset: "folder" to read the same images from an image folder, else None.
        settings: fields of Config as command-line text, name -> value.
    """

    budget: float = 1.0
    dataset: str | None = None
    data_dir: Path | None = None
    device: str = "auto"
    settings: Mapping[str, str] = dataclasses.field(default_factory=dict)


@dataclass(frozen=True)
class Run:
    """One seed of one cell."""

    config: Config

    @property
    def folder(self) -> Path:
        return self.config.run_dir

    @property
    def name(self) -> str:
        """Column/row-seed, as in the paths."""
        return f"{self.folder.parent.name}/{self.folder.name}"

    @property
    def state(self) -> Literal["new", "started", "done"]:
        """By the files in the directory."""
        if not (self.folder / "config.json").exists():
            return "new"
        return "done" if (self.folder / "summary.json").exists() else "started"

    def check(self) -> None:
        """Raises ValueError when the directory holds a run of another configuration."""
        if self.state == "new":
            return
        if differences := self.config.differences(json.loads((self.folder / "config.json").read_text())):
            raise ValueError(
                f"out: {self.folder} holds a run of another configuration; name another --out, or remove it. Found "
                f"there and wanted now:\n  " + "\n  ".join(differences)
            )

    def step(self) -> int:
        """Steps completed according to the log; 0 before its first row."""
        path, tail = self.folder / "metrics.jsonl", 1 << 14
        size = path.stat().st_size if path.exists() else 0
        while size:
            with open(path, "rb") as file:
                file.seek(max(0, size - tail))
                lines = file.read(tail).splitlines()
            for line in reversed(lines):
                try:
                    return json.loads(line)["step"]
                except (ValueError, TypeError):  # half written, or cut: a number, when the cut fell into a list
                    continue
            if tail >= size:
                break
            tail *= 8
        return 0

    def summary(self) -> dict:
        """summary.json of a run that is done."""
        return json.loads((self.folder / "summary.json").read_text())


@dataclass(frozen=True)
class Cell:
    """A row in a column.

    Attributes:
        protocol: name of the protocol it runs under; None where single values of it are changed.
        runs: one a seed, or none, and `missing` says why.
    """

    row: Row
    column: Column
    protocol: str | None
    runs: tuple[Run, ...]
    missing: str | None = None


def expand(table: Table, seeds: Sequence[int], options: Options, out: Path) -> list[Cell]:
    """All cells of the table, column by column.

    Raises:
        ValueError: an option does not fit, a setting is no field of Config, or a directory in `out` holds another run.
    """
    if not 0 < options.budget <= 1:
        raise ValueError(f"budget: expected a number above 0 and up to 1, found {options.budget:g}")
    if options.dataset is not None:
        datasets = {PRESETS[column.preset].config.dataset for column in table.columns}
        if len(datasets) > 1:
            raise ValueError(
                f"dataset: one {options.dataset} cannot stand for {', '.join(sorted(datasets))}; choose columns of one "
                f"data set with --columns"
            )
    cells = [_cell(row, column, seeds, options, out) for column in table.columns for row in table.rows]
    for run in (run for cell in cells for run in cell.runs):
        if run.config.data_dir is None and run.config.dataset != "digits":
            raise ValueError(f"data_dir: expected where {run.config.dataset} lies, found None")
        run.check()
    return cells


def _cell(row: Row, column: Column, seeds: Sequence[int], options: Options, out: Path) -> Cell:
    known = row.method in METHODS  # what a row changes may be fields of its own method
    config = _config(column, row.changes(column) if known else {}, options)
    protocol = None if split_overrides(config) or config.split else config.protocol
    if not known:
        return Cell(row, column, protocol, (), f"method {row.method} is not in this version")
    folder = out / "runs" / column.name
    runs = [
        Run(dataclasses.replace(config, method=row.method, seed=s, run_dir=folder / f"{row.name}-seed{s}").resolved())
        for s in seeds
    ]
    return Cell(row, column, protocol, tuple(runs))


def _config(column: Column, overrides: Mapping[str, object], options: Options) -> Config:
    """The column's preset with its and the row's overrides, then the options; the last one given wins."""
    fields = {"device": options.device, "report": False, **column.overrides, **overrides}
    config = dataclasses.replace(PRESETS[column.preset].config, **fields)
    if options.dataset is not None:
        config = dataclasses.replace(config, dataset=options.dataset)
    if options.data_dir is not None:
        config = dataclasses.replace(config, data_dir=options.data_dir)
    config = shorten(config, options.budget)
    words = [word for name, value in options.settings.items() for word in setting_words(name, value)]
    return tyro.cli(Config, args=words, default=config, prog="--set") if words else config


def check_images(runs: Sequence[Run]) -> None:
    """Raises ValueError when a finished run saw other images than those that its configuration names now."""
    datasets: dict[tuple, ImageDataset] = {}
    for run in (run for run in runs if run.state == "done"):
        config, recorded = run.config, json.loads((run.folder / "config.json").read_text())["data_dir"]
        if recorded == config.to_dict()["data_dir"]:
            continue
        source = config.dataset, config.data_dir, config.image_size, config.classes, config.images
        if source not in datasets:
            datasets[source] = build_dataset(config)
        try:
            Split.load(run.folder / "split.json").verify(datasets[source])
        except ValueError as error:
            raise ValueError(
                f"out: {run.folder} holds a run on other images, those of {recorded}; name another --out. {error}"
            ) from error


def setting_words(name: str, value: str) -> list[str]:
    """Command-line words for one field given as text."""
    if name in GIVEN:
        raise ValueError(
            f"set: expected a field that the table leaves open, found {name!r} (see --help for its option)"
        )
    names = {f.name for f in dataclasses.fields(Config)}
    if name not in names:
        raise ValueError(f"set: expected a field of the configuration (see train.py --help), found {name!r}")
    flag = name.replace("_", "-")
    if value in ("true", "false"):
        return [f"--{flag}" if value == "true" else f"--no-{flag}"]
    return [f"--{flag}", value]


def shorten(config: Config, budget: float) -> Config:
    """The configuration with `budget` times the steps. Schedules run on t/T and shrink along.

    Evaluations and log rows come at least `EVALUATIONS` and `LOG_ROWS` times where there are as many steps.
    """
    if budget == 1:
        return config
    steps = max(1, round(config.steps * budget))
    return dataclasses.replace(
        config,
        steps=steps,
        eval_every=min(config.eval_every, max(1, steps // EVALUATIONS)),
        log_every=min(config.log_every, max(1, steps // LOG_ROWS)),
    )


def command_words(config: Config) -> list[str]:
    """The words after `train.py` that give this configuration: its preset, then what differs from it."""
    words, default = [config.preset], PRESETS[config.preset].config
    for field in dataclasses.fields(Config):
        value = getattr(config, field.name)
        if value == getattr(default, field.name):
            continue
        flag = field.name.replace("_", "-")
        if isinstance(value, bool):
            words.append(f"--{flag}" if value else f"--no-{flag}")
        elif isinstance(value, tuple):
            words += [f"--{flag}", *map(str, value)]
        else:
            words += [f"--{flag}", str(value)]
    return words
