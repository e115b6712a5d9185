"""Runs on cached features: what the file holds, which views a step sees, resume, damage, and evaluation on pixels."""

import warnings

import pytest
import torch
from PIL import Image
from run_cases import assert_equal_states, final_state, tiny

from bacon_fast.data.longtail import Split
from bacon_fast.data.philox import Stream, philox
from bacon_fast.engine.presets import PRESETS
from bacon_fast.engine.trainer import Trainer
from bacon_fast.files import read_record
from bacon_fast.models import build_backbone
from bacon_fast.report.collect import collect
from bacon_fast.run import open_run

SEEN = 3
"""Seed of the runs: not that of the kept views."""


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> str:
    """A file of "pretrained" weights of a tiny WRN, whose BatchNorm statistics are not those of the start."""
    torch.manual_seed(5)
    backbone = build_backbone("wrn-10-1", bn_momentum=0.5)
    backbone(torch.randn(16, 3, 16, 16))
    path = tmp_path_factory.mktemp("weights") / "wrn.pt"
    torch.save(backbone.state_dict(), path)
    return str(path)


def cached(run_dir, weights: str, **changes):
    own = {"method": "fixmatch+abc", "backbone": "wrn-10-1", "weights": weights, "train": "head", "cached_views": 2}
    return tiny(run_dir, **own | {"bn_momentum": None, "seed": SEEN, "lr": 0.1} | changes)


@pytest.fixture(scope="module")
def trained(weights, tmp_path_factory) -> Trainer:
    trainer = Trainer(cached(tmp_path_factory.mktemp("run") / "run", weights))
    trainer.fit()
    return trainer


def the_backbone(weights: str) -> torch.nn.Module:
    backbone = build_backbone("wrn-10-1")
    backbone.load_state_dict(torch.load(weights))
    return backbone.eval()


def kept(trainer: Trainer) -> torch.Tensor:
    """float16 [M, 5, F], read from the file with its documented layout."""
    pool = trainer.dataset.pool_size
    values = torch.frombuffer(bytearray(trainer._features.file.read_bytes()[:-32]), dtype=torch.float16).view(-1, 64)
    assert len(values) == pool * 5 + len(trainer.dataset.test_images)
    return values[: pool * 5].view(pool, 5, 64)


def test_the_features_are_those_of_the_backbone_on_the_same_views(trained, weights):
    backbone, augment = the_backbone(weights), trained.batches.augment
    images, found = trained.dataset.pool(), kept(trained)
    views = [images]
    views += [augment.weak(images, 0, view, Stream.CACHED_WEAK) for view in (0, 1)]
    views += [augment.strong(images, 0, view, Stream.CACHED_STRONG) for view in (0, 1)]
    for number, view in enumerate(views):
        with torch.inference_mode():
            expected = backbone(augment.normalize(view))
        # Half of float16's last place, and the order of float32 sums in a batch of another size.
        torch.testing.assert_close(found[:, number].float(), expected, rtol=2**-11, atol=2e-5)
    assert not torch.equal(found[:, 1], found[:, 2]) and not torch.equal(found[:, 3], found[:, 4])


def test_a_batch_draws_the_view_of_each_row(trained):
    """Against a loop over the rows, with the draws of Philox."""
    batches, found = trained.batches, kept(trained)
    chosen = []
    for step in (0, 7):
        batches.prepare(step)
        batch = batches.batch(torch.tensor(step))
        rows = []
        for stream, slots, first in (
            (Stream.LABELED_WEAK, batches.labeled[batch.labeled_slots], 1),
            (Stream.UNLABELED_WEAK, batches.unlabeled[batch.unlabeled_slots], 1),
            (Stream.STRONG_0, batches.unlabeled[batch.unlabeled_slots], 3),
        ):
            for slot, image in enumerate(slots.tolist()):
                word = int(philox(SEEN, step, stream, torch.tensor([slot]), 1))
                chosen.append(word * 2 >> 32)
                rows.append(found[image, first + chosen[-1]])
        assert torch.equal(batch.images, torch.stack(rows).float())
        assert torch.equal(batch.labels, batches.labels[batch.labeled_slots])
    assert 0.2 < sum(chosen) / len(chosen) < 0.8  # both views


