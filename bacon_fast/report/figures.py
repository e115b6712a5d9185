"""The pictures of a run's report, drawn with Matplotlib's object interface (no global state), light or dark."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib import patheffects
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullFormatter

from bacon_fast.engine.metrics import GROUPS
from bacon_fast.report.style import (
    CLASS_COLORS,
    NAMED_CLASSES,
    Theme,
    add_legend,
    class_axis_label,
    class_legend,
    class_ticks,
    literal,
    new_figure,
    percent_label,
    rank_colorbar,
    rank_colors,
    readable_on,
    scatter_classes,
    step_axis,
    step_label,
    style_axes,
    style_colorbar,
)

SMOOTHED_FROM = 60


@dataclass(frozen=True)
class Line:
    """One named curve over training steps; values that are None or not finite are left out."""

    label: str
    steps: Sequence[float]
    values: Sequence[float | None]


@dataclass(frozen=True)
class Panel:
    """Curves that share one pair of axes. ``fraction``: the values are fractions, shown in percent."""

    ylabel: str
    lines: Sequence[Line]
    fraction: bool = False


def curves(panel: Panel, theme: Theme) -> Figure:
    """Curves over training steps."""
    figure = new_figure(4.8, 3.4, theme)
    axes = figure.add_subplot()
    style_axes(axes, theme, "training step", panel.ylabel)
    axes.grid(color=theme.grid, linewidth=0.8)
    for number, line in enumerate(panel.lines):
        _draw_line(axes, line, number, theme)
    step_axis(axes, [step for line in panel.lines for step in line.steps])
    _value_limits(axes)
    if panel.fraction:
        axes.yaxis.set_major_formatter(FuncFormatter(percent_label))
    add_legend(axes, theme)
    return figure


def confusion(matrix: np.ndarray, labels: Sequence[str], order: np.ndarray, theme: Theme) -> Figure:
    """Confusion matrix [K, K] in percent of the true class, classes in the given order; rows of absent classes stay
    empty. A matrix [K, K+1] is of pseudo-labels, its last column of rows without one.
    """
    num_classes = len(matrix)
    of_pseudo_labels = matrix.shape[1] > num_classes
    matrix = matrix[order][:, [*order, num_classes] if of_pseudo_labels else order]
    rows = [labels[c] for c in order]
    columns = [*rows, "none"] if of_pseudo_labels else rows
    total = matrix.sum(axis=1, keepdims=True)
    share = np.divide(matrix, total, out=np.full(matrix.shape, np.nan), where=total > 0)
    side = min(7.6, 4.2 + 0.26 * num_classes)
    figure = new_figure(side + 0.7, side, theme)
    axes = figure.add_subplot()
    sorting = "most labeled images first" if num_classes <= NAMED_CLASSES else "by rank of labeled images"
    predicted = "pseudo-label" if of_pseudo_labels else "predicted class"
    style_axes(axes, theme, f"{predicted}, {sorting}", "true class")
    scale = LinearSegmentedColormap.from_list("share", [theme.background, theme.accent])
    # A square root keeps errors of a few percent visible beside a diagonal near one.
    image = axes.imshow(np.sqrt(share), cmap=scale, vmin=0, vmax=1, interpolation="nearest")
    if num_classes <= NAMED_CLASSES:
        rotation = {"rotation": 45, "ha": "right"} if max(map(len, columns)) > 2 else {}
        axes.set_xticks(range(len(columns)), literal(columns), **rotation)
        axes.set_yticks(range(num_classes), literal(rows))
        for (row, column), value in np.ndenumerate(share):
            if value >= 0.005:
                color = readable_on(scale(np.sqrt(value)), theme)
                axes.text(column, row, f"{100 * value:.0f}", ha="center", va="center", color=color, fontsize=8)
    for spine in axes.spines.values():
        spine.set_visible(True)
    bar = figure.colorbar(image, ax=axes, shrink=0.85, pad=0.02)
    shown = np.array([0, 0.05, 0.2, 0.5, 1])
    bar.set_ticks(np.sqrt(shown), labels=[f"{100 * value:.0f} %" for value in shown])
    style_colorbar(bar, theme, "share of the true class")
    return figure


def per_class(
    recall: Sequence[float | None],
    labeled: Sequence[int],
    unlabeled: Sequence[int] | None,
    groups: Sequence[str],
    labels: Sequence[str],
    order: np.ndarray,
    ylabel: str,
    theme: Theme,
) -> Figure:
    """Recall of each class above the number of its training images; classes stand in the given order."""
    figure = new_figure(10.4, 5.2, theme)
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(3, 2))
    position = np.arange(len(order))
    color = dict(zip(GROUPS, theme.series))

    style_axes(upper, theme, None, ylabel)
    upper.grid(axis="y", color=theme.grid, linewidth=0.8)
    for name in GROUPS:
        inside = [i for i in position if groups[order[i]] == name and recall[order[i]] is not None]
        if inside:
            mean = np.mean([recall[order[i]] for i in inside])
            label = f"{name}: mean {100 * mean:.1f} %"
            upper.bar(inside, [recall[order[i]] for i in inside], width=0.78, color=color[name], label=label)
    for i in position:
        value = recall[order[i]]
        if value is None:
            upper.text(i, 0.02, "absent", rotation=90, ha="center", va="bottom", color=theme.muted, fontsize=7)
        elif len(order) <= NAMED_CLASSES:
            upper.text(i, value + 0.015, f"{100 * value:.0f}", ha="center", va="bottom", color=theme.ink, fontsize=8)
    upper.set_ylim(0, 1.1 if len(order) <= NAMED_CLASSES else 1.03)
    upper.yaxis.set_major_formatter(FuncFormatter(percent_label))
    upper.tick_params(labelbottom=False)
    add_legend(upper, theme)

    style_axes(lower, theme, class_axis_label(len(order)), "training images")
    lower.grid(axis="y", color=theme.grid, linewidth=0.8)
    series = [("labeled", labeled, theme.series[6])]
    if unlabeled is not None:
        series.append(("unlabeled", unlabeled, theme.series[4]))
    lower.set_yscale("log")
    width = 0.78 / len(series)
    for number, (label, counts, shade) in enumerate(series):
        values = np.asarray(counts)[order]
        if len(order) <= NAMED_CLASSES:
            offset = (number - (len(series) - 1) / 2) * width
            lower.bar(position + offset, values, width=width, color=shade, label=label)
        else:
            line = np.where(values > 0, values, np.nan)
            lower.step(position, line, where="mid", color=shade, linewidth=2, label=label)
    lower.set_ylim(bottom=0.8)
    lower.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    lower.yaxis.set_minor_formatter(NullFormatter())
    class_ticks(lower, labels, order)
    lower.set_xlim(-0.7, len(order) - 0.3)
    add_legend(lower, theme)
    return figure


def temperature(
    values: Sequence[float],
    base: float | None,
    first: Mapping | None,
    labels: Sequence[str],
    order: np.ndarray,
    theme: Theme,
) -> Figure:
    """Temperature of each class's positive logit, and at the `first` record of the run, if there is an earlier one."""
    figure = new_figure(4.8, 3.4, theme)
    axes = figure.add_subplot()
    style_axes(axes, theme, class_axis_label(len(order)), "temperature")
    axes.grid(axis="y", color=theme.grid, linewidth=0.8)
    position, size = np.arange(len(order)), 36 if len(order) <= NAMED_CLASSES else 12
    shown = [np.asarray(values, dtype=np.float64)[order]]
    if first is not None:
        # The adjustment fades to nothing by the last step: its start is the interesting part.
        shown.append(np.asarray(first["temperatures"], dtype=np.float64)[order])
        label = f"positives at step {step_label(first['step'])}"
        axes.scatter(position, shown[1], s=size, facecolors="none", edgecolors=theme.accent, zorder=3, label=label)
    axes.scatter(position, shown[0], s=size, color=theme.accent, zorder=3, label="positives at the end")
    if base is not None:
        axes.axhline(base, color=theme.muted, linestyle="--", linewidth=1.2, label="negatives")
        shown.append(np.full(len(order), base))
    axes.vlines(position, np.min(shown, axis=0), np.max(shown, axis=0), color=theme.grid, linewidth=2)
    class_ticks(axes, labels, order)
    _pad_limits(axes, np.ravel(shown))
    add_legend(axes, theme)
    return figure


