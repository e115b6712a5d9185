"""`python -m bacon_fast.evaluate RUN`: the averaged network of a run on the test part of its data, or on validation."""

import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from bacon_fast.cli import with_clear_errors
from bacon_fast.data.longtail import Split
from bacon_fast.engine.build import build_dataset, use_threads
from bacon_fast.engine.checkpoint import content_of
from bacon_fast.engine.config import Config
from bacon_fast.engine.evaluation import calibration_error, parts_of
from bacon_fast.engine.evaluation import evaluate as evaluate_network
from bacon_fast.engine.metrics import compute_metrics, standard_error
from bacon_fast.files import to_json
from bacon_fast.run import open_run


@dataclass(frozen=True)
class Arguments:
    """Evaluate a run's newest checkpoint on all test images, or else on the validation images, and print its metrics as
    one JSON object."""

    run: Annotated[Path, tyro.conf.Positional]
    """Run directory."""
    data_dir: Path | None = None
    """Where the dataset lies now; default: where the run found it."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""


def evaluate(arguments: Arguments) -> dict:
    """Metrics of `compute_metrics`, calibration and spread, "step", the part, the names of the classes in the order of
    "per_class", and the confusion matrix (rows = truth).

    A warning says so when the images are not those of the run's split.

    Raises ValueError when `data_dir` holds other classes, or images of another size, than the run was trained on, and
    what `open_run` raises.
    """
    use_threads(0)
    run = open_run(arguments.run, arguments.device)
    with content_of(run.checkpoint):
        config = Config.from_dict(run.saved)
    if arguments.data_dir is not None:
        config = config.replace(data_dir=arguments.data_dir)
    dataset = build_dataset(config, run.device)
    if tuple(dataset.class_names) != run.class_names:
        raise ValueError(f"data_dir: expected the classes {run.class_names}, found {tuple(dataset.class_names)}")
    if (size := tuple(dataset.train_images.shape[1:3])) != run.image_size:
        expected, found = (f"{height} x {width}" for height, width in (run.image_size, size))
        raise ValueError(f"data_dir: expected images of {expected} pixels, as the run was trained on, found {found}")
    split = Split.load(run.directory / "split.json")
    same = dataset.fingerprint == split.dataset_fingerprint
    parts = parts_of(dataset, split if same else None)
    if not parts:
        raise ValueError("data_dir: expected test images, or the run's validation images, found none")
    evaluation = evaluate_network(run.network, run.normalize, parts[0], dataset.num_classes, run.device)
    metrics = compute_metrics(evaluation.confusion, split.labeled_counts)
    if not same:
        warnings.warn(f"data_dir: the images of {config.data.data_dir} are not those that the run had", stacklevel=1)
    return {
        "step": run.step,
        "class_names": list(run.class_names),
        "evaluated_on": parts[0].name,
        **metrics,
        "bacc_error": standard_error(metrics["per_class"], evaluation.confusion.sum(1).tolist()),
        "calibration_error": calibration_error(evaluation.calibration),
        "intra_class_variance": float(evaluation.intra_class_variance),
        "confusion": evaluation.confusion.tolist(),
    }


def main() -> None:
    arguments = tyro.cli(Arguments, prog="python -m bacon_fast.evaluate")
    with_clear_errors(lambda: print(to_json(evaluate(arguments))))


if __name__ == "__main__":
    main()
