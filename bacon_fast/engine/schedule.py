"""Learning-rate schedules, by name."""

import math

import torch
from torch import Tensor

SCHEDULES = ("constant", "cosine")


def _check(name: str) -> None:
    if name not in SCHEDULES:
        raise ValueError(f"lr_schedule: expected 'constant' or 'cosine', found {name!r}")


def learning_rate(name: str, base: float, step: int, steps: int) -> float:
    """Rate of the step after `step` completed ones.

    constant: every imbalanced method of [US] and [BC]. cosine: base * max(0, cos(7 pi t / (16 T))), FixMatch's own
    (methods.md 0.3).
    """
    _check(name)
    return base if name == "constant" else base * max(0.0, math.cos(7 * math.pi * step / (16 * steps)))


def learning_rate_tensor(name: str, base: float, step: Tensor, steps: int) -> Tensor:
    """`learning_rate` of a step counter that the host does not read: 0-d int64 -> 0-d float32, on its device."""
    _check(name)
    if name == "constant":
        return torch.full((), base, device=step.device)
    return (base * torch.cos(step.double() * (7 * math.pi / (16 * steps))).clamp_min(0)).float()
