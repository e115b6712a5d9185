"""The 14 RandAugment operations on batches, bit for bit as Pillow 13 computes them (spec: augmentation.md, section 2).

Every operation takes images uint8 [N, H, W, 3] and magnitudes float64 [N], and returns uint8 [N, H, W, 3]. Nothing here
waits for a device or depends on the data in shape. csrc/augment/pixel_ops.h holds the same arithmetic for the kernels.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor


def _autocontrast(images: Tensor, magnitudes: Tensor) -> Tensor:
    low, high = images.amin((1, 2), keepdim=True), images.amax((1, 2), keepdim=True)
    spread = (high.to(torch.int32) - low).to(torch.float64)
    # Tensor by tensor: torch turns number / tensor into a multiplication by the reciprocal, which rounds twice.
    scale = torch.full_like(spread, 255) / spread.clamp(min=1)
    # Pillow evaluates int(level * scale + offset) in Python, so product and sum round separately, in float64.
    stretched = images * scale + -low.to(torch.float64) * scale
    return torch.where(spread > 0, stretched.clamp(0, 255).to(torch.uint8), images)


def _blend(degenerate: Tensor, images: Tensor, factors: Tensor) -> Tensor:
    """Float32 degenerate + factor * (image - degenerate), truncated, as ImagingBlend does."""
    degenerate = degenerate.to(torch.float32)
    factors = factors.to(torch.float32)[:, None, None, None]
    return (degenerate + factors * (images - degenerate)).clamp(0, 255).to(torch.uint8)


def _luma(images: Tensor) -> Tensor:
    """Pillow's conversion to gray: int32 [N, H, W, 1]."""
    red, green, blue = images.to(torch.int32).split(1, dim=3)
    return (19595 * red + 38470 * green + 7471 * blue + 32768) >> 16


def _brightness(images: Tensor, magnitudes: Tensor) -> Tensor:
    return _blend(torch.zeros_like(images), images, magnitudes)


def _color(images: Tensor, magnitudes: Tensor) -> Tensor:
    return _blend(_luma(images), images, magnitudes)


