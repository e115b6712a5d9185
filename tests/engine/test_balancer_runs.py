"""Runs of the class balancers: a resumed run equals an uninterrupted one, with state, phases and refreshes."""

import pytest
import torch
from run_cases import assert_equal_states, final_state, tiny

from bacon_fast.engine import build
from bacon_fast.engine.trainer import Trainer
from bacon_fast.models.batchnorm import synchronize
from bacon_fast.models.network import DebiasedNetwork
from bacon_fast.run import open_run

BALANCERS = ("daso", "darp", "crest", "crest+pda", "cossl", "cdmad")  # of both bases
BALANCED = ["supervised+la", "fixmatch+la", "fixmatch+debiaspl", "fixmatch+saw", "fixmatch+simpro"] + [
    f"{base}+{x}" for base in ("fixmatch", "remixmatch") for x in BALANCERS
]


@pytest.mark.parametrize("method", BALANCED)
def test_resumed_run_ends_bit_for_bit_where_an_uninterrupted_one_ends(tmp_path, method):
    config = tiny(tmp_path / "whole", method=method, steps=8, eval_every=8)
    Trainer(config).fit()
    first = Trainer(config.replace(run_dir=tmp_path / "parts"))
    for _ in range(5):
        first.train_step()
    first.save()
    first.train_step()  # lost with the process
    first.logger.close()
    second = Trainer(config.replace(run_dir=tmp_path / "parts", resume=True))
    assert second.step == 5
    if method == "fixmatch+simpro":
        balancer = second.method.balancer
        assert balancer.unlabeled_sums.any() and balancer.labeled_sums.any(), "it was saved between two estimates"
    addresses = {key: value.data_ptr() for key, value in second.method.named_buffers()}
    second.fit()
    one, two = final_state(tmp_path / "whole"), final_state(tmp_path / "parts")
    del one["rows"], two["rows"]
    assert_equal_states(one, two)
    # A captured graph updates the buffers where it found them.
    assert {key: value.data_ptr() for key, value in second.method.named_buffers()} == addresses


@pytest.mark.parametrize(
    "method, step", [("fixmatch+crest", 4), ("remixmatch+crest+pda", 4), ("fixmatch+cossl", 6), ("remixmatch+cossl", 6)]
)
def test_a_run_stopped_right_before_a_refresh_ends_as_an_uninterrupted_one(tmp_path, method, step):
    parts = {"crest.generations": 2, "cossl.start": 0.75}
    config = tiny(tmp_path / "whole", method=method, steps=8, eval_every=8, parts=parts)
    Trainer(config).fit()
    first = Trainer(config.replace(run_dir=tmp_path / "parts"))
    for _ in range(step):
        first.train_step()
    assert first.method.refresh_due(step)
    first.save()
    first.logger.close()
    second = Trainer(config.replace(run_dir=tmp_path / "parts", resume=True))
    second.fit()
    one, two = final_state(tmp_path / "whole"), final_state(tmp_path / "parts")
    del one["rows"], two["rows"]
    assert_equal_states(one, two)


# Where each acts in ReMixMatch, by its authors' code: (on the aligned and sharpened targets, as the alignment).
PLACES = {"daso": (True, False), "darp": (True, False), "crest": (False, False), "crest+pda": (False, True)}
PLACES |= {"cossl": (False, False), "cdmad": (False, False)}  # of both sets of the digits the imbalance is one


@pytest.mark.parametrize("name", BALANCERS)
def test_each_has_its_place_in_remixmatch(tmp_path, name):
    trainer = Trainer(tiny(tmp_path, method=f"remixmatch+{name}"))
    trainer.logger.close()
    balancer = trainer.method.balancer
    assert (balancer.on_targets, balancer.aligns) == PLACES[name]


@pytest.mark.parametrize(
    ("changes", "align", "aligns"),
    [
        ({}, "auto", False),
        ({}, "off", True),
        ({"gamma_u": 5.0}, "auto", True),
        ({"gamma_u": -10.0}, "auto", True),
        ({"gamma_u": -10.0}, "on", False),
    ],
)
def test_cdmad_takes_the_place_of_the_alignment_unless_the_imbalances_are_one(tmp_path, changes, align, aligns):
    changes = changes and {"unlabeled_head": 50, **changes}
    trainer = Trainer(tiny(tmp_path, method="remixmatch+cdmad", parts={"cdmad.align": align}, **changes))
    trainer.logger.close()
    assert trainer.method.balancer.aligns == aligns


@pytest.mark.parametrize(
    ("method", "parts", "changes", "message"),
    [
        ("fixmatch", {"cdmad.align": "on"}, {}, "cdmad.align: expected auto with fixmatch, .* found on"),
        ("remixmatch", {"cdmad.threshold": 0.5}, {}, "cdmad.threshold: expected 0 with remixmatch, .* found 0.5"),
        (
            "fixmatch",
            {},
            {"backbone": "resnet18"},
            r"image_size: expected images so large that .* more than one pixel, .* found 16x16",
        ),
        (
            "remixmatch",
            {},
            {"backbone": "resnet18"},
            r"image_size: expected images so large that .* more than one pixel, .* found 16x16",
        ),
    ],
)
def test_what_cdmad_cannot_do_is_refused_before_the_first_step(tmp_path, method, parts, changes, message):
    with pytest.raises(ValueError, match=message):
        Trainer(tiny(tmp_path / "run", method=f"{method}+cdmad", parts=parts, **changes))


