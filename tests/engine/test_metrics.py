"""Metrics against scikit-learn and SciPy, and the history of a run."""

import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import gmean
from sklearn import metrics as sk

from bacon_fast.engine.metrics import READINGS, History, compute_metrics, confusion_matrix


def draw(num_classes, size, seed, accuracy=0.6):
    """Imbalanced true classes and predictions that are right about `accuracy` of the time."""
    rng = np.random.default_rng(seed)
    weights = 0.7 ** np.arange(num_classes)
    targets = rng.choice(num_classes, size, p=weights / weights.sum())
    noise = rng.integers(0, num_classes, size)
    return targets, np.where(rng.random(size) < accuracy, targets, noise)


@pytest.mark.filterwarnings("ignore:A single label was found")
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8])
@pytest.mark.parametrize(("num_classes", "size"), [(1, 5), (2, 3), (10, 1000), (100, 1)])
def test_confusion_matrix_equals_scikit_learn(num_classes, size, dtype):
    targets, predictions = draw(num_classes, size, seed=num_classes)
    found = confusion_matrix(torch.tensor(targets, dtype=dtype), torch.tensor(predictions, dtype=dtype), num_classes)
    assert found.dtype == torch.int64
    assert found.tolist() == sk.confusion_matrix(targets, predictions, labels=range(num_classes)).tolist()


def test_confusion_matrix_of_no_image_and_of_strided_inputs():
    empty = torch.zeros(0, dtype=torch.int64)
    assert confusion_matrix(empty, empty, 3).tolist() == [[0] * 3] * 3
    pairs = torch.tensor([[0, 1], [1, 1], [2, 0]])
    assert confusion_matrix(pairs[:, 0], pairs[:, 1], 3).tolist() == [[0, 1, 0], [0, 1, 0], [1, 0, 0]]


@pytest.mark.parametrize("targets", [[0, -1], [0, 3]])
def test_confusion_matrix_refuses_classes_out_of_range(targets):
    good = torch.tensor([0, 1])
    with pytest.raises(ValueError, match=r"0\.\.2.*position 1"):
        confusion_matrix(torch.tensor(targets), good, 3)
    with pytest.raises(ValueError, match=r"0\.\.2.*position 1"):
        confusion_matrix(good, torch.tensor(targets), 3)


def test_confusion_matrix_refuses_wrong_inputs():
    labels = torch.tensor([0, 1])
    with pytest.raises(TypeError, match="predictions"):
        confusion_matrix(labels, torch.tensor([0.0, 1.0]), 2)
    with pytest.raises(TypeError, match="targets"):
        confusion_matrix(torch.tensor([True, False]), labels, 2)
    with pytest.raises(ValueError, match=r"^predictions: expected shape \[N\]"):
        confusion_matrix(labels, torch.zeros(2, 2, dtype=torch.int64), 2)
    with pytest.raises(ValueError, match=r"^predictions: expected 2, one a target, found 1"):
        confusion_matrix(labels, labels[:1], 2)
    with pytest.raises(ValueError, match="num_classes"):
        confusion_matrix(labels, labels, 0)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 12), st.integers(1, 80), st.integers(0, 2**31))
def test_metrics_equal_scikit_learn_also_when_classes_are_absent(num_classes, size, seed):
    targets, predictions = draw(num_classes, size, seed)
    present = np.unique(targets)
    found = compute_metrics(confusion_matrix(torch.from_numpy(targets), torch.from_numpy(predictions), num_classes))
    recall = sk.recall_score(targets, predictions, labels=present, average=None, zero_division=0)
    assert [value for value in found["per_class"] if value is not None] == pytest.approx(recall.tolist())
    assert found["absent_classes"] == sorted(set(range(num_classes)) - set(present.tolist()))
    assert [i for i, value in enumerate(found["per_class"]) if value is None] == found["absent_classes"]
    assert found["top1"] == pytest.approx(sk.accuracy_score(targets, predictions))
    assert found["bacc"] == pytest.approx(recall.mean())
    assert found["gm"] == pytest.approx(gmean(np.where(recall == 0, 1 / (100 * num_classes), recall)))
    average = {"labels": present, "average": "macro", "zero_division": 0}
    assert found["macro_precision"] == pytest.approx(sk.precision_score(targets, predictions, **average))
    assert found["macro_f1"] == pytest.approx(sk.f1_score(targets, predictions, **average))
    assert found["num_images"] == size


def test_balanced_accuracy_equals_scikit_learn_where_that_is_defined():
    targets, predictions = draw(10, 5000, seed=0)
    found = compute_metrics(torch.from_numpy(sk.confusion_matrix(targets, predictions)))
    assert found["bacc"] == pytest.approx(sk.balanced_accuracy_score(targets, predictions))
    assert found["bacc"] != pytest.approx(found["top1"], abs=1e-3)


def diagonal_confusion(percent):
    """100 test images a class, with the given recalls in percent; every error goes to the next class."""
    matrix = torch.diag(torch.tensor(percent))
    for i, value in enumerate(percent):
        matrix[i, (i + 1) % len(percent)] += 100 - value
    return matrix


def test_groups_by_thirds_are_three_four_three_for_ten_classes():
    found = compute_metrics(diagonal_confusion([90, 80, 70, 60, 50, 40, 30, 20, 10, 0]))
    assert (found["many"], found["medium"], found["few"]) == pytest.approx((0.8, 0.45, 0.1))
    assert found["many_count"] is found["medium_count"] is found["few_count"] is None
    assert found["gm"] == pytest.approx(gmean([0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1, 0.001]))


