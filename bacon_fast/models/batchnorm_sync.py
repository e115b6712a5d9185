"""Batch normalization with the statistics of the batches of all ranks, on any device that torch.distributed serves.

torch's SyncBatchNorm needs CUDA tensors; this one is made of ordinary operations and two collectives, so it runs with
gloo on a CPU too. Ranks may hold batches of different sizes, also empty ones.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from bacon_fast.reference.values import accumulator_dtype

_OVER = (0, 2, 3)  # all but the channels


def _by_channel(vector: Tensor) -> Tensor:
    return vector[None, :, None, None]


@torch.no_grad()
def _moments(x: Tensor, group: dist.ProcessGroup | None) -> tuple[Tensor, Tensor, Tensor]:
    """Mean [C], biased variance [C] and number of elements [] by channel of the batches of all ranks."""
    channels, count = x.shape[1], x.numel() // x.shape[1]
    wide = x.to(accumulator_dtype(x.dtype))
    # Each rank's own mean and centered squares: the plain sums would cancel.
    own_mean = wide.sum(_OVER) / max(count, 1)
    own_squares = (wide - _by_channel(own_mean)).square().sum(_OVER)
    own = torch.cat([own_mean, own_squares, own_mean.new_full((1,), count)])
    ranks = own.new_empty(dist.get_world_size(group) * own.shape[0])
    dist.all_gather_into_tensor(ranks, own, group)
    means, squares, counts = ranks.view(-1, own.shape[0]).split([channels, channels, 1], dim=1)
    total = counts.sum()
    mean = (counts * means).sum(0) / total
    return mean, (squares + counts * (means - mean).square()).sum(0) / total, total


class _Normalize(torch.autograd.Function):
    """Normalization with the moments of all ranks, whose part in the gradient is taken into account."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        mean: Tensor,
        inverse: Tensor,
        total: Tensor,
        group: dist.ProcessGroup | None,
    ) -> Tensor:
        ctx.save_for_backward(x, weight, mean, inverse, total)
        ctx.group = group
        normalized = (x.to(mean.dtype) - _by_channel(mean)) * _by_channel(inverse)
        out = normalized * _by_channel(weight) + _by_channel(bias)
        # torch.compile (2.11) loses the gradient of an output that is only another name of an inner value.
        return out if out.dtype == x.dtype else out.to(x.dtype)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, mean, inverse, total = ctx.saved_tensors
        wide = grad.to(mean.dtype)
        normalized = (x.to(mean.dtype) - _by_channel(mean)) * _by_channel(inverse)
        sums = torch.stack([(wide * normalized).sum(_OVER), wide.sum(_OVER)])
        # A rank's own parameters get its own gradient: the data-parallel wrapper adds up over ranks.
        grad_weight, grad_bias = sums.to(weight.dtype, copy=True).unbind()
        dist.all_reduce(sums, group=ctx.group)
        along, constant = sums / total
        wide = wide - _by_channel(constant) - normalized * _by_channel(along)
        return (wide * _by_channel(weight * inverse)).to(x.dtype), grad_weight, grad_bias, *[None] * 4


def sync_batch_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    num_batches_tracked: Tensor | None,
    *,
    momentum: float,
    eps: float,
    group: dist.ProcessGroup | None = None,
) -> Tensor:
    """Training-mode batch normalization of x [N,C,H,W] over the batches of all ranks of ``group`` (None: all ranks).

    Output, gradient and running statistics are as in one process with the whole batch. Every rank of the group must
    call it, and run its backward pass. The gradients of ``weight`` and ``bias`` cover the rank's own part. Running
    statistics, if given, are updated, the same on all ranks.

    Raises:
        RuntimeError: torch.distributed is not initialized.
    """
    if not dist.is_initialized():
        raise RuntimeError("sync_group: torch.distributed is not initialized; call init_process_group first")
    mean, variance, total = _moments(x, group)
    out = _Normalize.apply(x, weight, bias, mean, torch.rsqrt(variance + eps), total, group)
    with torch.no_grad():
        if num_batches_tracked is not None:
            num_batches_tracked.add_(1)
        if running_mean is not None:
            running_mean.lerp_(mean.to(running_mean.dtype), momentum)
        if running_var is not None:
            running_var.lerp_((variance * (total / (total - 1).clamp(min=1))).to(running_var.dtype), momentum)
    return out
