"""report.html: all that is known of a run on one self-contained page, and its pictures as PNG files."""

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from bacon_fast.engine.metrics import MEAN_WINDOW, History, class_groups, compute_metrics
from bacon_fast.files import write_atomically
from bacon_fast.report import figures, html
from bacon_fast.report.data import MAX_POINTS, MAX_VIEWS, ReportData
from bacon_fast.report.diagnostics import diagnostic_pictures
from bacon_fast.report.embedding import embed
from bacon_fast.report.figures import Line, Panel
from bacon_fast.report.html import Picture, percent
from bacon_fast.report.style import DARK, LIGHT, to_png

# The methods' statistics under names a reader knows; others keep their own.
STATISTICS = {
    "pseudo_rate": "pseudo-label rate",
    "pseudo_accuracy": "pseudo-label accuracy",
    "abc_rate": "pseudo-label rate of ABC",
    "reliable": "reliable rows",
    "bank_fill": "filled slots",
    "selected": "selected slots",
}


def write_report(run_dir: Path, data: ReportData) -> Path:
    """Write ``report.html`` and ``figures/*.png`` into the run directory, each file atomically.

    Returns:
        The path of report.html.
    """
    run_dir = Path(run_dir)
    folder = run_dir / "figures"
    folder.mkdir(parents=True, exist_ok=True)

    def picture(name: str, draw: Callable[..., Figure], alt: str, caption: str, width: int = 1040) -> Picture:
        light, dark = (to_png(draw(theme=theme)) for theme in (LIGHT, DARK))
        write_atomically(folder / f"{name}.png", lambda path: path.write_bytes(light))
        return Picture(light, dark, alt, caption, width)

    order = np.argsort(-np.asarray(data.labeled_counts), kind="stable")
    body = "\n".join(
        [
            html.header(data.title, _facts(data)),
            _cards(data),
            html.section("Training", html.group("stack", _training_pictures(data, picture))),
            html.section(
                "Classes", html.group("stack", _class_pictures(data, order, picture)), _class_table(data, order)
            ),
            html.section("Diagnostics", html.group("stack", diagnostic_pictures(data, order, picture))),
            html.section("Test images in feature space", html.group("pair", _embedding_pictures(data, order, picture))),
            html.section("Augmentation", html.group("stack", _view_pictures(data, picture))),
            html.section("Data", html.settings(data.dataset)),
            html.section("Run", html.settings(_scalars(data.summary))),
            html.section("Configuration", html.settings(data.config)),
            "<footer>Accuracies belong to the averaged (EMA) model on the test set. "
            "The pictures are also in the folder figures.</footer>",
        ]
    )
    path = run_dir / "report.html"
    text = html.page(data.title, body)
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))
    return path


def _facts(data: ReportData) -> dict[str, Any]:
    facts = {
        "dataset": data.summary.get("dataset"),
        "method": data.summary.get("method"),
        "steps": data.history[-1]["step"],
        "classes": len(data.class_names),
        "labeled": int(np.sum(data.labeled_counts)),
    }
    if data.unlabeled_counts is not None:
        facts["unlabeled"] = int(np.sum(data.unlabeled_counts))
    facts["test"] = int(data.confusion.sum())
    facts["steps/s"] = data.summary.get("steps_per_second")
    return {name: value for name, value in facts.items() if value is not None}


def _cards(data: ReportData) -> str:
    summary = History(data.history).summary()
    named = {"balanced": "bacc", "top-1": "top1", "geometric mean": "gm"}
    last, mean, best = ({label: row[key] for label, key in named.items()} for row in summary.values())
    groups = compute_metrics(data.confusion, data.labeled_counts)
    evaluations = summary["mean_last_20"]["evaluations"]
    averaged = "evaluations" if evaluations == MEAN_WINDOW else f"only {evaluations}, as this network has no more"
    cards = [
        html.card("Last evaluation", f"after step {summary['last']['step']:,}", last),
        html.card(f"Mean of the last {MEAN_WINDOW}", averaged, mean),
        html.card("Best evaluation", "chosen on the test set: optimistic", best, optimistic=True),
        html.card(
            "Classes with few labels",
            "thirds of the classes by labeled images, last evaluation",
            {"few": groups["few"], "medium": groups["medium"], "many": groups["many"]},
        ),
    ]
    return f'<div class="cards">{"".join(cards)}</div>'


