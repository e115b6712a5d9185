"""The picture of the emoji runs: a dot a seed, a line at the mean."""

import statistics
from collections.abc import Sequence
from pathlib import Path

from bacon_fast.report import style
from bacon_fast.report.style import LIGHT, to_png

PANELS = {"bacc_last_percent": "balanced accuracy (%)", "few_last_percent": "recall of the rarest third (%)"}


def draw(rows: Sequence[dict], path: Path) -> None:
    """Writes a PNG of the rows that `benchmarks.emoji` made."""
    arms = list(dict.fromkeys(row["arm"] for row in rows))
    figure = style.new_figure(8.4, 1.3 + 0.36 * len(arms), LIGHT)
    for axes, (name, title) in zip(figure.subplots(1, 2, sharey=True), PANELS.items()):
        style.style_axes(axes, LIGHT, title, None)
        for place, arm in enumerate(arms):
            values = [float(row[name]) for row in rows if row["arm"] == arm]
            axes.plot(values, [place] * len(values), "o", color=LIGHT.series[0], markersize=4.5, alpha=0.8)
            axes.plot([statistics.fmean(values)], [place], "|", color=LIGHT.ink, markersize=15)
        axes.set_yticks(range(len(arms)), arms)
        axes.grid(axis="x", color=LIGHT.grid, linewidth=0.8)
    axes.invert_yaxis()
    seeds = len({row["seed"] for row in rows})
    text = f"Emoji, 40 to 4 labels a class, 360 test pictures; a dot a seed ({seeds}), a bar at the mean"
    figure.suptitle(text, x=0.01, ha="left", color=LIGHT.muted, fontsize=9)
    path.write_bytes(to_png(figure))
