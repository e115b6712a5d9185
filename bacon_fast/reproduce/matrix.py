"""From a table and the options of a call to runs: their configurations, directories and states."""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from bacon_fast.data.datasets import ImageDataset
from bacon_fast.data.images import Interpolation
from bacon_fast.data.longtail import Split
from bacon_fast.engine.build import build_dataset, interpolation, split_overrides
from bacon_fast.engine.checkpoint import CheckpointError, saved_step
from bacon_fast.engine.config import GROUP_OF, Config
from bacon_fast.engine.directory import logged_step, newest_state
from bacon_fast.engine.presets import PRESETS
from bacon_fast.engine.summary import read_summary
from bacon_fast.methods import METHODS, PARTS, parts_of
from bacon_fast.parser import override, words_of
from bacon_fast.reproduce.tables import Column, Row, Table

# A shortened run is still evaluated this often, so that the mean of the last 20 covers its second half (or, for methods
# that start again like CReST, the part of its last network).
EVALUATIONS = 40
LOG_ROWS = 40

# Fields that each run gets from the table, or from an option of this command.
GIVEN = ("method", "seed", "run_dir", "resume", "dataset", "data_dir", "device")


@dataclass(frozen=True)
class Options:
    """The changes of a call to every run of a table.

    Attributes:
        budget: in (0, 1], factor of the steps.
        dataset: "folder" to read the same images from an image folder, else None.
        settings: options of `bacon-fast train` as text, name -> value; those of a part, such as bacon.top_k, act where
            a row's method has it.
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
        return self.config.run.run_dir

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
        """Raises ValueError when the directory holds a run of another configuration, or a summary of another run."""
        if self.state == "new":
            return
        if differences := self.config.differences(Config.read(self.folder / "config.json")):
            raise ValueError(
                f"out: {self.folder} holds a run of another configuration; name another --out, or remove it. Found "
                f"there and wanted now:\n  " + "\n  ".join(differences)
            )
        if self.state == "done":
            self.summary()

    def step(self) -> int:
        """Steps completed according to its log, or its newest checkpoint when it was stopped between two rows."""
        return max(logged_step(self.folder), saved_step(self.folder / "checkpoints"))

    def summary(self) -> dict:
        """summary.json of a run that is done. Raises ValueError, which names the file, when it is not of this run."""
        split = Split.load(self.folder / "split.json").hash
        return read_summary(self.folder / "summary.json", self.config, split)


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
        ValueError: an option does not fit, a setting is no option of `bacon-fast train` or of no method here, or a
            directory in `out` holds another run.
    """
    if not 0 < options.budget <= 1:
        raise ValueError(f"budget: expected a number above 0 and up to 1, found {options.budget:g}")
    if options.dataset is not None:
        datasets = {PRESETS[column.preset].config().data.dataset for column in table.columns}
        if len(datasets) > 1:
            raise ValueError(
                f"dataset: one {options.dataset} cannot stand for {', '.join(sorted(datasets))}; choose columns of one "
                f"data set with --columns"
            )
    check_settings(table, options.settings)
    cells = [_cell(row, column, seeds, options, out) for column in table.columns for row in table.rows]
    for run in (run for cell in cells for run in cell.runs):
        data = run.config.data
        if data.data_dir is None and data.dataset != "digits":
            raise ValueError(f"data_dir: expected where {data.dataset} lies, found None")
        run.check()
    return cells


def _cell(row: Row, column: Column, seeds: Sequence[int], options: Options, out: Path) -> Cell:
    known = row.method in METHODS
    config = _config(column, row if known else Row(row.name, PRESETS[column.preset].method), options)
    protocol = None if split_overrides(config) or config.data.split else config.data.protocol
    if not known:
        return Cell(row, column, protocol, (), f"method {row.method} is not in this version")
    folder = out / "runs" / column.name
    runs = [Run(config.replace(seed=s, run_dir=folder / f"{row.name}-seed{s}")) for s in seeds]
    return Cell(row, column, protocol, tuple(runs))


