"""Means of a run's losses and statistics between two log rows, summed on the device within the step."""

from collections.abc import Hashable

import torch
from torch import Tensor


class Meter:
    """Running sums at fixed addresses, so that a captured step updates them too; the host waits in `read` alone.

    Args:
        device: of the values.
    """

    def __init__(self, device: torch.device) -> None:
        self._one = torch.ones((), device=device)
        self._sums: dict[Hashable, tuple[list[str], Tensor]] = {}

    @torch.no_grad()
    def add(self, phase: Hashable, values: dict[str, Tensor]) -> None:
        """Adds the 0-d values of a step; their names are the same in all steps of a phase."""
        if phase not in self._sums:
            self._sums[phase] = list(values), torch.zeros(len(values) + 1, device=self._one.device)
        names, sums = self._sums[phase]
        if names != list(values):
            raise ValueError(f"values: expected the names {names} in phase {phase!r}, found {list(values)}")
        sums += torch.stack([*(value.detach().float() for value in values.values()), self._one])

    def read(self) -> dict[str, float]:
        """Mean of each value over the steps since the last call that had it, and a fresh start."""
        totals: dict[str, tuple[float, float]] = {}
        for names, sums in self._sums.values():
            *found, steps = sums.tolist()
            sums.zero_()
            for name, value in zip(names, found):
                total, count = totals.get(name, (0.0, 0.0))
                totals[name] = total + value, count + steps
        return {name: total / count for name, (total, count) in totals.items() if count}
