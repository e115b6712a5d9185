"""Which evaluation's averaged weights a run is reported by, and whether it goes on: by the validation log-loss."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

LOSS = "validation_log_loss"
"""The class-balanced log-loss in an evaluation's row."""
LEAST_FOR_PATIENCE = 200
"""Validation images below which the log-loss is too uncertain to stop a run by it."""


def require_validation(select: str, patience: int, images: int) -> None:
    """Raises ValueError for a choice that so many validation images cannot make."""
    if select == "validation" and not images:
        raise ValueError("select: expected last without validation images (--validation, --val), found validation")
    if patience and images < LEAST_FOR_PATIENCE:
        raise ValueError(
            f"patience: expected 0 below {LEAST_FOR_PATIENCE} validation images, found {patience} and {images} images"
        )


def best_row(rows: Sequence[Mapping[str, Any]]) -> int | None:
    """Index of the evaluation with the least validation log-loss, the first of several; None without any."""
    measured = [i for i, row in enumerate(rows) if row.get(LOSS) is not None]
    return min(measured, key=lambda i: rows[i][LOSS], default=None)


def is_out_of_patience(rows: Sequence[Mapping[str, Any]], patience: int) -> bool:
    """Whether the last `patience` evaluations were no better than one before; never for 0. The rows alone decide, so
    that a resumed run stops where it would have."""
    best = best_row(rows) if patience else None
    return best is not None and len(rows) - 1 - best >= patience


class KeptWeights:
    """A copy of the averaged network's tensors after the best evaluation.

    Tensors that the average shares with the trained network, as frozen ones, never change and are not copied.
    """

    def __init__(self) -> None:
        self.tensors: dict[str, Tensor] = {}

    @torch.no_grad()
    def keep(self, average: nn.Module, trained: nn.Module) -> None:
        """Takes the current state of `average`."""
        shared = _shared(average, trained)
        state = average.state_dict()
        self.tensors = {name: t if name in shared else t.detach().clone() for name, t in state.items()}

    def restore(self, tensors: Mapping[str, Tensor], average: nn.Module, trained: nn.Module) -> None:
        """Takes what a checkpoint holds. Raises ValueError when it does not fit."""
        state, shared = average.state_dict(), _shared(average, trained)
        if tensors and set(tensors) != set(state):
            raise ValueError(f"selected: expected {len(state)} tensors of the network, found {len(tensors)}")
        for name, tensor in tensors.items():
            if tensor.shape != state[name].shape or tensor.dtype != state[name].dtype:
                raise ValueError(f"selected: expected {name} {list(state[name].shape)}, found {list(tensor.shape)}")
        self.tensors = {
            name: state[name] if name in shared else tensor.to(state[name].device) for name, tensor in tensors.items()
        }


def _shared(average: nn.Module, trained: nn.Module) -> set[str]:
    """Names of the tensors that are one memory in both networks."""
    other = trained.state_dict()
    return {name for name, t in average.state_dict().items() if t.numel() and t.data_ptr() == other[name].data_ptr()}
