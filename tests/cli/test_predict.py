"""Prediction of files that are no images: each costs its own prediction, never that of another."""

import json
import os

import numpy as np
import pytest
import torch
from PIL import AvifImagePlugin, Image

import bacon_fast.run
from bacon_fast.run import Run


@pytest.fixture
def run(tmp_path, monkeypatch) -> Run:
    """A run whose network calls an image by its brightness."""

    def classify(network, normalize, images, device):
        light = images.float().mean((1, 2, 3)) / 255
        return None, 20 * torch.stack([0.5 - light, light - 0.5], dim=1)

    monkeypatch.setattr(bacon_fast.run, "predict", classify)
    names = ("dark", "\x1b[1mlight")
    return Run(tmp_path, tmp_path, {}, 1, torch.nn.Identity(), None, names, (8, 8), (8, 8), torch.device("cpu"))


def test_one_bad_file_never_costs_the_predictions_of_the_others(run, tmp_path, monkeypatch):
    def fail(self):
        raise RuntimeError("Failed to decode frame 0: Decoding of color planes failed")

    monkeypatch.setattr(AvifImagePlugin.AvifImageFile, "load", fail)
    pixels = np.full((9, 7, 3), 250, np.uint8)
    for name in ("first.png", "damaged.avif", "last.png"):
        Image.fromarray(pixels).save(tmp_path / name)
    (tmp_path / "script.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EOF\n")
    (tmp_path / "folder.png").mkdir()
    os.mkfifo(tmp_path / "pipe.png")
    bad = ["damaged.avif", "script.png", "folder.png", "pipe.png", "missing.png", "\x1b[2Jgone.png"]
    names = ["first.png", *bad, "last.png"]
    rows = run.predict([tmp_path / name for name in names])
    assert [row["file"] for row in rows] == [str(tmp_path / name) for name in names]
    assert [name for name, row in zip(names, rows) if "error" in row] == bad
    assert rows[0]["class"] == rows[-1]["class"] == "\x1b[1mlight" and rows[0]["probability"] > 0.99
    assert all(json.dumps(row).isprintable() for row in rows)
    assert run.predict([str(tmp_path / "first.png")]) == rows[:1]


def test_no_file_is_an_error(run):
    with pytest.raises(ValueError, match="files: expected at least one"):
        run.predict([])
