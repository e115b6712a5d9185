"""Shared by the references: the dtype to compute in, and a check of a tensor's values."""

import torch
from torch import Tensor


def accumulator_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which values of ``dtype`` are computed: float32 for half precision and integers, else their own."""
    return torch.promote_types(dtype, torch.float32)


def check_values(name: str, values: Tensor, expected: str, low: float, high: float) -> None:
    """Raises ValueError unless all values are within low..high, which NaN is not.

    Reading them costs next to nothing on a CPU, outside of torch.compile. There is no check on a GPU, where the host
    would have to wait for the values, nor of tensors that hold none (FakeTensor).
    """
    if values.device.type != "cpu" or type(values) is not Tensor or torch.compiler.is_compiling() or not values.numel():
        return
    smallest, largest = (value.tolist() for value in values.aminmax())
    if not (low <= smallest and largest <= high):
        raise ValueError(f"{name}: expected {expected}, found {largest if low <= smallest else smallest}")
