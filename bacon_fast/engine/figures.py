"""The pictures of a run's report, drawn with Matplotlib's object interface (no global state), light or dark.

Colors are chosen to be told apart with color-vision deficiencies: lines use Okabe and Ito's hues (2008), classes use
Petroff's ten-color cycle (arXiv 2107.02270), ordered quantities use cividis.
"""

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import matplotlib
import numpy as np
from matplotlib import patheffects
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.cm import ScalarMappable
from matplotlib.colorbar import Colorbar
from matplotlib.colors import Colormap, LinearSegmentedColormap, Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullFormatter

from bacon_fast.engine.metrics import GROUPS

# Up to this many classes, each has its own tick label, its number in the confusion matrix and its name in the scatter.
NAMED_CLASSES = 20
CLASS_COLORS = (
    "#3f90da", "#ffa90e", "#bd1f01", "#94a4a2", "#832db6", "#a96b59", "#e76300", "#b9ac70", "#717581", "#92dadd",
)  # fmt: skip
SMOOTHED_FROM = 60


@dataclass(frozen=True)
class Theme:
    """Colors of one appearance of the page."""

    background: str
    ink: str
    muted: str
    grid: str
    accent: str
    series: tuple[str, ...]
    rank_range: tuple[float, float]
    """Part of the ordered colormap that stands out from the background."""


LIGHT = Theme(
    "#ffffff", "#1c2530", "#5b6675", "#e3e8ee", "#0b66b0",
    ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#6b7280"), (0.0, 0.92),
)  # fmt: skip
DARK = Theme(
    "#171c23", "#e6eaf0", "#9aa5b3", "#2b333d", "#6db6f2",
    ("#56b4e9", "#f0883e", "#2fc198", "#e29cc4", "#f0c544", "#8fa8ff", "#a6afba"), (0.25, 1.0),
)  # fmt: skip


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


def to_png(figure: Figure) -> bytes:
    """The figure as PNG bytes."""
    buffer = io.BytesIO()
    FigureCanvasAgg(figure).print_png(buffer)
    return buffer.getvalue()


def curves(panels: Sequence[Panel], theme: Theme) -> Figure:
    """Panels of curves over training steps, side by side."""
    figure = _figure(5.2 * len(panels), 3.5, theme)
    for index, panel in enumerate(panels):
        axes = figure.add_subplot(1, len(panels), index + 1)
        _style(axes, theme, "training step", panel.ylabel)
        axes.grid(color=theme.grid, linewidth=0.8)
        for number, line in enumerate(panel.lines):
            _draw_line(axes, line, number, theme)
        _step_axis(axes, [step for line in panel.lines for step in line.steps])
        _value_limits(axes)
        if panel.fraction:
            axes.yaxis.set_major_formatter(FuncFormatter(_percent_label))
        _legend(axes, theme)
    return figure


def confusion(
    matrix: np.ndarray, class_names: Sequence[str], theme: Theme, columns: Sequence[str] | None = None
) -> Figure:
    """Confusion matrix [K, K] in percent of the true class; rows of absent classes stay empty.

    `columns` names the columns where they are not the K classes: matrix [K, len(columns)].
    """
    columns = class_names if columns is None else columns
    num_classes = len(matrix)
    total = matrix.sum(axis=1, keepdims=True)
    share = np.divide(matrix, total, out=np.full(matrix.shape, np.nan), where=total > 0)
    side = min(7.6, 4.2 + 0.26 * num_classes)
    figure = _figure(side + 0.7, side, theme)
    axes = figure.add_subplot()
    _style(axes, theme, "predicted class" if len(columns) == num_classes else "pseudo-label", "true class")
    scale = LinearSegmentedColormap.from_list("share", [theme.background, theme.accent])
    # A square root keeps errors of a few percent visible beside a diagonal near one.
    image = axes.imshow(np.sqrt(share), cmap=scale, vmin=0, vmax=1, interpolation="nearest")
    if num_classes <= NAMED_CLASSES:
        rotation = {"rotation": 45, "ha": "right"} if max(map(len, columns)) > 2 else {}
        axes.set_xticks(range(len(columns)), _literal(columns), **rotation)
        axes.set_yticks(range(num_classes), _literal(class_names))
        for (row, column), value in np.ndenumerate(share):
            if value >= 0.005:
                color = theme.background if value > 0.3 else theme.ink
                axes.text(column, row, f"{100 * value:.0f}", ha="center", va="center", color=color, fontsize=8)
    for spine in axes.spines.values():
        spine.set_visible(True)
    bar = figure.colorbar(image, ax=axes, shrink=0.85, pad=0.02)
    shown = np.array([0, 0.05, 0.2, 0.5, 1])
    bar.set_ticks(np.sqrt(shown), labels=[f"{100 * value:.0f} %" for value in shown])
    _style_colorbar(bar, theme, "share of the true class")
    return figure


