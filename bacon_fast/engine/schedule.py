"""Learning-rate schedules, by name."""

import math

import torch
from torch import Tensor

SCHEDULES = ("constant", "cosine", "cosine_to_zero")


def _check(name: str) -> None:
    if name not in SCHEDULES:
        raise ValueError(f"lr_schedule: expected one of {', '.join(SCHEDULES)}, found {name!r}")


def learning_rate(name: str, base: float, step: int, steps: int, warmup: float = 0.0) -> float:
    """Rate of the step after `step` completed ones.

    In the first `warmup` of the steps it rises from 0, as base * step / their number; the schedule runs over the rest.

    constant: every imbalanced method of [US] and [BC]. cosine: base * max(0, cos(7 pi t / (16 T))), FixMatch's own
    (methods.md 0.3). cosine_to_zero: base * (1 + cos(pi t / T)) / 2, half a period down to 0, like MoCo v2's.
    """
    _check(name)
    warm = int(warmup * steps)
    if step < warm:
        return base * (step / warm)
    step, steps = step - warm, steps - warm
    if name == "constant":
        return base
    if name == "cosine":
        return base * max(0.0, math.cos(7 * math.pi * step / (16 * steps)))
    return base * (1 + math.cos(math.pi * min(step / steps, 1))) / 2


def set_learning_rate(rate: Tensor, name: str, base: float, step: Tensor, steps: int, warmup: float = 0.0) -> None:
    """Sets `rate`, 0-d float32, to `learning_rate` of a step counter, 0-d int64, which the host does not read.

    `rate` is `base` at first; the constant rate without a warm-up is left alone.
    """
    _check(name)
    warm = int(warmup * steps)
    if name == "constant" and not warm:
        return
    current: float | Tensor = base
    if name != "constant":
        position, length = (step - warm).clamp_min(0).double() if warm else step.double(), steps - warm
        if name == "cosine":
            current = base * torch.cos(position * (7 * math.pi / (16 * length))).clamp_min(0)
        else:
            current = base * (1 + torch.cos(math.pi * (position / length).clamp_max(1))) / 2
    if warm:
        current = current * (step.double() / warm).clamp_max(1)
    rate.copy_(current)