def test_heads_learn_and_the_backbone_stays(trained, weights):
    state = final_state(trained.run_dir)
    for name, value in torch.load(weights).items():
        assert torch.equal(state["method"][f"network.backbone.{name}"], value), name
    fresh = Trainer(trained.config.replace(run_dir=trained.run_dir.parent / "fresh"))
    fresh.logger.close()
    for name in ("head", "balanced_head"):
        own, start = getattr(trained.method.network, name).weight, getattr(fresh.method.network, name).weight
        assert not torch.equal(own, start)


def test_the_saved_run_reads_pixels(trained, tmp_path):
    """`Run` evaluates on images, by a network whose features have no rounding to float16."""
    run = open_run(trained.run_dir, "cpu")
    on_pixels, on_features = run.evaluate()["confusion"], trained.evaluation().confusion
    moved = (torch.tensor(on_pixels) - on_features).abs().sum()
    assert moved <= 4 < on_features.sum()  # at most two rows on the border of two classes
    rows = trained.dataset.test_images[:100]
    with torch.inference_mode():
        exact = run.network(run.normalize.normalize(rows))[2]
        rounded = trained.ema.network(trained.parts[0].images[:100].float())[2]
    torch.testing.assert_close(rounded, exact, rtol=0, atol=float(exact.abs().max()) * 2**-9)
    assert exact.std(0).max() > 0
    Image.fromarray(rows[0].numpy()).save(tmp_path / "0.png")
    (answer,) = run.predict([tmp_path / "0.png"])
    assert answer["probability"] == pytest.approx(float(rounded[0].softmax(0).max()), abs=1e-3)


def test_the_report_shows_pixels_of_the_mistakes(trained):
    data = collect(trained, read_record(trained.run_dir / "summary.json"))
    assert data.mistakes
    for mistake in data.mistakes:
        same = (trained.dataset.test_images.numpy() == mistake.image).all(axis=(1, 2, 3))
        assert trained.dataset.test_labels[torch.from_numpy(same)].tolist() == [mistake.truth]


def test_a_resumed_run_ends_bit_for_bit_where_an_uninterrupted_one_ends(trained, weights, tmp_path):
    config = cached(tmp_path / "parts", weights)
    first = Trainer(config)
    for _ in range(5):
        first.train_step()
    first.save()
    first.train_step()  # lost with the process
    first.logger.close()
    file = first._features.file
    made, content = file.stat().st_mtime_ns, file.read_bytes()
    second = Trainer(config.replace(resume=True))
    assert second.step == 5 and second._features.file == file and file.stat().st_mtime_ns == made
    second.fit()
    one, two = final_state(trained.run_dir), final_state(tmp_path / "parts")
    del one["rows"], two["rows"]
    assert_equal_states(one, two)
    assert content == trained._features.file.read_bytes()  # a run in another place made the same bytes


@pytest.mark.parametrize("damage", ["a bit", "cut"])
def test_a_damaged_file_is_made_anew_by_name(weights, tmp_path, damage):
    config = cached(tmp_path, weights, steps=1)
    first = Trainer(config)
    first.logger.close()
    file = first._features.file
    whole = file.read_bytes()
    broken = bytearray(whole)
    broken[1000] ^= 1
    file.write_bytes(broken if damage == "a bit" else whole[:-1])
    with pytest.warns(UserWarning, match=f"{file.name}: damaged, computing the features again"):
        Trainer(config.replace(resume=True)).logger.close()
    assert file.read_bytes() == whole
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Trainer(config.replace(resume=True)).logger.close()