def per_class(
    recall: Sequence[float | None],
    labeled: Sequence[int],
    unlabeled: Sequence[int] | None,
    groups: Sequence[str],
    class_names: Sequence[str],
    order: np.ndarray,
    theme: Theme,
) -> Figure:
    """Recall of each class above the number of its training images; classes stand in the given order."""
    figure = _figure(10.4, 5.2, theme)
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(3, 2))
    position = np.arange(len(order))
    color = dict(zip(GROUPS, theme.series))

    _style(upper, theme, None, "recall on the test set")
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
    upper.yaxis.set_major_formatter(FuncFormatter(_percent_label))
    upper.tick_params(labelbottom=False)
    _legend(upper, theme)

    _style(lower, theme, _class_axis_label(len(order)), "training images")
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
    _class_ticks(lower, class_names, order)
    lower.set_xlim(-0.7, len(order) - 0.3)
    _legend(lower, theme)
    return figure


def temperature(
    values: Sequence[float],
    base: float | None,
    history: Sequence[Mapping] | None,
    class_names: Sequence[str],
    order: np.ndarray,
    theme: Theme,
) -> Figure:
    """Temperature of each class's positive logit, and its course over training when there is one."""
    with_history = history is not None and len(history) > 1
    figure = _figure(10.4, 3.5, theme)
    axes = figure.add_subplot(1, 2 if with_history else 1, 1)
    _style(axes, theme, _class_axis_label(len(order)), "temperature")
    axes.grid(axis="y", color=theme.grid, linewidth=0.8)
    position, size = np.arange(len(order)), 36 if len(order) <= NAMED_CLASSES else 12
    shown = [np.asarray(values, dtype=np.float64)[order]]
    if with_history:
        # The adjustment fades to nothing by the last step: its start is the interesting part.
        shown.append(np.asarray(history[0]["temperatures"], dtype=np.float64)[order])
        label = f"positives at step {_step_label(history[0]['step'])}"
        axes.scatter(position, shown[1], s=size, facecolors="none", edgecolors=theme.accent, zorder=3, label=label)
    axes.scatter(position, shown[0], s=size, color=theme.accent, zorder=3, label="positives at the end")
    if base is not None:
        axes.axhline(base, color=theme.muted, linestyle="--", linewidth=1.2, label="negatives")
        shown.append(np.full(len(order), base))
    axes.vlines(position, np.min(shown, axis=0), np.max(shown, axis=0), color=theme.grid, linewidth=2)
    _class_ticks(axes, class_names, order)
    _pad_limits(axes, np.ravel(shown))
    _legend(axes, theme)
    if with_history:
        axes = figure.add_subplot(1, 2, 2)
        _style(axes, theme, "training step", None)
        axes.grid(color=theme.grid, linewidth=0.8)
        steps = [row["step"] for row in history]
        table = np.array([row["temperatures"] for row in history], dtype=np.float64)
        cmap, norm = _rank_colors(len(order), theme)
        for rank, c in enumerate(order):
            axes.plot(steps, table[:, c], color=cmap(norm(rank)), linewidth=1.4 if len(order) <= NAMED_CLASSES else 0.8)
        _step_axis(axes, steps)
        _pad_limits(axes, table.ravel())
        _rank_colorbar(figure, axes, len(order), theme)
    return figure


def embedding(
    points: np.ndarray, labels: np.ndarray, class_names: Sequence[str], order: np.ndarray, axis_name: str, theme: Theme
) -> Figure:
    """Scatter of an embedding [N, 2] colored by true class; few classes are also named where they lie."""
    figure = _figure(5.4, 5.0, theme)
    axes = figure.add_subplot()
    _style(axes, theme, f"{axis_name} 1", f"{axis_name} 2")
    axes.set_xticks([])
    axes.set_yticks([])
    num_classes = len(class_names)
    size = float(np.clip(9000 / max(len(points), 1), 5, 28))
    if num_classes <= len(CLASS_COLORS):
        colors = np.array(CLASS_COLORS)[labels]
        axes.scatter(points[:, 0], points[:, 1], s=size, c=colors, linewidths=0, alpha=0.85)
    else:
        rank = np.empty(num_classes, dtype=np.int64)
        rank[order] = np.arange(num_classes)
        cmap, norm = _rank_colors(num_classes, theme)
        axes.scatter(points[:, 0], points[:, 1], s=size, c=cmap(norm(rank[labels])), linewidths=0, alpha=0.85)
        _rank_colorbar(figure, axes, num_classes, theme)
    if num_classes <= NAMED_CLASSES:
        halo = [patheffects.withStroke(linewidth=3, foreground=theme.background)]
        for c in np.unique(labels):
            x, y = np.median(points[labels == c], axis=0)
            name = axes.text(x, y, _literal(class_names)[c], color=theme.ink, path_effects=halo)
            name.set(ha="center", va="center", fontsize=10, fontweight="bold")
    return figure


