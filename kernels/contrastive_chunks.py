"""The contrastive family by chunks: torch.mm makes the products of all rows with some columns, one kernel reads them.

The products of a chunk stay in the L2 cache, so memory is linear in rows plus columns. Slower than products that never
leave a multiprocessor, unless the compiler does badly there: the yardstick, and what to fall back on.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def load_products(products, x_index, x_inside, x_scale, y_index, y_inside, y_scale, num_y):
    """Cosines [X,Y] of prepared vectors from their products [all X, num_y]."""
    place = products + x_index.to(tl.int64)[:, None] * num_y + y_index[None, :]
    product = tl.load(place, mask=x_inside[:, None] & y_inside[None, :], other=0.0)
    return product * y_scale[None, :] * x_scale[:, None]


def chunks_of(count: int, size: int) -> list[tuple[int, int]]:
    """First and last+1 of each chunk; one empty chunk of nothing, for it too has statistics."""
    return [(first, min(first + size, count)) for first in range(0, max(count, 1), size)]


def multiply_all(a: Tensor, b: Tensor) -> Tensor:
    """a·b in float32 also for half precision (float64 for float64)."""
    if a.dtype.itemsize > 2:
        return torch.mm(a, b)
    return torch.mm(a, b, out_dtype=torch.float32) if a.is_cuda else torch.mm(a.float(), b.float())
