"""`bacon-fast label RUN... IMAGES --out F.csv`: labels of images, in a file to review and to train on."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from bacon_fast.cli import with_clear_errors
from bacon_fast.engine.build import use_threads
from bacon_fast.labeling import label_images
from bacon_fast.run import Run


@dataclass(frozen=True)
class Arguments:
    """Label the images of a folder or a CSV file with the averaged networks of runs. The CSV file that is written is a
    file to train on, once its labels are checked. Status 1: it is written, and has images without a label."""

    paths: Annotated[tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="RUN... IMAGES")]
    """Run directories, averaged if several; then a folder of images, or a CSV file with a column image_path."""
    out: Path
    """The new CSV file: image_path, label, probability, margin, entropy, the next classes, error."""
    per_class: int | None = None
    """Keep only so many of each predicted class, the most probable ones."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""


def main(args: Sequence[str] | None = None) -> None:
    """The command, with these words or those of the process.

    Its status is 1 if the file was written and an image in it has no label, 2 if there was an error and no file.
    """
    arguments = tyro.cli(Arguments, prog="bacon-fast label", args=args)

    def show() -> None:
        use_threads(0)
        if len(arguments.paths) < 2:
            raise ValueError(f"RUN... IMAGES: expected a run directory and then images, found {len(arguments.paths)}")
        *directories, images = arguments.paths
        runs = [Run.open(directory, arguments.device) for directory in directories]
        result = label_images(runs, images, arguments.out, per_class=arguments.per_class)
        if any(run.temperature is None for run in runs):
            print("probabilities are uncalibrated: train with --validation or --val", file=sys.stderr)
        failed = f", {result.failed} not (column error)" if result.failed else ""
        print(f"{arguments.out}: {result.labeled} images labeled{failed}", file=sys.stderr)
        if result.failed:
            sys.exit(1)

    with_clear_errors(show)


if __name__ == "__main__":
    main()
