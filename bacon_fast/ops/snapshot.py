"""A buffer's current value, for a compiled function that uses it and then overwrites it."""

import torch
from torch import Tensor


def snapshot(buffer: Tensor) -> Tensor:
    """The buffer's current value: a copy under torch.compile, the buffer itself in eager mode.

    torch.compile may recompute what backward needs from the buffer itself, after it was overwritten, and so return a
    wrong gradient in silence (seen with torch 2.11). It never recomputes an opaque op, so backward gets this copy.
    Eager autograd refuses saved values that were overwritten: there the buffer itself will do.
    """
    return _snapshot(buffer) if torch.compiler.is_compiling() else buffer


@torch.library.custom_op("bacon_fast::snapshot", mutates_args=())
def _snapshot(buffer: Tensor) -> Tensor:
    return buffer.clone()


@_snapshot.register_fake
def _(buffer: Tensor) -> Tensor:
    return torch.empty_like(buffer)
