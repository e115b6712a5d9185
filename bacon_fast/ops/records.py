"""What a step adds to the records of a run, one launch each: `add_values_` and `count_pairs_`."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..reference import records as reference
from .backends import BACKENDS, Backend, always, choose_backend, why_not_cpp, why_not_cuda
from .checks import check_devices, check_integer, check_kind, check_shape

MAX_VALUES = 64


@torch.no_grad()
def add_values_(sums: Tensor, finite: Tensor, values: Sequence[Tensor], *, backend: str | None = None) -> None:
    """Adds the values of a step to their sums, in place, and counts the steps whose first sum was still finite.

    Args:
        sums: [V+1] float32, contiguous, of the values and, last, of steps.
        finite: 0-d float32: steps before the first sum stopped being finite.
        values: V 0-d tensors of a float dtype, int64 or bool, V at most 64.
        backend: None for the best one, "reference", "cpp" or "cuda".

    Raises:
        TypeError, ValueError: an argument does not fit; the message names it.
        RuntimeError: the named backend is not available here.

        >>> sums, finite = torch.zeros(3), torch.zeros(())
        >>> add_values_(sums, finite, [torch.tensor(2.5), torch.tensor(True)])
        >>> sums, finite
        (tensor([2.5000, 1.0000, 1.0000]), tensor(1.))
    """
    if not 1 <= len(values) <= MAX_VALUES:
        raise ValueError(f"values: expected 1 to {MAX_VALUES}, found {len(values)}")
    check_shape("sums", sums, len(values) + 1)
    check_shape("finite", finite)
    for name, tensor in (("sums", sums), ("finite", finite)):
        if tensor.dtype != torch.float32:
            raise TypeError(f"{name}: expected dtype float32, found {tensor.dtype}")
    for i, value in enumerate(values):
        check_shape(f"values[{i}]", value)
    check_devices("sums", sums, finite=finite, **{f"values[{i}]": value for i, value in enumerate(values)})
    choose_backend("add_values_", backend, sums)(sums, finite, list(values))


@torch.no_grad()
def count_pairs_(
    pairs: Tensor, pseudo_labels: Tensor, true_labels: Tensor, num_classes: int, *, backend: str | None = None
) -> None:
    """Counts how often rows of each true class got each pseudo-label, in place.

    Args:
        pairs: [K*(K+1)+1] int64, contiguous; a row counts in cell true * (K+1) + pseudo, where a row without
            pseudo-label (-1) is in column K, and one whose true label is unknown (-1) in the last cell.
        pseudo_labels, true_labels: [U] int64, -1..K-1.
        num_classes: K.
        backend: None for the best one, "reference", "cpp" or "cuda".

    Raises:
        TypeError, ValueError: an argument does not fit; the message names it.
        RuntimeError: the named backend is not available here.

        >>> pairs = torch.zeros(2 * 3 + 1, dtype=torch.int64)
        >>> count_pairs_(pairs, torch.tensor([0, -1, 1]), torch.tensor([1, 1, -1]), 2)
        >>> pairs[:-1].view(2, 3), pairs[-1]
        (tensor([[0, 0, 0],
                [1, 0, 1]]), tensor(1))
    """
    check_integer("num_classes", num_classes, low=1)
    check_shape("pairs", pairs, num_classes * (num_classes + 1) + 1)
    check_shape("pseudo_labels", pseudo_labels, "U")
    check_shape("true_labels", true_labels, pseudo_labels.shape[0])
    for name, tensor in (("pairs", pairs), ("pseudo_labels", pseudo_labels), ("true_labels", true_labels)):
        check_kind(name, tensor, "int64")
    check_devices("pairs", pairs, pseudo_labels=pseudo_labels, true_labels=true_labels)
    choose_backend("count_pairs_", backend, pairs)(pairs, pseudo_labels, true_labels, num_classes)


torch.library.define("bacon_fast::add_values_", "(Tensor(a!) sums, Tensor(b!) finite, Tensor[] values) -> ()")
torch.library.define(
    "bacon_fast::count_pairs_", "(Tensor(a!) pairs, Tensor pseudo_labels, Tensor true_labels, int num_classes) -> ()"
)


@torch.library.register_fake("bacon_fast::add_values_")
@torch.library.register_fake("bacon_fast::count_pairs_")
def _(*arguments: Any) -> None:
    """Nothing is returned; what changes is in the schema."""


def _add(*arguments: Any) -> None:
    torch.ops.bacon_fast.add_values_(*arguments)


def _count(*arguments: Any) -> None:
    torch.ops.bacon_fast.count_pairs_(*arguments)


BACKENDS["add_values_"] = {
    "cpp": Backend(_add, why_not_cpp),
    "cuda": Backend(_add, why_not_cuda),
    "reference": Backend(reference.add_values_, always),
}
BACKENDS["count_pairs_"] = {
    "cpp": Backend(_count, why_not_cpp),
    "cuda": Backend(_count, why_not_cuda),
    "reference": Backend(reference.count_pairs_, always),
}
