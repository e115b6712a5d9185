"""Weak and strong views in plain PyTorch: crop, flip, RandAugment, Cutout, normalization (augmentation.md, 1)."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .philox import philox, to_range, to_uniform
from .pixel_ops import FUNCTIONS
from .resized_crop import ATTEMPTS, crop_resized, draw_box
from .values import check_values

OPS: tuple[str, ...] = tuple(FUNCTIONS)
"""The operations of RandAugment; `ops` arguments hold indices into this tuple."""

# Magnitude = (low + span * r) * unit with r in [0, 1); the unit is 1, the width or the height. Posterize takes the
# integer part; operations that are not listed have no magnitude.
MAGNITUDES: dict[str, tuple[float, float, str]] = {
    "brightness": (0.05, 0.9, "one"),
    "color": (0.05, 0.9, "one"),
    "contrast": (0.05, 0.9, "one"),
    "sharpness": (0.05, 0.9, "one"),
    "posterize": (4, 4, "one"),
    "shear_x": (-0.3, 0.6, "one"),
    "shear_y": (-0.3, 0.6, "one"),
    "solarize": (0, 256, "one"),
    "translate_x": (-0.3, 0.6, "width"),
    "translate_y": (-0.3, 0.6, "height"),
    "rotate": (-30, 60, "one"),
}
CUTOUT_COLOR = (125, 123, 114)
# Top, left, flip; strong views add Cutout's size and center, then (operation, magnitude) pairs, then a resized crop's
# (area, ratio) pairs.
WEAK_WORDS = 3


def apply_ops(images: Tensor, ops: Tensor, magnitudes: Tensor) -> Tensor:
    """Each image's own chain of operations. Arguments: see `bacon_fast.ops.augment.apply_ops`."""
    apply_one = apply_grouped if images.device.type == "cpu" else apply_masked
    for s in range(ops.shape[1]):
        images = apply_one(images, ops[:, s], magnitudes[:, s])
    return images


def apply_grouped(images: Tensor, ops: Tensor, magnitudes: Tensor) -> Tensor:
    """On a CPU: each operation runs on the images that drew it."""
    result = torch.empty_like(images)
    for k, function in enumerate(FUNCTIONS.values()):
        rows = torch.nonzero(ops == k)[:, 0]
        if len(rows):
            result[rows] = function(images[rows], magnitudes[rows])
    return result


def apply_masked(images: Tensor, ops: Tensor, magnitudes: Tensor) -> Tensor:
    """On a GPU: each operation runs on all images and a mask picks; selecting rows would make the host wait."""
    result = images
    for k, function in enumerate(FUNCTIONS.values()):
        result = torch.where((ops == k)[:, None, None, None], function(images, magnitudes), result)
    return result


@dataclass(frozen=True)
class Draws:
    """The draws of N views.

    Attributes:
        top, left: int64 [N], corner of the crop: in the padded image, or in the image itself if the crop is resized.
        height, width: int64 [N], sides of the crop, of the views' own size unless it is resized.
        flip: bool [N], horizontal flip after the crop.
        ops, magnitudes: int64 and float64 [N, S], as `apply_ops` takes them; S = 0 for weak views.
        cutout: float64 [N, 4], the rectangle (x0, y0, x1, y1) as Pillow's ImageDraw.rectangle takes it; (0, 0, -1, -1)
            where there is none.
        resized: the crops are resized to the views' size.
    """

    top: Tensor
    left: Tensor
    height: Tensor
    width: Tensor
    flip: Tensor
    ops: Tensor
    magnitudes: Tensor
    cutout: Tensor
    resized: bool = False


def draw_views(
    count: int,
    seed: int,
    step: Tensor,
    stream: int,
    first_slot: int,
    *,
    strong: bool,
    source: tuple[int, int],
    size: tuple[int, int],
    ranges: Tensor,
    padding: int,
    hflip: bool,
    num_ops: int,
    cutout: bool,
    resized_crop: bool,
) -> Draws:
    """Draws of ``count`` views of ``size`` (H, W), of images of ``source`` (H', W').

    Slots are first_slot .. first_slot + count - 1. `augment_views` explains the other arguments.
    """
    slots = torch.arange(first_slot, first_slot + count, device=ranges.device)
    resized = strong and resized_crop
    boxes = 6 + 2 * num_ops  # the first word of the resized crops
    count_of_words = (boxes + 2 * ATTEMPTS if resized else boxes) if strong else WEAK_WORDS
    words = philox(seed, step, stream, slots, count_of_words)
    if resized:
        top, left, height, width = draw_box(words[:, boxes:], words[:, :2], source)
    else:
        top, left = (to_range(words[:, side], source[side] + 2 * padding - size[side] + 1) for side in (0, 1))
        height, width = (torch.full_like(top, side) for side in size)
    flip = words[:, 2] >= (1 << 31) if hflip else torch.zeros_like(words[:, 2], dtype=torch.bool)
    if not strong:
        none = words.new_empty((count, 0))
        box = torch.zeros((count, 4), dtype=torch.float64, device=words.device)
        box[:, 2:] = -1
        return Draws(top, left, height, width, flip, none, none.to(torch.float64), box)
    ops = to_range(words[:, 6:boxes:2], len(OPS))
    low, span, unit = (row[ops] for row in ranges)
    magnitudes = (low + span * to_uniform(words[:, 7:boxes:2])) * unit
    magnitudes = torch.where(ops == OPS.index("posterize"), magnitudes.floor(), magnitudes)
    box = _cutout_box(to_uniform(words[:, 3:6]), size, cutout)
    return Draws(top, left, height, width, flip, ops, magnitudes, box, resized)


