"""What a step adds to the run's records, in plain PyTorch."""

from collections.abc import Sequence

import torch
from torch import Tensor


@torch.no_grad()
def add_values_(sums: Tensor, finite: Tensor, values: Sequence[Tensor]) -> None:
    """sums [V+1] += (values, 1); finite += 1 where the first sum is finite. A sum that is not finite stays so."""
    sums += torch.stack([*(value.detach().float() for value in values), sums.new_ones(())])
    finite += sums[0].isfinite()


@torch.no_grad()
def count_pairs_(pairs: Tensor, pseudo_labels: Tensor, true_labels: Tensor, num_classes: int) -> None:
    """pairs [K*(K+1)+1] += 1 in cell true * (K+1) + pseudo of each row; pseudo -1: K; true -1: the last cell."""
    column = torch.where(pseudo_labels < 0, num_classes, pseudo_labels)
    cell = torch.where(true_labels < 0, len(pairs) - 1, true_labels * (num_classes + 1) + column)
    pairs.scatter_add_(0, cell, torch.ones_like(cell))
