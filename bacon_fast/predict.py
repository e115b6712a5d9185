"""`bacon-fast predict RUN FILE...`: class and probability of image files, as JSON lines."""

import sys
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
    """Classify image files with a run's averaged network; prints one JSON object a line: file, class, probability."""

    run: Annotated[Path, tyro.conf.Positional]
    """Run directory."""
    files: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """Image files of any size: JPEG, PNG, BMP, GIF, PPM, TIFF, WebP or AVIF."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""


def main(args: Sequence[str] | None = None) -> None:
    """The command, with these words or those of the process. Its status is 1 if a file could not be classified."""
    arguments = tyro.cli(Arguments, prog="bacon-fast predict", args=args)

    def show() -> None:
        use_threads(0)
        failed = 0
        for row in Run.open(arguments.run, arguments.device).predictions(arguments.files):
            failed += "error" in row
            print(to_json(row), flush=True)
        if failed:
            sys.exit(1)

    with_clear_errors(show)


if __name__ == "__main__":
    main()