def views(rows: Sequence[tuple[str, np.ndarray]], theme: Theme) -> Figure:
    """Rows of images uint8 [n, H, W, 3], each with its name; one column an image."""
    columns = max(len(images) for _, images in rows)
    figure = _figure(0.6 + 0.98 * columns, 0.98 * len(rows) + 0.1, theme)
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


def _figure(width: float, height: float, theme: Theme) -> Figure:
    return Figure(figsize=(width, height), dpi=150, facecolor=theme.background, layout="constrained")


def _style(axes: Axes, theme: Theme, xlabel: str | None, ylabel: str | None) -> None:
    axes.set_facecolor(theme.background)
    axes.set_axisbelow(True)
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(theme.grid)
    axes.tick_params(colors=theme.muted, labelsize=9, length=0, which="both")
    if xlabel:
        axes.set_xlabel(xlabel, color=theme.muted, fontsize=9.5)
    if ylabel:
        axes.set_ylabel(ylabel, color=theme.muted, fontsize=9.5)


def _legend(axes: Axes, theme: Theme) -> None:
    labels = axes.get_legend_handles_labels()[1]
    if labels:
        axes.legend(
            loc="lower left", bbox_to_anchor=(-0.01, 1.0), ncols=min(len(labels), 3), frameon=False, fontsize=9,
            labelcolor=theme.ink, handlelength=1.4, columnspacing=1.4, borderaxespad=0.2,
        )  # fmt: skip


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
    """Centered moving mean; near the ends over the neighbors that exist."""
    total = np.concatenate([[0.0], np.cumsum(values)])
    index = np.arange(len(values))
    low, high = np.maximum(index - radius, 0), np.minimum(index + radius + 1, len(values))
    return (total[high] - total[low]) / (high - low)


def _step_axis(axes: Axes, steps: Sequence[float]) -> None:
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    axes.xaxis.set_major_formatter(FuncFormatter(_step_label))
    if len(set(steps)) == 1:
        axes.set_xlim(steps[0] - 1, steps[0] + 1)


def _value_limits(axes: Axes) -> None:
    """Show a curve that is constant up to rounding against zero, not as noise magnified."""
    low, high = axes.dataLim.intervaly
    if np.isfinite([low, high]).all() and high - low <= 1e-6 * max(abs(low), abs(high)):
        axes.set_ylim(min(1.25 * low, 0), max(1.25 * high, 0) or 1)


def _percent_label(value: float, _position: int | None = None) -> str:
    return f"{100 * value:.3g} %"


def _class_axis_label(num_classes: int) -> str:
    return "class, most labeled images first" + ("" if num_classes <= NAMED_CLASSES else " (rank)")


def _literal(names: Sequence[str]) -> list[str]:
    """Names as matplotlib shows them letter by letter: a pair of dollar signs would be read as a formula."""
    return [name.replace("$", r"\$") for name in names]


def _class_ticks(axes: Axes, class_names: Sequence[str], order: np.ndarray) -> None:
    if len(order) <= NAMED_CLASSES:
        long = max(map(len, class_names)) > (9 if len(order) <= 10 else 3)
        names = [_literal(class_names)[c] for c in order]
        axes.set_xticks(range(len(order)), names, rotation=35 if long else 0, ha="right" if long else "center")
    else:
        axes.xaxis.set_major_locator(MaxNLocator(10, integer=True))


def _pad_limits(axes: Axes, values: Sequence[float]) -> None:
    """Limits just around the values, with ticks written in full rather than as an offset."""
    low, high = float(np.min(values)), float(np.max(values))
    margin = 0.08 * (high - low) or 0.01 * abs(high) or 1.0
    axes.set_ylim(low - margin, high + margin)
    axes.yaxis.set_major_locator(MaxNLocator(5))
    axes.ticklabel_format(axis="y", useOffset=False, style="plain")


def _rank_colors(num_classes: int, theme: Theme) -> tuple[Colormap, Normalize]:
    """Colors from the class with most to the one with fewest labels, without those that fade into the background."""
    colors = matplotlib.colormaps["cividis"](np.linspace(*theme.rank_range, 256))
    return LinearSegmentedColormap.from_list("rank", colors), Normalize(0, max(num_classes - 1, 1))


def _rank_colorbar(figure: Figure, axes: Axes, num_classes: int, theme: Theme) -> None:
    cmap, norm = _rank_colors(num_classes, theme)
    bar = figure.colorbar(ScalarMappable(norm, cmap), ax=axes, shrink=0.85, pad=0.02)
    bar.set_ticks([0, num_classes - 1], labels=["most", "fewest"])
    _style_colorbar(bar, theme, "labeled images of the class")


def _style_colorbar(bar: Colorbar, theme: Theme, label: str) -> None:
    bar.outline.set_visible(False)
    bar.ax.tick_params(colors=theme.muted, labelsize=8.5, length=0)
    bar.set_label(label, color=theme.muted, fontsize=9)


def _step_label(value: float, _position: int | None = None) -> str:
    return f"{value / 1000:g}k" if abs(value) >= 1000 else f"{value:g}"
