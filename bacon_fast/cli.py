"""The command line of train.py: a preset, overridden field by field, then one run."""

import dataclasses
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

import tyro
from torch.distributed import Store

from bacon_fast.engine import distributed
from bacon_fast.engine.build import resolve_device
from bacon_fast.engine.checkpoint import CheckpointError
from bacon_fast.engine.config import Config
from bacon_fast.engine.presets import PRESETS
from bacon_fast.engine.run_report import write_run_report
from bacon_fast.engine.trainer import DivergedError, StoppedError, Trainer

# What a user can cause. Anything else is a defect of ours and keeps its traceback.
USER_ERRORS = (ValueError, TypeError, OSError, CheckpointError, DivergedError, distributed.LostProcessError)

DESCRIPTION = """Train a class-imbalanced semi-supervised classifier: train.py [PRESET] [--option value ...]

Presets:
"""


def parse(args: Sequence[str]) -> Config:
    """Configuration from command-line words; the first may name a preset (default: digits)."""
    args = list(args)
    name = args.pop(0) if args and not args[0].startswith("-") else "digits"
    if name not in PRESETS:
        raise ValueError(f"preset: expected one of {', '.join(PRESETS)}, found {name!r}")
    presets = "\n".join(f"  {key:<26}{preset.help}" for key, preset in PRESETS.items())
    config = tyro.cli(
        Config,
        args=args,
        default=PRESETS[name].config,
        prog=f"train.py {name}",
        description=f"{DESCRIPTION}{presets}",
    )
    if config.data_dir is not None:  # absolute, so that the run can be evaluated from anywhere
        config = dataclasses.replace(config, data_dir=config.data_dir.resolve())
    if config.run_dir is None:
        if config.resume:
            raise ValueError("resume: expected --run-dir to name the run to continue, found none")
        stamp = time.strftime("%Y%m%d-%H%M%S")
        config = dataclasses.replace(config, run_dir=Path("runs") / f"{name}-{config.method}-seed{config.seed}-{stamp}")
    return config


def train(args: Sequence[str] | None = None) -> None:
    """Entry point of train.py, under plain python or, for several GPUs or machines, under torchrun."""
    with_clear_errors(lambda: _train(sys.argv[1:] if args is None else args))


def _train(args: Sequence[str]) -> None:
    config = parse(args)
    with distributed.process_group(resolve_device(config.device), config.rank_timeout) as store:
        main = distributed.is_main()
        trainer = Trainer(_same_run_everywhere(config, store))
        distributed.mark_started(store, trainer.run_dir)
        if main:
            print(f"run directory: {trainer.run_dir}", flush=True)
        summary = trainer.fit()
    if not main:
        return
    print(format_summary(summary, trainer.split.labeled_counts, trainer.split.unlabeled_counts), flush=True)
    if trainer.config.report:
        print(f"report: {write_run_report(trainer, summary)}")


def _same_run_everywhere(config: Config, store: Store | None) -> Config:
    """With rank 0's run directory on all ranks; after a restart by torchrun, with the one to continue in."""
    earlier = distributed.started_before(store)
    if earlier is not None:
        return dataclasses.replace(config, run_dir=earlier, resume=True)
    return dataclasses.replace(config, run_dir=distributed.share(config.run_dir))


def with_clear_errors(main: Callable[[], None]) -> None:
    """Runs `main`; what a user can cause ends in one line on stderr and a non-zero status instead of a traceback."""
    try:
        main()
    except StoppedError as stop:
        _exit(str(stop), 128 + stop.signum)
    except KeyboardInterrupt:
        _exit("interrupted", 130)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the reader left; nothing more to say to it
        sys.exit(141)
    except USER_ERRORS as error:
        if os.environ.get("BACON_FAST_TRACEBACK"):
            raise
        _exit(f"error: {error}", 2)


def _exit(message: str, status: int) -> NoReturn:
    if "RANK" in os.environ:  # torchrun mixes the output of its processes
        message = f"[rank {os.environ['RANK']}] {message}"
    print(message, file=sys.stderr)
    sys.exit(status)


def format_summary(summary: dict, labeled_counts: Sequence[int], unlabeled_counts: Sequence[int] | None) -> str:
    """The table a run ends with: three readings of the accuracy, then recall beside the class counts."""
    lines = [
        "",
        f"{summary['dataset']}, {summary['method']}, {summary['steps']} steps, seed {summary['seed']}, "
        f"{summary['steps_per_second']:.1f} steps/s",
        "",
        f"{'':<32}{'top-1':>8}{'bACC':>8}{'GM':>8}",
    ]
    for key, title in (
        ("last", "last evaluation"),
        ("mean_last_20", "mean of last 20 evaluations"),
        ("best_on_test", "best (chosen on the test set)"),
    ):
        row = summary[key]
        lines.append(f"{title:<32}{row['top1']:>8.4f}{row['bacc']:>8.4f}{row['gm']:>8.4f}")
    lines += ["", f"{'class':<20}{'labeled':>10}{'unlabeled':>12}{'recall':>10}"]
    unlabeled = ["?"] * len(labeled_counts) if unlabeled_counts is None else unlabeled_counts
    names, recalls = summary["class_names"], summary["per_class"]
    shown = range(len(names)) if len(names) <= 20 else [*range(10), None, *range(len(names) - 10, len(names))]
    for c in shown:
        if c is None:
            lines.append(f"  ... {len(names) - 20} more, all in summary.json")
            continue
        recall = "-" if recalls[c] is None else f"{recalls[c]:.4f}"
        lines.append(f"{names[c]:<20}{labeled_counts[c]:>10}{unlabeled[c]:>12}{recall:>10}")
    return "\n".join(lines)
