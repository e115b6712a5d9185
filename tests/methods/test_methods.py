"""FixMatch, ABC and their composition against per-sample Python loops in float64 (methods.md B, C)."""

import math

import pytest
import torch

from bacon_fast.data.philox import Stream, uniform
from bacon_fast.methods.abc import ABC
from bacon_fast.methods.fixmatch import FixMatch
from bacon_fast.methods.fixmatch_abc import FixMatchABC
from bacon_fast.methods.outputs import Batch, Outputs
from bacon_fast.methods.supervised import Supervised

B, U, K = 7, 19, 4
STEPS, EPOCHS = 300, 10
STEP = torch.tensor(0)
UNKNOWN = torch.full((U,), -1)


def batch(labels: torch.Tensor, true_labels: torch.Tensor = UNKNOWN) -> Batch:
    """A batch of labels alone: the bases read nothing else."""
    slots = torch.arange(len(labels) + len(true_labels))
    return Batch(torch.empty(0), labels, slots[: len(labels)], slots[: len(true_labels)], true_labels)


def outputs(scale: float = 4.0, seed: int = 0, dtype: torch.dtype = torch.float32) -> Outputs:
    generator = torch.Generator().manual_seed(seed)
    rows = B + 2 * U
    main, balanced = (scale * torch.randn(rows, K, generator=generator) for _ in range(2))
    return Outputs(torch.randn(rows, 8, generator=generator), main.to(dtype), balanced.to(dtype), B, U)


def balanced(counts: torch.Tensor, **changes) -> FixMatchABC:
    lambda_u = changes.pop("lambda_u", 1.0)
    values = {"threshold": 0.95, "lambda_abc": 1.0, "steps": STEPS, "epochs": EPOCHS, "seed": 0}
    return FixMatchABC(ABC(counts, **(values | changes)), lambda_u=lambda_u)


def labels() -> torch.Tensor:
    return torch.randint(0, K, (B,), generator=torch.Generator().manual_seed(9))


def softmax(row: list[float]) -> list[float]:
    top = max(row)
    powers = [math.exp(v - top) for v in row]
    return [p / sum(powers) for p in powers]


def cross_entropy(row: list[float], label: int) -> float:
    return -math.log(softmax(row)[label])


def test_fixmatch_against_a_loop():
    out, y = outputs(), labels()
    true = torch.tensor([-1, *[j % K for j in range(1, U)]])
    losses, stats, _ = FixMatch(threshold=0.95, lambda_u=2.0)(out, batch(y, true), STEP)
    supervised = sum(cross_entropy(out.logits[b].tolist(), int(y[b])) for b in range(B)) / B
    unsupervised, confident, right, known = 0.0, 0, 0, 0
    for j in range(U):
        p = softmax(out.logits[B + j].tolist())
        guess = p.index(max(p))
        if max(p) >= 0.95:
            unsupervised += cross_entropy(out.logits[B + U + j].tolist(), guess)
            confident += 1
            known += int(true[j]) >= 0
            right += guess == int(true[j])
    assert 0 < confident < U, "the case must have both kinds of rows"
    assert losses["supervised"].item() == pytest.approx(supervised, rel=1e-6)
    assert losses["unsupervised"].item() == pytest.approx(2 * unsupervised / U, rel=1e-6)
    assert stats["pseudo_rate"].item() == pytest.approx(confident / U)
    assert (stats["pseudo_known"].item(), stats["pseudo_correct"].item()) == (known, right)


def test_fixmatch_without_a_confident_row_is_exactly_zero_with_zero_gradient():
    out = outputs(scale=0.01)
    out.logits.requires_grad_()
    losses, *_ = FixMatch(threshold=0.95, lambda_u=1.0)(out, batch(labels()), STEP)
    assert losses["unsupervised"].item() == 0
    (gradient,) = torch.autograd.grad(losses["unsupervised"], out.logits)
    assert torch.equal(gradient, torch.zeros_like(gradient))


