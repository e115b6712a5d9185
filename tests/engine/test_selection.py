"""Choosing weights by validation: what is kept, what is reported, when a run ends, and that a resumed one agrees."""

import dataclasses
import signal

import numpy as np
import pytest
import torch
from run_cases import assert_equal_states, final_state, tiny
from sklearn.metrics import balanced_accuracy_score, log_loss

from bacon_fast.data.datasets import load_dataset
from bacon_fast.engine import selection
from bacon_fast.engine.evaluation import Part, balanced_log_loss, parts_of, predict
from bacon_fast.engine.interrupt import StopRequest
from bacon_fast.engine.metrics import standard_error
from bacon_fast.engine.selection import best_row, is_out_of_patience
from bacon_fast.engine.trainer import StoppedError, Trainer
from bacon_fast.files import read_record
from bacon_fast.run import open_run

# The average follows the network at once, whose loss then jumps up and down.
JUMPY = {"validation": 0.3, "eval_every": 1, "ema": 0.0, "lr": 0.1, "bn_momentum": 0.5, "log_every": 100}
JUMPY |= {"method": "fixmatch+abc"}


def config(run_dir, **changes):
    return tiny(run_dir, **(JUMPY | {"select": "validation"} | changes))


def test_the_log_loss_is_scikit_learns_with_balanced_weights():
    generator = torch.Generator().manual_seed(0)
    logits, labels = 3 * torch.randn(50, 5, generator=generator), torch.randint(4, (50,), generator=generator)
    labels[:30] = 0  # unbalanced, and class 4 does not occur
    weights = 1 / np.bincount(labels)[labels]
    expected = log_loss(labels, logits.double().softmax(1), sample_weight=weights, labels=range(5))
    assert float(balanced_log_loss(logits, labels, 5)) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("counts", [[8, 6, 4, 3, 2, 2, 1, 1, 1], [50] * 10, [1, 1, 0]])
def test_the_standard_error_is_the_spread_of_repeated_measurements(counts):
    """10,000 draws of test sets from classes of recalls between 0.3 and 0.8."""
    generator, n = np.random.default_rng(0), np.array(counts)
    recall = np.linspace(0.3, 0.8, len(counts))
    hits = generator.binomial(n, recall, (10_000, len(counts)))[:, n > 0] / n[n > 0]
    spread = hits.mean(1).std()
    estimates = []
    for row in hits[:500]:
        values = iter(row)
        estimates.append(standard_error([next(values) if m else None for m in counts], counts))
    assert np.mean(estimates) == pytest.approx(spread, rel=0.1)


def test_patience_counts_from_the_first_best_row():
    def rows(*losses):
        return [{selection.LOSS: loss} for loss in losses]

    assert best_row(rows(2.0, 1.0, 1.0)) == 1 and best_row([]) is None and best_row(rows(None, 3.0)) == 1
    assert best_row([{"bacc": 0.5}]) is None
    assert is_out_of_patience(rows(3.0, 1.0, 2.0, 1.0), 2) and not is_out_of_patience(rows(3.0, 1.0, 2.0), 2)
    assert not is_out_of_patience(rows(3.0, 2.0, 1.0), 1) and not is_out_of_patience(rows(1.0, 2.0), 0)


