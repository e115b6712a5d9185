"""DebiasPL against a loop written from methods.md H, and USB's error behind its flag."""

import math
from dataclasses import replace

import pytest
import torch
from balancer_cases import K, U, batch, random_labels, rows, softmax

from bacon_fast.methods.balancers.base import Rows
from bacon_fast.methods.balancers.debiaspl import DebiasPL
from bacon_fast.methods.fixmatch import FixMatch
from bacon_fast.methods.outputs import Outputs

STEP = torch.tensor(0)


def skewed(seed: int) -> Rows:
    """Rows whose logits favor class 0."""
    seen = rows(seed)
    return replace(seen, weak_logits=seen.weak_logits + torch.tensor([3.0] + [0.0] * (K - 1)))


@pytest.mark.parametrize("tau", [0.4, 1.0])
def test_targets_and_average_against_a_loop_over_three_steps(tau):
    debias, mean = DebiasPL(K, tau=tau, momentum=0.9), [1 / K] * K
    for step in range(3):
        seen = rows(step)
        targets = debias(seen, STEP, None)
        for j in range(U):
            logits = seen.weak_logits[j].tolist()
            expected = softmax([a - tau * math.log(m) for a, m in zip(logits, mean)])  # the average before the update
            assert targets.probabilities[j].tolist() == pytest.approx(expected, rel=1e-5)
        predictions = [softmax(row) for row in seen.weak_logits.tolist()]
        mean = [0.9 * m + 0.1 * sum(p[c] for p in predictions) / U for c, m in enumerate(mean)]
        assert debias.mean_prediction.tolist() == pytest.approx(mean, rel=1e-5)
        assert targets.strong_bias.tolist() == pytest.approx([tau * math.log(m) for m in mean], rel=1e-5)
    assert targets.confidence is None and not targets.losses


def test_debiasing_moves_pseudo_labels_away_from_the_favored_class():
    debias = DebiasPL(K, tau=1.0, momentum=0.5)
    for _ in range(10):
        targets = debias(skewed(0), STEP, None)
    before, after = skewed(0).weak_logits.argmax(1), targets.probabilities.argmax(1)
    assert (after == 0).sum() < (before == 0).sum()


def test_a_class_that_is_never_predicted_keeps_the_loss_finite():
    debias = DebiasPL(2, tau=1.0, momentum=0.0)  # the average is the last batch's: exactly (1, 0)
    certain = rows(num_classes=2, weak_logits=torch.tensor([[200.0, -200.0]]).expand(U, 2))
    for _ in range(2):
        targets = debias(certain, STEP, None)
    assert debias.mean_prediction.tolist() == [1, 0]
    assert targets.probabilities.isfinite().all() and targets.strong_bias.isfinite().all()


def test_usb_averages_over_all_elements_so_that_its_method_is_fixmatch():
    """The corrected average tells the classes apart, USB's cannot, whatever its other momentum does to its size."""
    corrected, usb = DebiasPL(K, tau=1.0, momentum=0.9), DebiasPL(K, tau=1.0, momentum=0.9, usb_ema=0.99)
    labels = random_labels()
    for step in range(5):
        seen = skewed(step)
        fixed, released = corrected(seen, STEP, None), usb(seen, STEP, None)
    assert corrected.mean_prediction.max() > 1.5 * corrected.mean_prediction.min()
    assert usb.mean_prediction.max() == usb.mean_prediction.min() > 1 / K  # 0.99 p + 0.1 / K grows

    logits = torch.cat([torch.zeros(len(labels), K), seen.weak_logits, skewed(99).weak_logits])
    out = Outputs(torch.zeros(len(logits), 1), logits, None, len(labels), U)
    base = FixMatch(threshold=0.6, lambda_u=1.0)
    plain, debiased, usb_loss = (base(out, batch(labels), STEP, t)[0]["unsupervised"] for t in (None, fixed, released))
    torch.testing.assert_close(usb_loss, plain)
    assert (debiased - plain).abs() > 0.01
