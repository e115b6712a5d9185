"""Labels of image files by the networks of one run or of several, and the CSV file of them that a person reviews."""

import csv
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from bacon_fast.data.ahead import Stored, read_ahead
from bacon_fast.data.image_csv import COLUMNS
from bacon_fast.data.images import Interpolation, decoding, is_inside
from bacon_fast.data.listing import unlabeled_files
from bacon_fast.data.names import distinct, is_utf8, printable, shown
from bacon_fast.files import write_atomically

MOST_CLASSES = 5
"""Classes in a row, the most probable ones."""


class Classifier(Protocol):
    """What labels images: a `Run`."""

    class_names: tuple[str, ...]
    stored_size: tuple[int, int]
    interpolation: Interpolation

    def probabilities(self, images: Tensor) -> Tensor:
        """uint8 [N,H,W,3], of the stored size -> float64 [N,K], on the CPU."""


class Answer(NamedTuple):
    """Probabilities of a file, float64 [K], or None and why there are none."""

    file: Path
    probabilities: Tensor | None
    error: str = ""


class Labeled(NamedTuple):
    """How many files `label_images` labeled, and how many it could not."""

    labeled: int
    failed: int


def answers(
    classifiers: Sequence[Classifier], files: Sequence[Path], done: Callable[[], object] = lambda: None
) -> Iterator[Answer]:
    """The mean of the classifiers' probabilities for each file, in order; classes as in the first one.

    `done` is called after each file that was decoded. Raises ValueError unless all have the same classes.
    """
    names = classifiers[0].class_names
    for other in classifiers[1:]:
        if set(other.class_names) != set(names):
            raise ValueError(
                f"runs: expected the same classes in each, found {', '.join(distinct(*names))} and "
                f"{', '.join(distinct(*other.class_names))}"
            )
    columns = [[one.class_names.index(name) for name in names] for one in classifiers]
    kinds = [Stored(*one.stored_size, one.interpolation) for one in classifiers]
    for chunk in read_ahead(files, kinds, done):
        found = [
            one.probabilities(chunk.images[kind])[:, order] for one, kind, order in zip(classifiers, kinds, columns)
        ]
        for i, (file, row) in enumerate(zip(chunk.files, torch.stack(found).mean(0))):
            if i in chunk.failed:
                yield Answer(file, None, chunk.failed[i])
            elif not row.isfinite().all():  # finite weights may overflow
                yield Answer(file, None, f"{shown(file)}: the network's output is not finite")
            else:
                yield Answer(file, row)


def label_images(
    classifiers: Sequence[Classifier], source: Path, out: Path, *, per_class: int | None = None
) -> Labeled:
    """Writes a CSV file of the labels of all images in a folder, at any depth, or in a CSV file.

    Its columns: image_path, relative to the file where the image is below its folder, else absolute; label and
    probability, of the most probable class; margin, how much more probable it is than the next one; entropy, in nats;
    label_2, probability_2, ..., of the next classes; error, for a file without a label. With its labels corrected it is
    a file to train on.

    Args:
        classifiers: at least one; of several, the probabilities are averaged.
        per_class: keep only so many of each predicted class, the most probable ones first; a review of a part then
            sees rare classes too. None: all, in the order of `source`.

    Raises:
        ValueError: `out` exists (it may hold a review) or is no .csv file, `source` has no images, classifiers of
            different classes.
        FileNotFoundError: there is no `source`.
    """
    if out.suffix.lower() != ".csv":
        raise ValueError(f"out: expected a file .csv, found {shown(out)}")
    if os.path.lexists(out):
        raise ValueError(f"out: expected a new file, found {shown(out)}, which may hold a review")
    if per_class is not None and per_class < 1:
        raise ValueError(f"per_class: expected at least 1, found {per_class}")
    files = unlabeled_files(source)
    if not files:
        raise ValueError(f"images: expected image files in {shown(source)}, found none")
    with decoding(len(files)) as done:
        found = list(answers(classifiers, files, done))
    failed = [answer for answer in found if answer.probabilities is None]
    labeled = [answer for answer in found if answer.probabilities is not None]
    if per_class is not None:
        labeled = _most_probable(labeled, len(classifiers[0].class_names), per_class)
    kept = [*labeled, *failed] if per_class is not None else found
    rows = [_row(answer, classifiers[0].class_names, os.path.abspath(out.parent)) for answer in kept]
    write_atomically(out, lambda path: _write(path, _columns(len(classifiers[0].class_names)), rows))
    without = sum("error" in row for row in rows)
    return Labeled(len(rows) - without, without)


def _most_probable(labeled: Sequence[Answer], num_classes: int, most: int) -> list[Answer]:
    """The `most` most probable answers of each predicted class, class by class."""
    classes = [int(answer.probabilities.argmax()) for answer in labeled]
    kept = []
    for c in range(num_classes):
        own = [answer for answer, predicted in zip(labeled, classes) if predicted == c]
        kept += sorted(own, key=lambda answer: -float(answer.probabilities.max()))[:most]
    return kept


def _columns(num_classes: int) -> list[str]:
    further = [f"{what}_{n}" for n in range(2, min(MOST_CLASSES, num_classes) + 1) for what in ("label", "probability")]
    return [*COLUMNS, "probability", "margin", "entropy", *further, "error"]


def _row(answer: Answer, class_names: Sequence[str], folder: str) -> dict[str, str]:
    path = os.path.abspath(answer.file)
    path = os.path.relpath(path, folder) if is_inside(path, folder) else path
    if not is_utf8(path):
        return {"image_path": printable(path), "error": "the name is no UTF-8: the path is not the file's"}
    if answer.probabilities is None:
        return {"image_path": path, "error": answer.error}
    values, order = answer.probabilities.sort(descending=True, stable=True)
    values, names = values.tolist(), [class_names[c] for c in order.tolist()]
    margin = values[0] - (values[1] if len(values) > 1 else 0)
    entropy = float(-torch.special.xlogy(answer.probabilities, answer.probabilities).sum())
    row = {"image_path": path, "label": names[0], "probability": values[0], "margin": margin, "entropy": entropy}
    for n in range(2, min(MOST_CLASSES, len(names)) + 1):
        row |= {f"label_{n}": names[n - 1], f"probability_{n}": values[n - 1]}
    return {name: f"{value:.6f}" if isinstance(value, float) else value for name, value in row.items()}


def _write(path: Path, columns: Sequence[str], rows: Sequence[dict[str, str]]) -> None:
    with open(path, "w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, columns, restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
