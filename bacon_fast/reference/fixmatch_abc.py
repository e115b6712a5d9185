"""The losses of FixMatch's main head and of ABC's balanced head in plain PyTorch.

FixMatch: Sohn et al., NeurIPS 2020. ABC: Lee, Shin and Kim, "ABC: Auxiliary Balanced Classifier for Class-Imbalanced
Semi-Supervised Learning", NeurIPS 2021. Rows of the logits are [B labeled | U weak | U strong].
"""

from typing import NamedTuple

import torch
from torch import Tensor

from .philox import philox_uniform
from .values import accumulator_dtype, check_values

# The streams of `bacon_fast.data.philox.Stream` that the two masks are drawn from.
STREAM_LABELED = 7
STREAM_UNLABELED = 8


class FixMatchABCLosses(NamedTuple):
    """losses [4]: supervised, unsupervised, ABC labeled, ABC unlabeled. stats [4] float32: share of confident rows of
    the main head, share of rows in ABC's unlabeled loss, number of confident rows whose true label is known, number of
    those that are right. pseudo_labels [U] int64: of the main head, -1 where not confident."""

    losses: Tensor
    stats: Tensor
    pseudo_labels: Tensor


def bernoulli(probability: Tensor, seed: int, step: Tensor, stream: int) -> Tensor:
    """Weights [N] of the rows: 0 or 1, drawn with the probability."""
    slots = torch.arange(probability.shape[0], device=probability.device)
    return (philox_uniform(seed, step, stream, slots) < probability).to(probability.dtype)


def mean_cross_entropy(logits: Tensor, target: Tensor, weights: Tensor) -> Tensor:
    """Sum over the rows of weight · cross entropy with the class ``target`` [N], divided by the number of rows.

    A row of weight 0 takes no part, not even with a NaN.
    """
    logits = torch.where(weights[:, None] > 0, logits, 0)
    loss = logits.logsumexp(dim=1) - logits.gather(1, target[:, None])[:, 0]
    return (weights * loss).sum() / max(logits.shape[0], 1)


def confident_labels(logits: Tensor, threshold: float) -> tuple[Tensor, Tensor]:
    """Pseudo-labels [U], and whether the largest probability reaches the threshold."""
    return logits.argmax(dim=1), logits.softmax(dim=1).amax(dim=1) >= threshold


def fixmatch_abc_loss(
    logits: Tensor,
    balanced: Tensor,
    labels: Tensor,
    true_labels: Tensor,
    keep_labeled: Tensor,
    keep_unlabeled: Tensor,
    step: Tensor,
    *,
    seed: int,
    threshold: float,
) -> FixMatchABCLosses:
    """`bacon_fast.functional.fixmatch_abc_loss` has the same arguments, and validates them.

        supervised     mean over labeled b of CE(logits_b, y_b)
        unsupervised   mean over unlabeled j of [p_j confident] · CE(strong logits_j, argmax p_j)
        ABC labeled    mean over labeled b of M_b · CE(balanced_b, y_b)
        ABC unlabeled  mean over unlabeled j of [q_j confident] · M_j · CE(strong balanced_j, argmax q_j)

    with p and q the weak rows' probabilities by the two heads and the masks M_b ~ Bernoulli(keep_labeled of y_b) and
    M_j ~ Bernoulli(keep_unlabeled of argmax q_j).
    """
    dtype = accumulator_dtype(logits.dtype)
    batch, num_unlabeled, num_classes = labels.shape[0], true_labels.shape[0], logits.shape[1]
    check_values("labels", labels, f"classes in 0..{num_classes - 1}", 0, num_classes - 1)
    sizes = [batch, num_unlabeled, num_unlabeled]
    labeled, weak, strong = logits.to(dtype).split(sizes)
    labeled_balanced, weak_balanced, strong_balanced = balanced.to(dtype).split(sizes)

    pseudo, confident = confident_labels(weak.detach(), threshold)

    labeled_weight = bernoulli(keep_labeled.to(dtype)[labels], seed, step, STREAM_LABELED)
    pseudo_balanced, confident_balanced = confident_labels(weak_balanced.detach(), threshold)
    kept = bernoulli(keep_unlabeled.to(dtype)[pseudo_balanced], seed, step, STREAM_UNLABELED)
    unlabeled_weight = torch.where(confident_balanced, kept, 0)

    losses = [
        mean_cross_entropy(labeled, labels, torch.ones_like(labeled_weight)),
        mean_cross_entropy(strong, pseudo, confident.to(dtype)),
        mean_cross_entropy(labeled_balanced, labels, labeled_weight),
        mean_cross_entropy(strong_balanced, pseudo_balanced, unlabeled_weight),
    ]
    known = confident & (true_labels >= 0)
    share = max(num_unlabeled, 1)
    stats = [
        confident.sum() / share,
        unlabeled_weight.sum().float() / share,
        known.sum().float(),
        (known & (pseudo == true_labels)).sum().float(),
    ]
    return FixMatchABCLosses(torch.stack(losses), torch.stack(stats), torch.where(confident, pseudo, -1))
