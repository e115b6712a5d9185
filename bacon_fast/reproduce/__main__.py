"""`bacon-fast reproduce TABLE`: runs a table's matrix of methods, protocols and seeds, and writes it."""

import dataclasses
import shlex
import sys
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from bacon_fast.cli import parse_seeds, with_clear_errors
from bacon_fast.engine.logger import format_seconds
from bacon_fast.engine.presets import PRESETS
from bacon_fast.files import write_atomically
from bacon_fast.parser import refuse_empty
from bacon_fast.reproduce.matrix import Cell, Options, Run, check_images, expand
from bacon_fast.reproduce.results import Result, collect
from bacon_fast.reproduce.runner import execute, lock
from bacon_fast.reproduce.slots import make_slots
from bacon_fast.reproduce.speed import calibrate, estimate, load
from bacon_fast.reproduce.table import markdown, runs_csv, table_csv
from bacon_fast.reproduce.tables import TABLES, Column, Table

NAMES = "\n".join(f"  {name:<18}{table.title}" for name, table in TABLES.items())
DESCRIPTION = f"""Run a matrix of methods, protocols and seeds; write it as a table beside the published numbers.

Finished runs are not repeated and stopped ones continue, so a call that was interrupted is simply given again. Files:
table.md, table.csv, runs.csv and figures in --out (with classes-COLUMN.txt where figures cut or number the names of
classes); the runs, each as `bacon-fast train` makes it, in --out/runs.

Tables:
{NAMES}
"""


@dataclass(frozen=True)
class Arguments:
    """Command line of `bacon-fast reproduce`."""

    table: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="{" + ",".join(TABLES) + "}")]
    """What to reproduce."""
    seeds: str | None = None
    """Seeds, such as 0,1,2; default: the table's."""
    budget: float = 1.0
    """Factor of every run's steps, above 0 and up to 1. The table says so."""
    methods: str | None = None
    """Rows to run, such as fixmatch,fixmatch+abc; default: all."""
    columns: str | None = None
    """Columns to run; also any preset of `bacon-fast train` by name. Default: all of the table."""
    data_dir: Path | None = None
    """Where the dataset lies; with several, a folder that holds them all."""
    dataset: Literal["folder"] | None = None
    """Read the images from an image folder (train/<class>/, test/<class>/) instead. The table says so."""
    device: str = "auto"
    """auto (cuda when there is one), cpu, cuda or cuda:N."""
    set: str | None = None
    """Options of `bacon-fast train` for every run, such as precision=bf16,eval_every=5000;
    those of a part, such as bacon.top_k=5, for the rows that have it. The table says so."""
    jobs: int | None = None
    """Runs at once; default: one a GPU, else one a CPU core (up to 8, which then share the cores)."""
    out: Path | None = None
    """Where everything goes; default: reproductions/<table>, with budget, dataset and settings in the name."""
    calibrate: bool = True
    """Try each kind of run for some seconds first, to say how long it will take."""
    dry_run: bool = False
    """Only list the runs, and how long they will take as far as that is known."""


def main(args: Sequence[str] | None = None) -> None:
    """The command, with these words or those of the process. Its status is 1 if a run failed."""
    words = sys.argv[1:] if args is None else args
    with_clear_errors(lambda: refuse_empty(words))
    arguments = tyro.cli(Arguments, prog="bacon-fast reproduce", description=DESCRIPTION, args=words)
    command = "bacon-fast reproduce " + shlex.join(words)
    failed = []
    with_clear_errors(lambda: failed.extend(reproduce(arguments, command)))
    if failed:
        sys.exit(1)


def reproduce(arguments: Arguments, command: str) -> Collection[str]:
    """Does what the arguments ask. The table quotes `command`. Returns the names of the runs that failed.

    Raises:
        ValueError: an argument does not fit, `out` holds other runs or is in use, or this is not Linux.
        StoppedError: a signal asked to stop.
    """
    if (
        sys.platform != "linux"
    ):  # runs are pinned to cores and inherit the lock, and end with the process that began them
        raise ValueError(
            f"reproduce needs Linux, and this is {sys.platform}; `bacon-fast train` runs a single preset here"
        )
    table, options = _table(arguments), _options(arguments)
    seeds = table.seeds if arguments.seeds is None else tuple(parse_seeds(arguments.seeds))
    out = (arguments.out or Path("reproductions") / _folder_name(arguments, options)).resolve()
    cells = expand(table, seeds, options, out)
    check_images([run for cell in cells for run in cell.runs])
    # Seed by seed, so that an interrupted call leaves whole tables of fewer seeds.
    runs = [cell.runs[i] for i in range(len(seeds)) for cell in cells if cell.runs]
    slots = make_slots(arguments.device, arguments.jobs, sum(run.state != "done" for run in runs))
    if arguments.dry_run:
        print("\n".join(_listing(runs)))
        print(_plan(cells, runs, estimate(runs, load(out), len(slots)), len(slots)))
        return []
    failed: list[str] = []
    with lock(out) as descriptor:
        print(f"{arguments.table}: {out}", file=sys.stderr)
        if arguments.calibrate and any(run.state != "done" for run in runs):
            print("measuring the speed of each kind of run", file=sys.stderr)
            speeds = calibrate(runs, slots, out)
        else:
            speeds = load(out)
        print(_plan(cells, runs, estimate(runs, speeds, len(slots)), len(slots)), file=sys.stderr, flush=True)
        try:
            failed += [failure.run.name for failure in execute(runs, slots, descriptor)]
        finally:
            results = collect(cells, failed)
            for name, text in (
                ("table.md", markdown(table, results, options, command)),
                ("table.csv", table_csv(arguments.table, table, results, options)),
                ("runs.csv", runs_csv(results)),
            ):
                write_atomically(out / name, lambda path, text=text: path.write_text(text, encoding="utf-8"))
        _write_pictures(table, results, arguments.device, out)
    print(out / "table.md")
    if failed:
        print(f"{len(failed)} of {len(runs)} runs failed: {', '.join(failed)}", file=sys.stderr)
    return failed


