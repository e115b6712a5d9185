"""The report: what the page says, that it stands alone, and what the pictures are drawn from."""

import base64
import io
import os
import re
from html.parser import HTMLParser

import matplotlib
import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits

from bacon_fast.engine.metrics import compute_metrics
from bacon_fast.report import html
from bacon_fast.report.data import Mistake, ReportData
from bacon_fast.report.page import write_report

COUNTS = [100, 60, 36, 22, 13, 8, 5, 3, 2, 1]


class Page(HTMLParser):
    """Text, pictures and every attribute value of a page; fails on a tag that is never closed."""

    VOID = frozenset({"meta", "img", "source"})

    def __init__(self, text):
        super().__init__()
        self.text, self.pictures, self.dark_pictures, self.attributes, self.open = [], [], [], [], []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        if tag not in self.VOID:
            self.open.append(tag)
        values = dict(attrs)
        self.attributes += attrs
        if tag == "img":
            assert values["alt"]
            self.pictures.append(self._decode(values["src"]))
        if tag == "source":
            self.dark_pictures.append(self._decode(values["srcset"]))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] != "style":
            self.text.append(data)

    @staticmethod
    def _decode(url):
        head, data = url.split(",", 1)
        assert head == "data:image/png;base64"
        return base64.b64decode(data)


def evaluations(recalls, steps=1, counts=None):
    """Rows of a history whose recall grows to the given ones (per cent), and the last confusion matrix."""
    rows = []
    for step in range(1, steps + 1):
        matrix = torch.zeros(len(recalls), len(recalls), dtype=torch.int64)
        for c, recall in enumerate(recalls):
            if recall is not None:
                hits = recall * step // steps
                matrix[c, c] += hits
                matrix[c, (c + 1) % len(recalls)] += 100 - hits
        rows.append({"step": 10 * step, **compute_metrics(matrix, counts)})
    return rows, matrix.numpy()


def full_data():
    digits = load_digits()
    images = np.repeat((digits.images[:4, :, :, None] * 15.9).astype(np.uint8), 3, axis=3)
    history, matrix = evaluations([97, 95, 93, 90, 88, 80, 75, 70, 60, 50], steps=25, counts=COUNTS)
    train = [
        {"step": step, "loss/total": 3 / step, "loss/contrast": 0.0, "stats/pseudo_rate": step / 80, "lr": 0.03}
        | {"stats/pseudo_accuracy": None if step < 5 else 0.9, "stats/reliable": 0.5, "stats/other_thing": float("nan")}
        for step in range(1, 81)
    ]
    for row in history:
        row |= {"calibration_error": 0.123, "intra_class_variance": 0.4, "center_drift": 0.01}
        row |= {"pseudo_precision": [0.9] * 9 + [None], "pseudo_recall": [c / 10 for c in range(10)]}
    pseudo = np.arange(110).reshape(10, 11)
    temperatures = [{"step": step, "temperatures": [0.1 - 0.0001 * c / step for c in range(10)]} for step in (1, 2)]
    return ReportData(
        title="a <run> & more",
        config={"method": "fixmatch+abc+bacon", "temperature": 0.1, "lr": 0.03, "classes": None, "nested": {"x": True}},
        dataset={"name": "digits", "hash": "0123abcd"},
        class_names=[f"digit {i}" for i in range(10)],
        labeled_counts=COUNTS,
        unlabeled_counts=[4 * n for n in COUNTS],
        history=history,
        train_history=train,
        confusion=matrix,
        temperatures=temperatures[-1]["temperatures"],
        base_temperature=0.1,
        temperature_history=temperatures,
        features=digits.data[:150].astype(np.float32),
        projections=digits.data[:150, 20:30].astype(np.float32),
        feature_labels=digits.target[:150],
        pseudo_confusion=pseudo,
        class_count_estimate=[3 * n for n in COUNTS],
        calibration=np.stack([np.arange(15), np.arange(15) * np.arange(15) / 15, np.arange(15) * 0.5], axis=1),
        original_samples=images,
        weak_samples=images[:, :, ::-1],
        strong_samples=255 - images,
        summary={"dataset": "digits", "steps_per_second": 41.5, "per_class": [1.0], "last": {"top1": 0.5}},
    )


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    data, folder = full_data(), tmp_path_factory.mktemp("run")
    before = dict(matplotlib.rcParams)
    path = write_report(folder, data)
    assert dict(matplotlib.rcParams) == before
    return folder, path, Page(path.read_text(encoding="utf-8")), data


