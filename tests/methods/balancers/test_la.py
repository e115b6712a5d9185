"""Logit adjustment against numbers worked out by hand from equation 10 of Menon et al. (ICLR 2021)."""

from math import log

import pytest
import torch
from run_cases import tiny

from bacon_fast.engine.trainer import Trainer
from bacon_fast.methods.balancers.base import Rows
from bacon_fast.methods.balancers.la import LogitAdjustment
from bacon_fast.methods.fixmatch import FixMatch
from bacon_fast.methods.outputs import Batch, Outputs
from bacon_fast.methods.supervised import Supervised

COUNTS = torch.tensor([8, 4, 4])  # pi = 1/2, 1/4, 1/4


def step(tau: float, labeled: list, labels: list, weak: list = (), strong: list = ()):
    """Logits of the main head by row -> the base learners' answers."""
    rows = torch.tensor([*labeled, *weak, *strong], dtype=torch.float32)
    unlabeled = torch.arange(len(weak))
    batch = Batch(rows, torch.tensor(labels), torch.arange(len(labels)), unlabeled, unlabeled * 0 - 1)
    out = Outputs(rows, rows, None, len(labels), len(weak))
    return out, batch, LogitAdjustment(COUNTS, tau=tau)


def targets(balancer, out, batch):
    return balancer(Rows(out.weak_logits, out.weak_logits, out.strong_logits, None, batch), torch.tensor(0), None)


@pytest.mark.parametrize(
    ("tau", "label", "loss"),
    [
        (0.0, 1, log(3)),  # plain cross entropy
        (1.0, 0, log(2)),  # softmax(log pi) = pi
        (1.0, 1, log(4)),
        (2.0, 0, log(6 / 4)),  # pi^2 = 4/16, 1/16, 1/16
        (2.0, 2, log(6)),
    ],
)
def test_equal_logits_have_the_prior_s_surprise(tau, label, loss):
    out, batch, balancer = step(tau, [[0, 0, 0]], [label])
    losses, _, _ = Supervised()(out, batch, torch.tensor(0), targets(balancer, out, batch))
    assert losses["supervised"].item() == pytest.approx(loss, rel=1e-6)


def test_two_rows_by_hand():
    """exp of the adjusted logits: (1, 1/4, 1/2), label 2; (1/2, 1, 1/4), label 0."""
    out, batch, balancer = step(1.0, [[log(2), 0, log(2)], [0, log(4), 0]], [2, 0])
    losses, _, _ = Supervised()(out, batch, torch.tensor(0), targets(balancer, out, batch))
    assert losses["supervised"].item() == pytest.approx((log(1.75 / 0.5) + log(1.75 / 0.5)) / 2, rel=1e-6)


def test_on_fixmatch_unlabeled_rows_are_not_adjusted():
    out, batch, balancer = step(1.0, [[0, 0, 0]], [1], weak=[[0, 9, 0]], strong=[[0, log(2), 0]])
    fixmatch = FixMatch(threshold=0.9, lambda_u=1.0)
    losses, _, pseudo_labels = fixmatch(out, batch, torch.tensor(0), targets(balancer, out, batch))
    assert losses["supervised"].item() == pytest.approx(log(4), rel=1e-6)
    assert losses["unsupervised"].item() == pytest.approx(log(2), rel=1e-6)  # softmax 1/4, 1/2, 1/4
    assert pseudo_labels.tolist() == [1]


def test_a_class_without_labels_is_refused():
    with pytest.raises(ValueError, match=r"found none for \[1\]"):
        LogitAdjustment(torch.tensor([3, 0, 1]), tau=1.0)


@pytest.mark.parametrize("method", ["supervised+la", "fixmatch+la"])
def test_tau_0_is_the_base_learner_bit_for_bit_and_1_is_not(tmp_path, method):
    found = {}
    for name, options in {
        method.partition("+")[0]: {},
        "zero": {"parts": {"la.tau": 0.0}},
        "one": {"parts": {"la.tau": 1.0}},
    }.items():
        trainer = Trainer(tiny(tmp_path / name, method=method if options else name, **options))
        for _ in range(3):
            trainer.train_step()
        trainer.logger.close()
        found[name] = trainer.method.network.state_dict()
    base, zero, one = found.values()
    assert all(torch.equal(zero[k], v) for k, v in base.items())
    assert not torch.equal(one["head.bias"], base["head.bias"])