def test_parts_are_the_datas_own_or_held_out():
    dataset = load_dataset("digits")
    assert [part.name for part in parts_of(dataset, None)] == ["test"]
    own = dataclasses.replace(dataset, test_images=None, test_labels=None,
                              val_images=dataset.train_images[:3], val_labels=dataset.train_labels[:3])  # fmt: skip
    (part,) = parts_of(own, None)
    assert isinstance(part, Part) and part.name == "validation" and torch.equal(part.images, dataset.train_images[:3])
    assert parts_of(dataclasses.replace(own, val_images=None, val_labels=None), None) == []


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished run, and the averaged weights after each of its steps."""
    trainer = Trainer(config(tmp_path_factory.mktemp("select") / "run"))
    states = []
    with StopRequest() as stop:
        while not trainer.ended:
            trainer.advance(stop)
            states.append({k: v.clone() for k, v in trainer.ema.network.state_dict().items()})
    summary = trainer.finish()
    trainer.logger.close()
    return trainer, states, summary


def test_the_best_of_all_evaluations_is_kept_reported_and_used(run):
    trainer, states, summary = run
    images, labels = (trainer.dataset.train_images, trainer.dataset.train_labels)
    held_out = torch.as_tensor(trainer.split.validation)
    weights = 1 / np.bincount(labels[held_out])[labels[held_out]]
    losses = []
    network = trainer.chosen_network()
    for state in states:
        network.load_state_dict(state)
        _, logits = predict(network, trainer.batches.augment, images[held_out], trainer.device)
        probabilities = logits.double().softmax(1)
        losses.append(log_loss(labels[held_out], probabilities, sample_weight=weights, labels=range(10)))
    best = int(np.argmin(losses))
    assert 0 < best < 11, "neither the first nor the last, else the test shows nothing"
    assert [row["validation_log_loss"] for row in trainer.history.rows] == pytest.approx(losses)

    assert trainer.selected_step == best + 1
    assert_equal_states(dict(trainer.chosen_network().state_dict()), states[best])
    opened = open_run(trainer.run_dir, "cpu")
    assert opened.step == best + 1
    assert_equal_states(dict(opened.network.state_dict()), states[best])

    row = trainer.history.rows[best]
    assert summary["bacc"] == row["bacc"] != summary["last"]["bacc"]
    assert summary["best_on_validation"]["step"] == best + 1 and summary["step"] == 12
    _, logits = predict(opened.network, opened.normalize, trainer.dataset.test_images, opened.device)
    assert summary["bacc"] == pytest.approx(balanced_accuracy_score(trainer.dataset.test_labels, logits.argmax(1)))
    again = opened.evaluate()
    assert again["bacc"] == summary["bacc"] and again["step"] == best + 1 and again["evaluated_on"] == "test"
    error, n = row["validation_bacc_error"], len(held_out)
    assert summary["choice"] == f"chosen by validation log-loss ({n} images, bACC ±{error:.2f}), reported on test"
    assert summary["validation"]["images"] == n and read_record(trainer.run_dir / "summary.json") == summary


@pytest.mark.parametrize(("patience", "stop_at"), [(0, 2), (0, 10), (2, 2), (6, 5)])
def test_a_resumed_run_keeps_and_ends_alike(tmp_path, monkeypatch, patience, stop_at):
    monkeypatch.setattr(selection, "LEAST_FOR_PATIENCE", 10)
    whole = Trainer(config(tmp_path / "whole", patience=patience))
    summary = whole.fit()
    parted = whole.config.replace(run_dir=tmp_path / "parted")
    first = Trainer(parted)
    with StopRequest() as stop:
        for _ in range(stop_at - 1):
            first.advance(stop)
        stop.signum = signal.SIGTERM
        with pytest.raises(StoppedError):
            first.advance(stop)
    first.logger.close()
    second = Trainer(parted.replace(resume=True))
    second.fit()
    one, two = final_state(tmp_path / "whole"), final_state(tmp_path / "parted")
    assert one["selected"] and one["step"] == whole.step == second.step
    assert_equal_states(one, two)
    if patience:
        assert (
            whole.step < 12
            and f"ended at step {whole.step}: {patience} evaluations were no better" in summary["choice"]
        )
        third = Trainer(parted.replace(resume=True))  # has nothing left to do
        assert third.ended and third.fit()["bacc"] == summary["bacc"]


def test_without_validation_nothing_changes(tmp_path):
    trainer = Trainer(tiny(tmp_path / "run"))
    summary = trainer.fit()
    assert trainer.chosen_network() is trainer.ema.network and final_state(tmp_path / "run")["selected"] == {}
    assert "validation" not in read_record(tmp_path / "run" / "split.json", key="hash")
    n = len(trainer.dataset.test_labels)
    assert (
        summary["choice"] == f"last averaged weights, reported on test ({n} images, bACC ±{summary['bacc_error']:.2f})"
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"select": "validation"}, "select: expected last without validation images"),
        ({"patience": 3}, "patience: expected 0 below 200 validation images, found 3 and 0 images"),
        ({"patience": 3, "validation": 0.2}, "patience: expected 0 below 200 validation images, found 3 and "),
    ],
)
def test_a_choice_that_the_images_cannot_make_is_refused_before_training(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        Trainer(tiny(tmp_path / "run", **changes))
    assert not (tmp_path / "run").exists()
