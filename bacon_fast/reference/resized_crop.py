"""A random part of an image, resized: torchvision's RandomResizedCrop on Pillow images (augmentation.md, section 2).

csrc/augment/resized_crop.h holds the same arithmetic for the kernels.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from .philox import to_range, to_uniform

AREA = (0.08, 1.0)  # share of the image
RATIO = (3 / 4, 4 / 3)  # width over height
ATTEMPTS = 10
_LOG_RATIO = math.log(4 / 3)
_EXP_TERMS = tuple(1 / math.factorial(n) for n in range(12, -1, -1))
_PRECISION = 22  # bits of a weight behind the point: 32 less 8 of a level less 2


def draw_box(words: Tensor, position: Tensor, size: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Parts of images of ``size`` (H, W): top, left, height and width, int64 [N] each.

    The first of ten draws of (area, ratio) that fits into the image; if none does, the largest part in the middle that
    has a ratio of 3/4 to 4/3.

    Args:
        words: [N, 20], for each attempt one of the area and one of the ratio.
        position: [N, 2], of the top and the left side.
    """
    height, width = size
    u = to_uniform(words)
    area = height * width * (AREA[0] + (AREA[1] - AREA[0]) * u[:, 0::2])
    ratio = _exp(-_LOG_RATIO + 2 * _LOG_RATIO * u[:, 1::2])
    w, h = (area * ratio).sqrt().round(), (area / ratio).sqrt().round()  # to even, as Python's
    fits = (w > 0) & (w <= width) & (h > 0) & (h <= height)
    first, found = fits.to(torch.uint8).argmax(1, keepdim=True), fits.any(1)
    h_middle, w_middle = largest_middle(height, width)
    h = torch.where(found, h.gather(1, first)[:, 0].long(), h_middle)
    w = torch.where(found, w.gather(1, first)[:, 0].long(), w_middle)
    top = torch.where(found, to_range(position[:, 0], height - h + 1), (height - h) // 2)
    left = torch.where(found, to_range(position[:, 1], width - w + 1), (width - w) // 2)
    return top, left, h, w


def largest_middle(height: int, width: int) -> tuple[int, int]:
    """Height and width of the largest part of an image with a ratio of 3/4 to 4/3."""
    if width / height < RATIO[0]:
        return round(width / RATIO[0]), width
    if width / height > RATIO[1]:
        return height, round(height * RATIO[1])
    return height, width


def _exp(t: Tensor) -> Tensor:
    """exp of |t| < 0.3 as a polynomial: the exp of a CPU's and of a GPU's library differ in their last bits."""
    result = torch.full_like(t, _EXP_TERMS[0])
    for term in _EXP_TERMS[1:]:
        result = result * t + term
    return result


def crop_resized(
    images: Tensor, indices: Tensor, top: Tensor, left: Tensor, height: Tensor, width: Tensor, size: tuple[int, int]
) -> Tensor:
    """Parts of images[i] for each of ``indices``, resized to ``size`` (H, W) as Pillow 13 crops and resizes them.

    Args:
        images: uint8 [M, H', W', 3].
        top, left, height, width: int64 [N], the parts.

    Returns:
        uint8 [N, H, W, 3].
    """
    rows, row_weights = _taps(top, height, size[0], images.shape[1])
    columns, column_weights = _taps(left, width, size[1], images.shape[2])
    # Each pass rounds to a level, so their order matters. Columns first where that shortens the image much.
    columns_first = (height > size[0]) & (height - size[0] > 2 * (width - size[1]))

    def both_passes(views: Tensor, columns_first: bool) -> Tensor:
        of, own = indices[views, None, None], torch.arange(len(views), device=images.device)[:, None, None]
        every_row = torch.arange(max(size[0], images.shape[1]), device=images.device)[:, None]
        every_column = torch.arange(max(size[1], images.shape[2]), device=images.device)
        row, column = rows[views, :, None], columns[views, None]
        along_columns, along_rows = row_weights[views, :, None, :, None], column_weights[views, None, :, :, None]
        if columns_first:
            low = _weighted(lambda k: images[of, row[..., k], every_column[: images.shape[2]]], along_columns)
            return _weighted(lambda k: low[own, every_row[: size[0]], column[..., k]], along_rows)
        wide = _weighted(lambda k: images[of, every_row[: images.shape[1]], column[..., k]], along_rows)
        return _weighted(lambda k: wide[own, row[..., k], every_column[: size[1]]], along_columns)

    if images.device.type == "cpu":
        result = torch.empty((len(indices), *size, 3), dtype=torch.uint8)
        for order in (False, True):
            views = torch.nonzero(columns_first == order)[:, 0]
            if len(views):
                result[views] = both_passes(views, order)
        return result
    every = torch.arange(len(indices), device=images.device)  # to select views would make the host wait
    return torch.where(columns_first[:, None, None, None], both_passes(every, True), both_passes(every, False))


def _weighted(pixels: Callable[[int], Tensor], weights: Tensor) -> Tensor:
    """The weighted sum of K images uint8, rounded to a level. Weights, in units of 2^-22, have K along dimension 3."""
    total = 1 << (_PRECISION - 1)
    for k in range(weights.shape[3]):
        total = total + pixels(k) * weights[:, :, :, k]
    return (total >> _PRECISION).clamp(max=255).to(torch.uint8)


def _taps(start: Tensor, length: Tensor, size: int, longest: int) -> tuple[Tensor, Tensor]:
    """Bilinear weights along one side of an image.

    Args:
        start, length: int64 [N], from ``length`` pixels at ``start``,
        size: to ``size`` pixels.
        longest: pixels of the whole side.

    Returns:
        The pixels that each new pixel is a mean of, int64 [N, size, K], and their weights, int64 [N, size, K], in units
        of 2^-22.
    """
    scale = length.to(torch.float64)[:, None] / size
    support = scale.clamp(min=1)  # the triangle spreads over this on both sides
    center = (torch.arange(size, dtype=torch.float64, device=length.device) + 0.5) * scale
    first = (center - support + 0.5).clamp(min=0).to(torch.int64)
    end = torch.minimum((center + support + 0.5).to(torch.int64), length[:, None])
    slope = torch.ones_like(support) / support
    weights, total = [], torch.zeros_like(center)
    for k in range(2 * math.ceil(max(1.0, longest / size)) + 1):
        weight = 1 - ((first + k - center + 0.5) * slope).abs()
        weights.append(torch.where(first + k < end, weight.clamp(min=0), 0))
        total = total + weights[-1]
    rounded = torch.stack([(0.5 + weight / total * (1 << _PRECISION)).to(torch.int64) for weight in weights], 2)
    pixels = (start[:, None] + first)[..., None] + torch.arange(len(weights), device=length.device)
    return pixels.clamp(max=longest - 1), rounded  # beyond the side weights are 0
