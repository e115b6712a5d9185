"""report.html: all that is known of a run on one self-contained page, and its pictures as PNG files."""

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
from bacon_fast.report.html import Picture, percent
from bacon_fast.report.labels import class_labels, replaced
from bacon_fast.report.mistakes import mistakes
from bacon_fast.report.style import DARK, LIGHT, NAMED_CLASSES, to_png
from bacon_fast.report.training import training_pictures


def write_report(run_dir: Path, data: ReportData) -> Path:
    """Write ``report.html`` and ``figures/*.png`` into the run directory, each file atomically.

    Returns:
        The path of report.html.
    """
    run_dir = Path(run_dir)
    folder = run_dir / "figures"
    folder.mkdir(parents=True, exist_ok=True)

    def picture(
        name: str, draw: Callable[..., Figure], alt: str, caption: str, width: int = 1040, least: int = 0
    ) -> Picture:
        light, dark = (to_png(draw(theme=theme)) for theme in (LIGHT, DARK))
        write_atomically(folder / f"{name}.png", lambda path: path.write_bytes(light))
        return Picture(light, dark, alt, caption, width, least)

    order = np.argsort(-np.asarray(data.labeled_counts), kind="stable")
    labels = class_labels(data.class_names, order)
    names = html.legend("In the pictures:", replaced(data.class_names, labels, order) if _named(data) else [])
    bars, temperatures = _class_pictures(data, labels, order, picture)
    narrow, wide = diagnostic_pictures(data, labels, order, picture)
    body = "\n".join(
        [
            html.header(data.title, _facts(data)),
            html.line(data.summary.get("choice", "")),
            html.line(data.summary.get("calibration", "")),
            _cards(data),
            html.note(_bacon_never_acted(data)),
            html.section("Classes", names, html.group("stack", bars), _class_table(data, order)),
            html.section("Mistakes", mistakes(data)),
            html.section("Training", html.group("pair", training_pictures(data, picture) + temperatures)),
            html.section("Diagnostics", html.group("pair", narrow), html.group("stack", wide)),
            html.section(
                f"{data.measured_on.capitalize()} images in feature space",
                html.group("pair", _embedding_pictures(data, labels, order, picture)),
            ),
            html.section("Augmentation", html.group("stack", _view_pictures(data, picture))),
            html.section("Data", html.settings(data.dataset)),
            html.section("Run", html.settings(_scalars(data.summary))),
            html.details("Configuration", html.settings(data.config)),
            f"<footer>Accuracies belong to the averaged (EMA) model on {data.where}; the geometric mean counts a "
            f"recall of 0 as {1 / len(data.class_names):.2g} % (1 / (100 x classes)). "
            "The pictures are also in the folder figures.</footer>",
        ]
    )
    path = run_dir / "report.html"
    text = html.page(data.title, body)
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))
    return path


def _facts(data: ReportData) -> dict[str, Any]:
    facts = {
        "dataset": data.dataset.get("name"),
        "method": data.summary.get("method"),
        "steps": data.history[-1]["step"] if data.history else data.summary.get("step"),
        "classes": len(data.class_names),
        "labeled": int(np.sum(data.labeled_counts)),
    }
    if data.unlabeled_counts is not None:
        facts["unlabeled"] = int(np.sum(data.unlabeled_counts))
    if data.confusion is not None:
        facts[data.measured_on] = int(data.confusion.sum())
    facts["steps/s"] = data.summary.get("steps_per_second")
    return {name: value for name, value in facts.items() if value is not None}


