"""The distortions of SimCLR and MoCo v2 beyond crop and flip, as one transform of a normalized batch on its device."""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bacon_fast.data.color_jitter import color_jitter, grayscale
from bacon_fast.data.philox import Stream, philox, to_uniform

JITTER_PROBABILITY, GRAY_PROBABILITY, BLUR_PROBABILITY = 0.8, 0.2, 0.5
_NEUTRAL = (1.0, 1.0, 1.0, 0.0)
_STRENGTH = (0.4, 0.4, 0.4, 0.1)  # of brightness, contrast, saturation (around 1) and of the hue's shift (around 0)
_SIGMAS = (0.1, 2.0)
_AREAS = (0.2, 1.0)
_LOG_RATIOS = (math.log(3 / 4), math.log(4 / 3))
LARGEST_SMALL_IMAGE = 64
"""Images up to this side in pixels are neither cropped to a part and enlarged nor blurred."""


class SimCLRDistortion(nn.Module):
    """Color jitter (p 0.8), then gray (p 0.2). Images larger than 64 pixels are first cropped to 20-100 % of their area
    and enlarged again, and at the end blurred (p 0.5) with a kernel of a tenth of the side.

    SimCLR (Chen et al., ICML 2020, appendix A) with the strengths of MoCo v2 (arXiv 2003.04297). Each image has its own
    draws, the Philox counters (seed, step, Stream.SIMCLR, slot); jitter comes in a drawn order, as in torchvision. A
    crop that would be longer than the image is cut to it, where torchvision draws again.

    Args:
        mean, std: the images were normalized with these, per channel, of pixel values in 0..1.
        seed: integer in [0, 2^64).
        largest_small: other than 64; 0: images of every size are cropped and blurred.
    """

    def __init__(
        self, mean: Sequence[float], std: Sequence[float], seed: int, *, largest_small: int = LARGEST_SMALL_IMAGE
    ) -> None:
        super().__init__()
        self.seed, self.largest_small = seed, largest_small
        for name, values in (("mean", mean), ("std", std), ("neutral", _NEUTRAL), ("strength", _STRENGTH)):
            self.register_buffer(name, torch.tensor(values), persistent=False)

    def forward(self, images: Tensor, step: int | Tensor, slots: Tensor) -> Tensor:
        """Normalized images [N, 3, H, W], distorted, in the same shape and dtype.

        Args:
            step: as in `philox`.
            slots: int64 [N], the images' places in the global batch.
        """
        with torch.autocast(images.device.type, enabled=False):  # which would blur in half precision
            return self._distort(images, step, slots)

    def _distort(self, images: Tensor, step: int | Tensor, slots: Tensor) -> Tensor:
        u = to_uniform(philox(self.seed, step, Stream.SIMCLR, slots, 16), torch.float32)
        large = min(images.shape[2:]) > self.largest_small
        mean, std = self.mean[:, None, None], self.std[:, None, None]
        pixels = (images.float() * std + mean).clamp(0, 1)
        if large:
            pixels = resized_crop(pixels, draw_boxes(u[:, 12:], *images.shape[2:]))
        factors = self.neutral + self.strength * (2 * u[:, 1:5] - 1)
        factors = torch.where(u[:, :1] < JITTER_PROBABILITY, factors, self.neutral)
        pixels = color_jitter(pixels, factors, order=u[:, 5:9].argsort(1))
        pixels = torch.where(_each(u[:, 9] < GRAY_PROBABILITY), grayscale(pixels), pixels)
        if large:
            low, high = _SIGMAS
            kernel_size = min(images.shape[2:]) // 20 * 2 + 1
            blurred = gaussian_blur(pixels, low + (high - low) * u[:, 11], kernel_size)
            pixels = torch.where(_each(u[:, 10] < BLUR_PROBABILITY), blurred, pixels)
        return torch.empty_like(images).copy_((pixels - mean) / std)


def _each(values: Tensor) -> Tensor:
    """[N] in a shape that broadcasts with [N, C, H, W]."""
    return values[:, None, None, None]


def draw_boxes(u: Tensor, height: int, width: int) -> Tensor:
    """Crops (top, left, height, width), int64 [N, 4], from four uniform numbers in [0, 1) each, float [N, 4]: area of
    20-100 %, width over height of 3/4 to 4/3 (uniform logarithm), position.
    """
    area = height * width * (_AREAS[0] + (_AREAS[1] - _AREAS[0]) * u[:, 0])
    ratio = (_LOG_RATIOS[0] + (_LOG_RATIOS[1] - _LOG_RATIOS[0]) * u[:, 1]).exp()
    h = (area / ratio).sqrt().round().clamp(1, height)
    w = (area * ratio).sqrt().round().clamp(1, width)
    top, left = (u[:, 2] * (height - h + 1)).floor(), (u[:, 3] * (width - w + 1)).floor()
    return torch.stack([top, left, h, w], dim=1).long()


def resized_crop(images: Tensor, boxes: Tensor) -> Tensor:
    """Cuts each image float [N, C, H, W] to its box (top, left, height, width), int64 [N, 4], enlarged to H x W.

    Bilinear between the pixels of the box, as torchvision's resized_crop.
    """
    top, left, h, w = boxes.to(images.dtype)[:, :, None].unbind(1)

    def positions(start: Tensor, length: Tensor, size: int) -> Tensor:
        """Source coordinates [N, size] of a side, as grid_sample counts: -1 and 1 are the image's edges."""
        pixel = (torch.arange(size, device=images.device) + 0.5) * length / size - 0.5
        inside = torch.minimum(pixel.clamp(min=0), length - 1)
        return (2 * (start + inside) + 1) / size - 1

    y, x = positions(top, h, images.shape[2]), positions(left, w, images.shape[3])
    grid = torch.stack(torch.broadcast_tensors(x[:, None, :], y[:, :, None]), dim=-1)
    return F.grid_sample(images, grid, mode="bilinear", padding_mode="border", align_corners=False)


def gaussian_blur(images: Tensor, sigma: Tensor, kernel_size: int) -> Tensor:
    """Each image float [N, C, H, W] under a Gaussian of its own sigma in pixels, float [N], cut to an odd
    `kernel_size`; edges reflect.
    """
    (n, c, h, w), half = images.shape, kernel_size // 2
    offsets = torch.arange(-half, half + 1, device=images.device)
    kernel = torch.softmax(-0.5 * (offsets / sigma[:, None]).square(), dim=1).to(images.dtype)
    kernel = kernel.repeat_interleave(c, dim=0)[:, None]  # [N * C, 1, kernel_size]: one convolution of N * C groups
    padded = F.pad(images, (half, half, half, half), mode="reflect").reshape(1, n * c, h + 2 * half, w + 2 * half)
    blurred = F.conv2d(F.conv2d(padded, kernel[:, :, None], groups=n * c), kernel[..., None], groups=n * c)
    return blurred.reshape(n, c, h, w)
