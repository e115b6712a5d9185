"""Shared by the references: the dtype to compute in, unit vectors, and a check of a tensor's values."""

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


def accumulator_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which values of ``dtype`` are computed: float32 for half precision and integers, else their own."""
    return torch.promote_types(dtype, torch.float32)


def normalize(vectors: Tensor, eps: float) -> Tensor:
    """Vectors of the last axis divided by max(norm, eps).

    Those whose squares could overflow are shrunk by a power of two first, which changes no bit of the others.
    """
    exponent = math.frexp(torch.finfo(vectors.dtype).max)[1]
    huge = (vectors.detach().abs() > 2.0 ** (exponent * 3 // 8)).any(dim=-1, keepdim=True)
    factor = vectors.new_ones(()).where(~huge, 2.0 ** -(exponent * 5 // 8))
    shrunk = vectors * factor
    return shrunk / torch.linalg.vector_norm(shrunk, dim=-1, keepdim=True).clamp_min(eps * factor)


_trusted = False


@contextmanager
def trusted_values() -> Iterator[None]:
    """Inside, `check_values` looks at nothing: for a training step, whose labels and slots our own samplers draw."""
    global _trusted
    before, _trusted = _trusted, True
    try:
        yield
    finally:
        _trusted = before


def check_values(name: str, values: Tensor, expected: str, low: float, high: float) -> None:
    """Raises ValueError unless all values are within low..high, which NaN is not.

    Reading them costs next to nothing on a CPU, outside of torch.compile. There is no check on a GPU, where the host
    would have to wait for the values, nor of tensors that hold none (FakeTensor).
    """
    if (
        _trusted
        or values.device.type != "cpu"
        or type(values) is not Tensor
        or torch.compiler.is_compiling()
        or not values.numel()
    ):
        return
    smallest, largest = (value.tolist() for value in values.aminmax())
    if not (low <= smallest and largest <= high):
        raise ValueError(f"{name}: expected {expected}, found {largest if low <= smallest else smallest}")