def _contrast(images: Tensor, magnitudes: Tensor) -> Tensor:
    pixels = images.shape[1] * images.shape[2]
    total = _luma(images).sum((1, 2), keepdim=True)
    return _blend((2 * total + pixels) // (2 * pixels), images, magnitudes)  # int(mean + 0.5), in integers


def _equalize(images: Tensor, magnitudes: Tensor) -> Tensor:
    n, height, width, _ = images.shape
    levels = images.reshape(n, height * width, 3).to(torch.int64)
    histogram = torch.zeros((n, 256, 3), dtype=torch.int64, device=images.device)
    histogram.scatter_add_(1, levels, torch.ones_like(levels))
    highest = levels.amax(1, keepdim=True)
    step = (height * width - histogram.gather(1, highest)) // 255
    below = histogram.cumsum(1) - histogram
    # A channel with a single level has step 0 as well: all its pixels are at the highest level.
    table = ((step // 2 + below) // step.clamp(min=1)).clamp(max=255)
    equalized = table.gather(1, levels)
    return torch.where(step > 0, equalized, levels).to(torch.uint8).reshape(images.shape)


def _identity(images: Tensor, magnitudes: Tensor) -> Tensor:
    return images


def _posterize(images: Tensor, magnitudes: Tensor) -> Tensor:
    bits = magnitudes.to(torch.int64).clamp(0, 8)
    masks = 256 - torch.bitwise_left_shift(torch.ones_like(bits), 8 - bits)
    return images & masks.to(torch.uint8)[:, None, None, None]


def _sharpness(images: Tensor, magnitudes: Tensor) -> Tensor:
    _, height, width, _ = images.shape
    smooth = images.to(torch.int32)
    if height > 2 and width > 2:
        rows = smooth[:, :-2] + smooth[:, 1:-1] + smooth[:, 2:]
        total = rows[:, :, :-2] + rows[:, :, 1:-1] + rows[:, :, 2:] + 4 * smooth[:, 1:-1, 1:-1]
        smooth = smooth.clone()
        smooth[:, 1:-1, 1:-1] = (2 * total + 13) // 26  # floor(total / 13 + 0.5); the border is copied
    return _blend(smooth, images, magnitudes)


def _solarize(images: Tensor, magnitudes: Tensor) -> Tensor:
    return torch.where(images < magnitudes[:, None, None, None], images, 255 - images)


def _sample(images: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Pixels at integer coordinates broadcastable to [N, H, W]; black outside the image."""
    n, height, width, _ = images.shape
    inside = (rows >= 0) & (rows < height) & (columns >= 0) & (columns < width)
    source = rows.clamp(0, height - 1) * width + columns.clamp(0, width - 1)
    source = source.expand(n, height, width).reshape(n, height * width, 1).expand(-1, -1, 3)
    picked = images.reshape(n, height * width, 3).gather(1, source).reshape(images.shape)
    return picked * inside.expand(n, height, width)[..., None]


def _grid(images: Tensor) -> tuple[Tensor, Tensor]:
    """Output coordinates: rows int64 [1, H, 1] and columns int64 [1, 1, W]."""
    _, height, width, _ = images.shape
    rows = torch.arange(height, device=images.device)[None, :, None]
    return rows, torch.arange(width, device=images.device)[None, None, :]


def _translate(images: Tensor, dx: Tensor, dy: Tensor) -> Tensor:
    # Without rotation or shear Pillow walks in float64 pixel centers, not in fixed point.
    rows, columns = _grid(images)
    rows = torch.floor(dy[:, None, None] + 0.5 + rows)
    columns = torch.floor(dx[:, None, None] + 0.5 + columns)
    return _sample(images, _to_coordinates(rows), _to_coordinates(columns))


def _to_coordinates(values: Tensor) -> Tensor:
    """Float64 to int64, cut off where it is outside of any image, so that huge magnitudes cannot overflow."""
    return values.clamp(-1, 2**31).to(torch.int64)


def _fix(values: Tensor) -> Tensor:
    """16.16 fixed point: int64."""
    return torch.floor(values * 65536.0 + 0.5).to(torch.int64)


def _affine(images: Tensor, matrix: tuple[Tensor, ...]) -> Tensor:
    """Nearest neighbor under the output-to-input matrix (A, B, C; D, E, F), float64 [N] each, in 16.16 fixed point."""
    a, b, c, d, e, f = matrix
    x_x, x_y, x_0 = _fix(a), _fix(b), _fix(c + a * 0.5 + b * 0.5)
    y_x, y_y, y_0 = _fix(d), _fix(e), _fix(f + d * 0.5 + e * 0.5)
    rows, columns = _grid(images)
    x = x_0[:, None, None] + x_x[:, None, None] * columns + x_y[:, None, None] * rows
    y = y_0[:, None, None] + y_x[:, None, None] * columns + y_y[:, None, None] * rows
    return _sample(images, y >> 16, x >> 16)


def _shear_x(images: Tensor, magnitudes: Tensor) -> Tensor:
    one, zero = torch.ones_like(magnitudes), torch.zeros_like(magnitudes)
    return _affine(images, (one, magnitudes, zero, zero, one, zero))


def _shear_y(images: Tensor, magnitudes: Tensor) -> Tensor:
    one, zero = torch.ones_like(magnitudes), torch.zeros_like(magnitudes)
    return _affine(images, (one, zero, zero, magnitudes, one, zero))


def _translate_x(images: Tensor, magnitudes: Tensor) -> Tensor:
    return _translate(images, magnitudes, torch.zeros_like(magnitudes))


def _translate_y(images: Tensor, magnitudes: Tensor) -> Tensor:
    return _translate(images, torch.zeros_like(magnitudes), magnitudes)


def _round15(values: Tensor) -> Tensor:
    """Python's round(value, 15) for |value| <= 1."""
    return torch.round(values * 1e15) / 1e15


def _rotate(images: Tensor, magnitudes: Tensor) -> Tensor:
    _, height, width, _ = images.shape
    cx, cy = width / 2, height / 2
    angle = -(torch.remainder(magnitudes, 360.0) * (math.pi / 180.0))
    cos, sin = _round15(torch.cos(angle)), _round15(torch.sin(angle))
    c = cos * -cx + sin * -cy + cx
    f = -sin * -cx + cos * -cy + cy
    return _affine(images, (cos, sin, c, -sin, cos, f))


FUNCTIONS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "autocontrast": _autocontrast,
    "brightness": _brightness,
    "color": _color,
    "contrast": _contrast,
    "equalize": _equalize,
    "identity": _identity,
    "posterize": _posterize,
    "sharpness": _sharpness,
    "shear_x": _shear_x,
    "shear_y": _shear_y,
    "solarize": _solarize,
    "translate_x": _translate_x,
    "translate_y": _translate_y,
    "rotate": _rotate,
}
"""Operations by name, in the order of augmentation.md's table read down its left half, then its right half."""
