"""Runs of SsCL: resumed between refreshes, and its ImageNet presets on a small folder, by one process and by two."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from bacon_fast.engine.checkpoint import list_checkpoints
from bacon_fast.engine.config import Config
from bacon_fast.engine.presets import PRESETS
from bacon_fast.engine.trainer import Trainer
from bacon_fast.reproduce.matrix import command_words

ROOT = Path(__file__).resolve().parents[2]
SIDE = 72
"""Large enough to be cropped and blurred."""


def digits(run_dir: Path, **changes) -> Config:
    values = {
        "run_dir": run_dir,
        "steps": 9,
        "epochs": 9,
        "sscl.refresh_epochs": 3,
        "sscl.queue": 50,
        "batch_size": 8,
        "eval_every": 9,
        "checkpoint_every": 3,
        "report": False,
        "threads": 1,
        "precision": "fp32",  # whatever the machine
    }
    return PRESETS["digits"].config("sscl").replace(**(values | changes))


def final_method(run_dir: Path) -> dict[str, torch.Tensor]:
    return torch.load(list_checkpoints(run_dir / "checkpoints")[-1], weights_only=True)["method"]


def steps_with_refresh(trainer: Trainer, monkeypatch) -> list[int]:
    seen, refresh = [], trainer.method.refresh
    monkeypatch.setattr(trainer.method, "refresh", lambda context: seen.append(context.step) or refresh(context))
    return seen


@pytest.mark.parametrize(("stopped_at", "variant"), [(3, "default"), (5, "default"), (5, "paper")])
def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(tmp_path, monkeypatch, stopped_at, variant):
    """Stopped just before a refresh, whose features come from the checkpoint, and between two."""
    variant = {"sscl.variant": variant}
    whole = Trainer(digits(tmp_path / "whole", **variant))
    seen = steps_with_refresh(whole, monkeypatch)
    whole.fit()
    assert seen == [0, 3, 6]
    first = Trainer(digits(tmp_path / "parts", **variant))
    for _ in range(stopped_at):
        first.train_step()
    first.save()
    first.train_step()
    first.logger.close()
    second = Trainer(digits(tmp_path / "parts", resume=True, **variant))
    seen = steps_with_refresh(second, monkeypatch)
    second.fit()
    assert seen == [step for step in (0, 3, 6) if step >= stopped_at]
    one, two = final_method(tmp_path / "whole"), final_method(tmp_path / "parts")
    assert one.keys() == two.keys()
    for name, value in one.items():
        assert torch.equal(value, two[name]), name


def test_the_papers_choices_reach_the_method(tmp_path):
    ours, paper = (Trainer(digits(tmp_path / name, **{"sscl.variant": name})).method for name in ("default", "paper"))
    for method, mode, similarity, alpha, unit, soft, largest in (
        (ours, "ratio", "softmax", "assigned", True, False, 64),
        (paper, "literal", "cosine", "nearest", False, True, 0),
    ):
        assert (method.calibration.mode, method.calibration.similarity) == (mode, similarity)
        assert (method.prototypes.alpha_of, method.unit_features, method.soft) == (alpha, unit, soft)
        assert method.distortion.largest_small == largest
    assert ours.calibration.history.sum() > 0 == paper.calibration.history.sum()


def test_epochs_and_their_refresh_come_from_the_presets(tmp_path):
    """Every 5 epochs; of the digits run's 100 epochs of 15 steps, of 1,024 steps on CIFAR-10, of 1,251 on ImageNet."""
    for preset, expected in (("digits", 75), ("sscl-cifar10", 5120), ("sscl-imagenet-1pct", 6255)):
        config = PRESETS[preset].config("sscl")
        assert round(config.parts["sscl"].refresh_epochs * config.steps / config.shared.epochs) == expected
    trainer = Trainer(digits(tmp_path / "run", steps=1500, epochs=100, **{"sscl.refresh_epochs": 5}))
    trainer.logger.close()
    assert trainer.method.refresh_every == 75


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("sscl.queue", 0),
        ("sscl.refresh_epochs", 0),
        ("sscl.extra_keys", -1),
        ("sscl.momentum", 1.1),
        ("sscl.gamma", 0.0),
        ("sscl.temperature", -1.0),
        ("sscl.margin", float("nan")),
    ],
)
def test_wrong_settings_are_named(tmp_path, field, value):
    with pytest.raises(ValueError, match=f"{field}: expected .*, found {value!r}"):
        digits(tmp_path, **{field: value})


@pytest.fixture(scope="module")
def image_folder(tmp_path_factory):
    """Three classes of 10, 10 and 5 images of several sizes, some without label."""
    root, generator = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for part, counts in (("train", {"ant": 10, "bee": 10, "cat": 5}), ("test", {"ant": 2, "cat": 2})):
        for name, count in counts.items():
            (root / part / name).mkdir(parents=True)
            for i in range(count):
                pixels = generator.integers(0, 256, (60 + i, 90 - i, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(root / part / name / f"{i}.jpg")
    (root / "unlabeled").mkdir()
    Image.fromarray(pixels).save(root / "unlabeled" / "any.png")
    return root


def small_imagenet(root: Path, run_dir: Path, **changes) -> Config:
    values = {
        "data_dir": root,
        "run_dir": run_dir,
        "image_size": SIDE,
        "batch_size": 2,
        "steps": 2,
        "epochs": 2,
        "sscl.refresh_epochs": 1,
        "sscl.queue": 30,
        "log_every": 1,
        "eval_every": 2,
        "checkpoint_every": 2,
        "lr": 0.001,
        "report": False,
        "threads": 1,
        "sync_batchnorm": True,
    }
    return PRESETS["sscl-imagenet-10pct"].config().replace(**(values | changes))


@pytest.mark.filterwarnings("ignore:the views are made by PyTorch")
def test_the_imagenet_preset_trains_on_a_folder(tmp_path, image_folder):
    trainer = Trainer(small_imagenet(image_folder, tmp_path / "run"))
    assert trainer.split.labeled_counts == (1, 1, 1) and len(trainer.split.unlabeled) == 26
    assert trainer.method.queue.keys.shape == (30, 128) and trainer.batches.window is not None
    summary = trainer.fit()
    assert summary["protocol"] == "imagenet-10pct" and trainer.method.queue.position == 16
    assert trainer.method.prototypes.present.all() and trainer.method.bank.count.tolist() == [1, 1, 1]


def losses(run_dir: Path) -> list[dict[str, float]]:
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k.startswith("loss/")} for row in rows if row["kind"] == "train"]


def test_two_processes_train_the_preset_as_one_does(tmp_path, image_folder):
    one = small_imagenet(image_folder, tmp_path / "one", backbone="resnet18")
    Trainer(one).fit()
    words = command_words(one.replace(run_dir=tmp_path / "two"))
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    subprocess.run(
        [*launcher, str(ROOT / "train.py"), *words],
        cwd=tmp_path,
        env=os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)},
        check=True,
        capture_output=True,
        timeout=300,
    )
    for a, b in zip(losses(tmp_path / "two"), losses(tmp_path / "one"), strict=True):
        # float32 and other orders of summation, through 18 layers
        assert a == pytest.approx(b, rel=2e-3)
