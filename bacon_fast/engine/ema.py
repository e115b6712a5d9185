"""Exponential moving average of a network, updated in a handful of launches, or along with the optimizer's step."""

import copy
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn


class AveragePairs(NamedTuple):
    """The work of an average in a step: averages[i] moves towards sources[i], and copies[i] is set to copied[i].

    momentum: weight of the old average.
    """

    averages: list[Tensor]
    sources: list[Tensor]
    copies: list[Tensor]
    copied: list[Tensor]
    momentum: float

    @torch.no_grad()
    def apply(self) -> None:
        """Moves and sets all of them, in place and without host synchronization."""
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
    """

    def __init__(self, network: nn.Module, momentum: float, buffers: Literal["copy", "average"] = "copy") -> None:
        super().__init__()
        if not 0 <= momentum <= 1:
            raise ValueError(f"momentum: expected a number between 0 and 1, found {momentum!r}")
        if buffers not in ("copy", "average"):
            raise ValueError(f"buffers: expected 'copy' or 'average', found {buffers!r}")
        self.momentum = momentum
        self.buffers_mode = buffers
        self.network = copy.deepcopy(network).requires_grad_(False).eval()

    def pairs(self, online: nn.Module) -> AveragePairs:
        """The tensors of a step, beside their counterparts in the online network (the parameters themselves)."""
        averages, sources, copies, copied = list(self.network.parameters()), list(online.parameters()), [], []
        for own, other in zip(self.network.buffers(), online.buffers(), strict=True):
            averaged = self.buffers_mode == "average" and own.is_floating_point()
            (averages if averaged else copies).append(own)
            (sources if averaged else copied).append(other)
        return AveragePairs(averages, sources, copies, copied, self.momentum)

    def update(self, online: nn.Module) -> None:
        """Takes in the online network's current state."""
        self.pairs(online).apply()
