"""`label`: a CSV file of predicted labels that is a file to train on."""

import csv
import math
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import bacon_fast.run
from bacon_fast.data.ahead import CHUNK
from bacon_fast.data.image_csv import read_csv
from bacon_fast.data.listing import list_images
from bacon_fast.label import main
from bacon_fast.labeling import label_images
from bacon_fast.run import Run

NAMES = ("dark", "mid, or so", "light")


def made(monkeypatch, names=NAMES, temperature=None, size=(8, 8)) -> Run:
    """A run whose network compares an image's brightness, 0..1, with 0.2, 0.5 and 0.8."""

    def classify(network, normalize, images, device):
        light = images.float().mean((1, 2, 3)) / 255
        return None, -10 * (light[:, None] - torch.tensor([0.2, 0.5, 0.8])).abs()

    monkeypatch.setattr(bacon_fast.run, "predict", classify)
    sizes = size, size
    return Run(Path(), Path(), {}, 1, torch.nn.Identity(), None, names, *sizes, torch.device("cpu"), temperature)


def gray(path: Path, value: int) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((9, 7, 3), value, np.uint8)).save(path)
    return path


def table(path: Path) -> list[dict[str, str]]:
    with open(path, encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def softmax(values, temperature=1.0):
    powers = [math.exp(value / temperature) for value in values]
    return [power / sum(powers) for power in powers]


def logits(value: int) -> list[float]:
    return [-10 * abs(value / 255 - center) for center in (0.2, 0.5, 0.8)]


@pytest.mark.parametrize("temperature", [None, 2.5])
def test_rows_hold_the_probabilities_margin_entropy_and_the_next_classes(monkeypatch, tmp_path, temperature):
    gray(tmp_path / "in" / "a.png", 60)
    gray(tmp_path / "in" / "deep" / "b, c.png", 200)
    (tmp_path / "in" / "empty.png").touch()
    out = tmp_path / "in" / "labels.csv"
    counts = made(monkeypatch, temperature=temperature).label(tmp_path / "in", out)
    assert counts == (2, 1)
    a, b, empty = table(out)
    assert list(a) == ["image_path", "label", "probability", "margin", "entropy",
                       "label_2", "probability_2", "label_3", "probability_3", "error"]  # fmt: skip
    assert [row["image_path"] for row in (a, b, empty)] == ["a.png", os.path.join("deep", "b, c.png"), "empty.png"]
    for row, value, best in ((a, 60, 0), (b, 200, 2)):
        p = softmax(logits(value), temperature or 1.0)
        first, second, third = sorted(p, reverse=True)
        assert row["label"] == NAMES[best] and row["label_2"] == NAMES[1] and row["label_3"] == NAMES[2 - best]
        found = [float(row[name]) for name in ("probability", "margin", "entropy", "probability_2", "probability_3")]
        entropy = -sum(q * math.log(q) for q in p)
        assert found == pytest.approx([first, first - second, entropy, second, third], abs=2e-6)
        assert row["error"] == ""
    assert empty["label"] == empty["probability"] == "" and "empty.png (expected an image" in empty["error"]


def test_a_reviewed_file_is_a_file_to_train_on(monkeypatch, tmp_path):
    files = [gray(tmp_path / "in" / f"{value}.png", value) for value in (10, 50, 128, 220)]
    elsewhere = tmp_path / "review" / "labels.csv"
    made(monkeypatch).label(tmp_path / "in", elsewhere)
    assert {Path(row["image_path"]) for row in table(elsewhere)} == set(files), "absolute: not below the file's folder"
    inside = tmp_path / "labels.csv"
    made(monkeypatch).label(elsewhere, inside)  # images of a CSV file; its labels are not read
    assert [row["image_path"] for row in table(inside)] == [f"in/{path.name}" for path, _ in read_csv(elsewhere)]
    text = inside.read_text().replace("in/50.png,dark", 'in/50.png,"mid, or so"')
    inside.write_text(text)  # the review
    listing = list_images(inside)
    assert listing.class_names == tuple(sorted(NAMES))
    labels = {path.name: label for path, label in listing.train}
    assert labels == {"10.png": "dark", "50.png": "mid, or so", "128.png": "mid, or so", "220.png": "light"}


def test_per_class_keeps_the_most_probable_of_each_class(monkeypatch, tmp_path):
    values = [*range(53, 88), 128, 134, 240]  # 35 dark, the surest one last in the folder; 2 of the middle; 1 light
    for value in values:
        gray(tmp_path / "in" / f"{255 - value:03}.png", value)
    (tmp_path / "in" / "bad.png").write_bytes(b"no image")
    counts = made(monkeypatch).label(tmp_path / "in", tmp_path / "some.csv", per_class=2)
    expected = [f"{255 - value:03}.png" for value in (53, 54, 128, 134, 240)] + ["bad.png"]
    assert [Path(row["image_path"]).name for row in table(tmp_path / "some.csv")] == expected
    assert counts == (5, 1)


def test_several_runs_are_averaged_class_by_class_at_their_own_sizes(monkeypatch, tmp_path):
    gray(tmp_path / "in" / "a.png", 60)
    one = made(monkeypatch)
    other = made(monkeypatch, names=("light", "mid, or so", "dark"), temperature=3.0, size=(4, 6))
    label_images([one, other], tmp_path / "in", tmp_path / "both.csv")
    (row,) = table(tmp_path / "both.csv")
    first, second = softmax(logits(60)), softmax(logits(60), 3.0)[::-1]
    mean = [(p + q) / 2 for p, q in zip(first, second)]
    best = int(np.argmax(mean))
    assert row["label"] == NAMES[best] and float(row["probability"]) == pytest.approx(mean[best], abs=2e-6)
    stranger = made(monkeypatch, names=("dark", "mid, or so", "bright"))
    with pytest.raises(ValueError, match=r"runs: expected the same classes in each, found dark, .* and .*bright"):
        label_images([one, stranger], tmp_path / "in", tmp_path / "none.csv")
    assert not (tmp_path / "none.csv").exists()


def test_more_files_than_a_chunk_keep_their_order(monkeypatch, tmp_path):
    paths = [gray(tmp_path / "in" / f"{n:04}.png", n % 256) for n in range(CHUNK + 3)]
    (tmp_path / "in" / "0001.png").write_bytes(b"no image")
    made(monkeypatch).label(tmp_path / "in", tmp_path / "all.csv")
    rows = table(tmp_path / "all.csv")
    assert [Path(row["image_path"]).name for row in rows] == [path.name for path in paths]
    best = [NAMES[int(np.argmax(logits(n % 256)))] for n in range(len(paths))]
    assert [row["label"] for row in rows] == [best[0], "", *best[2:]]


def test_a_name_that_is_no_utf8_is_an_error_in_its_row(monkeypatch, tmp_path):
    gray(tmp_path / "in" / "a.png", 60).rename(tmp_path / "in" / os.fsdecode(b"\xff.png"))
    assert made(monkeypatch).label(tmp_path / "in", tmp_path / "labels.csv") == (0, 1), "no label, and counted so"
    (row,) = table(tmp_path / "labels.csv")
    assert row["label"] == "" and "no UTF-8" in row["error"] and "udcff.png" in row["image_path"]


@pytest.mark.parametrize(
    ("out", "per_class", "message"),
    [
        ("old.csv", None, "out: expected a new file, found .*old.csv, which may hold a review"),
        ("new.txt", None, "out: expected a file .csv"),
        ("new.csv", 0, "per_class: expected at least 1, found 0"),
        ("new.csv", None, "images: expected image files in .*none, found none"),
    ],
)
@pytest.mark.filterwarnings("ignore:.*no image files in it")
def test_what_is_refused_before_any_work(monkeypatch, tmp_path, out, per_class, message):
    (tmp_path / "none").mkdir()
    (tmp_path / "old.csv").write_text("image_path,label\nmine.png,checked\n")
    with pytest.raises(ValueError, match=message):
        made(monkeypatch).label(tmp_path / "none", tmp_path / out, per_class=per_class)
    assert (tmp_path / "old.csv").read_text() == "image_path,label\nmine.png,checked\n"


def test_the_command_takes_several_runs(monkeypatch, tmp_path, capsys):
    gray(tmp_path / "in" / "a.png", 60)
    opened = []
    monkeypatch.setattr(Run, "open", lambda directory, device: opened.append(directory) or made(monkeypatch))
    out = tmp_path / "labels.csv"
    main(["one", "two", str(tmp_path / "in"), "--out", str(out), "--per-class", "3"])
    assert opened == [Path("one"), Path("two")] and len(table(out)) == 1
    text = capsys.readouterr().err
    assert text.endswith(f"{out}: 1 images labeled\n") and "uncalibrated" in text


def test_a_script_can_tell_some_labels_from_all_and_from_none(monkeypatch, tmp_path, capsys):
    """Status 1, as `predict` has it, and 2 for an error; what is written is the same."""
    gray(tmp_path / "in" / "a.png", 60)
    (tmp_path / "in" / "bad.png").write_bytes(b"no image")
    monkeypatch.setattr(Run, "open", lambda directory, device: made(monkeypatch))
    words = ["one", str(tmp_path / "in"), "--out", str(tmp_path / "labels.csv")]
    with pytest.raises(SystemExit) as stopped:
        main(words)
    assert stopped.value.code == 1 and [row["label"] for row in table(tmp_path / "labels.csv")] == ["dark", ""]
    assert capsys.readouterr().err.splitlines()[-1].endswith("labels.csv: 1 images labeled, 1 not (column error)")
    with pytest.raises(SystemExit) as stopped:
        main(words)  # the file is there, and may hold a review
    assert stopped.value.code == 2