def _cards(data: ReportData) -> str:
    if data.confusion is None:
        return ""
    summary = History(data.history).summary()
    named = {"balanced": "bacc", "top-1": "top1", "geometric mean": "gm"}
    last, mean, best = ({label: row[key] for label, key in named.items()} for row in summary.values())
    groups = compute_metrics(data.confusion, data.labeled_counts)
    evaluations = summary["mean_last_20"]["evaluations"]
    averaged = "evaluations" if evaluations == MEAN_WINDOW else f"only {evaluations}, as this network has no more"
    error = data.summary.get("bacc_error")

    def with_error(values: dict[str, float]) -> dict[str, float]:
        known = {} if error is None else {"standard error": error}
        return {"balanced": values["balanced"], **known, **values}

    cards = []
    if chosen := data.summary.get("best_on_validation"):
        values = with_error({label: chosen[key] for label, key in named.items()})
        note = f"after step {chosen['step']:,}, by its log-loss"
        optimistic = data.measured_on != "test"
        cards.append(html.card("Chosen by validation", note, values, optimistic=optimistic))
    cards += [
        html.card("Last evaluation", f"after step {summary['last']['step']:,}", last if chosen else with_error(last)),
        html.card(f"Mean of the last {MEAN_WINDOW}", averaged, mean),
        html.card("Best evaluation", f"chosen on {data.where}: optimistic", best, optimistic=True),
        html.card(
            "Classes with few labels",
            f"thirds of the classes by labeled images, {'chosen' if chosen else 'last'} evaluation",
            {"few": groups["few"], "medium": groups["medium"], "many": groups["many"]},
        ),
    ]
    return f'<div class="cards">{"".join(cards)}</div>'


def _named(data: ReportData) -> bool:
    """Whether the pictures name the classes, which are few enough."""
    return len(data.class_names) <= NAMED_CLASSES


def _bacon_never_acted(data: ReportData) -> str:
    """A line for a run with BaCon whose loss was 0 whenever it was logged, with the reason where it is known."""
    if data.base_temperature is None or not data.train_history:
        return ""
    if any(row.get("loss/contrastive") for row in data.train_history):
        return ""
    begin, steps = data.config.get("bacon.contrast_start"), data.config.get("steps")
    last = (data.history or data.train_history)[-1]["step"]
    if begin is not None and steps is not None and last <= begin * steps:
        why = f"it begins after step {begin * steps:,.0f} (--bacon.contrast-start), and the run has {last:,}"
    elif not any(row.get("stats/reliable") for row in data.train_history):
        sure = data.config.get("bacon.reliable_threshold")
        reached = "no row was reliable" if sure is None else f"no row reached the confidence {sure:g}"
        why = f"{reached} (--bacon.reliable-threshold)"
    else:
        why = "its logged loss is 0 throughout"
    return f"BaCon never acted in this run: {why}. What is measured here is the method without it."


def _class_pictures(
    data: ReportData, labels: Sequence[str], order: np.ndarray, picture: Callable[..., Picture]
) -> tuple[list[Picture], list[Picture]]:
    """Wide pictures of the classes, and narrow ones of BaCon's temperatures."""
    if data.confusion is None:
        return [], _temperature_pictures(data, labels, order, picture)
    metrics = compute_metrics(data.confusion, data.labeled_counts)
    groups = class_groups(len(data.class_names), data.labeled_counts)
    draw = partial(
        figures.per_class,
        metrics["per_class"],
        data.labeled_counts,
        data.unlabeled_counts,
        groups,
        labels,
        order,
        f"recall on {data.where}",
    )
    known = "" if data.unlabeled_counts is None else " and unlabeled"
    wide = [
        picture(
            "per_class",
            draw,
            "Bars: recall of each class above the number of its training images",
            f"Recall of each class above its number of labeled{known} training images (logarithmic). A method that "
            "ignores the imbalance falls off to the right.",
            1040,
            620,
        ),
        picture(
            "confusion",
            partial(figures.confusion, data.confusion, labels, order),
            "Confusion matrix in percent of the true class",
            f"Each row shows where the {data.measured_on} images of one class went, in percent; the color scale is "
            "stretched toward small shares so that rare errors stay visible. Columns that collect errors are favored "
            "classes.",
            780,
            560,
        ),
    ]
    return wide, _temperature_pictures(data, labels, order, picture)


def _temperature_pictures(
    data: ReportData, labels: Sequence[str], order: np.ndarray, picture: Callable[..., Picture]
) -> list[Picture]:
    if data.temperatures is None:
        return []
    history = data.temperature_history if data.temperature_history and len(data.temperature_history) > 1 else None
    narrow = [
        picture(
            "temperature",
            partial(
                figures.temperature, data.temperatures, data.base_temperature, history and history[0], labels, order
            ),
            "Temperature of each class's positive logit",
            "BaCon's balanced temperature adjustment: classes with many selected images get a lower temperature for "
            f"their positive logit. {_temperature_range(data)}",
            520,
        )
    ]
    if history is not None:
        narrow.append(
            picture(
                "temperature_history",
                partial(figures.temperature_history, history, order),
                "Curves over training steps: temperature of each class's positive logit, one line a class",
                "The same over training: the adjustment fades toward its end.",
                520,
            )
        )
    return narrow


