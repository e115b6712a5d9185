"""Class-balanced accuracies from a confusion matrix, and their history over a run (methods.md A.3)."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

HEADLINE = ("top1", "bacc", "gm")
GROUPS = ("many", "medium", "few")
MEAN_WINDOW = 20
# Three ways in which papers read a run's accuracy off its evaluations; keys of `History.summary`. Never mix them.
READINGS = {
    "last": "last evaluation",
    "mean_last_20": "mean of last 20",
    "best_on_test": "best (chosen on the test set)",
}
CHOSEN = {"best_on_validation": "best (chosen on validation)"}
"""A fourth one, of runs with --select validation."""


def confusion_matrix(targets: Tensor, predictions: Tensor, num_classes: int) -> Tensor:
    """Count (true class, predicted class) pairs on the device of the inputs, without host synchronization on a GPU.

    Args:
        targets: integer tensor [N], true classes in 0..num_classes-1.
        predictions: integer tensor [N], predicted classes in 0..num_classes-1.
        num_classes: K.

    Returns:
        int64 [K, K]; entry (i, j) counts the images of class i that were predicted as j.

    Raises:
        TypeError: if an input does not hold integers.
        ValueError: if the shapes differ, or (on a CPU) a value lies outside 0..K-1. On a GPU such a value fails a
            device-side assertion instead, because a check by the host would have to wait for the device.
    """
    for name, value in (("targets", targets), ("predictions", predictions)):
        if value.is_floating_point() or value.is_complex() or value.dtype == torch.bool:
            raise TypeError(f"{name}: expected integers, found {value.dtype}")
        if value.dim() != 1:
            raise ValueError(f"{name}: expected shape [N], found {list(value.shape)}")
    if targets.shape != predictions.shape:
        raise ValueError(f"predictions: expected {len(targets)}, one a target, found {len(predictions)}")
    if num_classes < 1:
        raise ValueError(f"num_classes: expected at least 1, found {num_classes}")

    rows, columns = targets.long(), predictions.long()
    valid = (rows >= 0) & (rows < num_classes) & (columns >= 0) & (columns < num_classes)
    if valid.device.type == "cpu" and not valid.all():
        bad = int(torch.argmin(valid.int()))
        raise ValueError(
            f"targets, predictions: expected classes in 0..{num_classes - 1}, "
            f"found target {int(rows[bad])} and prediction {int(columns[bad])} at position {bad}"
        )
    # Row-major cell of each pair; an invalid pair must not land in a neighboring cell, so it gets an index that fails.
    cell = torch.where(valid, rows * num_classes + columns, -1)
    counts = torch.zeros(num_classes * num_classes, dtype=torch.int64, device=cell.device)
    # Not torch.bincount: on a GPU it reads the largest value back to the host to size its result.
    return counts.scatter_add_(0, cell, torch.ones_like(cell)).view(num_classes, num_classes)


def class_groups(num_classes: int, labeled_counts: Sequence[int] | np.ndarray | None = None) -> list[str]:
    """Group of each class by thirds: "many" for the first floor(K/3), "few" for the last floor(K/3), else "medium".

    The order is by labeled count, most first and ties by class index; without counts it is the class index.
    """
    order = np.arange(num_classes) if labeled_counts is None else np.argsort(-np.asarray(labeled_counts), kind="stable")
    third = num_classes // 3
    groups = np.full(num_classes, "medium")
    groups[order[:third]], groups[order[num_classes - third :]] = "many", "few"
    return groups.tolist()


def compute_metrics(confusion: Tensor, labeled_counts: Sequence[int] | Tensor | None = None) -> dict[str, Any]:
    """All accuracies of one evaluation, as plain numbers in 0..1 that JSON can hold.

    Classes without a test image have no recall: they are left out of every mean and listed under ``absent_classes``.

    Args:
        confusion: [K, K] counts, rows = true class (tensor, array or nested list).
        labeled_counts: labeled training images per class [K]. They order the classes for many / medium / few (most
            labeled first, ties by class index). Without them the class index is taken to be that order.

    Returns:
        ``top1``; ``bacc``, the mean recall; ``gm``, the geometric mean of the recalls where a recall of 0 counts as
        1/(100K); ``macro_precision`` and ``macro_f1`` (a class that is never predicted has precision 0);
        ``per_class``, the K recalls, None for an absent class; ``many``, ``medium``, ``few``, mean recall of the
        first floor(K/3) classes, the rest, and the last floor(K/3); ``many_count``, ``medium_count``, ``few_count``,
        mean recall of the classes with more than 100, 20 to 100, and fewer than 20 labeled images (None when
        ``labeled_counts`` is None); ``absent_classes``; ``num_images``. A group without a test image is None.

    Raises:
        ValueError: if the matrix is not square, has a negative entry or no image, or ``labeled_counts`` is not of
            length K.
    """
    matrix = np.asarray(confusion.cpu() if isinstance(confusion, Tensor) else confusion, dtype=np.float64)
    if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1] or not matrix.size:
        raise ValueError(f"confusion: expected shape [K, K], found {list(matrix.shape)}")
    if not (matrix >= 0).all():
        raise ValueError(f"confusion: expected counts >= 0, found {matrix[~(matrix >= 0)][0]:g}")
    if not matrix.sum():
        raise ValueError("confusion: expected at least one test image, found none")
    num_classes = len(matrix)
    counts = None
    if labeled_counts is not None:
        counts = np.asarray(labeled_counts.cpu() if isinstance(labeled_counts, Tensor) else labeled_counts)
        if counts.shape != (num_classes,):
            raise ValueError(f"labeled_counts: expected shape [{num_classes}], found {list(counts.shape)}")

    correct, true_total, predicted_total = matrix.diagonal(), matrix.sum(axis=1), matrix.sum(axis=0)
    present = true_total > 0
    recall = np.divide(correct, true_total, out=np.zeros(num_classes), where=present)
    precision = np.divide(correct, predicted_total, out=np.zeros(num_classes), where=predicted_total > 0)
    f1 = np.divide(2 * correct, true_total + predicted_total, out=np.zeros(num_classes), where=present)
    floored = np.where(recall > 0, recall, 1 / (100 * num_classes))

    def mean_recall(classes: np.ndarray) -> float | None:
        classes = classes[present[classes]]
        return float(recall[classes].mean()) if classes.size else None

    group = np.array(class_groups(num_classes, counts))
    groups = {name: mean_recall(np.flatnonzero(group == name)) for name in GROUPS}
    for name, low, high in (("many_count", 101, np.inf), ("medium_count", 20, 100), ("few_count", 0, 19)):
        inside = None if counts is None else np.flatnonzero((counts >= low) & (counts <= high))
        groups[name] = None if inside is None else mean_recall(inside)
    return {
        "top1": float(correct.sum() / matrix.sum()),
        "bacc": float(recall[present].mean()),
        "gm": float(np.exp(np.log(floored[present]).mean())),
        "macro_precision": float(precision[present].mean()),
        "macro_f1": float(f1[present].mean()),
        **groups,
        "per_class": [float(value) if there else None for value, there in zip(recall, present)],
        "absent_classes": np.flatnonzero(~present).tolist(),
        "num_images": int(matrix.sum()),
    }


def standard_error(per_class: Sequence[float | None], images: Sequence[int]) -> float:
    """Standard error of the mean recall, from recalls [K] and images of each class [K]; None and 0 where there is none.

    sqrt(sum_c r_c (1 - r_c) / n_c) / K over the classes that occur, of binomial counts. r_c is estimated as
    (hits + 1) / (n_c + 2), Laplace's rule of succession: by hits / n_c, a class of one image would count as certain.
    Raises ValueError without any image.

    Example:
        >>> round(standard_error([0.5, 1.0], [8, 1]), 3)
        0.147
    """
    recall = np.array([0.0 if value is None else value for value in per_class])
    images = np.asarray(images, dtype=np.float64)
    recall, images = recall[images > 0], images[images > 0]
    if not len(images):
        raise ValueError("images: expected at least one, found none")
    smoothed = (recall * images + 1) / (images + 2)
    return float(np.sqrt((smoothed * (1 - smoothed) / images).sum()) / len(images))


class History:
    """The evaluations of a run, in order of their steps.

    ``rows`` is a list of JSON-serializable dicts, ``{"step": int, **compute_metrics(...)}``, the lines of
    metrics.jsonl; ``History(rows)`` restores one.
    """

    def __init__(self, rows: Iterable[Mapping[str, Any]] = ()):
        self.rows: list[dict[str, Any]] = []
        for row in rows:
            if "step" not in row:
                raise ValueError(f"rows: expected the key 'step' in each, found only {', '.join(sorted(row))}")
            self.append(row["step"], {key: value for key, value in row.items() if key != "step"})

    def __len__(self) -> int:
        return len(self.rows)

    def append(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Add the evaluation after ``step`` completed steps.

        Raises:
            ValueError: if top1, bacc or gm is missing, or the step does not come after the last one.
        """
        missing = [key for key in HEADLINE if key not in metrics]
        if missing:
            raise ValueError(f"metrics: expected {', '.join(HEADLINE)}, found no {', '.join(missing)}")
        if self.rows and step <= self.rows[-1]["step"]:
            raise ValueError(f"step: expected more than the last one, {self.rows[-1]['step']}, found {step}")
        self.rows.append({"step": int(step), **metrics})

    def summary(self) -> dict[str, dict[str, Any]]:
        """The three accuracies that papers report, never to be mixed, each with ``top1``, ``bacc``, ``gm``, ``many``,
        ``medium``, ``few`` and ``per_class``.

        Returns:
            ``last``: the last evaluation (with its ``step``); ``mean_last_20``: the mean of the last 20, or of all
            when there are fewer (``evaluations`` says how many), without those of an earlier generation, which had
            another network (``generation`` of a row, 0 by default); ``best_on_test``: the maximum of each metric on
            its own (``steps`` says where), with the recalls at the best bacc. It is optimistic, because the test set
            chose it. A value without a test image is None; a value that rows lack is left out.

        Raises:
            ValueError: if there is no evaluation.
        """
        if not self.rows:
            raise ValueError("the history holds no evaluation")
        last, tail = self.rows[-1], last_network(self.rows)
        best = {key: max(self.rows, key=lambda row, key=key: row[key]) for key in HEADLINE}
        groups = [key for key in (*GROUPS, "per_class") if all(key in row for row in self.rows)]
        return {
            "last": {**{key: last[key] for key in (*HEADLINE, *groups)}, "step": last["step"]},
            "mean_last_20": {
                **{key: _mean([row[key] for row in tail]) for key in (*HEADLINE, *groups)},
                "evaluations": len(tail),
            },
            "best_on_test": {
                **{key: best[key][key] for key in HEADLINE},
                **{key: best["bacc"][key] for key in groups},
                "steps": {key: best[key]["step"] for key in HEADLINE},
            },
        }


def last_network(rows: Sequence[Mapping[str, Any]]) -> Sequence[Mapping[str, Any]]:
    """The last MEAN_WINDOW evaluations, without those of an earlier ``generation``, which had another network."""
    generation = rows[-1].get("generation", 0)
    return [row for row in rows if row.get("generation", 0) == generation][-MEAN_WINDOW:]


def _mean(values: Sequence[Any]) -> Any:
    """Mean of numbers, or element by element of lists; None where there is no value."""
    if values[0] is None:
        return None
    if isinstance(values[0], list):
        return [_mean(column) for column in zip(*values)]
    return sum(values) / len(values)
