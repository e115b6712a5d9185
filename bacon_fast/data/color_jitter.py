"""torchvision's ColorJitter with its own draw for every image of a batch, without the host reading any.

Images are float [N, 3, H, W], RGB in 0..1; every factor is float [N]. The arithmetic is torchvision's on float images
(torchvision.transforms.v2.functional).
"""

import torch
from torch import Tensor

BRIGHTNESS, CONTRAST, SATURATION, HUE = range(4)
"""Columns of `factors` and values of `order` of `color_jitter`."""


def grayscale(images: Tensor) -> Tensor:
    """Luma (ITU-R 601-2 weights) of float [N, 3, H, W]: [N, 1, H, W]."""
    red, green, blue = images.unbind(1)
    return (0.2989 * red + 0.587 * green + 0.114 * blue)[:, None]


def color_jitter(images: Tensor, factors: Tensor, order: Tensor) -> Tensor:
    """Brightness, contrast, saturation and hue of each image, changed in an order of its own.

    Args:
        images: float [N, 3, H, W] in 0..1.
        factors: float [N, 4]: multipliers of brightness, contrast and saturation, at least 0, and the hue's shift in
            turns of the color wheel, -0.5..0.5. (1, 1, 1, 0) leaves an image as it is, bit for bit.
        order: int64 [N, 4], a permutation of `BRIGHTNESS`, `CONTRAST`, `SATURATION`, `HUE` for each image.

    Returns:
        float [N, 3, H, W] in 0..1.
    """
    # The hue is expensive, so it is shifted once. One loop applies the operations that come before it in an image's
    # order, one those after it. Each loop runs all three on all images, with factor 1 where it is not an image's turn.
    hue_at = order.argsort(1)[:, HUE]
    places = torch.arange(3, device=order.device)
    others = order.gather(1, places + (places >= hue_at[:, None]))
    chosen = factors.gather(1, others)
    for k in range(3):
        images = _blend(images, others[:, k], torch.where(k < hue_at, chosen[:, k], 1))
    images = shift_hue(images, factors[:, HUE])
    for k in range(3):
        images = _blend(images, others[:, k], torch.where(k >= hue_at, chosen[:, k], 1))
    return images


def _blend(images: Tensor, operation: Tensor, factor: Tensor) -> Tensor:
    """factor * image + (1 - factor) * degenerate image: black, the mean gray, or the gray image."""
    gray, operation = grayscale(images), operation[:, None, None, None]
    mean = gray.mean(dim=(2, 3), keepdim=True)
    degenerate = torch.where(operation == SATURATION, gray, torch.where(operation == CONTRAST, mean, 0))
    factor = factor[:, None, None, None]
    return (factor * images + (1 - factor) * degenerate).clamp(0, 1)


def shift_hue(images: Tensor, shift: Tensor) -> Tensor:
    """Hue shifted by `shift` turns, float [N] in -0.5..0.5, through HSV; an image with shift 0 stays bit for bit."""
    value, brightest = images.max(1)
    red, green, blue = images.unbind(1)
    chroma = value - images.amin(1)
    scale = torch.where(chroma > 0, chroma, 1)
    hue = torch.where(brightest == 0, (green - blue) / scale, (blue - red) / scale + 2)
    hue = torch.where(brightest == 2, (red - green) / scale + 4, hue) / 6
    hue = torch.where(chroma > 0, hue, 0)
    sixths = 6 * (hue + shift[:, None, None]).remainder(1)
    # Channel n of HSV -> RGB is V - C * max(0, min(k, 4 - k, 1)) with k = (n + 6 H) mod 6 and n = 5, 3, 1.
    k = (torch.stack([sixths + n for n in (5, 3, 1)], dim=1)).remainder(6)
    shifted = value[:, None] - chroma[:, None] * torch.minimum(k, 4 - k).clamp(0, 1)
    return torch.where((shift != 0)[:, None, None, None], shifted, images)
