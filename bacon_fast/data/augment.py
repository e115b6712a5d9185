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

    Weak: reflect-pad, random crop to the original size, horizontal flip with probability 1/2. Strong: an independent
    crop and flip, `num_ops` operations drawn with replacement from `OPS`, each with its own uniform magnitude, and one
    Cutout of a side up to half the width.

    Args:
        image_size: (H, W), or one integer for both.
        mean, std: per channel, of pixel values in 0..1.
        padding: pixels of reflection on each side; default int(0.125 * min(H, W)).
        hflip: flip half of the views.
        num_ops: operations per strong view; 0 leaves RandAugment out.
        cutout: one Cutout per strong view.

    Raises:
        ValueError: an argument out of range.
    """

    def __init__(
        self,
        image_size: int | tuple[int, int],
        *,
        mean: Sequence[float],
        std: Sequence[float],
        padding: int | None = None,
        hflip: bool = True,
        num_ops: int = 3,
        cutout: bool = True,
    ) -> None:
        super().__init__()
        size = (image_size, image_size) if isinstance(image_size, int) else tuple(image_size)
        if len(size) != 2 or min(size) < 1:
            raise ValueError(f"image_size: expected a positive integer or (H, W), found {image_size}")
        padding = int(min(size) * 0.125) if padding is None else padding
        if not 0 <= padding < min(size):
            raise ValueError(f"padding: expected 0 <= padding < {min(size)}, since it reflects, found {padding}")
        if num_ops < 0:
            raise ValueError(f"num_ops: expected at least 0, found {num_ops}")
        if len(mean) != 3 or len(std) != 3 or min(std) <= 0:
            raise ValueError(f"mean, std: expected 3 numbers each, std positive, found {mean} and {std}")
        self.height, self.width = size
        self.padding, self.hflip, self.num_ops, self.cutout = padding, hflip, num_ops, cutout

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
        step, size = as_step_tensor(step, self.table.device), (self.height, self.width)
        return draw_views(count, seed, step, int(stream), first_slot, strong=strong, size=size, **self._settings())

    def _settings(self) -> dict[str, Any]:
        """The settings that `draw_views` and `augment_views` take."""
        return {
            "ranges": self.ranges,
            "padding": self.padding,
            "hflip": self.hflip,
            "num_ops": self.num_ops,
            "cutout": self.cutout,
        }

    def weak(self, images: Tensor, seed: int, step: int | Tensor, stream: int) -> Tensor:
        """Weak views of uint8 [N, H, W, 3]: the same shape and dtype."""
        return self.replay(images, self.draw_weak(len(images), seed, step, stream))

    def strong(self, images: Tensor, seed: int, step: int | Tensor, stream: int) -> Tensor:
        """Strong views of uint8 [N, H, W, 3]: the same shape and dtype."""
        return self.replay(images, self.draw_strong(len(images), seed, step, stream))

    def replay(self, images: Tensor, draws: Draws, indices: Tensor | None = None) -> Tensor:
        """Views under given draws: crop, flip, operations, Cutout.

        Args:
            images: uint8 [M, H, W, 3].
            draws: of N views.
            indices: int64 [N], the image of each view; default 0..M-1.

        Returns:
            uint8 [N, H, W, 3].
        """
        self._check_size("images", images)
        if indices is None:
            indices = torch.arange(len(images), device=images.device)
        if len(indices) != len(draws.top):
            raise ValueError(f"draws: expected one per view, {len(indices)}, found {len(draws.top)}")
        return replay(images, draws, indices, self.padding)

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
        if images.shape[1:3] != (self.height, self.width):
            raise ValueError(f"{name}: expected size {self.height}x{self.width}, found {list(images.shape[1:3])}")
