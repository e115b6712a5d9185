"""Pictures show their numbers."""

import warnings

import numpy as np
import pytest

from bacon_fast.engine.metrics import GROUPS, class_groups
from bacon_fast.report import diagnostic_figures, figures
from bacon_fast.report.figures import Line, Panel
from bacon_fast.report.labels import class_labels, replaced
from bacon_fast.report.style import DARK, LIGHT, contrast, to_png


def test_confusion_matrix_is_drawn_in_percent_of_the_true_class():
    figure = figures.confusion(np.array([[150, 50], [1, 99]]), ["a", "b"], np.array([0, 1]), LIGHT)
    axes = figure.axes[0]
    assert [(*text.get_position(), text.get_text()) for text in axes.texts] == [
        (0, 0, "75"), (1, 0, "25"), (0, 1, "1"), (1, 1, "99"),
    ]  # fmt: skip
    drawn = axes.images[0].get_array()
    np.testing.assert_allclose(np.square(drawn), [[0.75, 0.25], [0.01, 0.99]])


@pytest.mark.parametrize("theme", [LIGHT, DARK], ids=["light", "dark"])
def test_the_numbers_of_a_confusion_matrix_can_be_read_on_every_shade(theme):
    assert contrast("white", "black") == pytest.approx(21) and contrast("#777777", "white") == pytest.approx(4.48, 0.01)
    for percent in range(1, 51):
        axes = figures.confusion(np.array([[percent, 100 - percent], [0, 1]]), ["a", "b"], np.array([0, 1]), theme).axes
        (image,), texts = axes[0].images, axes[0].texts
        shades = image.to_rgba(image.get_array())[0]
        assert all(contrast(text.get_color(), shade[:3]) > 3.7 for text, shade in zip(texts[:2], shades)), percent


def test_class_bars_follow_the_order_of_the_labeled_counts():
    recall, labeled = [0.2, None, 0.9, 0.5], [5, 50, 500, 20]
    order = np.argsort(-np.array(labeled), kind="stable")
    groups = class_groups(4, labeled)
    figure = figures.per_class(recall, labeled, None, groups, list("abcd"), order, "recall here", DARK)
    upper, lower = figure.axes
    assert [bar.get_height() for bar in upper.patches] == [0.9, 0.5, 0.2]
    assert [bar.get_height() for bar in lower.patches] == [500, 50, 20, 5]
    assert [label.get_text() for label in lower.get_xticklabels()] == ["c", "b", "d", "a"]
    assert "absent" in [text.get_text() for text in upper.texts]
    assert [text.get_text() for text in upper.get_legend().get_texts()] == [
        f"{name}: mean {100 * np.mean([recall[i] for i in range(4) if groups[i] == name and recall[i]]):.1f} %"
        for name in GROUPS
    ]


def test_every_plot_has_the_classes_in_one_order():
    """By labeled images, not by index: [b, c, a]."""
    labels, order, matrix = ["a", "b", "c"], np.array([1, 2, 0]), np.array([[8, 1, 1], [0, 10, 0], [0, 2, 8]])
    names = ["b", "c", "a"]

    def ticks(axis):
        return [text.get_text() for text in axis.get_ticklabels()]

    for extra, columns in ((matrix, names), (np.hstack([matrix, matrix[:, :1]]), [*names, "none"])):
        axes = figures.confusion(extra, labels, order, LIGHT).axes[0]
        assert ticks(axes.yaxis) == names and ticks(axes.xaxis) == columns
        drawn, total = np.square(axes.images[0].get_array()), extra.sum(axis=1)
        for row, c in enumerate(order):
            for column, other in enumerate([*order, 3][: len(columns)]):
                assert drawn[row, column] == pytest.approx(extra[c, other] / total[c])
    shown = figures.temperature([0.1, 0.09, 0.095], 0.1, None, labels, order, LIGHT).axes[0]
    assert ticks(shown.xaxis) == names
    assert shown.collections[0].get_offsets()[:, 1].tolist() == [0.09, 0.095, 0.1]
    counts = diagnostic_figures.count_estimate([1, 3, 2], [2, 4, 3], labels, order, LIGHT).axes[0]
    assert ticks(counts.xaxis) == names and [bar.get_height() for bar in counts.patches] == [4, 3, 2]
    points = np.arange(12.0).reshape(6, 2)
    scatter = figures.embedding(points, np.array([0, 1, 2, 0, 1, 2]), labels, order, "t-SNE", LIGHT)
    assert [text.get_text() for text in scatter.legends[0].get_texts()] == names
    assert [c.get_offsets()[0].tolist() for c in scatter.axes[0].collections] == [[2, 3], [4, 5], [0, 1]]