def test_cdmad_s_slip_needs_statistics_that_change(tmp_path):
    pytest.importorskip("timm", reason="needs timm")
    changes = {"backbone": "timm/test_vit", "bn_momentum": None, "image_size": 32}
    with pytest.raises(ValueError, match=r"cdmad.authors_statistics: expected False where no statistics of BatchNorm"):
        Trainer(tiny(tmp_path, method="fixmatch+cdmad", parts={"cdmad.authors_statistics": True}, **changes))


def test_synchronized_statistics_do_not_hide_an_image_too_small(tmp_path):
    trainer = Trainer(tiny(tmp_path, method="fixmatch+cdmad"))
    trainer.logger.close()
    synchronize(trainer.method)
    trainer.method.check_images(8, 8)
    with pytest.raises(ValueError, match=r"image_size: expected images so large .* found 4x4"):
        trainer.method.check_images(4, 4)


def test_evaluations_of_a_new_generation_are_told_apart(tmp_path):
    config = tiny(tmp_path, method="fixmatch+crest", parts={"crest.generations": 3}, steps=12, eval_every=2)
    trainer = Trainer(config)
    summary = trainer.fit()
    rows = trainer.history.rows
    assert [(row["step"], row.get("generation", 0)) for row in rows] == [
        (2, 0), (4, 0), (6, 1), (8, 1), (10, 2), (12, 2),
    ]  # fmt: skip
    assert summary["mean_last_20"]["evaluations"] == 2
    assert summary["mean_last_20"]["bacc"] == pytest.approx((rows[-1]["bacc"] + rows[-2]["bacc"]) / 2)


@pytest.mark.parametrize("name", ["debiaspl", "daso", "cossl"])
def test_usb_compat_reaches_the_method(tmp_path, name):
    totals = []
    for usb_compat in (False, True):
        parts = {"cossl.start": 0.1}
        config = tiny(tmp_path / str(usb_compat), method=f"fixmatch+{name}", usb_compat=usb_compat, parts=parts)
        trainer = Trainer(config)
        totals.append([trainer.train_step()[0]["total"].item() for _ in range(3)])
        trainer.logger.close()
    assert totals[0] != totals[1]


@pytest.mark.parametrize("method", ["fixmatch+crest", "remixmatch+crest"])
def test_a_generation_starts_from_a_fresh_network_on_the_labeled_set_and_what_was_chosen(tmp_path, method, monkeypatch):
    trainer = Trainer(tiny(tmp_path, method=method, parts={"crest.generations": 3}, lr_schedule="cosine"))
    buffers, start_generation = {}, trainer._start_generation

    def recorded(new):
        start_generation(new)
        buffers.update({name: buffer.clone() for name, buffer in trainer.method.network.named_buffers()})

    monkeypatch.setattr(trainer, "_start_generation", recorded)
    original, labels = trainer.batches.labeled.clone(), trainer.batches.labels.clone()
    rates = []
    for step in range(12):
        trainer.train_step()
        rates.append(trainer.program.rate.item())
        if step == 4:  # the first of the second generation
            build.seed_everything(trainer.config.seed + 1)
            fresh = build.build_method(trainer.config, trainer._info)
            for start, now in zip(fresh.parameters(), trainer.method.parameters()):
                if now.dim() == 1:  # without weight decay; Nesterov's first step is of 1.9 gradients
                    torch.testing.assert_close(now, start - 1.9 * rates[-1] * now.grad)
                    assert torch.equal(trainer.optimizer.state[now]["momentum_buffer"], now.grad)
            for name, start in fresh.network.named_buffers():  # such as BatchNorm's running statistics
                assert torch.equal(buffers[name], start), name
            networks = fresh.network, trainer.method.network, trainer.ema.network
            for start, now, mean in zip(*(network.parameters() for network in networks)):
                torch.testing.assert_close(mean, 0.99 * start + 0.01 * now)
            second = trainer.batches.labeled
    trainer.logger.close()
    assert rates[:4] == rates[4:8] == rates[8:] and rates[3] < rates[0]
    assert trainer.generation == 2
    for labeled in (second, trainer.batches.labeled):
        assert torch.equal(labeled[: len(original)], original)
        added = labeled[len(original) :]
        assert 0 < len(added) < len(trainer.batches.unlabeled) and torch.isin(added, trainer.batches.unlabeled).all()
    assert torch.equal(trainer.batches.labels[: len(labels)], labels)


