"""Learning-rate schedules, by name."""

import math


def learning_rate(name: str, base: float, step: int, steps: int) -> float:
    """Rate of the step after `step` completed ones.

    constant: every imbalanced method of [US] and [BC]. cosine: base * max(0, cos(7 pi t / (16 T))), FixMatch's own
    (methods.md 0.3).
    """
    if name == "constant":
        return base
    if name == "cosine":
        return base * max(0.0, math.cos(7 * math.pi * step / (16 * steps)))
    raise ValueError(f"lr_schedule: expected 'constant' or 'cosine', found {name!r}")
