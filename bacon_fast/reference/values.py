"""A check of what stands in a tensor, where reading it costs next to nothing: on a CPU, outside of torch.compile."""

import torch
from torch import Tensor


def check_values(name: str, values: Tensor, expected: str, low: float, high: float) -> None:
    """Raises ValueError unless all values are within low..high; NaN never is.

    Silent on a GPU, where the host would have to wait for the values, and for tensors that hold none (FakeTensor).
    """
    if values.device.type != "cpu" or type(values) is not Tensor or torch.compiler.is_compiling() or not values.numel():
        return
    smallest, largest = (value.tolist() for value in values.aminmax())
    if not (low <= smallest and largest <= high):
        raise ValueError(f"{name}: expected {expected}, found {largest if low <= smallest else smallest}")