def test_the_page_is_one_file_without_network_resources(written):
    folder, path, page, _ = written
    assert path == folder / "report.html"
    text = path.read_text(encoding="utf-8")
    assert "<script" not in text and "@import" not in text and "<link" not in text
    assert not re.search(r"https?://|url\(", text)
    assert all(not value or value.startswith("data:") for name, value in page.attributes if name in ("src", "href"))
    assert not [name for name in os.listdir(folder) + os.listdir(folder / "figures") if name.endswith(".tmp")]


def test_every_picture_is_embedded_and_written_and_has_a_dark_twin(written):
    folder, _, page, _ = written
    files = {file.read_bytes(): file.stem for file in (folder / "figures").glob("*.png")}
    assert sorted(files[data] for data in page.pictures) == sorted(files.values())
    assert set(files.values()) == {
        "accuracy", "group_recall", "losses", "learning_rate", "pseudo_labels", "memory_bank", "intra_class_variance",
        "center_drift", "calibration_error", "per_class", "confusion", "temperature", "temperature_history",
        "pseudo_precision_by_class", "pseudo_recall_by_class", "pseudo_confusion", "class_counts", "reliability",
        "embedding_features", "embedding_projections", "views",
    }  # fmt: skip
    assert len(page.dark_pictures) == len(page.pictures)
    for light, dark in zip(page.pictures, page.dark_pictures):
        light, dark = (Image.open(io.BytesIO(data)).convert("RGB") for data in (light, dark))
        assert light.size == dark.size
        assert light.getpixel((0, 0)) == (255, 255, 255) and max(dark.getpixel((0, 0))) < 48
        assert len(light.getcolors(1 << 24)) > 8


def test_the_page_states_the_three_accuracies_and_marks_the_best_one(written):
    _, _, page, data = written
    text = " ".join(page.text)
    assert "a <run> & more" in page.text
    last = data.history[-1]["bacc"]
    mean = np.mean([row["bacc"] for row in data.history[-20:]])
    assert round(100 * last, 1) != round(100 * mean, 1)
    for value in (last, mean):
        assert f"{100 * value:.1f}" in page.text
    assert "chosen on the test set" in text and "Mean of the last 20" in text
    for expected in ("calibration error 23.3 %", "nested.x", "0123abcd", "digit 9", "1,000", "41.5"):
        assert expected in text


def test_class_table_lists_counts_recall_precision_and_the_favored_confusion(written):
    text = written[1].read_text(encoding="utf-8")
    rows = re.findall(r"<tr>(.*?)</tr>", text)
    cells = [re.findall(r"<t[hd]>(.*?)</t[hd]>", row) for row in rows]
    assert cells[0] == ["class", "recall %", "precision %", "most often taken for", "labeled", "unlabeled", "test"]
    # Class 9 takes the 40 errors of class 8; its own 50 errors go to class 0.
    assert cells[10] == ["digit 9", "50.0", f"{100 * 50 / 90:.1f}", "digit 0 (50\u00a0%)", "1", "4", "100"]


def test_the_worst_pairs_of_classes_and_the_mistakes_among_the_images_are_shown(tmp_path):
    matrix = np.array([[90, 0, 10], [3, 7, 0], [1, 0, 0]])
    history = [{"step": 1, **compute_metrics(torch.from_numpy(matrix))}]
    pixels = np.zeros((500, 300, 3), np.uint8)
    pixels[:, :, 0] = 200
    wrong = [Mistake(pixels, 2, 0, 0.987), Mistake(pixels[:8, :8], 1, 0, 0.5)]
    data = ReportData("t", {}, {}, ["<cat>", "dog", "猫"], [3, 2, 1], history, matrix, mistakes=wrong)
    text = write_report(tmp_path, data).read_text("utf-8")
    tables = [re.findall(r"<t[hd]>(.*?)</t[hd]>", table) for table in re.findall(r"<table>(.*?)</table>", text)]
    assert tables[1] == [
        *("class", "taken for", "test images", "% of the class"),
        *("&lt;cat&gt;", "猫", "10", "10.0"),
        *("dog", "&lt;cat&gt;", "3", "30.0"),
        *("猫", "&lt;cat&gt;", "1", "100.0"),
    ]
    thumbs = text[text.index('<div class="thumbs">') :]
    captions = re.findall(r'<img src="data:image/png;base64,(.*?)" alt="(.*?)"><figcaption>(.*?)</figcaption>', thumbs)
    assert [(alt, caption) for _, alt, caption in captions] == [
        ("猫, taken for &lt;cat&gt;", "<b>猫</b>, taken for <b>&lt;cat&gt;</b> with 99\u00a0%"),
        ("dog, taken for &lt;cat&gt;", "<b>dog</b>, taken for <b>&lt;cat&gt;</b> with 50\u00a0%"),
    ]
    large, small = (Image.open(io.BytesIO(base64.b64decode(image))) for image, _, _ in captions)
    assert large.size == (144, 240) and small.size == (8, 8) and large.getpixel((5, 5)) == (200, 0, 0)


