"""`bacon-fast train`: a preset, overridden field by field, then one run, or one for each of several seeds."""

import io
import os
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from itertools import count
from pathlib import Path
from typing import Annotated, NoReturn

import tyro
from torch.distributed import Store

from bacon_fast.data.names import printable
from bacon_fast.engine import distributed
from bacon_fast.engine.build import resolve_device
from bacon_fast.engine.checkpoint import CheckpointError
from bacon_fast.engine.config import Config
from bacon_fast.engine.logger import RowHook, format_speed
from bacon_fast.engine.memory import is_out_of_memory
from bacon_fast.engine.metrics import CHOSEN, READINGS
from bacon_fast.engine.presets import PRESETS
from bacon_fast.engine.several import fit_together
from bacon_fast.engine.trainer import DivergedError, StoppedError, Trainer
from bacon_fast.parser import override, refuse_empty, value_in
from bacon_fast.report.collect import collect

# Errors that a user can cause. Any other error is a bug of ours and keeps its traceback.
USER_ERRORS = (ValueError, TypeError, OSError, CheckpointError, DivergedError, distributed.LostProcessError)

SAVING_MEMORY = (
    "Training needs less with a smaller --batch-size, --image-size or --backbone; a folder of images needs "
    "less with --images mapped"
)

DESCRIPTION = "Train a class-imbalanced semi-supervised classifier: bacon-fast train [PRESET] [--option value ...]"
SEEDS_HELP = "A run per seed, all at once; --run-dir X then names X-seedN."


def parse(args: Sequence[str]) -> Config:
    """Configuration from command-line words; the first may name a preset (default: digits)."""
    configs = parse_runs(args)
    if len(configs) > 1:
        raise ValueError(f"seeds: expected one, found {len(configs)}")
    return configs[0]


def parse_runs(args: Sequence[str]) -> list[Config]:
    """As `parse`; under --seeds, one configuration for each. Without --run-dir, `run_directories` names theirs.

    Under --resume --run-dir, without the name of a preset, the words change the run's own configuration.
    """
    args = list(args)
    refuse_empty(args)
    named = bool(args) and not args[0].startswith("-")
    name = args.pop(0) if named else "digits"
    default = (None if named else _saved(args)) or default_config(name, value_in(args, "--method"))
    config, more = override(
        default,
        args,
        prog=f"bacon-fast train {name}",
        description=f"{DESCRIPTION}\n\n{_presets(name if named else None)}",
        extra={"seeds": (Annotated[str | None, tyro.conf.arg(metavar="N,N,...", help=SEEDS_HELP)], None)},
    )
    seeds, run_dir, config = more["seeds"], config.run.run_dir, settle(config)
    if seeds is None:
        return [config]
    if config.seed != default.seed:
        raise ValueError(f"seeds: expected no --seed beside --seeds, found {config.seed}")
    return [
        config.replace(seed=seed, run_dir=None if run_dir is None else Path(f"{run_dir}-seed{seed}"))
        for seed in parse_seeds(seeds)
    ]


def default_config(preset: str, method: str | None) -> Config:
    """The configuration of a preset, for another method than its own if one is named."""
    if preset not in PRESETS:
        raise ValueError(f"preset: expected one of {', '.join(PRESETS)}, found {preset!r}")
    return PRESETS[preset].config(method)


def settle(config: Config) -> Config:
    """The configuration with absolute paths to its data, so that the run can be evaluated and resumed from anywhere.

    Raises ValueError under `resume` without a run directory.
    """
    if config.run.run_dir is None and config.run.resume:
        raise ValueError("resume: expected --run-dir to name the run to continue, found none")
    places = {name: getattr(config.data, name) for name in ("data_dir", "split")}
    lists = {
        name: tuple(path.resolve() for path in getattr(config.data, name)) for name in ("unlabeled", "test", "val")
    }
    return config.replace(**{name: path.resolve() for name, path in places.items() if path is not None}, **lists)


def _saved(words: Sequence[str]) -> Config | None:
    """The configuration of the run that --resume --run-dir name, or of a first one under --seeds; None without one."""
    run_dir, seeds = value_in(words, "--run-dir"), value_in(words, "--seeds")
    if "--resume" not in words or run_dir is None:
        return None
    folders = [Path(run_dir)] if seeds is None else [Path(f"{run_dir}-seed{seed}") for seed in parse_seeds(seeds)]
    method = value_in(words, "--method")
    return next((saved for folder in folders if (saved := saved_config(folder, method)) is not None), None)


def saved_config(folder: Path, method: str | None) -> Config | None:
    """The configuration of the run in a folder, to be resumed; None if there is no run.

    Raises ValueError when it has another method than the one that is named.
    """
    if not (folder / "config.json").exists():
        return None
    saved = Config.read(folder / "config.json")
    if method not in (None, saved.method):
        raise ValueError(f"method: expected {saved.method}, that of the run in {folder}, found {method}")
    # The run has its split; the file that it came from may be gone.
    return saved.replace(split=None) if (folder / "split.json").exists() else saved