def _table(arguments: Arguments) -> Table:
    """The table with the rows and columns that were asked for."""
    if arguments.table not in TABLES:
        raise ValueError(f"table: expected one of {', '.join(TABLES)}, found {arguments.table!r}")
    table = TABLES[arguments.table]
    if arguments.methods is not None:
        rows = {row.name: row for row in table.rows}
        wanted = _words("methods", arguments.methods)
        if unknown := [name for name in wanted if name not in rows]:
            raise ValueError(f"methods: expected some of {', '.join(rows)}, found {', '.join(unknown)}")
        table = dataclasses.replace(table, rows=tuple(rows[name] for name in wanted))
    if arguments.columns is not None:
        columns = {name: Column(name) for name in PRESETS} | {column.name: column for column in table.columns}
        wanted = _words("columns", arguments.columns)
        if unknown := [name for name in wanted if name not in columns]:
            raise ValueError(f"columns: expected some of {', '.join(columns)}, found {', '.join(unknown)}")
        table = dataclasses.replace(table, columns=tuple(columns[name] for name in wanted))
    return table


def _options(arguments: Arguments) -> Options:
    settings = {}
    for word in [] if arguments.set is None else _words("set", arguments.set):
        name, separator, value = word.partition("=")
        if not separator:
            raise ValueError(f"set: expected NAME=VALUE, found {word!r}")
        settings[name.replace("-", "_")] = value
    data_dir = None if arguments.data_dir is None else arguments.data_dir.resolve()
    return Options(arguments.budget, arguments.dataset, data_dir, arguments.device, settings)


def _words(name: str, text: str) -> list[str]:
    """The words between commas, each once."""
    words = [word.strip() for word in text.split(",")]
    if "" in words or len(set(words)) < len(words):
        raise ValueError(f"{name}: expected different words between commas, found {text!r}")
    return words


def _folder_name(arguments: Arguments, options: Options) -> str:
    parts = [arguments.table]
    if options.budget < 1:
        parts.append(f"budget{options.budget:g}")
    if options.dataset is not None:
        parts.append(options.dataset)
    parts += [f"{name}={value}" for name, value in sorted(options.settings.items())]
    return "-".join(parts)


def _listing(runs: Sequence[Run]) -> list[str]:
    lines = []
    for run in runs:
        state = run.state
        text = f"stopped at step {run.step():,}" if state == "started" else state
        lines.append(f"{run.name:<60}{run.config.steps:>10,} steps  {text}")
    return lines


def _plan(cells: Sequence[Cell], runs: Sequence[Run], seconds: float | None, jobs: int) -> str:
    """Prints what there is to do, and about how long it takes."""
    left = [run for run in runs if run.state != "done"]
    lines = [f"not run: {reason}" for reason in dict.fromkeys(cell.missing for cell in cells if cell.missing)]
    if not left:
        return "\n".join([*lines, f"{len(runs)} runs, all done"])
    steps = sum(run.config.steps - run.step() for run in left)
    time_needed = "time not known yet" if seconds is None else f"about {format_seconds(seconds)}"
    at_once = "one at a time" if jobs == 1 else f"{jobs} at once"
    lines.append(f"{len(runs)} runs, {len(runs) - len(left)} done; {steps:,} steps left, {at_once}; {time_needed}")
    return "\n".join(lines)


def _write_pictures(table: Table, results: Sequence[Result], device: str, out: Path) -> None:
    # Imported here: matplotlib and scikit-learn take seconds, which a dry run need not wait for.
    from bacon_fast.report.labels import class_labels, replaced
    from bacon_fast.report.style import LIGHT, NAMED_CLASSES, to_png
    from bacon_fast.reproduce import figures

    pictures = {}
    for column in table.columns:
        inside = [result for result in results if result.cell.column == column and result.summaries]
        if inside:
            pictures[f"accuracy-{column.name}"] = figures.accuracies(table, inside, LIGHT)
            pictures[f"recall-{column.name}"] = figures.recalls(inside, LIGHT)
            pictures[f"features-{column.name}"] = figures.embeddings(inside, device, LIGHT)
            names, order = figures.classes_of(inside)
            pairs = replaced(names, class_labels(names, order), order)
            if pairs and len(names) <= NAMED_CLASSES:
                text = "".join(f"{label}\t{name}\n" for label, name in pairs)
                write_atomically(
                    out / f"classes-{column.name}.txt", lambda path, text=text: path.write_text(text, encoding="utf-8")
                )
    for name, figure in pictures.items():
        if figure is not None:
            data = to_png(figure)
            write_atomically(out / f"{name}.png", lambda path, data=data: path.write_bytes(data))


if __name__ == "__main__":
    main()
