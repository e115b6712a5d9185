"""Pictures show their numbers."""

import numpy as np

from bacon_fast.engine.metrics import GROUPS, class_groups
from bacon_fast.report import figures
from bacon_fast.report.figures import Line, Panel
from bacon_fast.report.style import DARK, LIGHT


def test_confusion_matrix_is_drawn_in_percent_of_the_true_class():
    figure = figures.confusion(np.array([[150, 50], [1, 99]]), ["a", "b"], LIGHT)
    axes = figure.axes[0]
    assert [(*text.get_position(), text.get_text()) for text in axes.texts] == [
        (0, 0, "75"), (1, 0, "25"), (0, 1, "1"), (1, 1, "99"),
    ]  # fmt: skip
    drawn = axes.images[0].get_array()
    np.testing.assert_allclose(np.square(drawn), [[0.75, 0.25], [0.01, 0.99]])


def test_class_bars_follow_the_order_of_the_labeled_counts():
    recall, labeled = [0.2, None, 0.9, 0.5], [5, 50, 500, 20]
    order = np.argsort(-np.array(labeled), kind="stable")
    groups = class_groups(4, labeled)
    figure = figures.per_class(recall, labeled, None, groups, list("abcd"), order, DARK)
    upper, lower = figure.axes
    assert [bar.get_height() for bar in upper.patches] == [0.9, 0.5, 0.2]
    assert [bar.get_height() for bar in lower.patches] == [500, 50, 20, 5]
    assert [label.get_text() for label in lower.get_xticklabels()] == ["c", "b", "d", "a"]
    assert "absent" in [text.get_text() for text in upper.texts]
    assert [text.get_text() for text in upper.get_legend().get_texts()] == [
        f"{name}: mean {100 * np.mean([recall[i] for i in range(4) if groups[i] == name and recall[i]]):.1f} %"
        for name in GROUPS
    ]


def test_curves_leave_out_missing_values_and_smooth_long_lines():
    gaps = Line("gaps", [1, 2, 3, 4], [0.5, None, float("nan"), 0.7])
    values = np.random.default_rng(3).random(90)
    long = Line("long", np.arange(90), values)
    axes = figures.curves([Panel("share", [gaps, long, Line("empty", [1], [None])])], LIGHT).axes[0]
    first, pale, smooth = axes.lines
    np.testing.assert_array_equal(first.get_xydata(), [[1, 0.5], [4, 0.7]])
    np.testing.assert_array_equal(pale.get_ydata(), values)
    np.testing.assert_allclose(smooth.get_ydata()[3:-3], np.convolve(values, np.full(7, 1 / 7), mode="valid"))
    np.testing.assert_allclose(smooth.get_ydata()[0], values[:4].mean())
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["gaps", "long"]