def _presets(name: str | None) -> str:
    """The lines of --help about one preset, or about all."""
    if name is not None:
        return f"Preset {name}: {PRESETS[name].help}\n\nAll presets: bacon-fast train --help"
    return "Presets:\n" + "\n".join(f"  {key:<26}{preset.help}" for key, preset in PRESETS.items())


def parse_seeds(text: str) -> list[int]:
    """'0,1,2' -> [0, 1, 2]. Raises ValueError, which names the option seeds, for anything else.

    Example:
        >>> parse_seeds("0,1,2")
        [0, 1, 2]
    """
    words = text.split(",")
    # 0 and 00 are one run.
    if not all(word.strip().isdecimal() for word in words) or len({int(word) for word in words}) < len(words):
        raise ValueError(f"seeds: expected different integers of at least 0 between commas, found {text!r}")
    return [int(word) for word in words]


@contextmanager
def run_directories(configs: Sequence[Config]) -> Iterator[list[Config]]:
    """The configurations with a directory each: runs/PRESET-METHOD-seedSEED-TIME where they name none.

    Such a directory is made at once, so that no command that starts in the same second takes the same one. If it is
    empty at the end, because no run began, it is removed.
    """
    folder, stamp = Path("runs"), time.strftime("%Y%m%d-%H%M%S")
    made = [] if folder.exists() else [folder]
    named = []
    try:
        for config in configs:
            if config.run.run_dir is None:
                run_dir = _make_directory(folder / f"{config.preset}-{config.method}-seed{config.seed}-{stamp}")
                made.insert(0, run_dir)
                config = config.replace(run_dir=run_dir)
            named.append(config)
        yield named
    finally:
        for path in made:
            with suppress(OSError):  # not empty
                path.rmdir()


def _make_directory(path: Path) -> Path:
    """Makes and returns `path`, or the first of path-2, path-3, ... that does not exist."""
    for number in count(1):
        candidate = path if number == 1 else path.with_name(f"{path.name}-{number}")
        with suppress(FileExistsError):
            candidate.mkdir(parents=True)
            return candidate


def train(args: Sequence[str] | None = None) -> None:
    """The command, also train.py; under plain python or, for several GPUs or machines, under torchrun."""
    with_clear_errors(lambda: _train(sys.argv[1:] if args is None else args))


def _train(args: Sequence[str]) -> None:
    configs = parse_runs(args)
    if len(configs) > 1:
        _train_together(configs)
        return
    train_run(configs[0])


def train_run(config: Config, on_row: RowHook | None = None) -> Trainer:
    """Trains one run to its end, in a process group under torchrun, and prints and writes what it came to."""
    with (
        distributed.process_group(resolve_device(config.run.device), config.engine.rank_timeout) as store,
        _same_run_everywhere(config, store) as config,
    ):
        main = distributed.is_main()
        trainer = Trainer(config, on_row=on_row)
        distributed.mark_started(store, trainer.run_dir)
        if main:
            print(f"run directory: {printable(str(trainer.run_dir))}", flush=True)
        summary = trainer.fit()
    if main:
        _conclude(trainer, summary)
    return trainer


def _train_together(configs: Sequence[Config]) -> None:
    if distributed.Launch.from_environment() is not None:
        raise ValueError("seeds: expected plain python, found torchrun, whose processes train one run together")
    with run_directories(configs) as configs:
        for config in configs:
            print(f"run directory: {printable(str(config.run.run_dir))}", flush=True)
        outcomes = fit_together(configs)
    for trainer, summary, _ in outcomes:
        if summary is not None:
            _conclude(trainer, summary)
    summaries = [summary for _, summary, _ in outcomes if summary is not None]
    if len(summaries) > 1 and outcomes[0].trainer.parts:
        print(format_seeds(summaries), flush=True)
    failures = [f"{trainer.logger.name}: {error}" for trainer, _, error in outcomes if error is not None]
    if failures:
        raise DivergedError(f"{len(failures)} of {len(outcomes)} runs diverged\n" + "\n".join(failures))


def _conclude(trainer: Trainer, summary: dict) -> None:
    """Prints a run's summary and writes its report."""
    print(format_summary(summary, trainer.split.labeled_counts, trainer.split.unlabeled_counts), flush=True)
    if trainer.config.log.report:
        # Imported here: matplotlib and scikit-learn take seconds, which a command that fails at once need not wait for.
        from bacon_fast.report.page import write_report

        try:
            print(f"report: {write_report(trainer.run_dir, collect(trainer, summary))}", flush=True)
        except PermissionError as error:  # on Windows, a picture or the page is open in another program
            warnings.warn(f"{error}; `bacon-fast report {trainer.run_dir}` writes the report again", stacklevel=2)


