"""Pictures of a table: accuracies with deviations, recall of each class by method, t-SNE of methods side by side.

Each says on itself which column it is of, how many steps the runs had and how many seeds. Classes stand in the report's
order, most labeled images first, under the report's labels.
"""

from collections.abc import Sequence

import numpy as np
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from bacon_fast.data.longtail import Split
from bacon_fast.engine.build import build_dataset
from bacon_fast.engine.config import Config
from bacon_fast.engine.evaluation import predict
from bacon_fast.engine.presets import PRESETS
from bacon_fast.report import style
from bacon_fast.report.data import MAX_POINTS
from bacon_fast.report.embedding import embed
from bacon_fast.report.labels import class_labels
from bacon_fast.report.style import CLASS_COLORS, NAMED_CLASSES, Theme
from bacon_fast.reproduce.results import Result
from bacon_fast.reproduce.tables import Table
from bacon_fast.run import open_run

SIDE_BY_SIDE = ("fixmatch", "fixmatch+abc", "fixmatch+abc+bacon")


def accuracies(table: Table, results: Sequence[Result], theme: Theme) -> Figure:
    """A bar a method: last evaluation with its deviation over the seeds and a dot a seed, best evaluation, published.

    Args:
        results: of one column of the table, all with finished runs.
    """
    figure = style.new_figure(7.6, 1.4 + 0.42 * len(results), theme)
    axes = figure.add_subplot()
    style.style_axes(axes, theme, None, None)
    axes.grid(axis="x", color=theme.grid, linewidth=0.8)
    name = "top1" if table.metric == "error" else table.metric
    last = [result.accuracy("last", table.metric) for result in results]
    means, deviations = [spread.mean for spread in last], [spread.deviation or 0.0 for spread in last]
    best = [result.accuracy("best_on_test", table.metric).mean for result in results]
    values = {i: value for i, result in enumerate(results) if (value := result.published(table.source)) is not None}
    position = np.arange(len(results))
    marks = {"capsize": 3, "elinewidth": 1.2, "ecolor": theme.ink}
    axes.barh(position, means, xerr=deviations, height=0.5, color=theme.series[0], error_kw=marks, label="last")
    seeds = [(100 * s["last"][name], i) for i, result in enumerate(results) for s in result.summaries]
    if table.metric == "error":
        seeds = [(100 - value, i) for value, i in seeds]
    axes.plot(*zip(*seeds), "o", color=theme.ink, markersize=2.5, alpha=0.8, label="a seed, last")
    axes.plot(best, position, "o", mfc="none", color=theme.ink, markersize=5, label="best, chosen on the test set")
    shown = [*means, *best, *(value for value, _ in seeds)]
    if values:  # below the bars, so that neither hides the other's deviation
        published = [value.mean for value in values.values()]
        spreads = [value.deviation or 0.0 for value in values.values()]
        axes.errorbar(
            published, position[list(values)] + 0.38, xerr=spreads, fmt="D", color=theme.series[1], markersize=4,
            capsize=2, elinewidth=1, label=f"published ({table.source.selection})",
        )  # fmt: skip
        shown += published
    # A few points of difference are the subject: the axis is cut, and says so.
    low = max(0.0, min(shown) - 3 * max(deviations) - 0.15 * (max(shown) - min(shown)) - 1)
    axes.set_xlim(low, min(100.5, max(shown) + max(deviations) + 0.08 * (max(shown) - low)))
    title = "error" if table.metric == "error" else "balanced accuracy"
    note = f", axis from {low:.0f}" if low > 0 else ""
    axes.set_xlabel(f"{title} on the test set (%{note})", color=theme.muted, fontsize=9.5)
    axes.set_yticks(position, [result.cell.row.name for result in results])
    axes.invert_yaxis()
    axes.xaxis.set_major_locator(MaxNLocator(8))
    style.add_legend(axes, theme)
    _name(figure, results, theme)
    return figure


