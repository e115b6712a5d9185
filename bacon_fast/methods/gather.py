"""Rows of all ranks, so that every rank computes the losses of the global batch and updates the same state.

Under torchrun each rank makes the views of its slice of the global batch and runs networks on those alone; then the
rows of all ranks are put together in the order of one process with the global batch. One process, or no process group:
every function returns what it is given.

What a method must do to be right under several ranks:

1. Whatever a network makes of this rank's images goes through `gather_views`, and labels and slots through
   `gather_batch`, before any loss, statistic or state is computed from it. What follows is then the same on all ranks,
   bit for bit: banks, queues, counts and averages need no further communication, and row i of a gathered tensor is
   row i of the global batch, so draws that are counted by row are the draws of one process.
2. The loss is the loss of the global batch on every rank, never divided or multiplied by the number of ranks.
   `gather_views` scales its backward so that DistributedDataParallel's mean over ranks is the gradient of that loss,
   both for parameters that saw this rank's rows only (networks) and for those that see all rows (projections).
3. Images of other ranks, for views mixed across rows, come from `gather_views(images, ...)`; `own_views` then takes
   this rank's share of the mixed images for its own networks.
4. No collective depends on data: every rank calls the same functions in the same order in a phase (methods.method).
5. Work between steps (`Method.refresh`) runs on all ranks on the same images and state; `RefreshContext.predict`
   divides the images over the ranks by itself.
"""

import dataclasses
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from bacon_fast.methods.outputs import Batch


def num_ranks() -> int:
    """Processes that train together: 1 without a process group."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def gather_views(rows: Tensor, num_labeled: int, num_unlabeled: int) -> Tensor:
    """Rows of this rank -> the same of the global batch, with gradient.

    Args:
        rows: [b + v*u, ...]: labeled rows, then v >= 0 views of the unlabeled ones, of equal shape on all ranks.
        num_labeled, num_unlabeled: b and u of this rank; either may be 0.

    Returns:
        [W*b + v*W*u, ...] for W ranks: the labeled rows of all ranks, then view by view the unlabeled rows of all.
    """
    ranks = num_ranks()
    if ranks == 1:
        return rows
    gathered = _gather(rows).view(ranks, *rows.shape)
    views = gathered.split(_view_sizes(len(rows), num_labeled, num_unlabeled), dim=1)
    return torch.cat([view.flatten(0, 1) for view in views])


def own_views(rows: Tensor, num_labeled: int, num_unlabeled: int) -> Tensor:
    """The inverse of `gather_views`: the part of this rank of rows [W*b + v*W*u, ...] of the global batch.

    Args:
        num_labeled, num_unlabeled: b and u of this rank, as for `gather_views`.
    """
    ranks = num_ranks()
    if ranks == 1:
        return rows
    views = rows.split(_view_sizes(len(rows), ranks * num_labeled, ranks * num_unlabeled))
    return torch.cat([view.unflatten(0, (ranks, len(view) // ranks))[dist.get_rank()] for view in views])


def gather_batch(batch: Batch) -> Batch:
    """The batch with the labels, slots and true labels of all ranks; its images stay this rank's."""
    ranks = num_ranks()
    if ranks == 1:
        return batch
    fields = ["labels", "labeled_slots", "unlabeled_slots", "true_labels"]
    if batch.balanced_labels is not None:
        fields.append("balanced_labels")
    own = [getattr(batch, name) for name in fields]
    columns = _gather(torch.cat(own)).view(ranks, -1).split([len(part) for part in own], dim=1)
    return dataclasses.replace(batch, **{name: part.flatten() for name, part in zip(fields, columns, strict=True)})


def _view_sizes(rows: int, num_labeled: int, num_unlabeled: int) -> list[int]:
    rest = rows - num_labeled
    if rest < 0 or (rest % num_unlabeled if num_unlabeled else rest):
        raise ValueError(f"rows: expected {num_labeled} + a multiple of {num_unlabeled}, found {rows}")
    return [num_labeled] + [num_unlabeled] * (rest // num_unlabeled if num_unlabeled else 0)


@torch.compiler.disable
def _gather(rows: Tensor) -> Tensor:
    return _GatherRows.apply(rows)


class _GatherRows(torch.autograd.Function):
    """[n, ...] of each rank -> [W*n, ...], rank after rank; backward: the gradient of this rank's rows, times W."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor) -> Tensor:
        rows = rows.contiguous()
        ctx.first, ctx.length, ctx.ranks = dist.get_rank() * len(rows), len(rows), dist.get_world_size()
        gathered = rows.new_empty(ctx.ranks * len(rows), *rows.shape[1:])
        dist.all_gather_into_tensor(gathered, rows)
        return gathered

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        # Every rank holds the same gradient of the same loss, so nothing is communicated. The factor undoes the mean
        # over ranks that follows: the sum over ranks of each rank's part is the whole gradient.
        return grad[ctx.first : ctx.first + ctx.length] * ctx.ranks