@pytest.mark.parametrize("theme", [LIGHT, DARK], ids=["light", "dark"])
def test_long_and_foreign_names_leave_room_and_no_boxes(theme):
    """Nothing warns of a missing glyph, and the axes keep most of the picture."""
    names = ["猫", "🚗 car", "قطة", "кошка", "naïve café", "$x$", *(f"class {'x' * 60} {i}" for i in range(4))]
    order = np.arange(10)
    labels = class_labels(names, order)
    assert labels == ["#1", "#2", "#3", "кошка", "naïve café", "$x$", "#7", "#8", "#9", "#10"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for figure in (
            figures.per_class([0.5] * 10, [9] * 10, None, ["many"] * 10, labels, order, "recall", theme),
            figures.confusion(np.eye(10, dtype=int), labels, order, theme),
            figures.embedding(np.eye(10)[:, :2], order, labels, order, "PCA", theme),
        ):
            to_png(figure)
            assert figure.axes[0].get_position().width > 0.5


@pytest.mark.parametrize("labels", [["a", "b", "c"], ["pseudo-label rate", "pseudo-label rate of ABC", "accuracy"]])
def test_a_legend_has_as_many_columns_as_there_is_room_for(labels):
    figure = figures.curves(Panel("share", [Line(label, [1, 2], [0.1, 0.2]) for label in labels]), LIGHT)
    to_png(figure)
    legend = figure.axes[0].get_legend()
    assert legend.get_window_extent().x1 <= figure.bbox.x1 and figure.axes[0].get_position().width > 0.75
    assert len({text.get_window_extent().y0 for text in legend.get_texts()}) == (1 if labels[0] == "a" else 2)


def test_labels_are_names_as_far_as_they_can_be_drawn_and_told_apart():
    order = np.array([2, 0, 1])
    assert class_labels(["cat", "dog", "ship"], order) == ["cat", "dog", "ship"]
    names = ["yellow-throated sparrow", "cat", "yellow-throated swift"]
    assert class_labels(names, order) == ["#2", "cat", "#1"], "they begin alike"
    assert class_labels(["#3", "猫", "#1"], order) == ["#2", "#3", "#1"], "no number stands for two classes"
    labels = class_labels([*names[:2], "猫 of another color"], order)
    assert labels == ["yellow-throated s…", "cat", "#1"]
    assert replaced([*names[:2], "猫"], labels, order) == [("#1", "猫"), (labels[0], names[0])]


def test_curves_leave_out_missing_values_and_smooth_long_lines():
    gaps = Line("gaps", [1, 2, 3, 4], [0.5, None, float("nan"), 0.7])
    values = np.random.default_rng(3).random(90)
    long = Line("long", np.arange(90), values)
    axes = figures.curves(Panel("share", [gaps, long, Line("empty", [1], [None])]), LIGHT).axes[0]
    first, pale, smooth = axes.lines
    np.testing.assert_array_equal(first.get_xydata(), [[1, 0.5], [4, 0.7]])
    np.testing.assert_array_equal(pale.get_ydata(), values)
    np.testing.assert_allclose(smooth.get_ydata()[3:-3], np.convolve(values, np.full(7, 1 / 7), mode="valid"))
    np.testing.assert_allclose(smooth.get_ydata()[0], values[:4].mean())
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["gaps", "long"]
