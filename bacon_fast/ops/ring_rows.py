"""What a step reads of a ring of columns, such as the samples in their random order: `ring_rows`."""

from typing import Any

import torch
from torch import Tensor

from ..reference.ring_rows import ring_rows as reference
from .backends import BACKENDS, Backend, always, choose_backend, why_not_cpp, why_not_cuda
from .checks import as_step_tensor, check_integer, check_kind, check_shape


def ring_rows(ring: Tensor, step: Tensor, *, stride: int, first: int, count: int, backend: str | None = None) -> Tensor:
    """Columns step * stride + first + i of a ring, modulo its length, for i below ``count``: one launch.

    Args:
        ring: [R, L] int64, contiguous, L at least 1.
        step: 0-d int64 on the ring's device, at least 0; never read by the host.
        stride: columns a step, at least 1.
        first, count: which of them are wanted, at least 0.
        backend: None for the best one, "reference", "cpp" or "cuda".

    Returns:
        [R, count] int64.

    Raises:
        TypeError, ValueError: an argument does not fit; the message names it.
        RuntimeError: the named backend is not available here.

        >>> ring_rows(torch.tensor([[5, 6, 7]]), torch.tensor(1), stride=2, first=0, count=2)
        tensor([[7, 5]])
    """
    check_shape("ring", ring, "R", "L")
    check_kind("ring", ring, "int64")
    if not ring.is_contiguous() or not ring.shape[1]:
        raise ValueError(f"ring: expected a contiguous tensor [R, L] with L > 0, found {list(ring.shape)}")
    check_integer("stride", stride, low=1)
    check_integer("first", first, low=0)
    check_integer("count", count, low=0)
    return choose_backend("ring_rows", backend, ring)(ring, as_step_tensor(step, ring.device), stride, first, count)


torch.library.define("bacon_fast::ring_rows", "(Tensor ring, Tensor step, int stride, int first, int count) -> Tensor")


@torch.library.register_fake("bacon_fast::ring_rows")
def _(ring: Tensor, step: Tensor, stride: int, first: int, count: int) -> Tensor:
    return ring.new_empty(ring.shape[0], count)


def _run(*arguments: Any) -> Tensor:
    return torch.ops.bacon_fast.ring_rows(*arguments)


BACKENDS["ring_rows"] = {
    "cpp": Backend(_run, why_not_cpp),
    "cuda": Backend(_run, why_not_cuda),
    "reference": Backend(reference, always),
}
