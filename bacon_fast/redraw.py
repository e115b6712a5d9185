"""`bacon-fast report RUN`: the report of a run, written again, also of one that is not finished."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from bacon_fast.cli import with_clear_errors
from bacon_fast.engine.checkpoint import CheckpointError
from bacon_fast.engine.config import Config
from bacon_fast.engine.summary import read_summary, summarize
from bacon_fast.engine.trainer import Trainer
from bacon_fast.report.collect import collect
from bacon_fast.report.page import write_report


@dataclass(frozen=True)
class Arguments:
    """Write report.html and its figures again, from a run's newest checkpoint, on the device of the run."""

    run: Annotated[Path, tyro.conf.Positional]
    """Run directory."""
    data_dir: Path | None = None
    """Where the dataset lies now; default: where the run found it."""


def redraw(directory: Path, data_dir: Path | None = None) -> Path:
    """Writes the report of the run in `directory` and returns the path of report.html.

    Raises:
        CheckpointError: there is no run, or none that was evaluated and has a usable checkpoint.
        ValueError: another command uses the run, or the images in `data_dir` are not its own.
    """
    file = directory / "config.json"
    if not file.exists():
        raise CheckpointError(f"run: expected a run directory, found no {file}")
    config = Config.read(file).replace(run_dir=directory, resume=True, split=None)
    trainer = Trainer(config if data_dir is None else config.replace(data_dir=data_dir.resolve()))
    try:
        if trainer.parts and not trainer.history.rows:
            raise CheckpointError(
                f"run: expected a run that was evaluated, found none in the checkpoints of {directory}"
            )
        config, summary = trainer.config, directory / "summary.json"
        if trainer.ended and summary.exists():
            values = read_summary(summary, config, trainer.split.hash)
        else:
            data = (trainer.dataset, trainer.split, trainer.parts, trainer.history)
            time = (trainer.device, trainer.step, trainer.train_seconds)
            values = summarize(config.replace(steps=trainer.step), *data, *time)
        return write_report(directory, collect(trainer, values))
    finally:
        trainer.logger.close()


def main(args: Sequence[str] | None = None) -> None:
    """The command, with these words or those of the process."""
    arguments = tyro.cli(Arguments, prog="bacon-fast report", args=args)
    with_clear_errors(lambda: print(redraw(arguments.run, arguments.data_dir)))


if __name__ == "__main__":
    main()