def test_groups_follow_the_labeled_counts_when_these_are_not_descending():
    recalls = [10, 20, 30, 40, 50, 60]
    found = compute_metrics(diagonal_confusion(recalls), labeled_counts=[19, 20, 50, 100, 101, 1000])
    assert (found["many"], found["medium"], found["few"]) == pytest.approx((0.55, 0.35, 0.15))
    assert (found["many_count"], found["medium_count"], found["few_count"]) == pytest.approx((0.55, 0.3, 0.1))
    tied = compute_metrics(diagonal_confusion(recalls), labeled_counts=torch.full((6,), 5))
    assert (tied["many"], tied["medium"], tied["few"]) == pytest.approx((0.15, 0.35, 0.55))
    assert tied["many_count"] is tied["medium_count"] is None


def test_thirds_of_a_hundred_classes_are_33_34_33():
    percent = [100] * 33 + [50] * 34 + [0] * 33
    found = compute_metrics(diagonal_confusion(percent))
    assert (found["many"], found["medium"], found["few"]) == pytest.approx((1, 0.5, 0))


def test_absent_class_leaves_its_group():
    matrix = diagonal_confusion([90, 60, 30])
    matrix[2] = 0
    found = compute_metrics(matrix, labeled_counts=[100, 10, 1])
    assert found["per_class"] == [0.9, 0.6, None]
    assert found["few"] is None and found["bacc"] == pytest.approx(0.75)


def test_two_classes_have_only_a_medium_group():
    found = compute_metrics([[3, 1], [0, 4]])
    assert found["many"] is None and found["few"] is None and found["medium"] == pytest.approx(0.875)


@pytest.mark.parametrize(
    ("confusion", "counts", "message"),
    [
        (torch.zeros(2, 3), None, r"\[K, K\]"),
        (torch.zeros(0, 0), None, r"\[K, K\]"),
        (torch.zeros(2, 2), None, "at least one test image"),
        (-torch.eye(2), None, ">= 0, found -1"),
        (torch.full((2, 2), float("nan")), None, ">= 0, found nan"),
        (torch.eye(2), [1, 2, 3], r"labeled_counts: expected shape \[2\], found \[3\]"),
    ],
)
def test_metrics_refuse_wrong_inputs(confusion, counts, message):
    with pytest.raises(ValueError, match=message):
        compute_metrics(confusion, counts)


def test_history_reports_last_mean_of_twenty_and_best():
    history = History()
    values = np.random.default_rng(0).random((25, 3)).round(6)
    for i, (top1, bacc, gm) in enumerate(values):
        history.append(100 * (i + 1), {"top1": top1, "bacc": bacc, "gm": gm, "per_class": [None, 0.5]})
    restored = History(json.loads(json.dumps(history.rows)))
    assert restored.rows == history.rows and len(restored) == 25
    summary = json.loads(json.dumps(restored.summary()))
    assert list(summary) == ["last", "mean_last_20", "best_on_test"]
    for column, key in enumerate(("top1", "bacc", "gm")):
        assert summary["last"][key] == values[-1, column]
        assert summary["mean_last_20"][key] == pytest.approx(values[-20:, column].mean())
        assert summary["best_on_test"][key] == values[:, column].max()
        assert summary["best_on_test"]["steps"][key] == 100 * (int(values[:, column].argmax()) + 1)
    assert summary["last"]["step"] == 2500 and summary["mean_last_20"]["evaluations"] == 20


def test_the_mean_covers_no_evaluation_of_an_earlier_network():
    history, values = History(), np.linspace(0.1, 0.9, 30)
    for i, value in enumerate(values):  # generations of 12, 12 and 6 evaluations
        metrics = dict.fromkeys(("top1", "bacc", "gm"), value)
        history.append(i + 1, metrics | ({"generation": i // 12} if i >= 12 else {}))
    summary = history.summary()
    assert list(summary) == list(READINGS)
    assert summary["mean_last_20"]["evaluations"] == 6
    assert summary["mean_last_20"]["bacc"] == pytest.approx(values[24:].mean())
    assert summary["best_on_test"]["bacc"] == 0.9
    assert History(history.rows[:12]).summary()["mean_last_20"]["bacc"] == pytest.approx(values[:12].mean())


def test_history_of_one_evaluation_and_its_errors():
    row = {"top1": 0.5, "bacc": 0.25, "gm": 0.125}
    history = History([{"step": 7, **row}])
    summary = history.summary()
    assert all(summary[kind][key] == row[key] for kind in summary for key in row)
    assert summary["mean_last_20"]["evaluations"] == 1
    with pytest.raises(ValueError, match="more than the last one, 7, found 7"):
        history.append(7, row)
    with pytest.raises(ValueError, match="found no gm"):
        history.append(8, {"top1": 0.5, "bacc": 0.25})
    with pytest.raises(ValueError, match="'step'"):
        History([row])
    with pytest.raises(ValueError, match="no evaluation"):
        History().summary()


def test_the_mean_of_evaluations_covers_groups_and_classes():
    rows = [
        {"step": i, "top1": t, "bacc": t, "gm": t, "many": t, "medium": None, "few": 0.0, "per_class": [t, None]}
        for i, t in enumerate((0.2, 0.6, 0.4))
    ]
    summary = History(rows).summary()
    mean, best = summary["mean_last_20"], summary["best_on_test"]
    assert mean["many"] == pytest.approx(0.4) and mean["medium"] is None and mean["few"] == 0
    assert mean["per_class"] == [pytest.approx(0.4), None]
    assert best["many"] == 0.6 and best["per_class"] == [0.6, None] and best["steps"]["bacc"] == 1
