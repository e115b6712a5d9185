"""A step's part of a ring of columns, in plain PyTorch."""

import torch
from torch import Tensor


def ring_rows(ring: Tensor, step: Tensor, stride: int, first: int, count: int) -> Tensor:
    """[R, count]: columns step * stride + first + i of ring [R, L], modulo L, for i below count."""
    places = torch.arange(first, first + count, device=ring.device)
    return ring.index_select(1, (places + step * stride).remainder(ring.shape[1]))