def _lines(rows: Sequence[Mapping[str, Any]], names: Mapping[str, str]) -> list[Line]:
    """A line for each key of `names` that occurs with a finite value, labeled with its entry."""
    lines = []
    for key, label in names.items():
        found = [row for row in rows if row.get(key) is not None and math.isfinite(row[key])]
        if found:
            lines.append(Line(label, [row["step"] for row in found], [row[key] for row in found]))
    return lines


def _training_pictures(data: ReportData, picture: Callable[..., Picture]) -> list[Picture]:
    accuracy = [
        Panel("accuracy", _lines(data.history, {"top1": "top-1", "bacc": "balanced", "gm": "geometric mean"}), True),
        Panel("mean recall", _lines(data.history, {"many": "many", "medium": "medium", "few": "few"}), True),
    ]
    keys = dict.fromkeys(key for row in data.train_history for key in row)
    prefixed = {prefix: [key for key in keys if key.startswith(prefix)] for prefix in ("loss/", "stats/")}
    losses = {key: key.removeprefix("loss/").replace("_", " ") for key in prefixed["loss/"]}
    stats = {key: key.removeprefix("stats/") for key in prefixed["stats/"]}
    stats = {key: STATISTICS.get(name, name.replace("_", " ")) for key, name in stats.items()}
    pseudo = {key: label for key, label in stats.items() if "pseudo" in label}
    memory = {key: label for key, label in stats.items() if "reliable" in label or "slots" in label}
    rest = {key: label for key, label in stats.items() if key not in pseudo and key not in memory}
    plan = [
        ("accuracy", accuracy, "Accuracy on the test set after each evaluation (left), and the mean recall of the "
         "classes with many, medium and few labeled images (right)."),
        ("losses", [
            Panel("loss", _lines(data.train_history, losses)),
            Panel("learning rate", _lines(data.train_history, {"lr": "learning rate"})),
         ], "Training losses and learning rate; long curves are drawn pale, with their moving mean on top."),
        ("statistics", [
            Panel("share of the unlabeled batch", _lines(data.train_history, pseudo), True),
            Panel("share", _lines(data.train_history, memory), True),
         ], "Left: pseudo-labels, how many pass the confidence threshold and how many of those are right. Right: "
         "rows reliable enough for the memory bank, and its slots that hold a feature (filled) or count as a class "
         "(selected)."),
        ("representation", [
            Panel("intra-class variance", _lines(data.history, {"intra_class_variance": "unit features, test images"})),
            Panel("1 - cosine", _lines(data.history, {"center_drift": "center drift between evaluations"})),
            Panel("calibration error", _lines(data.history, {"calibration_error": "expected, test images"}), True),
         ], "How far the features of a class spread, how far BaCon's class centers move between evaluations, and how "
         "far confidence is from accuracy."),
        ("other_statistics", [
            Panel("value", _lines(data.train_history, rest)),
            Panel("steps per second", _lines(data.train_history, {"steps_per_second": "steps per second"})),
         ], "Other logged quantities, and the training speed."),
    ]  # fmt: skip
    pictures = []
    for name, panels, caption in plan:
        panels = [panel for panel in panels if panel.lines]
        if panels:
            alt = "Curves over training steps: " + ", ".join(line.label for panel in panels for line in panel.lines)
            pictures.append(picture(name, partial(figures.curves, panels), alt, caption, 520 * len(panels)))
    return pictures


