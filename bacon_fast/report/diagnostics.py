"""The report's section on pseudo-labels, class counts, centers and calibration."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch

from bacon_fast.engine.evaluation import calibration_error
from bacon_fast.report import diagnostic_figures, figures
from bacon_fast.report.data import ReportData
from bacon_fast.report.html import Picture


def diagnostic_pictures(
    data: ReportData, labels: Sequence[str], order: np.ndarray, picture: Callable[..., Picture]
) -> tuple[list[Picture], list[Picture]]:
    """What the run recorded of these, narrow and wide; nothing for what it did not."""
    rows, narrow, wide = data.history, [], []
    for key, name, meaning in (
        ("pseudo_precision", "precision", "how many of the images labeled so are of that class"),
        ("pseudo_recall", "recall", "how many of its images were confident and labeled so"),
    ):
        if any(row.get(key) for row in rows):
            narrow.append(
                picture(
                    f"pseudo_{name}_by_class",
                    partial(diagnostic_figures.by_class, name, *_table(rows, key, len(labels)), order),
                    f"Curves over training steps: {name} of the pseudo-labels, one line a class",
                    f"{name.capitalize()} of the pseudo-labels of each class since the evaluation before: {meaning}. "
                    "Counted are unlabeled images whose class is known.",
                    520,
                )
            )
    if data.pseudo_confusion is not None and data.pseudo_confusion.any():
        wide.append(
            picture(
                "pseudo_confusion",
                partial(figures.confusion, data.pseudo_confusion, labels, order),
                "Confusion matrix of the pseudo-labels in percent of the true class",
                "Pseudo-labels between the last two evaluations: where the unlabeled images of each true class went; "
                "the last column did not reach the threshold.",
                820,
                560,
            )
        )
    if data.class_count_estimate is not None and data.unlabeled_counts is not None:
        truth = np.asarray(data.labeled_counts) + np.asarray(data.unlabeled_counts)
        wide.append(
            picture(
                "class_counts",
                partial(diagnostic_figures.count_estimate, data.class_count_estimate, truth, labels, order),
                "True and estimated number of training images of each class",
                "Images the memory bank counts for each class (labels, and the latest confident pseudo-label of "
                "every unlabeled image) beside the true number.",
                1040,
                620,
            )
        )
    if data.calibration is not None:
        scaled = " before the temperature" if data.summary.get("scaled_calibration_error") is not None else ""
        narrow.append(
            picture(
                "reliability",
                partial(diagnostic_figures.reliability, data.calibration),
                f"Accuracy on the {data.measured_on} images by confidence",
                f"Calibration on {data.where}: expected calibration error "
                f"{100 * calibration_error(torch.as_tensor(data.calibration)):.1f} %{scaled}.",
                520,
            )
        )
    return narrow, wide


def _table(rows: Sequence[Mapping[str, Any]], key: str, num_classes: int) -> tuple[list[int], np.ndarray]:
    """Steps [S] and values [S, K] of the evaluations that have `key`; None becomes NaN."""
    found = [row for row in rows if row.get(key)]
    values = np.array([row[key] for row in found], dtype=np.float64).reshape(len(found), num_classes)
    return [row["step"] for row in found], values
