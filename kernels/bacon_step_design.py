"""Which of the two designs of BaCon's step runs, until a GPU has measured both (docs/gpu_design.md)."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from .bacon_step import bacon_step as bacon_step_by_rows
from .bacon_step_phases import bacon_step_by_phases

# "phases": four launches, each row and pair treated once. "rows": two, every program walks over all rows.
DESIGNS = {"phases": bacon_step_by_phases, "rows": bacon_step_by_rows}
_chosen = "phases"


@contextmanager
def use_design(name: str) -> Iterator[None]:
    """Steps within take the design of that name. Raises ValueError for a name that none has."""
    global _chosen
    if name not in DESIGNS:
        raise ValueError(f"name: expected one of {', '.join(DESIGNS)}, found {name!r}")
    before, _chosen = _chosen, name
    try:
        yield
    finally:
        _chosen = before


def bacon_step(*arguments: Any, **options: Any) -> tuple[Tensor, Tensor, Tensor]:
    """One step by the chosen design; arguments and results as of `kernels.bacon_step.bacon_step`."""
    return DESIGNS[_chosen](*arguments, **options)
