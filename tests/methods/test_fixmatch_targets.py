"""FixMatch with a balancer's targets (probabilities, confidence, bias, weights) against a loop in float64."""

import pytest
import torch
from balancer_cases import B, F, K, U, batch, cross_entropy, random_labels

from bacon_fast.methods.balancers.base import Targets
from bacon_fast.methods.fixmatch import FixMatch
from bacon_fast.methods.outputs import Outputs

STEP = torch.tensor(0)


def outputs() -> Outputs:
    generator = torch.Generator().manual_seed(1)
    logits = (4 * torch.randn(B + 2 * U, K, generator=generator)).requires_grad_()
    return Outputs(torch.zeros(B + 2 * U, F), logits, None, B, U)


def targets(**changes) -> Targets:
    generator = torch.Generator().manual_seed(2)
    values = {
        "probabilities": (5 * torch.randn(U, K, generator=generator)).softmax(1),
        "strong_bias": torch.randn(K, generator=generator),
        "labeled_weights": torch.rand(K, generator=generator) + 0.1,
        "unlabeled_weights": torch.rand(K, generator=generator) + 0.1,
    }
    return Targets(**(values | changes))


def test_losses_against_a_loop():
    out, y, given = outputs(), random_labels(), targets()
    losses, stats, pseudo_labels = FixMatch(threshold=0.9, lambda_u=2.0)(out, batch(y), STEP, given)
    supervised = unsupervised = 0.0
    confident = []
    for b in range(B):
        supervised += given.labeled_weights[y[b]].item() * cross_entropy(out.logits[b].tolist(), int(y[b]))
    for j in range(U):
        p = given.probabilities[j].tolist()
        guess = p.index(max(p))
        if max(p) >= 0.9:
            shifted = (out.logits[B + U + j] + given.strong_bias).tolist()
            unsupervised += given.unlabeled_weights[guess].item() * cross_entropy(shifted, guess)
            confident.append(j)
            assert pseudo_labels[j] == guess
        else:
            assert pseudo_labels[j] == -1
    assert 0 < len(confident) < U, "the case must have both kinds of rows"
    assert losses["supervised"].item() == pytest.approx(supervised / B, rel=1e-5)
    assert losses["unsupervised"].item() == pytest.approx(2 * unsupervised / U, rel=1e-5)
    assert stats["pseudo_rate"].item() == pytest.approx(len(confident) / U)


def test_gradient_against_autograd_of_the_loop_in_double():
    out, y, given = outputs(), random_labels(), targets()
    losses, _, pseudo_labels = FixMatch(threshold=0.9, lambda_u=1.0)(out, batch(y), STEP, given)
    (gradient,) = torch.autograd.grad(sum(losses.values()), out.logits)
    logits = out.logits.detach().double().requires_grad_()
    terms = [given.labeled_weights[y[b]] * -logits[b].log_softmax(0)[y[b]] / B for b in range(B)]
    for j in torch.nonzero(pseudo_labels >= 0)[:, 0]:
        shifted = logits[B + U + j] + given.strong_bias
        label = pseudo_labels[j]
        terms.append(given.unlabeled_weights[label] * -shifted.log_softmax(0)[label] / U)
    (expected,) = torch.autograd.grad(sum(terms), logits)
    torch.testing.assert_close(gradient.double(), expected, rtol=1e-5, atol=1e-7)


def test_another_confidence_decides_alone():
    out, given = outputs(), targets(confidence=torch.arange(U) / U)
    *_, pseudo_labels = FixMatch(threshold=0.5, lambda_u=1.0)(out, batch(random_labels()), STEP, given)
    assert torch.equal(pseudo_labels >= 0, torch.arange(U) / U >= 0.5)


def test_softmax_of_the_weak_views_is_what_none_means():
    out, y = outputs(), random_labels()
    weak = Targets(out.weak_logits.detach().softmax(1))
    plain, given = (FixMatch(threshold=0.9, lambda_u=1.0)(out, batch(y), STEP, t) for t in (None, weak))
    assert torch.equal(plain[2], given[2])
    assert all(torch.equal(plain[0][name], given[0][name]) for name in plain[0])
