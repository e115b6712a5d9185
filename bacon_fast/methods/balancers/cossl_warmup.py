"""The warm-up of CoSSL's teacher head: a class-balanced set of features, and a linear layer trained on it.

All draws are counters of (seed, `Stream.COSSL_WARMUP`); the `step` part of the counter says what they are for.
"""

import copy

import torch
import torch.nn.functional as F
from scipy.special import betaincinv
from torch import Tensor, nn

from bacon_fast.data.philox import Stream, philox, to_range, to_uniform

_ORDER, _BLENDS = 0, 1  # draws of the batches' order, and of the blends of class c: _BLENDS + c
BETA = 0.75
BATCH_SIZE = 64
PASSES = 20  # the authors' 10 epochs of 500 batches, on the 15,000 features of their CIFAR-10 runs
LEARNING_RATE, WEIGHT_DECAY = 2e-3, 5e-4  # the authors'
AVERAGED_FRACTION = 1 / 5  # of the batches; the authors' momentum of 0.999 on 5,000 batches


def imprinted_weights(features: Tensor, labels: Tensor, num_classes: int) -> Tensor:
    """Mean feature of each class, of length 1: features [n,F], labels int64 [n] -> [K,F]."""
    one_hot = F.one_hot(labels, num_classes).to(features.dtype)
    return F.normalize(one_hot.T @ features)  # sum and mean have the same direction


def balanced_features(
    labeled: Tensor, labels: Tensor, unlabeled: Tensor, weights: Tensor, seed: int
) -> tuple[Tensor, Tensor]:
    """Labeled features, and as many blended ones of each class as it lacks of N_1.

    A blend of class c is lambda a + (1 - lambda) b with lambda ~ Beta(0.75, 0.75), a a random labeled feature of c, and
    b a feature of another class or of an unlabeled image: the ones to which softmax(weights f) gives the largest
    probabilities of c, each once (again from the start if there are too few).

    Args:
        labeled: [n,F]; labels: int64 [n], every class at least once.
        unlabeled: [m,F].
        weights: [K,F], imprinted.

    Returns:
        Features [K·N_1, F], the labeled ones first, and their labels int64 [K·N_1].
    """
    every = torch.cat([labeled, unlabeled])
    classes = torch.cat([labels, labels.new_full((len(unlabeled),), -1)])
    likeliest = (every @ weights.T).softmax(1).argsort(0, descending=True)
    counts = labels.bincount(minlength=len(weights))
    features, targets = [labeled], [labels]
    for c, missing in enumerate((counts.max() - counts).tolist()):
        others = likeliest[:, c]
        others = others[classes[others] != c]
        slots = torch.arange(missing, device=labels.device)
        words = philox(seed, _BLENDS + c, Stream.COSSL_WARMUP, slots, 2)
        own = (labels == c).nonzero()[:, 0][to_range(words[:, 0], int(counts[c]))]
        uniform = to_uniform(words[:, 1], torch.float64).cpu().numpy()
        share = torch.from_numpy(betaincinv(BETA, BETA, uniform)).to(labeled)[:, None]
        features.append(torch.lerp(every[others[slots % len(others)]], labeled[own], share))
        targets.append(torch.full_like(slots, c))
    return torch.cat(features), torch.cat(targets)


def train_head(head: nn.Linear, features: Tensor, labels: Tensor, seed: int) -> tuple[list[Tensor], list[Tensor]]:
    """Trains a copy of a linear head, `PASSES` times over all rows in batches of 64, with Adam.

    Returns:
        Weight and bias, and their moving averages over the last batches.
    """
    num_batches = PASSES * -(-len(labels) // BATCH_SIZE)
    newest = 1 / max(1, AVERAGED_FRACTION * num_batches)
    head = copy.deepcopy(head).requires_grad_()
    mean = [p.detach().clone() for p in head.parameters()]
    groups = [{"params": [head.weight], "weight_decay": WEIGHT_DECAY}, {"params": [head.bias], "weight_decay": 0.0}]
    optimizer = torch.optim.Adam(groups, lr=LEARNING_RATE, fused=True)
    rows = torch.arange(len(labels), device=labels.device)
    words = philox(seed, _ORDER, Stream.COSSL_WARMUP, rows, 2 * PASSES)
    for words_of_pass in words.split(2, dim=1):
        order = ((words_of_pass[:, 0] << 31) | (words_of_pass[:, 1] >> 1)).argsort(stable=True)
        for batch in order.split(BATCH_SIZE):
            optimizer.zero_grad()
            F.cross_entropy(head(features[batch]), labels[batch]).backward()
            optimizer.step()
            torch._foreach_lerp_(mean, [p.detach() for p in head.parameters()], newest)
    return [p.detach() for p in head.parameters()], mean
