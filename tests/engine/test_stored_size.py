"""Images that are stored larger than their views: evaluation and prediction see the same center crops."""

import csv

import numpy as np
import pytest
import torch
import torchvision.transforms.functional as tvf
from PIL import Image

from bacon_fast.engine import build
from bacon_fast.engine.checkpoint import list_checkpoints, load_checkpoint, save_checkpoint
from bacon_fast.engine.config import Config
from bacon_fast.engine.several import fit_together
from bacon_fast.engine.trainer import Trainer
from bacon_fast.files import read_record
from bacon_fast.report.collect import collect
from bacon_fast.run import open_run

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """A folder of two classes, photos of different sizes: a bright or a dark box in noise."""
    root, rng = tmp_path_factory.mktemp("photos"), np.random.default_rng(0)
    for part, count in (("train", 8), ("test", 5)):
        for label, level in (("bright", 220), ("dark", 30)):
            folder = root / part / label
            folder.mkdir(parents=True)
            for i in range(count):
                height, width = 20 + i, 31 - i
                pixels = rng.integers(0, 256, (height, width, 3))
                pixels[6:-6, 6:-6] = level + rng.integers(-20, 20, (height - 12, width - 12, 3))
                Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{i}.png")
    return root


def config(photos, run_dir, method="fixmatch", **changes) -> Config:
    mu = 1 if method == "remixmatch" else 2
    overrides = {
        "steps": 3,
        "data": {"dataset": "folder", "data_dir": photos, "protocol": "as-is", "image_size": 16},
        "views": {"batch_size": 4, "unlabeled_ratio": mu, "stored_size": 18, "strong_crop": "resized"},
        "model": {"backbone": "wrn-10-1"},
        "run": {"run_dir": run_dir, "device": "cpu"},
        "shared": {"epochs": 1},
        "log": {"eval_every": 3, "checkpoint_every": 3},
    }
    return Config.of(method, overrides).replace(**changes)


@pytest.fixture(scope="module")
def trained(photos, tmp_path_factory):
    trainer = Trainer(config(photos, tmp_path_factory.mktemp("run") / "run"))
    summary = trainer.fit()
    return trainer, summary


def test_predict_and_evaluate_see_what_the_training_evaluated(photos, trained):
    trainer, _ = trained
    run = open_run(trainer.run_dir, "cpu")
    assert (run.stored_size, run.image_size) == ((18, 18), (16, 16))
    files = sorted((photos / "test").rglob("*.png"))
    rows = run.predict(files)
    # By other means: Pillow's resize to the stored square, torchvision's center, the network in evaluation mode.
    squares = [Image.open(file).convert("RGB").resize((18, 18), Image.Resampling.BILINEAR) for file in files]
    windows = [tvf.to_tensor(tvf.center_crop(square, [16, 16])) for square in squares]
    images = torch.stack([tvf.normalize(w, trainer.dataset.mean, trainer.dataset.std) for w in windows])
    with torch.inference_mode():
        expected = trainer.ema.network.eval().predict(images)[1].softmax(1)
    names = trainer.dataset.class_names
    assert [row["class"] for row in rows] == [names[c] for c in expected.argmax(1)]
    assert [row["probability"] for row in rows] == pytest.approx(expected.amax(1).tolist(), abs=1e-5)

    confusion = torch.zeros(2, 2, dtype=torch.int64)
    for file, row in zip(files, rows):
        confusion[names.index(file.parent.name), names.index(row["class"])] += 1
    assert trainer.evaluation().confusion.tolist() == confusion.tolist()
    assert run.evaluate()["confusion"] == confusion.tolist()


@pytest.fixture(scope="module")
def bicubic(photos, tmp_path_factory):
    """A run on a network of timm, whose weights were trained on images that were resized bicubically."""
    pytest.importorskip("timm", reason="timm/NAME needs the extra timm")
    changes = {"backbone": "timm/test_vit", "bn_momentum": None, "image_size": 32, "stored_size": 36}
    trainer = Trainer(config(photos, tmp_path_factory.mktemp("bicubic") / "run", **changes))
    trainer.fit()
    return trainer


