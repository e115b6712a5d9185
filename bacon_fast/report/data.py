"""The content of a report as plain values: collect.py makes it from a run."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import numpy as np

# The most test images that are embedded, that are shown with their views, and that are shown as mistakes.
MAX_POINTS = 2000
MAX_VIEWS = 10
MAX_MISTAKES = 12


class Mistake(NamedTuple):
    """A measured image, uint8 [H, W, 3], its class, the other one that was predicted, and its probability."""

    image: np.ndarray
    truth: int
    predicted: int
    probability: float


@dataclass
class ReportData:
    """The content of a report: K classes, N test images, n sample images of shape [H, W, 3]. Absent parts are None.

    Raises:
        ValueError: if an array's shape does not fit the others, or there is a confusion matrix and no history.
    """

    title: str
    config: Mapping[str, Any]
    """The resolved configuration."""
    dataset: Mapping[str, Any]
    """Facts about the data: name, protocol, sizes, hash of the split, ..."""
    class_names: Sequence[str]
    labeled_counts: Sequence[int]
    """Labeled training images per class [K]."""
    history: Sequence[Mapping[str, Any]]
    """Evaluations in order, the rows of `metrics.History`; none if nothing was measured."""
    confusion: np.ndarray | None
    """int64 [K, K] of the chosen weights, rows = true class."""
    measured_on: Literal["test", "validation"] = "test"
    """The images of the accuracies."""
    unlabeled_counts: Sequence[int] | None = None
    """True counts of the unlabeled images per class [K], when they are known."""
    train_history: Sequence[Mapping[str, Any]] = ()
    """Log rows: "step", "loss/<name>", "stats/<name>" (fractions), "lr", "steps_per_second". Rows may lack keys."""
    temperatures: Sequence[float] | None = None
    """BaCon's temperature of the positive logit per class [K] (methods.md E.3)."""
    base_temperature: float | None = None
    """The temperature of its negatives."""
    temperature_history: Sequence[Mapping[str, Any]] | None = None
    """Rows {"step": int, "temperatures": [K floats]}."""
    features: np.ndarray | None = None
    """Backbone features of the test images, float32 [N, F]."""
    projections: np.ndarray | None = None
    """The same images in the contrastive space, float32 [N, D]."""
    feature_labels: np.ndarray | None = None
    """Their true classes, int64 [N]."""
    pseudo_confusion: np.ndarray | None = None
    """int64 [K, K+1] pseudo-labels of the last evaluation's window, rows = true class, last column = none."""
    class_count_estimate: Sequence[float] | None = None
    """BaCon's count of training images per class [K]."""
    calibration: np.ndarray | None = None
    """float [M, 3] of the last evaluation, see `evaluation.calibration_bins`."""
    original_samples: np.ndarray | None = None
    """Unlabeled images before augmentation, uint8 [n, H, W, 3]."""
    weak_samples: np.ndarray | None = None
    strong_samples: np.ndarray | None = None
    mistakes: Sequence[Mistake] = ()
    """Measured images that were classified wrong, the most probable ones first."""
    summary: Mapping[str, Any] = field(default_factory=dict)
    """summary.json; its single values are shown under Run."""

    def __post_init__(self) -> None:
        num_classes = len(self.class_names)
        if self.confusion is not None:
            self.confusion = np.asarray(self.confusion)
        if self.confusion is not None and self.confusion.shape != (num_classes, num_classes):
            expected = [num_classes, num_classes]
            raise ValueError(f"confusion: expected shape {expected}, found {list(self.confusion.shape)}")
        for name in ("labeled_counts", "unlabeled_counts", "temperatures"):
            value = getattr(self, name)
            if value is not None and len(value) != num_classes:
                raise ValueError(f"{name}: expected {num_classes} values, one a class, found {len(value)}")
        if self.confusion is not None and not self.history:
            raise ValueError("history: expected at least one evaluation, found none")
        for name in ("features", "projections"):
            value = getattr(self, name)
            if value is None:
                continue
            if self.feature_labels is None or np.ndim(value) != 2 or len(value) != len(self.feature_labels):
                shapes = f"{np.shape(value)} and {np.shape(self.feature_labels)}"
                raise ValueError(f"{name}: expected [N, dimensions] beside feature_labels [N], found {shapes}")
        for name in ("original_samples", "weak_samples", "strong_samples"):
            value = getattr(self, name)
            if value is not None and (value.ndim != 4 or value.shape[3] != 3 or value.dtype != np.uint8):
                raise ValueError(f"{name}: expected uint8 [n, H, W, 3], found {value.dtype} {list(value.shape)}")

    @property
    def where(self) -> str:
        """The measured images, for a sentence."""
        return "the test set" if self.measured_on == "test" else "the validation images"