def _class_pictures(data: ReportData, order: np.ndarray, picture: Callable[..., Picture]) -> list[Picture]:
    metrics = compute_metrics(data.confusion, data.labeled_counts)
    groups = class_groups(len(data.class_names), data.labeled_counts)
    names = data.class_names
    draw = partial(
        figures.per_class, metrics["per_class"], data.labeled_counts, data.unlabeled_counts, groups, names, order
    )
    known = "" if data.unlabeled_counts is None else " and unlabeled"
    pictures = [
        picture(
            "per_class",
            draw,
            "Bars: recall of each class above the number of its training images",
            f"Recall of each class above its number of labeled{known} training images (logarithmic). A method that "
            "ignores the imbalance falls off to the right.",
        ),
        picture(
            "confusion",
            partial(figures.confusion, data.confusion, names),
            "Confusion matrix in percent of the true class",
            "Each row shows where the test images of one class went, in percent; the color scale is stretched toward "
            "small shares so that rare errors stay visible. Columns that collect errors are favored classes.",
            780,
        ),
    ]
    if data.temperatures is not None:
        history = data.temperature_history
        pictures.append(
            picture(
                "temperature",
                partial(figures.temperature, data.temperatures, data.base_temperature, history, names, order),
                "Temperature of each class's positive logit",
                "BaCon's balanced temperature adjustment: classes with many selected images get a lower temperature "
                "for their positive logit; the difference fades toward the end of training.",
                1040 if history is not None and len(history) > 1 else 780,
            )
        )
    return pictures


def _class_table(data: ReportData, order: np.ndarray) -> str:
    columns = ["class", "labeled", *(["unlabeled"] if data.unlabeled_counts is not None else []), "test"]
    columns += ["recall %", "precision %", "most often taken for"]
    recall = compute_metrics(data.confusion, data.labeled_counts)["per_class"]
    rows = []
    for c in order:
        row, predicted = data.confusion[c], data.confusion[:, c].sum()
        errors = np.where(np.arange(len(row)) == c, 0, row)
        worst = int(errors.argmax())
        taken_for = f"{data.class_names[worst]} ({100 * errors[worst] / row.sum():.0f} %)" if errors.any() else "–"
        unlabeled = [f"{int(data.unlabeled_counts[c]):,}"] if data.unlabeled_counts is not None else []
        precision = percent(row[c] / predicted) if predicted else "–"
        counts = [f"{int(data.labeled_counts[c]):,}", *unlabeled, f"{int(row.sum()):,}"]
        rows.append([data.class_names[c], *counts, percent(recall[c]), precision, taken_for])
    return html.details("All classes as a table", html.table(columns, rows))


def _embedding_pictures(data: ReportData, order: np.ndarray, picture: Callable[..., Picture]) -> list[Picture]:
    pictures = []
    for name, values, what, normalize in (
        ("features", data.features, "Backbone features", False),
        ("projections", data.projections, "Projections into the contrastive space (compared by cosine)", True),
    ):
        if values is None or not len(values):
            continue
        chosen = np.sort(np.random.default_rng(0).permutation(len(values))[:MAX_POINTS])
        points, kind = embed(values[chosen], normalize=normalize)
        labels = np.asarray(data.feature_labels)[chosen]
        draw = partial(figures.embedding, points, labels, data.class_names, order, kind)
        caption = f"{what} of {len(chosen):,} test images, {kind}, colored by true class."
        pictures.append(picture(f"embedding_{name}", draw, f"Scatter plot of {name} by class", caption, 560))
    return pictures


def _view_pictures(data: ReportData, picture: Callable[..., Picture]) -> list[Picture]:
    named = (("original", data.original_samples), ("weak", data.weak_samples), ("strong", data.strong_samples))
    rows = [(name, images[:MAX_VIEWS]) for name, images in named if images is not None and len(images)]
    if not rows:
        return []
    caption = (
        "Unlabeled images and the views the network sees: the weak view gives the pseudo-label, and the strong view is "
        "trained to agree with it."
    )
    alt = "Sample images in rows: " + ", ".join(name for name, _ in rows)
    width = 70 + 98 * max(len(images) for _, images in rows)
    return [picture("views", partial(figures.views, rows), alt, caption, width)]


def _scalars(values: Mapping[str, Any]) -> dict[str, Any]:
    """The entries that fit on a line; accuracies per class and per evaluation are shown elsewhere."""
    return {key: value for key, value in values.items() if isinstance(value, (str, bool, int, float))}
