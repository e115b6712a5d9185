"""Exponential moving average of a network, updated in a handful of launches, or along with the optimizer's step."""

import copy
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn


class AveragePairs(NamedTuple):
    """The work of an average in a step: averages[i] moves towards sources[i], and copies[i] is set to copied[i].

    momentum: weight of the old average; a tensor, 0-d float32, where it changes from step to step.
    """

    averages: list[Tensor]
    sources: list[Tensor]
    copies: list[Tensor]
    copied: list[Tensor]
    momentum: float | Tensor

    @torch.no_grad()
    def apply(self) -> None:
        """Moves and sets all of them, in place and without host synchronization."""
        if isinstance(self.momentum, Tensor):  # for which torch has no fused interpolation
            moved = torch._foreach_sub(self.sources, self.averages)
            torch._foreach_mul_(moved, 1 - self.momentum)
            torch._foreach_add_(self.averages, moved)
        else:
            torch._foreach_lerp_(self.averages, self.sources, 1 - self.momentum)
        if self.copies:
            torch._foreach_copy_(self.copies, self.copied)


class EMA(nn.Module):
    """Averaged copy of `network`: theta_bar <- m*theta_bar + (1-m)*theta after every optimizer step (methods.md 0.3).

    Args:
        network: the online network; the average starts at its current parameters.
        momentum: m in [0, 1].
        buffers: "copy" takes BatchNorm's running statistics from the online network ([US], [FX]); "average" averages
            every floating-point buffer like the parameters ([AB], [CO]). Integer buffers are copied in both cases.
        warmup: the momentum of the update after t others is min(m, (1 + t) / (10 + t)) (`tf.train`'s moving average).

    Frozen parameters and buffers of a frozen backbone are the network's own: they do not change, and take no second
    memory, neither here nor in a checkpoint.
    """

    def __init__(
        self,
        network: nn.Module,
        momentum: float,
        buffers: Literal["copy", "average"] = "copy",
        *,
        warmup: bool = False,
    ) -> None:
        super().__init__()
        if not 0 <= momentum <= 1:
            raise ValueError(f"momentum: expected a number between 0 and 1, found {momentum!r}")
        if buffers not in ("copy", "average"):
            raise ValueError(f"buffers: expected 'copy' or 'average', found {buffers!r}")
        self.momentum = momentum
        self.buffers_mode = buffers
        self.warmup = warmup
        shared = {id(tensor): tensor for tensor in _constant(network)}
        self.network = copy.deepcopy(network, shared).requires_grad_(False).eval()
        self.register_buffer("_momentum", None, persistent=False)
        if warmup:
            self._momentum = torch.zeros((), device=next(network.parameters()).device)

    def set_step(self, step: Tensor) -> None:
        """Sets the momentum of the update after `step` others, 0-d int64, which the host does not read."""
        if self.warmup:
            self._momentum.copy_(((1 + step).double() / (10 + step)).clamp_max(self.momentum))

    def pairs(self, online: nn.Module) -> AveragePairs:
        """The tensors of a step, beside their counterparts in the online network (the parameters themselves)."""
        averages, sources, copies, copied = [], [], [], []
        for own, other in zip(self.network.parameters(), online.parameters(), strict=True):
            if own is not other:
                averages.append(own)
                sources.append(other)
        for own, other in zip(self.network.buffers(), online.buffers(), strict=True):
            if own is other:
                continue
            averaged = self.buffers_mode == "average" and own.is_floating_point()
            (averages if averaged else copies).append(own)
            (sources if averaged else copied).append(other)
        momentum = self._momentum if self.warmup else self.momentum
        return AveragePairs(averages, sources, copies, copied, momentum)

    def update(self, online: nn.Module) -> None:
        """Takes in the online network's current state."""
        self.pairs(online).apply()


def _constant(network: nn.Module) -> list[Tensor]:
    """What never changes in a network with a frozen backbone: heads may be moved by a method, frozen or not (CoSSL)."""
    backbone = getattr(network, "backbone", None)
    if not getattr(backbone, "frozen", False):
        return []
    return [tensor for tensor in (*backbone.parameters(), *backbone.buffers()) if not tensor.requires_grad]
