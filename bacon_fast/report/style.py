"""How all pictures look: light and dark themes, axes, legends, class names and colors.

Colors are chosen to be told apart with color-vision deficiencies: lines use Okabe and Ito's hues (2008), classes use
Petroff's ten-color cycle (arXiv 2107.02270), ordered quantities use cividis.
"""

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.cm import ScalarMappable
from matplotlib.colorbar import Colorbar
from matplotlib.colors import Colormap, LinearSegmentedColormap, Normalize, to_rgb
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

# Up to this many classes, each has its own tick label, its number in the confusion matrix and its name in the scatter.
NAMED_CLASSES = 20


CLASS_COLORS = (
    "#3f90da", "#ffa90e", "#bd1f01", "#94a4a2", "#832db6", "#a96b59", "#e76300", "#b9ac70", "#717581", "#92dadd",
)  # fmt: skip


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


def to_png(figure: Figure) -> bytes:
    """The figure as PNG bytes."""
    buffer = io.BytesIO()
    FigureCanvasAgg(figure).print_png(buffer)
    return buffer.getvalue()


def new_figure(width: float, height: float, theme: Theme) -> Figure:
    """An empty figure of so many inches."""
    return Figure(figsize=(width, height), dpi=150, facecolor=theme.background, layout="constrained")


def style_axes(axes: Axes, theme: Theme, xlabel: str | None, ylabel: str | None) -> None:
    """The theme's colors, and spines at the left and below only."""
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


def contrast(one: object, other: object) -> float:
    """Ratio of the luminances of two colors, 1 to 21 (WCAG 2.1): text is read well from 4.5 on."""
    rgb = np.array([to_rgb(one), to_rgb(other)])
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    low, high = sorted(linear @ (0.2126, 0.7152, 0.0722))
    return float((high + 0.05) / (low + 0.05))


def readable_on(color: object, theme: Theme) -> str:
    """The theme's ink or its background, whichever is read better on this color."""
    return max(theme.ink, theme.background, key=lambda text: contrast(text, color))


def add_legend(axes: Axes, theme: Theme) -> None:
    """A legend above the axes, if anything in them is named, in up to 3 columns, as there is room for."""
    labels = axes.get_legend_handles_labels()[1]
    if labels:
        column = 0.4 + 0.07 * max(map(len, labels))  # inches: the line, and its letters
        room = max(1, int((axes.figure.get_figwidth() - 0.6) / column))
        axes.legend(
            loc="lower left", bbox_to_anchor=(-0.01, 1.0), ncols=min(len(labels), room, 3), frameon=False, fontsize=9,
            labelcolor=theme.ink, handlelength=1.4, columnspacing=1.4, borderaxespad=0.2,
        )  # fmt: skip


def step_axis(axes: Axes, steps: Sequence[float]) -> None:
    """Training steps on the x axis."""
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    axes.xaxis.set_major_formatter(FuncFormatter(step_label))
    if len(set(steps)) == 1:
        axes.set_xlim(steps[0] - 1, steps[0] + 1)


def percent_label(value: float, _position: int | None = None) -> str:
    """A fraction as a tick label, for FuncFormatter."""
    return f"{100 * value:.3g} %"


def class_axis_label(num_classes: int) -> str:
    """Label of an axis of classes."""
    return "class, most labeled images first" + ("" if num_classes <= NAMED_CLASSES else " (rank)")


def literal(names: Sequence[str]) -> list[str]:
    """Names that matplotlib shows letter by letter: it would read a pair of dollar signs as a formula."""
    return [name.replace("$", r"\$") for name in names]


def class_ticks(axes: Axes, labels: Sequence[str], order: np.ndarray) -> None:
    """Labels of the classes on the x axis, in the given order; ranks where they are many."""
    if len(order) <= NAMED_CLASSES:
        room = 9 * axes.figure.get_figwidth() / 10.4 * min(1, 10 / len(order))  # letters, at this size of the figure
        long = max(map(len, labels)) > room
        names = [literal(labels)[c] for c in order]
        style = {"rotation": 35, "ha": "right", "rotation_mode": "anchor"} if long else {}
        axes.set_xticks(range(len(order)), names, **style)
    else:
        axes.xaxis.set_major_locator(MaxNLocator(10, integer=True))


def scatter_classes(
    axes: Axes, points: np.ndarray, classes: np.ndarray, labels: Sequence[str], order: np.ndarray, dots: Mapping
) -> None:
    """Points [N, 2] of up to ten classes int64 [N], each class in a color of its own and named for a legend."""
    for place, c in enumerate(order):
        x, y = points[classes == c].T
        axes.scatter(x, y, color=CLASS_COLORS[place], label=literal(labels)[c], **dots)


def class_legend(figure: Figure, axes: Axes, labels: Sequence[str], theme: Theme) -> None:
    """The classes' colors below the figure, in as many columns as there is room for."""
    columns = int(np.clip(figure.get_figwidth() * 12 / (max(map(len, labels)) + 3), 1, len(labels)))
    legend = figure.legend(
        *axes.get_legend_handles_labels(), loc="outside lower center", ncols=columns, frameon=False, fontsize=9,
        labelcolor=theme.ink, handletextpad=0.1, columnspacing=1.2,
    )  # fmt: skip
    for handle in legend.legend_handles:
        handle.set_sizes([36])


def rank_colors(num_classes: int, theme: Theme) -> tuple[Colormap, Normalize]:
    """Colors from the class with the most labels to the one with the fewest. None fades into the background."""
    colors = matplotlib.colormaps["cividis"](np.linspace(*theme.rank_range, 256))
    return LinearSegmentedColormap.from_list("rank", colors), Normalize(0, max(num_classes - 1, 1))


def rank_colorbar(figure: Figure, axes: Axes, num_classes: int, theme: Theme) -> None:
    """The legend of `rank_colors`."""
    cmap, norm = rank_colors(num_classes, theme)
    bar = figure.colorbar(ScalarMappable(norm, cmap), ax=axes, shrink=0.85, pad=0.02)
    bar.set_ticks([0, num_classes - 1], labels=["most", "fewest"])
    style_colorbar(bar, theme, "labeled images of the class")


def style_colorbar(bar: Colorbar, theme: Theme, label: str) -> None:
    """The theme's colors and a label."""
    bar.outline.set_visible(False)
    bar.ax.tick_params(colors=theme.muted, labelsize=8.5, length=0)
    bar.set_label(label, color=theme.muted, fontsize=9)


def step_label(value: float, _position: int | None = None) -> str:
    """A training step as a tick label, for FuncFormatter: 12000 -> 12k."""
    return f"{value / 1000:g}k" if abs(value) >= 1000 else f"{value:g}"
