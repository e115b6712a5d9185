"""The report's curves over the training steps, each with a caption for what is drawn in it."""

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from bacon_fast.report import figures
from bacon_fast.report.data import ReportData
from bacon_fast.report.figures import SMOOTHED_FROM, Line, Panel
from bacon_fast.report.html import Picture

# The methods' statistics under names a reader knows; others keep their own.
STATISTICS = {
    "pseudo_rate": "pseudo-label rate",
    "pseudo_accuracy": "pseudo-label accuracy",
    "abc_rate": "pseudo-label rate of ABC",
    "reliable": "reliable rows",
    "bank_fill": "filled slots",
    "selected": "selected slots",
}
# What a caption says of a curve, where it is drawn.
MEANINGS = {
    "pseudo-label rate": "Rate: unlabeled rows whose pseudo-label passes the confidence threshold.",
    "pseudo-label rate of ABC": "Rate of ABC: those that its balanced head trains on.",
    "pseudo-label accuracy": "Accuracy: how many of them are right, among the images whose class is known and that are "
    "not labeled themselves.",
    "reliable rows": "Reliable: rows sure enough to be BaCon's anchors and to enter its memory bank.",
    "filled slots": "Filled: slots of the bank that hold a feature.",
    "selected slots": "Selected: slots that count as a class.",
}


def training_pictures(data: ReportData, picture: Callable[..., Picture]) -> list[Picture]:
    """A picture for each group of curves of which the run recorded any."""
    keys = dict.fromkeys(key for row in data.train_history for key in row)
    prefixed = {prefix: [key for key in keys if key.startswith(prefix)] for prefix in ("loss/", "stats/")}
    losses = {key: key.removeprefix("loss/").replace("_", " ") for key in prefixed["loss/"]}
    stats = {key: key.removeprefix("stats/") for key in prefixed["stats/"]}
    stats = {key: STATISTICS.get(name, name.replace("_", " ")) for key, name in stats.items()}
    pseudo = {key: label for key, label in stats.items() if "pseudo" in label}
    memory = {key: label for key, label in stats.items() if "reliable" in label or "slots" in label}
    rest = {key: label for key, label in stats.items() if key not in pseudo and key not in memory}
    tests, logs, num_classes = data.history, data.train_history, len(data.class_names)
    images = f"{data.measured_on} images"
    plan = [
        (
            "accuracy",
            Panel("accuracy", _lines(tests, {"top1": "top-1", "bacc": "balanced", "gm": "geometric mean"}), True),
            f"Accuracy on {data.where}. The geometric mean counts a class with recall 0 as 1/(100 x classes), here "
            f"{1 / num_classes:.2g} %, so that one such class pulls it down and does not make it 0.",
        ),
        (
            "group_recall",
            Panel("mean recall", _lines(tests, {"many": "many", "medium": "medium", "few": "few"}), True),
            f"Mean recall on {data.where} of the thirds of the classes with many, medium and few labeled images.",
        ),
        (
            "validation",
            Panel("log-loss", _lines(tests, {"validation_log_loss": "class-balanced, validation images"})),
            "Log-loss on the validation images, each class with the same weight.",
        ),
        ("losses", Panel("loss", _lines(logs, losses)), "Training losses, each with its weight."),
        (
            "learning_rate",
            Panel("learning rate", _lines(logs, {"lr": "learning rate"})),
            "Learning rate.",
        ),
        ("pseudo_labels", Panel("share of the unlabeled batch", _lines(logs, pseudo), True), "Pseudo-labels."),
        ("memory_bank", Panel("share", _lines(logs, memory), True), "BaCon's memory bank."),
        (
            "intra_class_variance",
            Panel(
                "intra-class variance",
                _lines(tests, {"intra_class_variance": f"unit features, {images}"}),
            ),
            "How far the features of a class spread.",
        ),
        (
            "center_drift",
            Panel("1 - cosine", _lines(tests, {"center_drift": "center drift between evaluations"})),
            "How far BaCon's class centers move between evaluations.",
        ),
        (
            "calibration_error",
            Panel("calibration error", _lines(tests, {"calibration_error": f"expected, {images}"}), True),
            "How far confidence is from accuracy.",
        ),
        ("other_statistics", Panel("value", _lines(logs, rest)), "Other logged quantities."),
        (
            "speed",
            Panel("steps per second", _lines(logs, {"steps_per_second": "steps per second"})),
            "Training speed.",
        ),
    ]
    pictures = []
    for name, panel, caption in plan:
        if panel.lines:
            labels = [line.label for line in panel.lines]
            words = [caption, *(MEANINGS[label] for label in labels if label in MEANINGS)]
            if any(len(line.steps) >= SMOOTHED_FROM for line in panel.lines):
                words.append("Pale: as logged; strong: moving mean.")
            alt = f"Curves over training steps: {', '.join(labels)}"
            pictures.append(picture(name, partial(figures.curves, panel), alt, " ".join(words), 520))
    return pictures


def _lines(rows: Sequence[Mapping[str, Any]], names: Mapping[str, str]) -> list[Line]:
    """A line for each key of `names` that occurs with a finite value, labeled with its entry."""
    lines = []
    for key, label in names.items():
        found = [row for row in rows if row.get(key) is not None and math.isfinite(row[key])]
        if found:
            lines.append(Line(label, [row["step"] for row in found], [row[key] for row in found]))
    return lines
