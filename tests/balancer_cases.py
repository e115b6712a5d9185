"""Rows of a step for the balancers' tests, and the formulas of FixMatch as plain Python."""

import math
from dataclasses import replace

import torch

from bacon_fast.methods.balancers.base import Rows
from bacon_fast.methods.outputs import Batch

B, U, K, F = 7, 19, 4, 8


def batch(labels: torch.Tensor, unlabeled_slots: torch.Tensor | None = None) -> Batch:
    """A batch of labels and slots alone: balancers see no images."""
    slots = torch.arange(U) if unlabeled_slots is None else unlabeled_slots
    return Batch(torch.empty(0), labels, torch.arange(len(labels)), slots, torch.full_like(slots, -1))


def random_labels(seed: int = 9, num_classes: int = K) -> torch.Tensor:
    return torch.randint(0, num_classes, (B,), generator=torch.Generator().manual_seed(seed))


def rows(seed: int = 0, num_classes: int = K, **changes) -> Rows:
    """Random rows; the strong features are a leaf that takes a gradient."""
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(U, num_classes, generator=generator)
    weak, strong = (torch.randn(U, F, generator=generator) for _ in range(2))
    values = Rows(logits, weak, strong.requires_grad_(), None, batch(random_labels(num_classes=num_classes)))
    return replace(values, **changes)


def softmax(row: list[float]) -> list[float]:
    top = max(row)
    powers = [math.exp(v - top) for v in row]
    return [p / sum(powers) for p in powers]


def cross_entropy(row: list[float], label: int) -> float:
    return -math.log(softmax(row)[label])