def _config(column: Column, row: Row, options: Options) -> Config:
    """The column's preset, with the overrides of column and row, then the options. The last one given wins."""
    values = {"device": options.device, "report": False, **column.overrides, **row.changes(column)}
    config = PRESETS[column.preset].config(row.method).replace(**values)
    if options.dataset is not None:
        config = config.replace(dataset=options.dataset)
    if options.data_dir is not None:
        config = config.replace(data_dir=options.data_dir)
    config = shorten(config, options.budget)
    own = {name: value for name, value in options.settings.items() if _part(name) in ("", *config.parts)}
    words = [word for name, value in own.items() for word in setting_words(name, value)]
    return override(config, words, prog="--set")[0] if words else config


def _part(name: str) -> str:
    """The part that an option belongs to, by its name; empty for the options that every method has."""
    return name.rpartition(".")[0]


def check_settings(table: Table, settings: Mapping[str, str]) -> None:
    """Raises ValueError for a setting that the table fixes, that `bacon-fast train` lacks, or that no row has."""
    for name in settings:
        part, _, field = name.rpartition(".")
        if name in GIVEN:
            raise ValueError(
                f"set: expected an option that the table leaves open, found {name!r} (see --help for its own)"
            )
        fields = (f.name for f in dataclasses.fields(PARTS[part].options)) if part in PARTS else ()
        if name not in ("steps", *GROUP_OF) and field not in fields:
            raise ValueError(f"set: expected an option of bacon-fast train (see its --help-all), found {name!r}")
        methods = [row.method for row in table.rows if row.method in METHODS]
        if part and not any(part in parts_of(method) for method in methods):
            raise ValueError(f"set: no row of the table has the part of {name!r}, its methods are {', '.join(methods)}")


def check_images(runs: Sequence[Run]) -> None:
    """Raises ValueError if a finished run saw other images than its configuration names now."""
    datasets: dict[tuple, ImageDataset] = {}
    for run in (run for run in runs if run.state == "done"):
        config, data = run.config, run.config.data
        recorded = Config.read(run.folder / "config.json").data.data_dir
        if recorded == data.data_dir:
            continue
        resized = _interpolation_of(run)
        source = (
            data.dataset,
            data.data_dir,
            config.views.stored_size,
            data.image_size,
            resized,
            data.classes,
            data.images,
            data.follow_links,
        )
        source += data.unlabeled, data.test, data.val, data.other_labels, data.unreadable
        if source not in datasets:
            datasets[source] = build_dataset(config, resized=resized)
        try:
            Split.load(run.folder / "split.json").verify(datasets[source])
        except ValueError as error:
            raise ValueError(
                f"out: {run.folder} holds a run on other images, from {recorded}; name another --out. {error}"
            ) from error


def _interpolation_of(run: Run) -> Interpolation:
    """How a finished run's images were resized, as far as it has kept a checkpoint: once all were bilinearly."""
    try:
        _, state = newest_state(run.folder)
    except CheckpointError:
        return interpolation(run.config)
    return state["inference"].get("interpolation", "bilinear")


def setting_words(name: str, value: str) -> list[str]:
    """Command-line words for one option given as text."""
    part, dot, field = name.replace("_", "-").rpartition(".")
    if value in ("true", "false"):
        return [f"--{part}{dot}{field}" if value == "true" else f"--{part}{dot}no-{field}"]
    return [f"--{part}{dot}{field}", value]


def shorten(config: Config, budget: float) -> Config:
    """The configuration with `budget` times the steps. Schedules run on t/T and shrink along.

    Evaluations and log rows come at least `EVALUATIONS` and `LOG_ROWS` times where there are as many steps.
    """
    if budget == 1:
        return config
    steps = max(1, round(config.steps * budget))
    return config.replace(
        steps=steps,
        eval_every=min(config.log.eval_every, max(1, steps // EVALUATIONS)),
        log_every=min(config.log.log_every, max(1, steps // LOG_ROWS)),
    )


def command_words(config: Config) -> list[str]:
    """The words after `bacon-fast train` that give this configuration: its preset, then the differences."""
    preset, words = PRESETS[config.preset], [config.preset]
    if config.method != preset.method:
        words += ["--method", config.method]
    return words + words_of(config, preset.config(config.method))