def test_a_run_without_mistakes_shows_none(tmp_path):
    matrix = np.diag([5, 4])
    history = [{"step": 1, **compute_metrics(torch.from_numpy(matrix))}]
    text = write_report(tmp_path, ReportData("t", {}, {}, ["a", "b"], [2, 1], history, matrix)).read_text("utf-8")
    assert "Mistakes" not in text and "taken for" in text, "the table of all classes"


@pytest.mark.parametrize("chosen", [False, True])
def test_the_standard_error_stands_beside_the_reported_balanced_accuracy(tmp_path, chosen):
    history, matrix = evaluations([80, 60, 40], steps=2)
    summary = {"bacc_error": 0.123} | ({"best_on_validation": history[0]} if chosen else {})
    text = write_report(tmp_path, ReportData("t", {}, {}, list("abc"), [3, 2, 1], history, matrix, summary=summary))
    cards = re.findall(r'<div class="card"><h3>(.*?)</h3>(.*?)</div>', text.read_text("utf-8"))
    with_error = [title for title, card in cards if "<dl><dt>standard error</dt><dd>12.3</dd><dt>top-1" in card]
    assert with_error == ["Chosen by validation" if chosen else "Last evaluation"]


def test_a_run_with_one_evaluation_and_nothing_else(tmp_path):
    history, matrix = evaluations([80, None, 40])
    data = ReportData("short", {}, {}, ["airplane", "automobile", "bird"], [1, 1, 1], history, matrix)
    page = Page(write_report(tmp_path, data).read_text(encoding="utf-8"))
    files = sorted(file.stem for file in (tmp_path / "figures").iterdir())
    assert files == ["accuracy", "confusion", "group_recall", "per_class"] and len(page.pictures) == 4
    for absent in ("BaCon", "pseudo-label", "unlabeled", "Pale"):
        assert absent not in " ".join(page.text), "captions speak of what is there"
    assert "only 1, as this network has no more" in page.text
    assert "Augmentation" not in page.text and "Test images in feature space" not in page.text
    assert "nan" not in " ".join(page.text).lower()


def test_names_that_pictures_lack_are_explained_and_shown_by_the_page(tmp_path):
    history, matrix = evaluations([80, 60, 40])
    names = ["猫", "dog", "🚗 of a rather long name"]
    text = write_report(tmp_path, ReportData("t", {}, {}, names, [1, 3, 2], history, matrix)).read_text("utf-8")
    (legend,) = re.findall(r'<ul class="legend">(.*?)</ul>', text)
    assert re.findall(r"<b>(.*?)</b> <bdi>(.*?)</bdi>", legend) == [("#2", names[2]), ("#3", names[0])]
    assert all(f"<td>{name}</td>" in text for name in names)


