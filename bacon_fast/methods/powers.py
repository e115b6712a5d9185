"""Powers of probabilities, as sharpening takes them, for exponents of any size."""

import torch
from torch import Tensor

_SMALLEST = 1e-30  # float32 still has eight digits of what is this large, and of a hundred-millionth of it


def powers(values: Tensor, exponent: float) -> Tensor:
    """``values`` ** ``exponent`` up to a factor for each row of the last axis: values >= 0, exponent > 0.

    Whoever divides a row by its sum or its maximum needs no more. Rows whose powers would all underflow are divided by
    their largest value first; the others keep every bit.

        >>> powers(torch.tensor([[0.25, 0.5], [0.5, 0.5]]), 2.0)
        tensor([[0.0625, 0.2500],
                [0.2500, 0.2500]])
        >>> powers(torch.tensor([0.5, 0.25]), 200.0)
        tensor([1., 0.])
    """
    largest = values.amax(dim=-1, keepdim=True)
    return (values / torch.where(largest**exponent < _SMALLEST, largest, 1)) ** exponent
