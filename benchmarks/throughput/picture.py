"""The picture of benchmarks/throughput: a horizontal bar an arm, from the slowest to the fastest round."""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot

from bacon_fast.files import write_atomically


def draw(rows: list[dict], path: Path) -> None:
    """Saves the arms' steps a second as a PNG file."""
    rows = [row for row in rows if row["steps_per_s"] != ""]
    labels = [f"{row['arm']}  {row['name']}\n{row['precision']}" for row in rows]
    medians = [row["steps_per_s"] for row in rows]
    spread = [
        [row["steps_per_s"] - row["slowest"] for row in rows],
        [row["fastest"] - row["steps_per_s"] for row in rows],
    ]
    colors = ["#1b6ca8" if row["arm"].startswith("F") else "#9aa5b1" for row in rows]

    figure, axes = pyplot.subplots(figsize=(9, 0.9 + 0.55 * len(rows)), layout="constrained")
    axes.barh(range(len(rows)), medians, xerr=spread, color=colors, ecolor="#333333", capsize=3)
    axes.set_yticks(range(len(rows)), labels, fontsize=8)
    axes.invert_yaxis()
    for place, row in enumerate(rows):
        text = f"{row['steps_per_s']:.3g}"
        if row["ours_over_arm"] not in ("", 1.0):
            text += f"  (ours {row['ours_over_arm']:.3g}x)"
        axes.annotate(text, (row["fastest"], place), xytext=(6, 0), textcoords="offset points", va="center", fontsize=8)
    axes.set_xlim(0, 1.3 * max(row["fastest"] for row in rows))
    axes.set_xlabel("training steps a second: median, slowest and fastest round")
    first = rows[0]
    axes.set_title(
        f"FixMatch + ABC + BaCon, {first['backbone']}, {first['batch']} images, {first['data']}\n"
        f"{first['machine']}, {first['threads']} threads, torch {first['torch']}, {first['commit']}, {first['date']}",
        fontsize=9,
    )
    axes.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, lambda temporary: figure.savefig(temporary, format="png", dpi=150))
    pyplot.close(figure)
