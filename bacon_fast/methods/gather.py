"""Rows of all ranks, so that every rank computes the losses of the global batch and updates the same state.

One process: both functions return what they are given.
"""

from torch import Tensor

from bacon_fast.methods.outputs import Batch


def gather_views(rows: Tensor, num_labeled: int) -> Tensor:
    """Rows [B + V*U, ...] of this rank (labeled, then view by view) -> the same of the global batch, with gradient.

    The order is that of one process with the global batch: all ranks' labeled rows, then all ranks' rows of each view.
    """
    return rows


def gather_batch(batch: Batch) -> Batch:
    """The batch with labels, slots and true labels of all ranks; `images` stay those of this rank."""
    return batch
