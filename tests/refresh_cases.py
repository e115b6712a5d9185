"""The context of a method between two steps, with predictions that the test chooses."""

from collections.abc import Callable

import torch
from torch import Tensor

from bacon_fast.methods.method import RefreshContext


def context_of(
    predict: Callable, *, pool: Tensor, unlabeled: Tensor, labeled: Tensor | None = None, labels: Tensor | None = None
) -> RefreshContext:
    """The context of step 0; without `labeled`, no image is labeled."""
    none = torch.zeros(0, dtype=torch.int64)
    labeled, labels = (none if part is None else part for part in (labeled, labels))
    return RefreshContext(0, pool, labeled, unlabeled, labels, lambda images: images, predict)