def _temperature_range(data: ReportData) -> str:
    """How little the temperatures move."""
    rows = [row["temperatures"] for row in data.temperature_history or ()]
    values = np.array([*rows, data.temperatures], dtype=np.float64)
    base = data.base_temperature or values.max()
    text = f"The axis is narrow: all temperatures lie between {values.min():.5g} and {values.max():.5g}"
    if data.base_temperature is not None:
        text += f", at most {100 * (1 - values.min() / base):.2g} % below that of the negatives"
    return f"{text}. By its formula the adjustment hardly moves them: by a share eta at most, 0.005 in the paper."


def _class_table(data: ReportData, order: np.ndarray) -> str:
    known = ["labeled", *(["unlabeled"] if data.unlabeled_counts is not None else [])]
    if data.confusion is None:
        counts = [data.labeled_counts] + ([data.unlabeled_counts] if data.unlabeled_counts is not None else [])
        rows = [[data.class_names[c], *(f"{int(found[c]):,}" for found in counts)] for c in order]
        return html.details("All classes as a table", html.table(["class", *known], rows))
    # The counts last: a phone shows the first columns, and the picture above has the counts too.
    columns = ["class", "recall %", "precision %", "most often taken for", *known, data.measured_on]
    recall = compute_metrics(data.confusion, data.labeled_counts)["per_class"]
    rows = []
    for c in order:
        row, predicted = data.confusion[c], data.confusion[:, c].sum()
        errors = np.where(np.arange(len(row)) == c, 0, row)
        worst = int(errors.argmax())
        taken_for = f"{data.class_names[worst]} ({100 * errors[worst] / row.sum():.0f}\u00a0%)" if errors.any() else "–"
        unlabeled = [f"{int(data.unlabeled_counts[c]):,}"] if data.unlabeled_counts is not None else []
        precision = percent(row[c] / predicted) if predicted else "–"
        counts = [f"{int(data.labeled_counts[c]):,}", *unlabeled, f"{int(row.sum()):,}"]
        rows.append([data.class_names[c], percent(recall[c]), precision, taken_for, *counts])
    return html.details("All classes as a table", html.table(columns, rows), opened=_named(data))


def _embedding_pictures(
    data: ReportData, labels: Sequence[str], order: np.ndarray, picture: Callable[..., Picture]
) -> list[Picture]:
    pictures = []
    for name, values, what, normalize in (
        ("features", data.features, "Backbone features", False),
        ("projections", data.projections, "Projections into the contrastive space (compared by cosine)", True),
    ):
        if values is None or not len(values):
            continue
        chosen = np.sort(np.random.default_rng(0).permutation(len(values))[:MAX_POINTS])
        points, kind = embed(values[chosen], normalize=normalize)
        classes = np.asarray(data.feature_labels)[chosen]
        draw = partial(figures.embedding, points, classes, labels, order, kind)
        caption = f"{what} of {len(chosen):,} {data.measured_on} images, {kind}, colored by true class."
        pictures.append(picture(f"embedding_{name}", draw, f"Scatter plot of {name} by class", caption, 560))
    return pictures


def _view_pictures(data: ReportData, picture: Callable[..., Picture]) -> list[Picture]:
    named = (("original", data.original_samples), ("weak", data.weak_samples), ("strong", data.strong_samples))
    rows = [(name, images[:MAX_VIEWS]) for name, images in named if images is not None and len(images)]
    if not rows:
        return []
    caption = "Training images and what the augmentation makes of them."
    if any(key.startswith("stats/pseudo") for row in data.train_history for key in row):
        caption = (
            "Unlabeled images and the views the network sees: the weak view gives the pseudo-label, and the strong "
            "view is trained to agree with it."
        )
    alt = "Sample images in rows: " + ", ".join(name for name, _ in rows)
    width = 70 + 98 * max(len(images) for _, images in rows)
    return [picture("views", partial(figures.views, rows), alt, caption, width, min(width, 480))]


def _scalars(values: Mapping[str, Any]) -> dict[str, Any]:
    """The entries that fit on a line; accuracies per class and per evaluation are shown elsewhere."""
    return {key: value for key, value in values.items() if isinstance(value, (str, bool, int, float))}
