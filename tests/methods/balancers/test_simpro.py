"""SimPro against the numbers of newer_methods.md K, a loop over many steps, and its degenerate cases."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from balancer_cases import batch, cross_entropy, softmax

from bacon_fast.methods.balancers.base import Rows
from bacon_fast.methods.balancers.simpro import SimPro, labeled_weight
from bacon_fast.methods.fixmatch import FixMatch
from bacon_fast.methods.outputs import Outputs

COUNTS = torch.tensor([6, 3, 1])
WEAK = [[2, 0, 1], [0.4, 0.6, 0.5]]
STRONG = [[1, 0, 0], [0, 1, 0], [0.5, 0.5, 0], [0, 0, 1]]  # view by view
LABELED_WEAK, LABELED_STRONG = [[1, 0, 0], [0, 0, 1]], [[0, 1, 0], [0, 0, 2]]
LABELS = torch.tensor([0, 2])
Q = [[0.90286817, 0.04398837, 0.05314346], [0.6186081, 0.27200507, 0.10938683]]
NEVER = 10**6  # steps of a run in which no estimate is due


def simpro(counts=COUNTS, **changes) -> SimPro:
    options = {"tau": 2.0, "momentum": 0.9, "labeled_weight": 1 / 1.5, "steps": NEVER, "estimates": 1, "threshold": 0.6}
    return SimPro(counts, **options | changes).double()


def documented(**changes) -> SimPro:
    balancer = simpro(**changes)
    balancer.unlabeled_prior.copy_(torch.tensor([0.5, 0.3, 0.2]))
    return balancer


def tensor(rows, **options) -> torch.Tensor:
    return torch.tensor(rows, dtype=torch.float64, **options)


def rows(weak=WEAK, labels: torch.Tensor = LABELS) -> Rows:
    return Rows(tensor(weak), torch.empty(0), torch.empty(0), None, batch(labels, torch.arange(len(weak))))


def outputs() -> Outputs:
    logits = tensor(LABELED_WEAK + WEAK + STRONG, requires_grad=True)
    strong = tensor(LABELED_STRONG, requires_grad=True)
    return Outputs(torch.zeros(len(logits), 1), logits, None, 2, 2, strong)


def losses(balancer: SimPro, out: Outputs, t: int = 0) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    step, seen = torch.tensor(t), rows()
    base = FixMatch(threshold=balancer.threshold, lambda_u=1.0, strong_views=2)
    found, _, pseudo_labels = base(out, seen.batch, step, balancer(seen, step, None))
    return found, pseudo_labels


# --- the documented numbers ------------------------------------------------------------------------------------------


def test_the_documented_step():
    balancer, out = documented(), outputs()
    assert balancer._bias(balancer.unlabeled_prior).tolist() == pytest.approx(
        [-1.38629436, -2.40794561, -3.21887582], abs=1e-7
    )
    targets = balancer(rows(), torch.tensor(0), None)
    assert targets.soft and targets.confidence is None and not targets.losses
    assert targets.probabilities.numpy() == pytest.approx(np.array(Q), abs=1e-7)
    assert balancer.unlabeled_sums.tolist() == pytest.approx([1.52147627, 0.31599344, 0.16253029], abs=1e-7)
    assert balancer.labeled_sums.tolist() == [1, 0, 1]

    bias = targets.labeled_bias
    assert torch.equal(bias, targets.strong_bias)
    shifted = [(tensor(row) + bias).tolist() for row in LABELED_WEAK + LABELED_STRONG]
    found = [cross_entropy(row, y) for row, y in zip(shifted, [0, 2, 0, 2])]
    assert found == pytest.approx([0.09729796, 2.86531459, 0.53494143, 1.95869772], abs=1e-6)
    shifted = tensor(STRONG) + targets.strong_bias
    terms = torch.nn.functional.cross_entropy(shifted, targets.probabilities.repeat(2, 1), reduction="none")
    assert terms.tolist() == pytest.approx([0.44585123, 1.03200523, 0.51452515, 0.94147769], abs=1e-7)

    found, pseudo_labels = losses(documented(), out)
    assert found["supervised"].item() == pytest.approx(0.90937528, abs=1e-7)
    assert found["unsupervised"].item() == pytest.approx(0.73346482, abs=1e-7)
    assert pseudo_labels.tolist() == [0, 0]
    (gradient,) = torch.autograd.grad(found["unsupervised"], out.logits)
    assert gradient[4].tolist() == pytest.approx([0.00110437, 0.00986364, -0.01096801], abs=1e-7)
    assert not gradient[:4].any(), "only strong views move by it"


def test_the_documented_step_with_one_confident_row():
    found, pseudo_labels = losses(documented(threshold=0.7), outputs())
    assert found["unsupervised"].item() == pytest.approx(0.24009409, abs=1e-7)
    assert pseudo_labels.tolist() == [0, -1]


@pytest.mark.parametrize(
    ("unlabeled", "unlabeled_prior", "prior"),
    [
        ((100, 40, 10), (0.51622517, 0.29649007, 0.18662252), (0.60074766, 0.29803738, 0.10121495)),
        ((0, 0, 0), (0.45, 0.27, 0.18), (0.586875, 0.30125, 0.111875)),
    ],
)
def test_the_documented_estimate(unlabeled, unlabeled_prior, prior):
    balancer = documented(steps=1)
    balancer.labeled_sums.copy_(torch.tensor([30, 20, 14]))
    balancer.unlabeled_sums.copy_(torch.tensor(unlabeled))
    balancer._estimate(torch.tensor(0))
    assert balancer.unlabeled_prior.tolist() == pytest.approx(unlabeled_prior, abs=1e-7)
    assert balancer.prior.tolist() == pytest.approx(prior, abs=1e-7)
    assert not balancer.unlabeled_sums.any() and not balancer.labeled_sums.any()


def test_the_documented_em_finds_the_prior():
    """x is a or b, p(a | y) = .8, .3; 60 % of the unlabeled images are a. Nearly without a moving average: a batch of
    10^6 images hides the +1 of the sums."""
    likelihood = tensor([[0.8, 0.3], [0.2, 0.7]])
    balancer = simpro(torch.tensor([1, 1]), tau=1.0, momentum=0.0, steps=10**4, estimates=10**4, threshold=0.0)
    weak = likelihood.log()[[0] * 6 + [1] * 4].tolist()
    found = []
    for t in range(400):
        found.append(balancer.unlabeled_prior[0].item())
        sums = (likelihood.log()[[0] * 6 + [1] * 4] + balancer._bias(balancer.unlabeled_prior)).softmax(1).sum(0)
        balancer.unlabeled_sums.add_(sums * (10**9 - 1))
        balancer(rows(weak), torch.tensor(t), None)
    assert found[:4] == pytest.approx([0.5, 0.52525253, 0.5441888, 0.55832655], abs=1e-7)
    assert found[-1] == pytest.approx(0.6, abs=1e-6)  # 0.8 p + 0.3 (1 - p) = 0.6


@pytest.mark.parametrize(
    ("sizes", "s"),  # newer_methods.md N.1: N, M, B, mu
    [
        ((1236, 9922, 64, 8), 1),
        ((1162, 9329, 64, 8), 1),
        ((1545, 12_719, 64, 8), 1),
        ((1236, 40_000, 64, 8), 78 / 19),
        ((1162, 40_000, 64, 8), 13 / 3),
        ((1545, 40_000, 64, 8), 3.25),
        ((1835, 100_000, 64, 16), 97 / 28),
        ((1528, 100_000, 64, 16), 97 / 23),
        ((50, 1000, 64, 8), 1000 / (8 * 50)),  # floor(N / B) is 0
        ((640, 100, 64, 8), 100 / (8 * 640)),  # floor(M / (mu B)) is 0
    ],
)
def test_the_documented_weight(sizes, s):
    labeled, unlabeled, batch_size, mu = sizes
    assert labeled_weight(labeled, unlabeled, batch_size, mu * batch_size) == pytest.approx(1 / s, rel=1e-12)


# --- a loop, and autograd --------------------------------------------------------------------------------------------


def test_state_over_steps_and_estimates_against_a_loop():
    """Four estimates in ten steps, 2 or 3 steps apart: one is due where (t + 1) E // T grows."""
    steps, estimates, k = 10, 4, 3
    balancer = simpro(steps=steps, estimates=estimates, tau=1.5)
    prior_u, prior = [1 / k] * k, [0.6, 0.3, 0.1]
    sums_u, sums_l = [0.0] * k, [0.0] * k
    generator = torch.Generator().manual_seed(4)
    ends = []
    for t in range(steps):
        weak = (2 * torch.randn(19, k, generator=generator, dtype=torch.float64)).tolist()
        labels = torch.randint(0, k, (7,), generator=generator)
        targets = balancer(rows(weak, labels), torch.tensor(t), None)
        for row, q in zip(weak, targets.probabilities.tolist()):
            expected = softmax([a + math.log(p**1.5 + 1e-12) for a, p in zip(row, prior_u)])
            assert q == pytest.approx(expected, rel=1e-6)
            if max(expected) >= 0.6:
                sums_u = [n + p for n, p in zip(sums_u, expected)]
        assert targets.strong_bias.tolist() == pytest.approx([math.log(p**1.5 + 1e-12) for p in prior], rel=1e-6)
        sums_l = [n + (labels == c).sum().item() for c, n in enumerate(sums_l)]
        if (t + 1) * estimates // steps > t * estimates // steps:
            ends.append(t + 1)
            prior_u = [0.9 * p + 0.1 * n / (sum(sums_u) + 1) for p, n in zip(prior_u, sums_u)]
            total = [a + b for a, b in zip(sums_u, sums_l)]
            prior = [0.9 * p + 0.1 * n / sum(total) for p, n in zip(prior, total)]
            sums_u, sums_l = [0.0] * k, [0.0] * k
        assert balancer.unlabeled_prior.tolist() == pytest.approx(prior_u, rel=1e-6)
        assert balancer.prior.tolist() == pytest.approx(prior, rel=1e-6)
        assert balancer.unlabeled_sums.tolist() == pytest.approx(sums_u, rel=1e-6, abs=1e-9)
        assert balancer.labeled_sums.tolist() == sums_l
    assert ends == [3, 5, 8, 10]


