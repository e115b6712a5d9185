"""`photos` holds validation images out by itself, where there are labels enough: --validation None."""

import dataclasses

import pytest
from run_cases import tiny

from bacon_fast.data.datasets import load_dataset
from bacon_fast.data.longtail import validation_counts
from bacon_fast.engine.build import build_split, settle_validation
from bacon_fast.engine.checkpoint import CheckpointError
from bacon_fast.engine.config import Config
from bacon_fast.engine.presets import PRESETS
from bacon_fast.engine.trainer import Trainer

LINE = "validation: 0.2 of the labels of each class are held out, as there are at least 100; --validation 0 trains"


def config(run_dir, **changes):
    return tiny(run_dir, **({"method": "supervised", "steps": 4, "validation": None} | changes))


def opened(config: Config) -> Trainer:
    trainer = Trainer(config)
    trainer.logger.close()
    return trainer


def test_the_presets_of_photos_leave_it_to_the_data():
    unsettled = {name for name, preset in PRESETS.items() if preset.config().data.validation is None}
    assert unsettled == {"photos", "photos-cached"}


def test_a_fifth_of_many_labels_is_held_out_said_and_recorded(tmp_path, capsys):
    trainer = opened(config(tmp_path / "run"))
    assert LINE in capsys.readouterr().err
    whole = build_split(config(tmp_path, validation=0.0), trainer.dataset, None)
    held_out = sum(validation_counts(whole.labeled_counts, 0.2))
    assert len(whole.labeled) >= 100 and len(trainer.split.validation) == held_out > 20
    assert [part.name for part in trainer.parts] == ["test", "validation"]
    assert Config.read(tmp_path / "run" / "config.json").data.validation == 0.2
    assert opened(config(tmp_path / "named", validation=0.2)).split.hash == trainer.split.hash


@pytest.mark.parametrize("changes", [{"validation": 0.0}, {"labeled_head": 25}], ids=["asked not to", "few labels"])
def test_none_is_held_out(tmp_path, capsys, changes):
    trainer = opened(config(tmp_path / "run", **changes))
    assert not len(trainer.split.validation) and "held out" not in capsys.readouterr().err
    assert sum(trainer.split.labeled_counts) < 100 or "validation" in changes
    assert Config.read(tmp_path / "run" / "config.json").data.validation == 0.0


def test_where_the_count_ends(tmp_path):
    dataset = load_dataset("digits")
    for head, expected in ((10, 0.2), (9, 0.0)):  # of each of ten classes
        assert settle_validation(config(tmp_path, labeled_head=head, gamma_l=1.0), dataset) == expected


def test_images_or_a_split_that_are_given_decide(tmp_path):
    dataset = load_dataset("digits")
    own = dataclasses.replace(dataset, val_images=dataset.test_images, val_labels=dataset.test_labels)
    assert settle_validation(config(tmp_path), own) == 0.0
    split = opened(config(tmp_path / "run", validation=0.3)).split
    again = opened(config(tmp_path / "again", split=tmp_path / "run" / "split.json"))
    assert again.split.hash == split.hash and again.config.data.validation == 0.0


@pytest.mark.parametrize("has_checkpoint", [True, False])
@pytest.mark.parametrize("share", [0.0, 0.3, None])
def test_a_resumed_run_stays_as_it_was(tmp_path, capsys, share, has_checkpoint):
    first = Trainer(config(tmp_path, validation=share))
    first.train_step()
    if has_checkpoint:
        first.save()
    first.logger.close()
    capsys.readouterr()
    second = opened(config(tmp_path, resume=True))
    assert second.step == has_checkpoint and second.split.hash == first.split.hash
    assert "of the labels of each class are held out" not in capsys.readouterr().err
    expected = 0.2 if share is None else share
    assert second.config.data.validation == Config.read(tmp_path / "config.json").data.validation == expected
    with pytest.raises(CheckpointError, match=rf"validation: checkpoint {expected}, now 0.5"):
        Trainer(config(tmp_path, resume=True, validation=0.5))
