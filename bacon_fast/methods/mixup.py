"""What MixUp and the rotation task draw, and what they do to images (methods.md D; Zhang et al., ICLR 2018)."""

import torch
from scipy.special import betaincinv
from torch import Tensor, nn

from bacon_fast.data.philox import Stream, philox, to_range, to_uniform

QUANTILES = 4097


class MixUp(nn.Module):
    """One coefficient and one permutation a step, drawn on the device from the counters of `Stream.MIXUP`.

    The coefficient inverts the Beta distribution's CDF by a table of quantiles, between which it is interpolated. The
    table's points are exact to float32's resolution, so in between the CDF is off by less than 1/4096.

    Args:
        alpha: > 0; lambda ~ Beta(alpha, alpha), and 1 - lambda is taken where it is the larger one.
        seed: key of the draws.
    """

    def __init__(self, alpha: float, seed: int) -> None:
        super().__init__()
        self.seed = seed
        points = torch.linspace(0, 1, QUANTILES, dtype=torch.float64)
        quantiles = torch.from_numpy(betaincinv(alpha, alpha, points.numpy()))
        self.register_buffer("quantiles", quantiles.float(), persistent=False)

    def draw(self, rows: int, step: Tensor) -> tuple[Tensor, Tensor]:
        """Lambda, 0-d float32 in [1/2, 1], and a permutation of `rows` rows, int64 [rows], of `step` (0-d int64)."""
        words = philox(self.seed, step, Stream.MIXUP, torch.arange(rows, device=self.quantiles.device), 3)
        coefficient = self.quantile(to_uniform(words[0, 2], torch.float32))
        keys = (words[:, 0] << 31) | (words[:, 1] >> 1)
        return torch.maximum(coefficient, 1 - coefficient), keys.argsort(stable=True)

    def quantile(self, probability: Tensor) -> Tensor:
        """Inverse CDF of Beta(alpha, alpha) at probabilities in [0, 1), of any shape."""
        position = probability.flatten() * (QUANTILES - 1)  # an index that is a 0-d tensor would be read by the host
        below = position.long()
        low, high = self.quantiles[below], self.quantiles[below + 1]
        return torch.lerp(low, high, (position - below).to(low.dtype)).view_as(probability)


def mix(values: Tensor, coefficient: Tensor, permutation: Tensor) -> Tensor:
    """coefficient * values + (1 - coefficient) * values[permutation], row by row."""
    return torch.lerp(values[permutation], values, coefficient.to(values.dtype))


def draw_quarter_turns(rows: int, seed: int, step: Tensor) -> Tensor:
    """How far each row is turned in the step: uniform in 0..3, int64 [rows]."""
    slots = torch.arange(rows, device=step.device)
    return to_range(philox(seed, step, Stream.ROTATION, slots, 1)[:, 0], 4)


def rotate(images: Tensor, quarter_turns: Tensor) -> Tensor:
    """Images [N,C,S,S], each turned counterclockwise by its number of quarter turns, int64 [N] in 0..3.

    Raises ValueError for images that are not square.
    """
    if images.shape[2] != images.shape[3]:
        raise ValueError(f"images: expected square images to rotate, found {images.shape[2]}x{images.shape[3]}")
    turns, rotated = quarter_turns[:, None, None, None], images
    for k in (1, 2, 3):
        rotated = torch.where(turns == k, images.rot90(k, (2, 3)), rotated)
    return rotated
