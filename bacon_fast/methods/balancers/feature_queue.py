"""A queue of features for each class, of equal length (DASO's balanced memory)."""

import torch
from torch import Tensor, nn

from bacon_fast.methods.last_rows import last_of_equal


class FeatureQueue(nn.Module):
    """The latest `length` features of each class; their means are the class prototypes.

    Args:
        num_classes: K.
        num_features: F.
        length: Q.

    Buffers:
        features: float32 [K,Q,F], zeros where none was written yet; written: int64 [K], how many ever were.
    """

    def __init__(self, num_classes: int, num_features: int, length: int) -> None:
        super().__init__()
        self.register_buffer("features", torch.zeros(num_classes, length, num_features))
        self.register_buffer("written", torch.zeros(num_classes, dtype=torch.int64))

    @torch.no_grad()
    def enqueue(self, features: Tensor, labels: Tensor) -> None:
        """Appends rows, float32 [B,F] with labels int64 [B], in place of the oldest ones."""
        length = self.features.shape[1]
        one_hot = (labels[:, None] == torch.arange(len(self.written), device=labels.device)).long()
        rank = one_hot.cumsum(0).gather(1, labels[:, None])[:, 0] - 1  # among the rows of the same class
        place = labels * length + (self.written[labels] + rank) % length
        self.features.flatten(0, 1).index_copy_(0, place, features[last_of_equal(place)].to(self.features.dtype))
        self.written.add_(one_hot.sum(0))

    def prototypes(self) -> tuple[Tensor, Tensor]:
        """Mean feature of each class, float32 [K,F], and whether it has one, bool [K]."""
        size = self.written.clamp(max=self.features.shape[1])
        return self.features.sum(1) / size.clamp_min(1)[:, None], size > 0
