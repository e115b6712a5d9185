"""`bacon-fast evaluate RUN`: the averaged network of a run on its test images, or else on its validation images."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from bacon_fast.cli import with_clear_errors
from bacon_fast.engine.build import use_threads
from bacon_fast.files import to_json
from bacon_fast.run import Run


@dataclass(frozen=True)
class Arguments:
    """Evaluate a run on its test images, or without them on its validation images, with the weights that the run
    reports; print the metrics as one JSON object."""

    run: Annotated[Path, tyro.conf.Positional]
    """Run directory."""
    data_dir: Path | None = None
    """Where the dataset lies now; default: where the run found it."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""


def main(args: Sequence[str] | None = None) -> None:
    """The command, with these words or those of the process."""
    arguments = tyro.cli(Arguments, prog="bacon-fast evaluate", args=args)

    def show() -> None:
        use_threads(0)
        print(to_json(Run.open(arguments.run, arguments.device).evaluate(arguments.data_dir)))

    with_clear_errors(show)


if __name__ == "__main__":
    main()
