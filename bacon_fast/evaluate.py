"""`python -m bacon_fast.evaluate RUN`: the averaged network of a run on the test part of its dataset."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from bacon_fast.cli import with_clear_errors
from bacon_fast.data.longtail import Split
from bacon_fast.engine.build import build_dataset, use_threads
from bacon_fast.engine.config import Config
from bacon_fast.engine.evaluation import calibration_error
from bacon_fast.engine.evaluation import evaluate as evaluate_network
from bacon_fast.engine.metrics import compute_metrics
from bacon_fast.run import open_run


@dataclass(frozen=True)
class Arguments:
    """Evaluate a run's newest checkpoint on the full test part and print its metrics as one JSON object."""

    run: Annotated[Path, tyro.conf.Positional]
    """Run directory."""
    data_dir: Path | None = None
    """Where the dataset lies now; default: where the run found it."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""


def evaluate(arguments: Arguments) -> dict:
    """Metrics of `compute_metrics`, calibration and spread, "step" and the confusion matrix (rows = truth).

    Raises ValueError when `data_dir` holds other classes, or images of another size, than the run was trained on.
    """
    use_threads(0)
    run = open_run(arguments.run, arguments.device)
    config = Config.from_dict(run.saved)
    if arguments.data_dir is not None:
        config = config.replace(data_dir=arguments.data_dir)
    dataset = build_dataset(config)
    if tuple(dataset.class_names) != run.class_names:
        raise ValueError(f"data_dir: expected the classes {run.class_names}, found {tuple(dataset.class_names)}")
    if (size := tuple(dataset.test_images.shape[1:3])) != run.image_size:
        expected, found = (f"{height} x {width}" for height, width in (run.image_size, size))
        raise ValueError(f"data_dir: expected images of {expected} pixels, as the run was trained on, found {found}")
    evaluation = evaluate_network(run.network, run.normalize, dataset, run.device)
    counts = Split.load(run.directory / "split.json").labeled_counts
    return {
        "step": run.step,
        **compute_metrics(evaluation.confusion, counts),
        "calibration_error": calibration_error(evaluation.calibration),
        "intra_class_variance": float(evaluation.intra_class_variance),
        "confusion": evaluation.confusion.tolist(),
    }


def main() -> None:
    arguments = tyro.cli(Arguments, prog="python -m bacon_fast.evaluate")
    with_clear_errors(lambda: print(json.dumps(evaluate(arguments))))


if __name__ == "__main__":
    main()
