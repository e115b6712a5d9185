"""`python -m bacon_fast.predict RUN FILE...`: class and probability of image files, as JSON lines."""

import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import tyro

from bacon_fast.cli import with_clear_errors
from bacon_fast.data.images import read_files
from bacon_fast.engine.build import use_threads
from bacon_fast.engine.evaluation import EVALUATION_BATCH, predict
from bacon_fast.files import to_json
from bacon_fast.run import open_run


@dataclass(frozen=True)
class Arguments:
    """Classify image files with a run's averaged network; prints one JSON object a line: file, class, probability."""

    run: Annotated[Path, tyro.conf.Positional]
    """Run directory."""
    files: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """Image files of any size: JPEG, PNG, BMP, GIF, PPM, TIFF, WebP or AVIF."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""


def predictions(arguments: Arguments) -> Iterator[dict]:
    """One dict a file, in order: {"file", "class", "probability"}, or {"file", "error"} for one that cannot be read or
    classified.

    Raises ValueError when there is no file.
    """
    if not arguments.files:
        raise ValueError("files: expected at least one image file, found none")
    use_threads(0)
    run = open_run(arguments.run, arguments.device)
    for start in range(0, len(arguments.files), EVALUATION_BATCH):
        files = arguments.files[start : start + EVALUATION_BATCH]
        images, errors = {}, {}
        for file in files:
            try:
                images[file] = read_files([file], run.stored_size)[0]
            except ValueError as error:
                errors[file] = str(error)
        answers = {}
        if images:
            _, logits = predict(run.network, run.normalize, torch.stack(list(images.values())), run.device)
            probabilities, classes = logits.softmax(1).max(1)
            pairs = zip(probabilities.tolist(), classes.tolist())
            for file, (probability, c) in zip(images, pairs):
                if math.isfinite(probability):
                    answers[file] = {"class": run.class_names[c], "probability": probability}
                else:  # finite weights may overflow
                    errors[file] = f"{file}: the network's output is not finite"
        for file in files:
            yield {"file": str(file), **(answers[file] if file in answers else {"error": errors[file]})}


def main() -> None:
    arguments = tyro.cli(Arguments, prog="python -m bacon_fast.predict")

    def show() -> None:
        failed = 0
        for row in predictions(arguments):
            failed += "error" in row
            print(to_json(row), flush=True)
        if failed:
            sys.exit(1)

    with_clear_errors(show)


if __name__ == "__main__":
    main()
