"""Means of a run's losses and statistics between two log rows, summed on the device within the step."""

from collections.abc import Hashable

import torch
from torch import Tensor

from bacon_fast.ops.records import add_values_


class Meter:
    """Running sums at fixed addresses, so that a captured step updates them too. The host waits only in `read`.

    Args:
        device: the device of the values.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        # By phase, as text: names, sums of the values (steps last), steps in which the first sum was finite.
        self._sums: dict[str, tuple[list[str], Tensor, Tensor]] = {}

    def add(self, phase: Hashable, values: dict[str, Tensor]) -> None:
        """Adds the 0-d values of a step; their names are the same in all steps of a phase."""
        key = repr(phase)
        if key not in self._sums:
            self._sums[key] = list(values), self._zeros(len(values) + 1), self._zeros()
        names, sums, finite = self._sums[key]
        if names != list(values):
            raise ValueError(f"values: expected the names {names} in phase {phase!r}, found {list(values)}")
        add_values_(sums, finite, list(values.values()))

    def _zeros(self, *shape: int) -> Tensor:
        return torch.zeros(shape, device=self._device)

    def steps(self) -> tuple[int, int]:
        """Steps since the last `read`, and how many came before the first value, the total loss, stopped being finite.

        The host waits for the device.
        """
        counts = [torch.stack([sums[-1], finite]).tolist() for _, sums, finite in self._sums.values()]
        return int(sum(steps for steps, _ in counts)), int(sum(finite for _, finite in counts))

    def read(self) -> dict[str, float]:
        """Mean of each value over those steps since the last call that had it. Starts again from zero."""
        totals: dict[str, tuple[float, float]] = {}
        for names, sums, finite in self._sums.values():
            *found, steps = sums.tolist()
            sums.zero_()
            finite.zero_()
            for name, value in zip(names, found):
                total, count = totals.get(name, (0.0, 0.0))
                totals[name] = total + value, count + steps
        return {name: total / count for name, (total, count) in totals.items() if count}

    def state_dict(self) -> dict[str, list]:
        """The sums since the last `read`, by phase: a run that is stopped between two log rows continues them."""
        return {phase: [list(names), *sums] for phase, (names, *sums) in self._sums.items() if float(sums[0][-1])}

    def load_state_dict(self, state: dict[str, list]) -> None:
        """Continues from the sums of `state_dict`. Call it before the first step."""
        device = self._device
        self._sums = {
            phase: (list(names), sums.to(device), finite.to(device)) for phase, (names, sums, finite) in state.items()
        }