def temperature_history(history: Sequence[Mapping], order: np.ndarray, theme: Theme) -> Figure:
    """The same over training, one curve a class, colored from the most to the fewest labeled images."""
    figure = new_figure(4.8, 3.4, theme)
    axes = figure.add_subplot()
    style_axes(axes, theme, "training step", "temperature")
    axes.grid(color=theme.grid, linewidth=0.8)
    steps = [row["step"] for row in history]
    table = np.array([row["temperatures"] for row in history], dtype=np.float64)
    cmap, norm = rank_colors(len(order), theme)
    for rank, c in enumerate(order):
        axes.plot(steps, table[:, c], color=cmap(norm(rank)), linewidth=1.4 if len(order) <= NAMED_CLASSES else 0.8)
    step_axis(axes, steps)
    _pad_limits(axes, table.ravel())
    rank_colorbar(figure, axes, len(order), theme)
    return figure


def embedding(
    points: np.ndarray, classes: np.ndarray, labels: Sequence[str], order: np.ndarray, axis_name: str, theme: Theme
) -> Figure:
    """Scatter of an embedding [N, 2] colored by true class int64 [N]: up to ten with a legend; up to twenty named where
    they lie, as far as there is room.
    """
    num_classes = len(labels)
    legend = num_classes <= len(CLASS_COLORS)
    figure = new_figure(5.4, 5.8 if legend else 5.0, theme)
    axes = figure.add_subplot()
    style_axes(axes, theme, f"{axis_name} 1", f"{axis_name} 2")
    axes.set_xticks([])
    axes.set_yticks([])
    dots = {"s": float(np.clip(9000 / max(len(points), 1), 5, 28)), "linewidths": 0, "alpha": 0.85}
    if legend:
        scatter_classes(axes, points, classes, labels, order, dots)
        class_legend(figure, axes, labels, theme)
    else:
        rank = np.empty(num_classes, dtype=np.int64)
        rank[order] = np.arange(num_classes)
        cmap, norm = rank_colors(num_classes, theme)
        axes.scatter(points[:, 0], points[:, 1], c=cmap(norm(rank[classes])), **dots)
        rank_colorbar(figure, axes, num_classes, theme)
    if num_classes <= NAMED_CLASSES:
        halo = [patheffects.withStroke(linewidth=3, foreground=theme.background)]
        for c in np.unique(classes):
            if legend and len(labels[c]) > 10:  # it would cover its neighbors, and the legend has it
                continue
            x, y = np.median(points[classes == c], axis=0)
            name = axes.text(x, y, literal(labels)[c], color=theme.ink, path_effects=halo)
            name.set(ha="center", va="center", fontsize=10, fontweight="bold")
    return figure