def _cutout_box(u: Tensor, size: tuple[int, int], cutout: bool) -> Tensor:
    """Rectangle from three uniform numbers: side, then center. All steps are exact in float64."""
    height, width = size
    side = 0.5 * width * u[:, 0]
    # USB draws the center with numpy's uniform(size), whose other end is 1: the interval (1, size].
    x0 = torch.floor((width + (1.0 - width) * u[:, 1] - side / 2).clamp(min=0))
    y0 = torch.floor((height + (1.0 - height) * u[:, 2] - side / 2).clamp(min=0))
    x1, y1 = (x0 + side).clamp(max=width), (y0 + side).clamp(max=height)
    wanted = (side > 0) & cutout
    return torch.stack([torch.where(wanted, v, none) for v, none in ((x0, 0), (y0, 0), (x1, -1), (y1, -1))], dim=1)


def replay(images: Tensor, draws: Draws, indices: Tensor, padding: int, size: tuple[int, int]) -> Tensor:
    """Views of ``size`` (H, W) under given draws, one of images[i] for each of ``indices``: crop, flip, operations,
    Cutout.
    """
    if draws.resized:
        views = crop_resized(images, indices, draws.top, draws.left, draws.height, draws.width, size)
        views = torch.where(draws.flip[:, None, None, None], views.flip(2), views)
    else:
        rows = _reflect(draws.top, size[0], images.shape[1], padding)
        columns = _reflect(draws.left, size[1], images.shape[2], padding)
        columns = torch.where(draws.flip[:, None], columns.flip(1), columns)
        views = images[indices[:, None, None], rows[:, :, None], columns[:, None, :]]
    return _fill_box(apply_ops(views, draws.ops, draws.magnitudes), draws.cutout)


def _reflect(start: Tensor, size: int, source: int, padding: int) -> Tensor:
    """Coordinates of a crop from the padded image of ``source`` pixels: int64 [N, size]."""
    position = (start[:, None] - padding + torch.arange(size, device=start.device)).abs()
    return torch.minimum(position, 2 * (source - 1) - position)


def _fill_box(images: Tensor, box: Tensor) -> Tensor:
    x0, y0, x1, y1 = box.to(torch.int64)[:, :, None].unbind(1)  # Pillow truncates; both ends are inside
    rows = torch.arange(images.shape[1], device=images.device)
    columns = torch.arange(images.shape[2], device=images.device)
    inside = ((rows >= y0) & (rows <= y1))[:, :, None] & ((columns >= x0) & (columns <= x1))[:, None, :]
    # Filled, not copied from the host, for which a GPU would wait.
    color = torch.stack([torch.full((), level, dtype=torch.uint8, device=images.device) for level in CUTOUT_COLOR])
    return torch.where(inside[..., None], color, images)


def normalize(images: Tensor, table: Tensor, dtype: torch.dtype, channels_last: bool) -> Tensor:
    """``table`` [3, 256] at the levels of uint8 [N, H, W, 3], rounded to ``dtype``: [N, 3, H, W]."""
    channels = 256 * torch.arange(3, device=images.device)
    normalized = table.to(dtype).flatten()[images + channels].permute(0, 3, 1, 2)
    return normalized if channels_last else normalized.contiguous()


def check_indices(indices: Tensor, size: int) -> None:
    """Raises IndexError, on a CPU, unless they are rows of a pool of this size: -1 is not the last one."""
    try:
        check_values("indices", indices, f"values in 0..{size - 1}", 0, size - 1)
    except ValueError as error:
        raise IndexError(*error.args) from None


def augment_views(
    pool: Tensor,
    indices: Sequence[Tensor],
    streams: Sequence[int],
    strong: Sequence[bool],
    first_slots: Sequence[int],
    seed: int,
    step: Tensor,
    table: Tensor,
    ranges: Tensor,
    padding: int,
    hflip: bool,
    num_ops: int,
    cutout: bool,
    height: int,
    width: int,
    resized_crop: bool,
    dtype: torch.dtype,
    channels_last: bool,
) -> Tensor:
    """The views of all requests as one batch. Arguments: see `bacon_fast.ops.augment.augment_views`."""
    size = height, width
    options = {"ranges": ranges, "padding": padding, "hflip": hflip, "num_ops": num_ops, "cutout": cutout}
    options |= {"source": (pool.shape[1], pool.shape[2]), "size": size, "resized_crop": resized_crop}
    views = []
    for of, stream, is_strong, first_slot in zip(indices, streams, strong, first_slots, strict=True):
        check_indices(of, len(pool))
        draws = draw_views(len(of), seed, step, stream, first_slot, strong=is_strong, **options)
        views.append(replay(pool, draws, of, padding, size))
    return normalize(torch.cat(views), table, dtype, channels_last)
