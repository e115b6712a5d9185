"""Weak and strong views of a batch: crop, flip, RandAugment, Cutout, normalization (protocol "usb", augmentation.md).

All random numbers are Philox counters of (seed, step, stream, slot): the views of a step depend neither on the device
nor on their neighbors in the batch nor on what ran before. `draw_weak` and `draw_strong` give the draws themselves.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from bacon_fast.ops.augment import ViewRequest, augment_views
from bacon_fast.ops.checks import as_step_tensor, check_images, check_integer, check_seed, check_stream
from bacon_fast.reference.augment import MAGNITUDES, OPS, Draws, draw_views, normalize, replay


class Augment(nn.Module):
    """The augmentation of USB's FixMatch, ABC and BaCon (augmentation.md, section 1).

    Weak: reflect-pad, random crop, horizontal flip with probability 1/2. Strong: an independent crop and flip,
    `num_ops` operations drawn with replacement from `OPS`, each with its own uniform magnitude, and one Cutout of a
    side up to half the width. Center, for evaluation: the middle of the image.

    Small images have views of their own size, from the padded image (CIFAR: 32, padding 4). Photos are stored larger
    than their views and not padded (USB: 256, views of 224).

    Args:
        image_size: (h, w) of the views, or one integer for both.
        mean, std: per channel, of pixel values in 0..1.
        source_size: (H, W) of the images, or one integer for both; default: the size of the views.
        padding: pixels of reflection on each side; default int(0.125 * min(H, W)), or 0 if `source_size` differs.
        hflip: flip half of the views.
        num_ops: operations per strong view; 0 leaves RandAugment out.
        cutout: one Cutout per strong view.
        resized_crop: the crop of a strong view is a random part of the image, 8 to 100 % of its area with a ratio of
            3/4 to 4/3, resized to the view's size as Pillow does it, bilinear (torchvision's RandomResizedCrop).

    Raises:
        ValueError: an argument out of range.
    """

    def __init__(
        self,
        image_size: int | tuple[int, int],
        *,
        mean: Sequence[float],
        std: Sequence[float],
        source_size: int | tuple[int, int] | None = None,
        padding: int | None = None,
        hflip: bool = True,
        num_ops: int = 3,
        cutout: bool = True,
        resized_crop: bool = False,
    ) -> None:
        super().__init__()
        size = _sides("image_size", image_size)
        source = size if source_size is None else _sides("source_size", source_size)
        if padding is None:
            padding = int(min(size) * 0.125) if source == size else 0
        if not 0 <= padding < min(source):
            raise ValueError(f"padding: expected 0 <= padding < {min(source)}, since it reflects, found {padding}")
        if size[0] > source[0] or size[1] > source[1]:
            raise ValueError(f"image_size: expected at most {source}, the size of the images, found {size}")
        if num_ops < 0:
            raise ValueError(f"num_ops: expected at least 0, found {num_ops}")
        if len(mean) != 3 or len(std) != 3 or min(std) <= 0:
            raise ValueError(f"mean, std: expected 3 numbers each, std positive, found {mean} and {std}")
        (self.height, self.width), self.source_size = size, source
        self.padding, self.hflip, self.num_ops, self.cutout = padding, hflip, num_ops, cutout
        self.resized_crop = resized_crop

        levels = torch.arange(256, dtype=torch.float64) / 255
        rows = [(levels - m) / s for m, s in zip(mean, std)]
        # Normalization is a table, float32 [3, 256], so that every backend writes the same bits.
        self.register_buffer("table", torch.stack(rows).to(torch.float32), persistent=False)
        units = {"one": 1.0, "height": float(self.height), "width": float(self.width)}
        spans = [MAGNITUDES.get(name, (0.0, 0.0, "one")) for name in OPS]
        ranges = [[low, span, units[unit]] for low, span, unit in spans]
        # Low, span and unit of each operation's magnitude: float64 [3, 14].
        self.register_buffer("ranges", torch.tensor(ranges, dtype=torch.float64).T.contiguous(), persistent=False)

    def draw_weak(self, count: int, seed: int, step: int | Tensor, stream: int, first_slot: int = 0) -> Draws:
        """Draws of `count` weak views; arguments as in `philox`, slots first_slot .. first_slot + count - 1."""
        return self._draw(False, count, seed, step, stream, first_slot)

    def draw_strong(self, count: int, seed: int, step: int | Tensor, stream: int, first_slot: int = 0) -> Draws:
        """Draws of `count` strong views; arguments as in `draw_weak`."""
        return self._draw(True, count, seed, step, stream, first_slot)

    def _draw(self, strong: bool, count: int, seed: int, step: int | Tensor, stream: int, first_slot: int) -> Draws:
        check_seed(seed)
        check_stream(stream)
        check_integer("first_slot", first_slot, low=0)
        step, source = as_step_tensor(step, self.table.device), self.source_size
        return draw_views(count, seed, step, int(stream), first_slot, strong=strong, source=source, **self._settings())

    def _settings(self) -> dict[str, Any]:
        """The settings that `draw_views` and `augment_views` take."""
        return {
            "ranges": self.ranges,
            "padding": self.padding,
            "hflip": self.hflip,
            "num_ops": self.num_ops,
            "cutout": self.cutout,
            "size": (self.height, self.width),
            "resized_crop": self.resized_crop,
        }

    def weak(self, images: Tensor, seed: int, step: int | Tensor, stream: int) -> Tensor:
        """Weak views of uint8 [N, H, W, 3]: uint8 [N, h, w, 3]."""
        return self.replay(images, self.draw_weak(len(images), seed, step, stream))

    def strong(self, images: Tensor, seed: int, step: int | Tensor, stream: int) -> Tensor:
        """Strong views of uint8 [N, H, W, 3]: uint8 [N, h, w, 3]."""
        return self.replay(images, self.draw_strong(len(images), seed, step, stream))

    def center(self, images: Tensor) -> Tensor:
        """The middle of uint8 [N, H, W, 3], for evaluation: uint8 [N, h, w, 3], as torchvision's center_crop."""
        self._check_size("images", images)
        if (self.height, self.width) == self.source_size:
            return images
        top, left = (round((side - own) / 2) for side, own in zip(self.source_size, (self.height, self.width)))
        return images[:, top : top + self.height, left : left + self.width]

    def replay(self, images: Tensor, draws: Draws, indices: Tensor | None = None) -> Tensor:
        """Views under given draws: crop, flip, operations, Cutout.

        Args:
            images: uint8 [M, H, W, 3].
            draws: of N views.
            indices: int64 [N], the image of each view; default 0..M-1.

        Returns:
            uint8 [N, h, w, 3].
        """
        self._check_size("images", images)
        if indices is None:
            indices = torch.arange(len(images), device=images.device)
        if len(indices) != len(draws.top):
            raise ValueError(f"draws: expected one per view, {len(indices)}, found {len(draws.top)}")
        return replay(images, draws, indices, self.padding, (self.height, self.width))

    def normalize(self, images: Tensor, dtype: torch.dtype = torch.float32, channels_last: bool = False) -> Tensor:
        """(image / 255 - mean) / std of uint8 [N, H, W, 3], rounded to float32, then to `dtype`: [N, 3, H, W]."""
        check_images("images", images)
        return normalize(images, self.table, dtype, channels_last)

    def views(
        self,
        pool: Tensor,
        requests: Sequence[ViewRequest],
        seed: int,
        step: int | Tensor,
        *,
        dtype: torch.dtype = torch.float32,
        channels_last: bool = False,
        backend: str | None = None,
    ) -> Tensor:
        """All views of a step, normalized, as one batch: `ops.augment.augment_views` with these settings."""
        self._check_size("pool", pool)
        return augment_views(
            pool,
            requests,
            seed,
            step,
            table=self.table,
            **self._settings(),
            dtype=dtype,
            channels_last=channels_last,
            backend=backend,
        )

    def _check_size(self, name: str, images: Tensor) -> None:
        check_images(name, images)
        if tuple(images.shape[1:3]) != self.source_size:
            height, width = self.source_size
            raise ValueError(f"{name}: expected size {height}x{width}, found {list(images.shape[1:3])}")


def _sides(name: str, size: int | tuple[int, int]) -> tuple[int, int]:
    sides = (size, size) if isinstance(size, int) else tuple(size)
    if len(sides) != 2 or min(sides) < 1:
        raise ValueError(f"{name}: expected a positive integer or (H, W), found {size}")
    return sides
