"""Runs of ReMixMatch and SSC: resumed bit for bit, evaluated by the head that predicts, in half precision."""

import pytest
import torch
from run_cases import assert_equal_states, final_state, tiny

from bacon_fast.engine.trainer import Trainer


@pytest.mark.parametrize(
    "method, state", [("remixmatch+abc+bacon", "alignment.average"), ("ssc", "network.prototypes")]
)
def test_resumed_run_ends_bit_for_bit_where_an_uninterrupted_one_ends(tmp_path, method, state):
    config = tiny(tmp_path / "whole", method=method, eval_every=12)
    Trainer(config).fit()
    first = Trainer(config.replace(run_dir=tmp_path / "parts"))
    for _ in range(7):
        first.train_step()
    first.save()
    first.train_step()  # lost with the process
    first.logger.close()
    second = Trainer(config.replace(run_dir=tmp_path / "parts", resume=True))
    assert second.step == 7
    second.fit()
    one, two = final_state(tmp_path / "whole"), final_state(tmp_path / "parts")
    del one["rows"], two["rows"]
    assert one["method"][state].any(), "the state under test"
    assert_equal_states(one, two)


def test_a_run_resumes_from_the_preset_s_own_words(tmp_path):
    """Both have the method's own defaults."""
    config = tiny(tmp_path / "run", method="remixmatch")
    first = Trainer(config)
    assert (first.config.views.unlabeled_ratio, first.config.parts["remixmatch"].lambda_u) == (1, 1.5)
    first.train_step()
    first.save()
    first.logger.close()
    second = Trainer(config.replace(resume=True))
    second.logger.close()
    assert second.step == 1 and second.config.views.unlabeled_ratio == 1


def test_the_rotation_head_is_trained_but_not_part_of_what_is_evaluated(tmp_path):
    trainer = Trainer(tiny(tmp_path / "run", method="remixmatch"))
    before = trainer.method.rotation_head.weight.detach().clone()
    trainer.train_step()
    trainer.logger.close()
    assert not torch.equal(trainer.method.rotation_head.weight, before)
    assert not [name for name in trainer.ema.network.state_dict() if "rotation" in name]


def test_prototypes_and_projector_are_averaged_and_evaluated(tmp_path):
    trainer = Trainer(tiny(tmp_path / "run", method="ssc", ema=0.5))
    start = trainer.method.network.prototypes.detach().clone()
    trainer.train_step()
    trainer.logger.close()
    prototypes = trainer.method.network.prototypes
    torch.testing.assert_close(trainer.ema.network.prototypes, 0.5 * start + 0.5 * prototypes)
    images = trainer.batches.augment.normalize(trainer.dataset.test_images[:20])
    average = trainer.ema.network.eval()
    z = torch.nn.functional.normalize(average.projector(average.backbone(images)), dim=1)
    nearest = (z @ torch.nn.functional.normalize(average.prototypes, dim=1).T).argmax(1)
    assert average.predict(images)[1].argmax(1).tolist() == nearest.tolist()


@pytest.mark.parametrize("method", ["remixmatch+abc+bacon", "ssc", "sscl"])
def test_half_precision_steps_follow_full_precision(tmp_path, method):
    losses = {}
    for precision in ("fp32", "bf16"):
        trainer = Trainer(tiny(tmp_path / precision, precision=precision, method=method))
        losses[precision] = torch.stack([trainer.train_step()[0]["total"] for _ in range(3)])
        trainer.logger.close()
    torch.testing.assert_close(losses["bf16"], losses["fp32"], rtol=0.05, atol=0.05)
    assert not torch.equal(losses["bf16"], losses["fp32"])