def views(rows: Sequence[tuple[str, np.ndarray]], theme: Theme) -> Figure:
    """Rows of images uint8 [n, H, W, 3], each with its name; one column an image."""
    columns = max(len(images) for _, images in rows)
    figure = new_figure(0.6 + 0.98 * columns, 0.98 * len(rows) + 0.1, theme)
    for axes, (name, images) in zip(figure.subplots(len(rows), 1, squeeze=False).flat, rows):
        height, width = images.shape[1:3]
        axes.set_axis_off()
        # One pair of axes for the whole row: thirty of them would take longer to lay out than to draw.
        for index, image in enumerate(images):
            left = index * 1.08 * width
            axes.imshow(image, extent=(left, left + width, height, 0), interpolation="nearest")
        axes.set_xlim(0, (1.08 * columns - 0.08) * width)
        axes.set_ylim(height, 0)
        label = axes.text(-0.12 * width, height / 2, name, color=theme.muted)
        label.set(rotation=90, ha="right", va="center", fontsize=9)
    return figure


def _draw_line(axes: Axes, line: Line, number: int, theme: Theme) -> None:
    values = np.array([np.nan if value is None else value for value in line.values], dtype=np.float64)
    steps = np.asarray(line.steps, dtype=np.float64)
    keep = np.isfinite(values)
    steps, values = steps[keep], values[keep]
    if not len(values):
        return
    style = {"color": theme.series[number % len(theme.series)]}
    if number >= len(theme.series):
        style["linestyle"] = "--"
    if len(values) >= SMOOTHED_FROM:
        axes.plot(steps, values, linewidth=0.8, alpha=0.25, **style)
        values = _smooth(values, len(values) // 30)
    marker = "o" if len(values) < 12 else None
    axes.plot(steps, values, linewidth=1.8, label=line.label, marker=marker, markersize=4, **style)


def _smooth(values: np.ndarray, radius: int) -> np.ndarray:
    """Centered moving mean; near the ends it covers the neighbors that exist."""
    total = np.concatenate([[0.0], np.cumsum(values)])
    index = np.arange(len(values))
    low, high = np.maximum(index - radius, 0), np.minimum(index + radius + 1, len(values))
    return (total[high] - total[low]) / (high - low)


def _value_limits(axes: Axes) -> None:
    """Shows a curve that is constant up to rounding against zero, not as magnified noise."""
    low, high = axes.dataLim.intervaly
    if np.isfinite([low, high]).all() and high - low <= 1e-6 * max(abs(low), abs(high)):
        axes.set_ylim(min(1.25 * low, 0), max(1.25 * high, 0) or 1)


def _pad_limits(axes: Axes, values: Sequence[float]) -> None:
    """Limits just around the values, with ticks written in full rather than as an offset."""
    low, high = float(np.min(values)), float(np.max(values))
    margin = 0.08 * (high - low) or 0.01 * abs(high) or 1.0
    axes.set_ylim(low - margin, high + margin)
    axes.yaxis.set_major_locator(MaxNLocator(5))
    axes.ticklabel_format(axis="y", useOffset=False, style="plain")
