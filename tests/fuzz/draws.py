"""Random arguments with a taste for the edges, all from one generator, so that a seed is a case."""

import math

import torch
from torch import Tensor

SIZES = (0, 1, 1, 2, 3, 5, 8, 17, 33)
DIMS = (1, 2, 3, 16, 33, 64)
# What a row of vectors is multiplied with; nothing near the smallest norms that anything is divided by (1e-12, 1e-8).
SCALES = (1.0, 1.0, 1.0, 1e-3, 1e3, 1e-30, 1e-42, 0.0, 1e19, 1e25, 1e37)
NOT_FINITE = (math.nan, math.inf, -math.inf)


class Draws:
    """Draws of one case. What float16 cannot hold is drawn closer to one."""

    def __init__(self, seed: int):
        self.generator = torch.Generator().manual_seed(seed)

    def integer(self, low: int, high: int) -> int:
        """One of low..high."""
        return int(torch.randint(low, high + 1, (), generator=self.generator))

    def choice(self, values):
        return values[self.integer(0, len(values) - 1)]

    def chance(self, probability: float) -> bool:
        return bool(torch.rand((), generator=self.generator) < probability)

    def integers(self, low: int, high: int, *shape: int) -> Tensor:
        """int64 of low..high; of the edges more often."""
        values = torch.randint(low, high + 1, shape, generator=self.generator)
        edge = torch.rand(shape, generator=self.generator)
        return torch.where(edge < 0.1, low, torch.where(edge > 0.9, high, values))

    def mask(self, *shape: int) -> Tensor:
        return torch.rand(shape, generator=self.generator) < self.choice((0.0, 0.3, 0.8, 1.0))

    def uniform(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.rand(shape, generator=self.generator, dtype=torch.float64).to(dtype)

    def normal(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(shape, generator=self.generator, dtype=torch.float64).to(dtype)

    def dtype(self) -> torch.dtype:
        return self.choice((torch.float32, torch.float32, torch.float32, torch.float64, torch.bfloat16, torch.float16))

    def vectors(self, *shape: int, dtype: torch.dtype) -> Tensor:
        """Rows of all lengths, some equal to others."""
        values = torch.randn(shape, generator=self.generator, dtype=torch.float64)
        if values.numel() and self.chance(0.5):
            scales = torch.tensor(SCALES, dtype=torch.float64)
            picked = torch.randint(len(SCALES), (*shape[:-1], 1), generator=self.generator)
            values = values * (scales[picked] if self.chance(0.5) else self.choice(SCALES))
        if dtype == torch.float16:
            values = torch.where(values.abs() > 6e4, values.sign() * 6e4, values)
        if len(shape) == 2 and shape[0] > 2 and self.chance(0.2):
            values[0] = values[1]
        return values.to(dtype)

    def break_one(self, tensor: Tensor) -> Tensor:
        """A copy with one number that is not finite."""
        tensor = tensor.clone()
        tensor.view(-1)[self.integer(0, tensor.numel() - 1)] = self.choice(NOT_FINITE)
        return tensor

    def strided(self, tensor: Tensor) -> Tensor:
        """The same values, sometimes with gaps or with the axes stored the other way round."""
        how = self.integer(0, 3)
        if how == 1 and tensor.dim() > 1:
            return tensor.transpose(0, -1).contiguous().transpose(0, -1)
        if how == 2 and tensor.dim() > 0:
            filler = math.nan if tensor.is_floating_point() else 1
            wide = tensor.new_full((*tensor.shape[:-1], 2 * tensor.shape[-1]), filler)
            wide[..., ::2] = tensor
            return wide[..., ::2]
        return tensor