@pytest.mark.parametrize("threshold", [0.6, 0.7])
def test_gradients_against_autograd_of_the_formulas(threshold):
    out = outputs()
    found, _ = losses(documented(threshold=threshold), out)
    gradients = torch.autograd.grad(sum(found.values()), (out.logits, out.labeled_strong_logits))

    logits, strong = out.logits.detach().requires_grad_(), out.labeled_strong_logits.detach().requires_grad_()
    b = (tensor([0.6, 0.3, 0.1]) ** 2 + 1e-12).log()
    q = (logits[2:4].detach() + (tensor([0.5, 0.3, 0.2]) ** 2 + 1e-12).log()).softmax(1)
    labeled = torch.cat([logits[:2], strong]) + b
    terms = [-labeled[i].log_softmax(0)[y] / 4 / 1.5 for i, y in enumerate([0, 2, 0, 2])]
    for v in range(2):
        for j in range(2):
            if q[j].max() >= threshold:
                terms.append(-(q[j] * (logits[4 + 2 * v + j] + b).log_softmax(0)).sum() / 4)
    expected = torch.autograd.grad(sum(terms), (logits, strong))
    torch.testing.assert_close(gradients, expected, rtol=1e-6, atol=1e-8)


# --- degenerate cases ------------------------------------------------------------------------------------------------