@contextmanager
def _same_run_everywhere(config: Config, store: Store | None) -> Iterator[Config]:
    """The configuration with rank 0's run directory on all ranks; after a restart by torchrun, with the earlier one."""
    earlier = distributed.started_before(store)
    if earlier is not None:
        yield config.replace(run_dir=earlier, resume=True)
        return
    with ExitStack() as reserved:
        run_dir = distributed.from_main(lambda: reserved.enter_context(run_directories([config]))[0].run.run_dir)
        yield config.replace(run_dir=run_dir)


def with_clear_errors(main: Callable[[], None]) -> None:
    """Runs `main`. Errors that a user can cause become one line on stderr and a non-zero status, not a traceback.

    Warnings become one line each, and characters that stdout cannot show become escapes, as on stderr.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
    usual, warnings.formatwarning = warnings.formatwarning, _warning_line
    try:
        main()
    except StoppedError as stop:
        _exit(str(stop), 128 + stop.signum)
    except KeyboardInterrupt:
        _exit("interrupted", 130)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the reader left
        sys.exit(141)
    except Exception as error:
        out_of_memory = is_out_of_memory(error)
        if os.environ.get("BACON_FAST_TRACEBACK") or not (out_of_memory or isinstance(error, USER_ERRORS)):
            raise
        message = f"out of memory: {(str(error).splitlines() or ['no detail'])[0]}\n{SAVING_MEMORY}"
        _exit(f"error: {message if out_of_memory else error}", 2)
    finally:
        warnings.formatwarning = usual


def _warning_line(message: Warning | str, *place: object) -> str:
    return f"warning: {printable(' '.join(str(message).split()))}\n"


def _exit(message: str, status: int) -> NoReturn:
    if "RANK" in os.environ:  # torchrun mixes the output of its processes
        message = f"[rank {os.environ['RANK']}] {message}"
    print("\n".join(map(printable, message.splitlines())), file=sys.stderr)
    sys.exit(status)


def format_seeds(summaries: Sequence[dict]) -> str:
    """Mean and standard deviation (n - 1) of the accuracies over runs that differ in the seed."""
    seeds = ", ".join(str(summary["seed"]) for summary in summaries)
    lines = ["", f"mean ± standard deviation over {len(summaries)} seeds ({seeds})", ""]
    lines.append(f"{'':<32}" + "".join(f"{title:>18}" for title in ("top-1", "bACC", "GM")))
    for key, title in (READINGS | CHOSEN).items():
        if not all(key in summary for summary in summaries):
            continue
        line = f"{title:<32}"
        for name in ("top1", "bacc", "gm"):
            values = [summary[key][name] for summary in summaries]
            line += f"{f'{statistics.mean(values):.4f} ± {statistics.stdev(values):.4f}':>18}"
        lines.append(line)
    return "\n".join(lines)


def format_summary(summary: dict, labeled_counts: Sequence[int], unlabeled_counts: Sequence[int] | None) -> str:
    """The table a run ends with: three readings of the accuracy, then recall beside the class counts."""
    lines = [
        "",
        f"{summary['dataset']}, {summary['method']}, {summary['steps']} steps, seed {summary['seed']}, "
        f"{format_speed(summary['steps_per_second'])}",
        summary["choice"],
        summary["calibration"],
        "",
    ]
    readings = {key: title for key, title in (READINGS | CHOSEN).items() if key in summary}
    if readings:
        lines.append(f"{'':<32}{'top-1':>8}{'bACC':>8}{'GM':>8}")
    for key, title in readings.items():
        row = summary[key]
        lines.append(f"{title:<32}{row['top1']:>8.4f}{row['bacc']:>8.4f}{row['gm']:>8.4f}")
    lines += [*([""] if readings else []), f"{'class':<20}{'labeled':>10}{'unlabeled':>12}{'recall':>10}"]
    unlabeled = ["?"] * len(labeled_counts) if unlabeled_counts is None else unlabeled_counts
    names = summary["class_names"]
    recalls = summary.get("per_class", [None] * len(names))
    shown = range(len(names)) if len(names) <= 20 else [*range(10), None, *range(len(names) - 10, len(names))]
    for c in shown:
        if c is None:
            lines.append(f"  ... {len(names) - 20} more, all in summary.json")
            continue
        recall = "-" if recalls[c] is None else f"{recalls[c]:.4f}"
        lines.append(f"{printable(names[c]):<20}{labeled_counts[c]:>10}{unlabeled[c]:>12}{recall:>10}")
    return "\n".join(lines)


if __name__ == "__main__":
    train()