@pytest.mark.parametrize(
    ("train", "config", "line"),
    [
        ([{"loss/contrastive": 0.0}, {"loss/contrastive": 0.5}], {}, None),
        ([], {}, None),
        (
            [{"loss/contrastive": 0.0, "stats/reliable": 0.5}],
            {"bacon.contrast_start": 0.5, "steps": 40},
            "BaCon never acted in this run: it begins after step 20 (--bacon.contrast-start), and the run has 10.",
        ),
        (
            [{"loss/contrastive": 0.0, "stats/reliable": 0.0}],
            {"bacon.contrast_start": 0.5, "steps": 10, "bacon.reliable_threshold": 0.98},
            "BaCon never acted in this run: no row reached the confidence 0.98 (--bacon.reliable-threshold).",
        ),
    ],
)
def test_a_run_in_which_bacon_never_acted_says_so(tmp_path, train, config, line):
    history, matrix = evaluations([80, 60, 40])
    train = [{"step": i, **row} for i, row in enumerate(train)]
    data = ReportData("t", config, {}, ["a", "b", "c"], [3, 2, 1], history, matrix, train_history=train)
    data.temperatures = [0.1, 0.1, 0.0995]
    assert "never acted" not in write_report(tmp_path, data).read_text(), "a method without BaCon"
    data.base_temperature = 0.1
    text = " ".join(Page(write_report(tmp_path, data).read_text()).text)
    assert ("never acted" in text) == (line is not None) and (line is None or line in text)
    assert "between 0.0995 and 0.1, at most 0.5 % below that of the negatives" in text, "its range is small"


def test_the_floor_of_the_geometric_mean_is_explained(written):
    text = " ".join(written[2].text)
    assert compute_metrics(torch.tensor([[0, 1], [1, 0]]))["gm"] == pytest.approx(1 / 200)
    assert "geometric mean counts a class with recall 0 as 1/(100 x classes), here 0.1 %" in text


def test_many_classes_without_unlabeled_counts(tmp_path):
    counts = list(range(30, 0, -1))
    history, matrix = evaluations([90 - 2 * c for c in range(30)], steps=2, counts=counts)
    data = ReportData(
        title="thirty",
        config={},
        dataset={},
        class_names=[f"class {c}" for c in range(30)],
        labeled_counts=counts,
        history=history,
        confusion=matrix,
        temperatures=[0.1] * 30,
        features=np.random.default_rng(0).normal(size=(6, 3)).astype(np.float32),
        feature_labels=np.arange(6),
    )
    page = Page(write_report(tmp_path, data).read_text(encoding="utf-8"))
    assert {"temperature", "embedding_features"} <= {file.stem for file in (tmp_path / "figures").iterdir()}
    assert any("6 test images, PCA" in text for text in page.text)


def test_a_second_report_replaces_the_first_and_a_failing_one_leaves_it(tmp_path, monkeypatch):
    history, matrix = evaluations([80, 40])
    path = write_report(tmp_path, ReportData("first", {}, {}, ["a", "b"], [2, 1], history, matrix))
    write_report(tmp_path, ReportData("second", {}, {}, ["a", "b"], [2, 1], history, matrix))
    assert "<h1>second</h1>" in path.read_text()

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(html, "page", lambda *_: "third")
    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        write_report(tmp_path, ReportData("third", {}, {}, ["a", "b"], [2, 1], history, matrix))
    assert "<h1>second</h1>" in path.read_text()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"confusion": np.zeros((2, 3))}, r"confusion: expected shape \[3, 3\]"),
        ({"labeled_counts": [1, 2]}, "labeled_counts: expected 3 values, one a class, found 2"),
        ({"temperatures": [0.1] * 4}, "temperatures: expected"),
        ({"history": []}, "at least one evaluation"),
        ({"features": np.zeros((4, 2))}, "feature_labels"),
        ({"projections": np.zeros((4, 2)), "feature_labels": np.zeros(3, dtype=int)}, "projections: expected"),
        ({"weak_samples": np.zeros((2, 8, 8, 3))}, "weak_samples: expected uint8"),
        ({"weak_samples": np.zeros((2, 3, 8, 8), dtype=np.uint8)}, "weak_samples: expected uint8"),
    ],
)
def test_wrong_shapes_are_refused_by_name(change, message):
    history, matrix = evaluations([80, 60, 40])
    good = {"labeled_counts": [3, 2, 1], "history": history, "confusion": matrix}
    with pytest.raises(ValueError, match=message):
        ReportData(**{"title": "", "config": {}, "dataset": {}, "class_names": ["a", "b", "c"], **good, **change})


def test_values_are_written_for_readers():
    shown = [html.show(value) for value in (None, True, 12345, 0.03, 1e-5, 123456.7, ("a", 1), (), "x")]
    assert shown == ["–", "yes", "12,345", "0.03", "1e-05", "123,457", "a, 1", "–", "x"]
    assert html.percent(None) == "–" and html.percent(0.98765) == "98.8"
