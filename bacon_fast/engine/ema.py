"""Exponential moving average of a network, updated in a handful of launches."""

import copy
from typing import Literal

import torch
from torch import nn


class EMA(nn.Module):
    """Averaged copy of `network`: theta_bar <- m*theta_bar + (1-m)*theta after every optimizer step (methods.md 0.3).

    Args:
        network: the online network; the average starts at its present parameters.
        momentum: m in [0, 1].
        buffers: "copy" takes BatchNorm's running statistics from the online network ([US], [FX]); "average" averages
            every floating-point buffer as the parameters ([AB], [CO]). Integer buffers are copied in both.
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

    @torch.no_grad()
    def update(self, online: nn.Module) -> None:
        """Takes in the online network's present state. No host synchronization, fixed storage."""
        averaged, source = list(self.network.parameters()), [p.detach() for p in online.parameters()]
        copied, copied_from = [], []
        for own, other in zip(self.network.buffers(), online.buffers(), strict=True):
            if self.buffers_mode == "average" and own.is_floating_point():
                averaged.append(own)
                source.append(other)
            else:
                copied.append(own)
                copied_from.append(other)
        torch._foreach_lerp_(averaged, source, 1 - self.momentum)
        if copied:
            torch._foreach_copy_(copied, copied_from)