def test_the_teacher_of_cossl_starts_late_and_then_predicts(tmp_path):
    trainer = Trainer(tiny(tmp_path, method="fixmatch+cossl", parts={"cossl.start": 0.5}))
    online, averaged = trainer.method.network, trainer.ema.network
    images = trainer.batches.augment.normalize(trainer.dataset.test_images[:20])
    start = online.balanced_head.weight.detach().clone()
    for _ in range(6):
        losses, _ = trainer.train_step()
        assert "teacher" not in losses
    assert torch.equal(online.balanced_head.weight, start), "neither gradient nor decay before the start"
    assert torch.equal(averaged.predict(images)[1], averaged(images)[1]), "the main head predicts"
    before = averaged.balanced_head.weight.clone()
    losses, _ = trainer.train_step()
    assert losses["teacher"].item() > 0
    features, logits = averaged.predict(images)
    assert torch.equal(logits, averaged.balanced_head(features)), "the averaged teacher predicts"
    assert (averaged.balanced_head.weight - before).norm() > 0.1 * before.norm(), "warmed up, not averaged slowly"
    warmed = online.balanced_head.weight.detach().clone()
    trainer.train_step()
    trainer.logger.close()
    assert not torch.equal(online.balanced_head.weight, warmed)


@pytest.mark.parametrize("method", ["fixmatch+cdmad", "remixmatch+cdmad"])
def test_a_network_of_cdmad_opened_from_a_checkpoint_predicts_without_the_bias(tmp_path, method):
    trainer = Trainer(tiny(tmp_path, method=method, parts={"cdmad.image": "white"}, steps=4))
    trainer.fit()
    opened, images = open_run(tmp_path, "cpu"), trainer.batches.augment.normalize(trainer.dataset.test_images[:9])
    assert isinstance(opened.network, DebiasedNetwork)
    white = trainer.batches.augment.normalize(torch.full((1, *trainer.dataset.test_images.shape[1:]), 255).byte())
    torch.testing.assert_close(opened.network.empty(images), white)
    # Up to the memory format of the weights.
    torch.testing.assert_close(opened.network.predict(images)[1], trainer.ema.network.predict(images)[1])
    expected = opened.network(images)[1] - opened.network(white)[1]
    torch.testing.assert_close(opened.network.predict(images)[1], expected.detach(), rtol=1e-4, atol=1e-5)


def test_the_authors_slip_moves_running_statistics_and_no_loss_of_the_step(tmp_path):
    found = []
    for slip in (False, True):
        parts = {"cdmad.authors_statistics": slip, "cdmad.start": 0.5}
        trainer = Trainer(tiny(tmp_path / str(slip), method="fixmatch+cdmad", parts=parts))
        total = trainer.train_step()[0]["total"].item()
        trainer.logger.close()
        buffers = dict(trainer.method.network.named_buffers())
        found.append((total, {name: value.clone() for name, value in buffers.items() if "running_mean" in name}))
    assert found[0][0] == found[1][0]
    assert not any(torch.equal(found[0][1][name], found[1][1][name]) for name in found[0][1])


def test_simpro_counts_labels_and_estimates_priors_as_often_as_told(tmp_path):
    trainer = Trainer(tiny(tmp_path, method="fixmatch+simpro", steps=12, parts={"simpro.estimates": 4}))
    balancer, start = trainer.method.balancer, trainer.method.balancer.prior.clone()
    sums, moved = [], []
    for _ in range(6):
        before = balancer.prior.clone()
        trainer.train_step()
        sums.append(balancer.labeled_sums.sum().item())
        moved.append(not torch.equal(before, balancer.prior))
    trainer.logger.close()
    assert sums == [8, 16, 0, 8, 16, 0] and moved == [False, False, True] * 2
    assert balancer.prior.sum().item() == pytest.approx(1, abs=1e-6) and not torch.equal(balancer.prior, start)


@pytest.mark.parametrize(("strong_views", "labeled_strong"), [(1, False), (1, True), (2, False)])
def test_simpro_with_fewer_views(tmp_path, strong_views, labeled_strong):
    parts = {"simpro.strong_views": strong_views, "simpro.labeled_strong": labeled_strong}
    trainer = Trainer(tiny(tmp_path, method="fixmatch+simpro", parts=parts))
    trainer.batches.prepare(0)
    batch = trainer.batches.batch(torch.tensor(0))
    assert len(batch.images) == 8 + (1 + strong_views) * 16
    assert (batch.labeled_strong_images is not None) == labeled_strong
    losses, _ = trainer.train_step()
    trainer.logger.close()
    assert losses["total"].isfinite() and losses["supervised"] > 0


@pytest.mark.parametrize("method", ["fixmatch+simpro", "fixmatch+cdmad", "remixmatch+cdmad"])
def test_the_newer_balancers_run_in_half_precision(tmp_path, method):
    """The answer to the empty image is computed in float32 whatever the images come in."""
    trainer = Trainer(tiny(tmp_path, method=method, parts={"cdmad.start": 0.0}, precision="bf16"))
    for _ in range(2):
        losses, _ = trainer.train_step()
        assert all(value.isfinite() for value in losses.values())
    if "cdmad" in method:
        trainer.batches.prepare(2)
        balancer = trainer.method.balancer
        with torch.autocast("cpu", dtype=torch.bfloat16):
            answer = balancer.own_pass(trainer.batches.batch(torch.tensor(2)), True)
        torch.testing.assert_close(answer, balancer.network(torch.ones(1, 3, 16, 16))[1].detach())
    trainer.logger.close()
