"""MoCo's queue: the keys of the latest steps, as the negatives of this one."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bacon_fast.ops.snapshot import snapshot


class KeyQueue(nn.Module):
    """A ring of K_q keys; new ones overwrite the oldest, in place (MoCo, CVPR 2020; methods.md F.3).

    It starts with random unit vectors from torch's generator, which the trainer seeds. Any number of keys may enter at
    once, also one that does not divide K_q.

    Buffers:
        keys [K_q, D] float32; classes [K_q] int64, the class each was assigned to, -1 for the random first ones.
        position: where the next key goes, 0-d int64.

    Args:
        size: K_q.
        dim: D.
    """

    def __init__(self, size: int, dim: int) -> None:
        super().__init__()
        for name, value in (("size", size), ("dim", dim)):
            if value < 1:
                raise ValueError(f"{name}: expected a positive integer, found {value}")
        self.register_buffer("keys", F.normalize(torch.randn(size, dim), dim=1))
        self.register_buffer("classes", torch.full((size,), -1))
        self.register_buffer("position", torch.zeros((), dtype=torch.int64))

    def current(self) -> tuple[Tensor, Tensor]:
        """Current keys [K_q, D] and classes [K_q]; a backward pass after the next `enqueue_` is still right."""
        return snapshot(self.keys.clone()), snapshot(self.classes.clone())

    @torch.no_grad()
    def enqueue_(self, keys: Tensor, classes: Tensor) -> None:
        """Keys float [n, D] and classes int64 [n] enter in order; of more than K_q the last K_q stay."""
        size, entering = len(self.keys), len(keys)
        last = slice(max(entering - size, 0), None)
        places = (self.position + torch.arange(entering, device=keys.device)[last]).remainder(size)
        self.keys.index_copy_(0, places, keys[last].to(self.keys.dtype))
        self.classes.index_copy_(0, places, classes[last])
        self.position.add_(entering).remainder_(size)
