"""A finished or running run, opened for inference."""

import math
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from bacon_fast.data.augment import Augment
from bacon_fast.data.datasets import check_image_size
from bacon_fast.data.images import read_files
from bacon_fast.data.longtail import Split
from bacon_fast.engine.build import build_dataset, resolve_device
from bacon_fast.engine.checkpoint import CheckpointError, content_of
from bacon_fast.engine.config import Config
from bacon_fast.engine.directory import newest_state, require_own
from bacon_fast.engine.evaluation import EVALUATION_BATCH, calibration_error, parts_of, predict
from bacon_fast.engine.evaluation import evaluate as evaluate_network
from bacon_fast.engine.finite import not_finite
from bacon_fast.engine.metrics import compute_metrics, standard_error
from bacon_fast.models.spec import NetworkSpec, build_network


@dataclass(frozen=True)
class Run:
    """The averaged network of a run's newest checkpoint, in evaluation mode, and what it needs to read images: the one
    that validation chose (--select validation), else the newest.

    step: after which the network had these weights.
    saved: the run's configuration in the checkpoint, as `Config.to_dict` gives it. checkpoint: the file. Images are
    read at `stored_size`, and the network sees their center windows of `image_size`; `normalize` makes these.

    Example:
        >>> import bacon_fast
        >>> options = {"steps": 2, "batch_size": 8, "backbone": "wrn-10-1", "threads": 1, "report": False}
        >>> _ = bacon_fast.train("digits", method="supervised", run_dir="run", **options)  # doctest: +ELLIPSIS
        run directory: run
        ...
        >>> run = bacon_fast.Run.open("run")
        >>> run.step, run.image_size, run.evaluate()["num_images"]
        (2, (16, 16), 723)
    """

    directory: Path
    checkpoint: Path
    saved: dict
    step: int
    network: nn.Module
    normalize: Augment
    class_names: tuple[str, ...]
    stored_size: tuple[int, int]
    image_size: tuple[int, int]
    device: torch.device

    @classmethod
    def open(cls, directory: Path | str, device: str = "auto") -> "Run":
        """The run in `directory`, on a device named as on the command line. Raises what `open_run` raises."""
        return open_run(directory, device)

    def evaluate(self, data_dir: Path | str | None = None) -> dict:
        """Metrics on the test part of the run's data, or else on its validation images.

        A warning says so when the images are not those of the run's split.

        Args:
            data_dir: where the dataset lies now; None: where the run found it.

        Returns:
            Metrics of `compute_metrics`, calibration and spread, "step", "evaluated_on", the names of the classes in
            the order of "per_class", and the confusion matrix (rows = truth).

        Raises:
            ValueError: `data_dir` holds other classes, or images of another size, than the run was trained on, or no
                images to evaluate on.
            CheckpointError: the checkpoint's configuration cannot be read.
        """
        with content_of(self.checkpoint):
            config = Config.from_dict(self.saved)
        if data_dir is not None:
            config = config.replace(data_dir=Path(data_dir))
        dataset = build_dataset(config, self.device)
        if tuple(dataset.class_names) != self.class_names:
            raise ValueError(f"data_dir: expected the classes {self.class_names}, found {tuple(dataset.class_names)}")
        if (size := tuple(dataset.train_images.shape[1:3])) != self.stored_size:
            expected, found = (f"{height} x {width}" for height, width in (self.stored_size, size))
            raise ValueError(
                f"data_dir: expected images of {expected} pixels, as the run was trained on, found {found}"
            )
        split = Split.load(self.directory / "split.json")
        same = dataset.fingerprint == split.dataset_fingerprint
        parts = parts_of(dataset, split if same else None)
        if not parts:
            raise ValueError("data_dir: expected test images, or the run's validation images, found none")
        evaluation = evaluate_network(self.network, self.normalize, parts[0], dataset.num_classes, self.device)
        metrics = compute_metrics(evaluation.confusion, split.labeled_counts)
        if not same:
            place = config.data.data_dir
            warnings.warn(f"data_dir: the images of {place} are not those that the run had", stacklevel=2)
        return {
            "step": self.step,
            "class_names": list(self.class_names),
            "evaluated_on": parts[0].name,
            **metrics,
            "bacc_error": standard_error(metrics["per_class"], evaluation.confusion.sum(1).tolist()),
            "calibration_error": calibration_error(evaluation.calibration),
            "intra_class_variance": float(evaluation.intra_class_variance),
            "confusion": evaluation.confusion.tolist(),
        }

    def predict(self, files: Sequence[Path | str]) -> list[dict]:
        """Class and probability of image files: see `predictions`, which yields the same one by one."""
        return list(self.predictions(files))

    def predictions(self, files: Sequence[Path | str]) -> Iterator[dict]:
        """One dict a file, in order: {"file", "class", "probability"}, or {"file", "error"} for one that cannot be read
        or classified.

        Raises ValueError when there is no file.
        """
        if not files:
            raise ValueError("files: expected at least one image file, found none")
        for start in range(0, len(files), EVALUATION_BATCH):
            yield from self._predict_together([Path(file) for file in files[start : start + EVALUATION_BATCH]])

    def _predict_together(self, files: Sequence[Path]) -> Iterator[dict]:
        images, errors = {}, {}
        for file in files:
            try:
                images[file] = read_files([file], self.stored_size)[0]
            except ValueError as error:
                errors[file] = str(error)
        answers = {}
        if images:
            _, logits = predict(self.network, self.normalize, torch.stack(list(images.values())), self.device)
            probabilities, classes = logits.softmax(1).max(1)
            for file, probability, c in zip(images, probabilities.tolist(), classes.tolist()):
                if math.isfinite(probability):
                    answers[file] = {"class": self.class_names[c], "probability": probability}
                else:  # finite weights may overflow
                    errors[file] = f"{file}: the network's output is not finite"
        for file in files:
            yield {"file": str(file), **(answers[file] if file in answers else {"error": errors[file]})}


def open_run(directory: Path | str, device: str = "auto") -> Run:
    """Opens the run in `directory`.

    Raises:
        CheckpointError: the directory holds no usable checkpoint, one of another run, or one whose content does not fit
            or is not finite.
        ValueError: its checkpoint has another format; config.json or split.json is damaged.
    """
    directory = Path(directory)
    if not directory.is_dir():
        raise CheckpointError(f"run: expected a run directory, found nothing at {directory}")
    target = resolve_device(device)
    path, state = newest_state(directory, map_location=target)
    with content_of(path):
        info = state["inference"]
        network = build_network(NetworkSpec(**info["network"]))
        prefix = "network."
        newest = {k.removeprefix(prefix): v for k, v in state["ema"].items() if k.startswith(prefix)}
        network.load_state_dict(state["selected"] or newest)
        if broken := not_finite(network.state_dict().items()):
            raise ValueError(f"not finite: {', '.join(broken[:3])}")
        stored, size = tuple(info["stored_size"]), tuple(info["image_size"])
        check_image_size(*stored, *size)
        normalize = Augment(size, source_size=stored, mean=tuple(info["mean"]), std=tuple(info["std"])).to(target)
        class_names = tuple(info["class_names"])
        if len(class_names) != info["network"]["num_classes"] or not all(isinstance(n, str) for n in class_names):
            raise ValueError(f"class_names: expected {info['network']['num_classes']} names, found {class_names!r}")
    require_own(directory, path, state)
    network = network.to(target).eval()
    saved, step = state.get("config"), info["selected_step"] or state["step"]
    return Run(directory, path, saved, step, network, normalize, class_names, stored, size, target)
