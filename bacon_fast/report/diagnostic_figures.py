"""Pictures of pseudo-label quality, class-count estimates, centers and calibration, in the style of figures.py."""

from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter

from bacon_fast.report import style
from bacon_fast.report.style import NAMED_CLASSES, Theme


def by_class(ylabel: str, steps: Sequence[float], table: np.ndarray, order: np.ndarray, theme: Theme) -> Figure:
    """Curves of fractions over training steps, one a class, colored from the most to the fewest labeled images.

    Args:
        steps: [S]; table: values [S, K] with NaN where there is none.
        order: [K], class indices from the most to the fewest labeled images.
    """
    figure = style.new_figure(4.8, 3.4, theme)
    colors, norm = style.rank_colors(len(order), theme)
    axes = figure.add_subplot()
    style.style_axes(axes, theme, "training step", ylabel)
    axes.grid(color=theme.grid, linewidth=0.8)
    for rank, c in enumerate(order):
        keep = np.isfinite(table[:, c])
        width = 1.4 if len(order) <= NAMED_CLASSES else 0.8
        axes.plot(np.asarray(steps)[keep], table[keep, c], color=colors(norm(rank)), linewidth=width)
    axes.set_ylim(-0.03, 1.03)
    axes.yaxis.set_major_formatter(FuncFormatter(style.percent_label))
    style.step_axis(axes, steps)
    style.rank_colorbar(figure, axes, len(order), theme)
    return figure


def count_estimate(
    estimate: Sequence[float], truth: Sequence[float], labels: Sequence[str], order: np.ndarray, theme: Theme
) -> Figure:
    """Estimated images per class as dots above the true ones as bars, on a logarithmic axis."""
    figure = style.new_figure(10.4, 3.2, theme)
    axes = figure.add_subplot()
    style.style_axes(axes, theme, style.class_axis_label(len(order)), "training images")
    axes.grid(axis="y", color=theme.grid, linewidth=0.8)
    position = np.arange(len(order))
    axes.bar(position, np.asarray(truth)[order], width=0.78, color=theme.series[6], label="true")
    dots = np.asarray(estimate, dtype=np.float64)[order]
    axes.scatter(position, np.where(dots > 0, dots, np.nan), color=theme.series[0], zorder=3, s=28, label="estimated")
    axes.set_yscale("log")
    axes.set_ylim(bottom=0.8)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    style.class_ticks(axes, labels, order)
    style.add_legend(axes, theme)
    return figure


def reliability(bins: np.ndarray, theme: Theme) -> Figure:
    """Accuracy in each bin of confidence against the diagonal, above the share of images in the bin.

    Args:
        bins: float [M, 3], as `evaluation.calibration_bins` gives them.
    """
    figure = style.new_figure(4.8, 4.4, theme)
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    images, _, right = bins.T
    left, bar = np.linspace(0, 1, len(bins), endpoint=False), {"width": 1 / len(bins), "align": "edge"}
    accuracy = np.divide(right, images, out=np.full(len(bins), np.nan), where=images > 0)
    style.style_axes(upper, theme, None, "accuracy")
    upper.grid(axis="y", color=theme.grid, linewidth=0.8)
    upper.bar(left, accuracy, color=theme.series[0], edgecolor=theme.background, **bar)
    upper.plot([0, 1], [0, 1], color=theme.muted, linestyle="--", linewidth=1.2, label="calibrated")
    upper.set_ylim(0, 1.03)
    upper.yaxis.set_major_formatter(FuncFormatter(style.percent_label))
    upper.tick_params(labelbottom=False)
    style.add_legend(upper, theme)
    style.style_axes(lower, theme, "confidence", "images")
    share = images / images.sum()
    lower.bar(left, share, color=theme.series[6], edgecolor=theme.background, **bar)
    for axis in (lower.xaxis, lower.yaxis):
        axis.set_major_formatter(FuncFormatter(style.percent_label))
    return figure