def test_no_gradient_through_pseudo_labels():
    out = outputs()
    out.logits.requires_grad_()
    losses, *_ = FixMatch(threshold=0.5, lambda_u=1.0)(out, batch(labels()), STEP)
    (gradient,) = torch.autograd.grad(losses["unsupervised"], out.logits)
    assert not gradient[: B + U].any() and gradient[B + U :].any()


@pytest.mark.parametrize("step", [0, 29, 30, 299])
def test_abc_against_a_loop(step):
    counts = torch.tensor([100, 40, 20, 5])
    abc = balanced(counts, lambda_u=2.0, lambda_abc=3.0, seed=3)
    out, y = outputs(), labels()
    losses, stats, _ = abc(out, batch(y), torch.tensor(step))

    labeled_draw = uniform(3, step, Stream.ABC_LABELED, torch.arange(B)).tolist()
    unlabeled_draw = uniform(3, step, Stream.ABC_UNLABELED, torch.arange(U)).tolist()
    labeled = unlabeled = kept_rows = 0.0
    for b in range(B):
        if labeled_draw[b] < 5 / counts[y[b]].item():
            labeled += cross_entropy(out.balanced[b].tolist(), int(y[b]))
    epoch = step * EPOCHS // STEPS
    for j in range(U):
        p = softmax(out.balanced[B + j].tolist())
        guess = p.index(max(p))
        keep = 1 - (epoch / EPOCHS) * (1 - 5 / counts[guess].item())
        if max(p) >= 0.95 and unlabeled_draw[j] < keep:
            unlabeled += cross_entropy(out.balanced[B + U + j].tolist(), guess)
            kept_rows += 1
    assert losses["abc_labeled"].item() == pytest.approx(3 * labeled / B, rel=1e-6)
    assert losses["abc_unlabeled"].item() == pytest.approx(3 * unlabeled / U, rel=1e-6)
    main, main_stats, _ = FixMatch(threshold=0.95, lambda_u=2.0)(out, batch(y), STEP)
    for name, value in (main | main_stats).items():
        torch.testing.assert_close((losses | stats)[name], value, rtol=1e-6, atol=0)
    assert stats["abc_rate"].item() == pytest.approx(kept_rows / U)


def test_abc_masks_have_the_specified_probabilities_and_change_every_step():
    counts = torch.tensor([100, 10])
    abc = balanced(counts, threshold=0.0, steps=1000, epochs=1000, seed=1).abc
    steps = torch.arange(1000)
    draws = torch.stack([uniform(1, s, Stream.ABC_LABELED, torch.arange(50)) for s in steps])
    kept = (draws < abc.keep[0]).float()
    # 50,000 draws of probability 0.1: five standard deviations are 0.0067.
    assert kept.mean().item() == pytest.approx(0.1, abs=0.0067)
    assert not torch.equal(kept[0], kept[1])
    assert torch.equal(abc.keep_probability(torch.tensor(0)), torch.ones(2))
    torch.testing.assert_close(abc.keep_probability(torch.tensor(999)), torch.tensor([1 - 0.999 * 0.9, 1.0]))


def test_abc_refuses_a_class_without_labels():
    with pytest.raises(ValueError, match=r"labeled_counts.*\[1\]"):
        balanced(torch.tensor([3, 0, 2]))


def test_losses_are_float32_under_half_precision_logits():
    out = outputs(dtype=torch.bfloat16)
    losses, *_ = FixMatch(threshold=0.5, lambda_u=1.0)(out, batch(labels()), STEP)
    terms, *_ = balanced(torch.tensor([9, 5, 3, 1]), threshold=0.5)(out, batch(labels()), STEP)
    assert {v.dtype for v in (losses | terms).values()} == {torch.float32}


def test_supervised_uses_labeled_rows_only():
    out, y = outputs(), labels()
    losses, *_ = Supervised()(out, batch(y), STEP)
    expected = sum(cross_entropy(out.logits[b].tolist(), int(y[b])) for b in range(B)) / B
    assert list(losses) == ["supervised"]
    assert losses["supervised"].item() == pytest.approx(expected, rel=1e-6)