def recalls(results: Sequence[Result], theme: Theme) -> Figure:
    """Recall of each class after the last step, mean over the seeds: a row a method; `results` as in `accuracies`."""
    values = np.array([[np.nan if v is None else v for v in r.recalls()] for r in results], dtype=np.float64)
    names, order = classes_of(results)
    values, named = values[:, order], len(names) <= NAMED_CLASSES
    figure = style.new_figure(3.2 + 0.52 * min(len(names), NAMED_CLASSES), 1.6 + 0.34 * len(results), theme)
    axes = figure.add_subplot()
    style.style_axes(axes, theme, style.class_axis_label(len(names)), None)
    scale = LinearSegmentedColormap.from_list("recall", [theme.background, theme.accent])
    image = axes.imshow(values, cmap=scale, vmin=0, vmax=1, aspect="auto", interpolation="nearest")
    axes.set_yticks(range(len(results)), [result.cell.row.name for result in results])
    if named:
        style.class_ticks(axes, class_labels(names, order), order)
        for (row, column), value in np.ndenumerate(values):
            if np.isfinite(value):
                color = theme.background if value > 0.55 else theme.ink
                axes.text(column, row, f"{100 * value:.0f}", ha="center", va="center", color=color, fontsize=8)
    bar = figure.colorbar(image, ax=axes, pad=0.02)
    bar.set_ticks([0, 0.5, 1], labels=["0 %", "50 %", "100 %"])
    style.style_colorbar(bar, theme, "recall")
    _name(figure, results, theme)
    return figure


def embeddings(results: Sequence[Result], device: str, theme: Theme) -> Figure | None:
    """t-SNE of the test images' features under each of SIDE_BY_SIDE, first finished seed; None for fewer than two."""
    found = {}
    for result in results:
        if result.cell.row.method in SIDE_BY_SIDE:
            found.setdefault(result.cell.row.method, result)
    chosen = [found[method] for method in SIDE_BY_SIDE if method in found]
    if len(chosen) < 2:
        return None
    names, order = classes_of(chosen)
    labels = class_labels(names, order)
    figure = style.new_figure(4.6 * len(chosen), 4.9, theme)
    for axes, result in zip(figure.subplots(1, len(chosen), squeeze=False).flat, chosen):
        points, classes, technique = _embed(result, device)
        style.style_axes(axes, theme, f"{technique} 1", f"{technique} 2")
        axes.set_xticks([])
        axes.set_yticks([])
        axes.set_title(f"{result.cell.row.name}, seed {result.seeds[0]}", color=theme.ink, fontsize=10.5)
        if len(names) <= len(CLASS_COLORS):
            style.scatter_classes(axes, points, classes, labels, order, {"s": 8, "linewidths": 0, "alpha": 0.85})
        else:
            colors, norm = style.rank_colors(len(names), theme)
            axes.scatter(*points.T, s=5, c=colors(norm(np.argsort(order)[classes])), linewidths=0, alpha=0.85)
    if len(names) <= len(CLASS_COLORS):
        style.class_legend(figure, axes, labels, theme)
    else:
        style.rank_colorbar(figure, axes, len(names), theme)
    _name(figure, chosen, theme)
    return figure


def classes_of(results: Sequence[Result]) -> tuple[Sequence[str], np.ndarray]:
    """Names of the classes [K], and their order: most labeled images first, in the first finished run."""
    result = next(result for result in results if result.finished)
    split = Split.load(result.finished[0].folder / "split.json")
    return result.summaries[0]["class_names"], np.argsort(-np.asarray(split.labeled_counts), kind="stable")


def describe(results: Sequence[Result]) -> str:
    """Column, length of the runs and seeds, as a line above a picture."""
    configs = [result.config for result in results]
    steps, full = ({f"{n:,}" for n in numbers} for numbers in ([c.steps for c in configs], _full(configs)))
    share = sorted({f"{100 * c.steps / n:.3g} %" for c, n in zip(configs, _full(configs))})
    length = f"{' or '.join(sorted(steps))} steps"
    length += "" if share == ["100 %"] else f": {' or '.join(share)} of {' or '.join(sorted(full))}"
    seeds = sorted({len(result.seeds) for result in results})
    count = str(seeds[0]) if len(seeds) == 1 else f"{seeds[0]} to {seeds[-1]}"
    column = results[0].cell.column
    name = column.name if column.name == column.preset else f"{column.name} by preset {column.preset}"
    return f"{name}, {length}, {count} seed{'' if seeds == [1] else 's'}"


def _full(configs: Sequence[Config]) -> list[int]:
    return [PRESETS[config.preset].steps for config in configs]


def _name(figure: Figure, results: Sequence[Result], theme: Theme) -> None:
    figure.suptitle(describe(results), x=0.01, ha="left", color=theme.muted, fontsize=9)


def _embed(result: Result, device: str) -> tuple[np.ndarray, np.ndarray, str]:
    """Points [N, 2], true classes [N] and technique of the first finished run."""
    config = result.finished[0].config
    run = open_run(config.run.run_dir, device)
    dataset = build_dataset(config, resized=run.interpolation)
    stride = max(1, len(dataset.test_images) // MAX_POINTS)
    images, labels = dataset.test_images[::stride], dataset.test_labels[::stride]
    features, _ = predict(run.network, run.normalize, images, run.device)
    points, technique = embed(features.cpu().numpy())
    return points, labels.numpy(), technique
