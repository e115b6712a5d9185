"""A finished or running run, opened for inference."""

import math
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from bacon_fast.data.augment import Augment
from bacon_fast.data.datasets import check_image_size
from bacon_fast.data.images import Interpolation, resampling
from bacon_fast.data.longtail import Split
from bacon_fast.engine.build import build_dataset, resolve_device
from bacon_fast.engine.checkpoint import CheckpointError, content_of
from bacon_fast.engine.config import Config
from bacon_fast.engine.directory import newest_state, require_own
from bacon_fast.engine.evaluation import calibration_bins, calibration_error, parts_of, predict
from bacon_fast.engine.evaluation import evaluate as evaluate_network
from bacon_fast.engine.finite import not_finite
from bacon_fast.engine.metrics import HEADLINE, compute_metrics, standard_error
from bacon_fast.exporting import export_model
from bacon_fast.files import read_record
from bacon_fast.labeling import Labeled, answers, label_images
from bacon_fast.models.spec import NetworkSpec, build_network

REPORTED = (
    *("choice", "calibration", "evaluated_on", "images", *HEADLINE, "bacc_error", "per_class"),
    *("calibration_error", "scaled_calibration_error", "validation"),
)
"""Entries of a summary in an exported description."""


@dataclass(frozen=True)
class Run:
    """The averaged network of a run's newest checkpoint, in evaluation mode, and what it needs to read images: the one
    that validation chose (--select validation), else the newest.

    step: after which the network had these weights.
    saved: the run's configuration in the checkpoint, as `Config.to_dict` gives it. checkpoint: the file. Images are
    read at `stored_size`, resized by `interpolation`, and the network sees their center crops of `image_size`, which
    `normalize` makes.
    temperature: by which logits are divided before they become probabilities; None: uncalibrated, as the run had no
    validation images, or its newest checkpoint is from between two evaluations. info: the checkpoint's inference block.

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
    temperature: float | None = None
    info: dict = field(default_factory=dict)
    interpolation: Interpolation = "bilinear"

    @classmethod
    def open(cls, directory: Path | str, device: str = "auto") -> "Run":
        """The run in `directory`, on a device named as on the command line. Raises what `open_run` raises."""
        return open_run(directory, device)

    def evaluate(self, data_dir: Path | str | None = None) -> dict:
        """Metrics on the run's test images, or else on its validation images.

        A warning says so when the images are not those of the run's split.

        Args:
            data_dir: where the dataset lies now; None: where the run found it.

        Returns:
            Metrics of `compute_metrics`, calibration, before and after the temperature where there is one, and spread,
            "step", "evaluated_on", the names of the classes in the order of "per_class", and the confusion matrix
            (rows = truth).

        Raises:
            ValueError: `data_dir` holds other classes, or images of another size, than the run was trained on, or no
                images to evaluate on.
            CheckpointError: the checkpoint's configuration cannot be read.
        """
        with content_of(self.checkpoint):
            config = Config.from_dict(self.saved)
        if data_dir is not None:
            config = config.replace(data_dir=Path(data_dir))
        dataset = build_dataset(config, self.device, self.interpolation)
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
        scaled = {}
        if self.temperature is not None:
            bins = calibration_bins(evaluation.logits / self.temperature, parts[0].labels.to(self.device))
            scaled["scaled_calibration_error"] = calibration_error(bins)
        if not same:
            place = config.data.data_dir
            warnings.warn(f"data_dir: the images of {place} are not those that the run had", stacklevel=2)
        return {
            "step": self.step,
            "class_names": list(self.class_names),
            "evaluated_on": parts[0].name,
            **metrics,
            "bacc_error": standard_error(metrics["per_class"], evaluation.confusion.sum(1).tolist()),
            "temperature": self.temperature,
            "calibration_error": calibration_error(evaluation.calibration),
            **scaled,
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
        for answer in answers([self], [Path(file) for file in files]):
            if answer.probabilities is None:
                yield {"file": str(answer.file), "error": answer.error}
            else:
                probability, c = answer.probabilities.max(0)
                yield {"file": str(answer.file), "class": self.class_names[int(c)], "probability": float(probability)}

    def probabilities(self, images: Tensor) -> Tensor:
        """Probabilities of the classes, float64 [N,K] on the CPU, of uint8 images [N,H,W,3] of the stored size.

        Those of the network's logits over the temperature, where there is one.
        """
        _, logits = predict(self.network, self.normalize, images, self.device)
        return (logits.double().cpu() / (self.temperature or 1.0)).softmax(1)

    def label(self, source: Path | str, out: Path | str, *, per_class: int | None = None) -> Labeled:
        """Labels all images of a folder or a CSV file into a new CSV file, which is a file to train on once its labels
        are checked: see `label_images`, which takes several runs.

        Returns how many files were labeled, and how many could not be.
        """
        return label_images([self], Path(source), Path(out), per_class=per_class)

    def export(self, out: Path | str, *, onnx: bool = False) -> list[Path]:
        """Writes the network to the folder `out` for use elsewhere, and returns the paths of the files.

        model.safetensors holds the averaged weights (LoRA's are merged), for `build_network`. model.onnx, if asked for,
        takes uint8 images [N,H,W,3] of the stored size to probabilities [N,K]. model.json describes them: architecture,
        classes, sizes, mean and standard deviation, temperature, the counts and the hash of the split, the metrics with
        what they were chosen and measured on, pretrained weights with their license, SHA-256 of the files.

        Raises:
            ValueError: `out` holds a model, or the extra `export` is missing.
        """
        described: dict = {"run_step": self.step, "labeled_counts": None, "split": None, "metrics": None}
        if (path := self.directory / "split.json").exists():
            split = Split.load(path)
            described |= {"labeled_counts": list(split.labeled_counts), "split": split.hash}
        if (path := self.directory / "summary.json").exists():
            summary = read_record(path)
            of = summary.get("best_on_validation") or summary.get("last") or {}
            if (of.get("step"), summary.get("split")) == (self.step, described["split"]):  # of these weights
                described["metrics"] = {name: summary[name] for name in REPORTED if name in summary}
        return export_model(Path(out), self.network, self.normalize, self.info, described, onnx=onnx)


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
        interpolation = info.get("interpolation", "bilinear")  # older runs knew one way only
        resampling(interpolation)
        temperature = info["temperature"]
        if temperature is not None and not (isinstance(temperature, float) and 0 < temperature < math.inf):
            raise ValueError(f"temperature: expected a number above 0 or None, found {temperature!r}")
        class_names = tuple(info["class_names"])
        if len(class_names) != info["network"]["num_classes"] or not all(isinstance(n, str) for n in class_names):
            raise ValueError(f"class_names: expected {info['network']['num_classes']} names, found {class_names!r}")
    require_own(directory, path, state)
    network = network.to(target).eval()
    saved, step = state.get("config"), info["selected_step"] or state["step"]
    sizes = stored, size
    return Run(
        directory, path, saved, step, network, normalize, class_names, *sizes, target, temperature, info, interpolation
    )