def test_the_file_is_known_by_weights_and_views_and_not_by_the_seed_of_the_run(trained, weights, tmp_path):
    other = tmp_path / "other.pt"
    tensors = torch.load(weights)
    tensors[next(iter(tensors))] += 0.01
    torch.save(tensors, other)
    names = {}
    for name, changes in {
        "seed": {"seed": 4},
        "method": {"method": "supervised"},
        "weights": {"weights": str(other)},
        "views": {"cached_views": 1},
        "cutout": {"cutout": False},
    }.items():
        trainer = Trainer(cached(tmp_path / name, changes.pop("weights", weights), **changes))
        trainer.logger.close()
        names[name] = trainer._features.file.name
    own = trained._features.file.name
    assert names["method"] == own
    # The digits' test images are drawn by no seed, so that the data are the same.
    assert names["seed"] == own
    assert len({own, names["weights"], names["views"], names["cutout"]}) == 4


def test_validation_images_of_the_split_are_evaluated_by_their_center_windows(weights, tmp_path):
    trainer = Trainer(cached(tmp_path, weights, steps=4, validation=0.2, select="validation"))
    trainer.fit()
    held_out = Split.load(tmp_path / "split.json").validation
    assert [part.name for part in trainer.parts] == ["test", "validation"]
    assert torch.equal(trainer.parts[1].images, kept(trainer)[torch.as_tensor(held_out), 0])
    assert trainer.history.rows[-1]["validation_images"] == len(held_out) > 0


@pytest.mark.parametrize("method", ["fixmatch+crest", "fixmatch+cossl", "fixmatch+daso", "supervised+la", "ssc"])
def test_other_methods_train_on_features(method, weights, tmp_path):
    trainer = Trainer(cached(tmp_path, weights, method=method, steps=8, eval_every=8, checkpoint_every=8))
    before = {name: value.clone() for name, value in trainer.method.network.state_dict().items()}
    trainer.fit()
    changed = {
        name.split(".")[0] for name, v in trainer.method.network.state_dict().items() if not v.equal(before[name])
    }
    assert changed and "backbone" not in changed


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train": "all"}, "cached_views: expected 0 unless train is head"),
        ({"train": "bias"}, "cached_views: expected 0 unless train is head"),
        ({"cached_views": -1}, "cached_views: expected an integer"),
        ({"method": "fixmatch+bacon"}, "beside bacon, whose gradient would reach its own projection alone"),
        (
            {"method": "remixmatch", "parts": {"remixmatch.lambda_rot": 0.0}},
            "cached_views: expected 0 beside remixmatch, which mixes and rotates pixels; found 2",
        ),
        ({"method": "sscl"}, "cached_views: expected 0 beside sscl, which makes views of pixels"),
        ({"method": "fixmatch+cdmad"}, "cached_views: expected 0 beside cdmad, whose empty image is made of pixels"),
    ],
)
def test_what_has_no_use_for_features_is_refused(changes, message, weights, tmp_path):
    with pytest.raises(ValueError, match=message):
        cached(tmp_path, weights, **changes)


def test_features_outside_float16_are_refused_and_leave_no_file(weights, tmp_path):
    tensors = {k: v * 1e6 if k.endswith(("bn.weight", "norm.weight")) else v for k, v in torch.load(weights).items()}
    tensors = {k: torch.full_like(v, 1e9) if v.dim() == 1 and k.endswith("bias") else v for k, v in tensors.items()}
    torch.save(tensors, tmp_path / "large.pt")
    with pytest.raises(ValueError, match="cached_views: expected features that are finite in float16"):
        Trainer(cached(tmp_path / "run", str(tmp_path / "large.pt")))
    assert not list(tmp_path.rglob("*.features"))


def test_the_preset_keeps_two_and_two_views_of_a_frozen_dinov2():
    config, photos = PRESETS["photos-cached"].config(), PRESETS["photos"].config()
    assert (config.views.cached_views, config.model.train, config.model.weights) == (2, "head", "pretrained")
    assert (config.views.stored_size, config.data, config.method) == (256, photos.data, "fixmatch+abc")
    assert PRESETS["photos-cached"].config("supervised").method == "supervised"