def test_without_a_confident_row_the_unlabeled_loss_is_0_and_its_prior_only_shrinks():
    balancer = documented(threshold=0.99, steps=5, estimates=5)
    before = balancer(rows(), torch.tensor(0), None).probabilities
    found, _ = losses(balancer, outputs(), t=1)
    assert found["unsupervised"].item() == 0
    assert balancer.unlabeled_prior.tolist() == pytest.approx([0.81 * p for p in (0.5, 0.3, 0.2)], rel=1e-6)
    after = balancer(rows(), torch.tensor(2), None).probabilities
    torch.testing.assert_close(after, before, rtol=0, atol=1e-10)  # a sum below 1 cancels in the softmax


def test_a_class_that_is_never_confident_keeps_a_finite_bias():
    """In float32, as in a run: 86 estimates, and then many more."""
    k = 10
    balancer = simpro(torch.ones(k), steps=10**4, estimates=10**4).float()
    certain = rows([[50.0] + [0.0] * (k - 1)] * 4)
    certain = replace(certain, weak_logits=certain.weak_logits.float())
    for t in range(86):
        balancer(certain, torch.tensor(t), None)
    assert balancer.unlabeled_prior[3].item() == pytest.approx(1.161e-5, rel=1e-3)
    assert balancer._bias(balancer.unlabeled_prior)[3].item() == pytest.approx(-22.7198, abs=1e-3)
    for t in range(86, 1200):
        targets = balancer(certain, torch.tensor(t), None)
    assert balancer._bias(balancer.unlabeled_prior)[3].item() == pytest.approx(-27.6310, abs=1e-3)
    assert targets.probabilities.isfinite().all() and targets.strong_bias.isfinite().all()


def test_priors_that_are_uniform_leave_fixmatch_with_soft_labels():
    balancer, out = simpro(torch.ones(3), labeled_weight=1.0, threshold=0.0), outputs()
    found, _ = losses(balancer, out)
    q = tensor(WEAK).softmax(1)
    expected = torch.nn.functional.cross_entropy(tensor(STRONG), q.repeat(2, 1))
    torch.testing.assert_close(found["unsupervised"].detach(), expected, rtol=1e-6, atol=1e-9)
    labeled = torch.nn.functional.cross_entropy(tensor(LABELED_WEAK + LABELED_STRONG), LABELS.repeat(2))
    torch.testing.assert_close(found["supervised"].detach(), labeled, rtol=1e-6, atol=1e-9)