def test_images_are_resized_as_a_backbone_s_training_resized_them(photos, bicubic, tmp_path):
    run = open_run(bicubic.run_dir, "cpu")
    files = sorted((photos / "test").rglob("*.png"))
    pictures = [Image.open(file).convert("RGB") for file in files]
    squares = {how: np.stack([np.asarray(picture.resize((36, 36), how)) for picture in pictures])
               for how in (Image.Resampling.BICUBIC, Image.Resampling.BILINEAR)}  # fmt: skip
    assert np.array_equal(bicubic.dataset.test_images.numpy(), squares[Image.Resampling.BICUBIC])
    expected, other = (run.probabilities(torch.from_numpy(squares[how])).amax(1).tolist() for how in squares)
    assert [row["probability"] for row in run.predict(files)] == pytest.approx(expected, abs=1e-9)
    assert max(abs(a - b) for a, b in zip(expected, other)) > 1e-5, "the filters can be told apart"
    assert run.evaluate()["confusion"] == bicubic.evaluation().confusion.tolist()
    run.label(photos / "test", tmp_path / "labels.csv")
    with open(tmp_path / "labels.csv") as file:
        assert [float(row["probability"]) for row in csv.DictReader(file)] == pytest.approx(expected, abs=1e-6)
    run.export(tmp_path / "model")
    model = read_record(tmp_path / "model" / "model.json")
    assert model["interpolation"] == "bicubic" and "resized to 36 x 36 pixels, bicubic," in model["input"]


def test_a_run_that_does_not_say_how_it_resized_did_it_bilinearly(photos, bicubic, tmp_path, monkeypatch):
    """A checkpoint of an earlier version: resumed and evaluated on the images that it had."""
    monkeypatch.setattr(build, "interpolation", lambda config: "bilinear")
    of_old = bicubic.config.replace(run_dir=tmp_path / "old", steps=2, eval_every=1, checkpoint_every=1)
    old = Trainer(of_old)
    old.fit()
    monkeypatch.undo()
    for path in list_checkpoints(tmp_path / "old" / "checkpoints"):
        state = load_checkpoint(path)
        del state["inference"]["interpolation"]
        save_checkpoint(path.parent, state["step"], state, 2)
    assert open_run(tmp_path / "old", "cpu").evaluate()["confusion"] == old.evaluation().confusion.tolist()
    resumed = Trainer(of_old.replace(resume=True))
    resumed.logger.close()
    assert resumed.inference_info()["interpolation"] == "bilinear"
    assert torch.equal(resumed.dataset.test_images, old.dataset.test_images)
    assert not torch.equal(resumed.dataset.test_images, bicubic.dataset.test_images)


def test_views_are_windows_and_resized_parts_of_the_stored_images(trained):
    batches = trained[0].batches
    assert batches.pool.shape[1:] == (18, 18, 3) and batches.augment.padding == 0
    batches.prepare(0)
    batch = batches.batch(torch.tensor(0))
    assert batch.images.shape == (4 + 2 * 8, 3, 16, 16)
    stored = batches.augment.normalize(batches.pool)
    windows = stored.unfold(2, 16, 1).unfold(3, 16, 1).permute(0, 2, 3, 1, 4, 5).flatten(0, 2)
    windows = torch.cat([windows, windows.flip(3)]).flatten(1)
    exact = "donot_use_mm_for_euclid_dist"
    distances = torch.cdist(batch.images.flatten(1), windows, compute_mode=exact).amin(1)
    assert not distances[:12].any() and distances[12:].any()  # weak views are windows, strong ones are not


def test_a_report_shows_images_and_views_of_one_size(trained):
    data = collect(*trained)
    assert data.original_samples.shape == data.weak_samples.shape == data.strong_samples.shape
    assert data.dataset["image size"] == "18 x 18, views of 16 x 16"


def test_a_mapped_pool_trains_as_one_in_memory(photos, trained, tmp_path):
    mapped = Trainer(config(photos, tmp_path / "run", images="mapped"))
    mapped.fit()
    for one, other in zip(mapped.ema.state_dict().values(), trained[0].ema.state_dict().values(), strict=True):
        assert one.equal(other)


def test_remixmatch_rotates_and_mixes_the_views(photos, tmp_path):
    trainer = Trainer(config(photos, tmp_path / "run", "remixmatch", steps=2, eval_every=2))
    before = trainer.method.rotation_head.weight.detach().clone()
    assert trainer.fit()["steps"] == trainer.step == 2
    assert not torch.equal(trainer.method.rotation_head.weight, before)


def test_what_does_not_fit_is_refused(photos, tmp_path):
    with pytest.raises(ValueError, match="stored_size: expected at least the image_size, 16, found 15"):
        config(photos, tmp_path, stored_size=15)
    with pytest.raises(ValueError, match="stored_size: expected none without --image-size, found 18"):
        config(photos, tmp_path, image_size=None)
    with pytest.raises(ValueError, match="stored_size: expected 1 to 4096 pixels, found 5000"):
        config(photos, tmp_path, stored_size=5000)
    with pytest.raises(ValueError, match="strong_crop: expected window for sscl, whose strong views have a resized"):
        config(photos, tmp_path, "sscl")
    runs = [config(photos, tmp_path / name, stored_size=size) for name, size in (("a", 18), ("b", 17))]
    with pytest.raises(ValueError, match=r"stored_size: expected the same in all runs, found 1[78], 1[78]"):
        fit_together(runs)
