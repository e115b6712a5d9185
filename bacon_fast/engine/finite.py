"""Whether tensors are finite, asked of many at once."""

import math
from collections.abc import Iterable

import torch
from torch import Tensor


def not_finite(tensors: Iterable[tuple[str, Tensor]]) -> list[str]:
    """Names of the floating-point tensors that hold a NaN or an infinity. The host waits for the device once."""
    floating = [(name, t) for name, t in tensors if isinstance(t, Tensor) and t.is_floating_point() and t.numel()]
    if not floating:
        return []
    largest = torch.stack([norm.double() for norm in torch._foreach_norm([t for _, t in floating], math.inf)])
    return [name for (name, _), finite in zip(floating, largest.isfinite().tolist()) if not finite]
