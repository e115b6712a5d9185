"""Weak and strong views of a batch: crop, flip, RandAugment, Cutout, normalization (protocol "usb", augmentation.md).

All random numbers are Philox counters of (seed, step, stream, slot): the views of a step depend neither on the device
nor on their neighbors in the batch nor on what ran before. `draw_weak` and `draw_strong` give the draws themselves.
"""

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from bacon_fast.data import native_augment
from bacon_fast.data.philox import as_step_tensor, check_seed, philox, to_range, to_uniform
from bacon_fast.data.pixel_ops import FUNCTIONS
from bacon_fast.ops import BACKENDS, Backend, choose_backend

OPS: tuple[str, ...] = tuple(FUNCTIONS)
"""The operations of RandAugment; `ops` arguments hold indices into this tuple."""

# Magnitude = (low + span * r) * unit with r in [0, 1); the unit is 1, the width or the height. Posterize takes the
# integer part; operations that are not listed have no magnitude.
_MAGNITUDES: dict[str, tuple[float, float, str]] = {
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
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_WEAK_WORDS = 3  # top, left, flip; strong views add Cutout's size and center, then (operation, magnitude) pairs


def apply_ops(images: Tensor, ops: Tensor, magnitudes: Tensor, *, backend: str | None = None) -> Tensor:
    """Applies to each image its own chain of S operations, bit for bit as Pillow 13 does.

    Args:
        images: uint8 [N, H, W, 3].
        ops: int64 [N, S], indices into `OPS`; column 0 is applied first.
        magnitudes: float64 [N, S], the value itself: blend factor (brightness, color, contrast, sharpness), bits to
            keep (posterize, truncated to an integer), pixels (translate), degrees counterclockwise (rotate), slope
            (shear), threshold (solarize); ignored by autocontrast, equalize and identity.
        backend: "reference" (PyTorch), "cpp" (native, CPU), "cuda" (native, GPU) or None, the best one usable; all of
            them give the same bits.

    Returns:
        uint8 [N, H, W, 3].

    Raises:
        TypeError: a wrong dtype. ValueError: a wrong shape or, on a CPU, an operation outside of `OPS`.
        RuntimeError: `backend` is not usable here; the message says why.
    """
    _check_images("images", images)
    for name, tensor, dtype in (("ops", ops, torch.int64), ("magnitudes", magnitudes, torch.float64)):
        if tensor.dtype != dtype:
            raise TypeError(f"{name}: expected {dtype}, found {tensor.dtype}")
        if tensor.dim() != 2 or len(tensor) != len(images) or tensor.shape != ops.shape:
            raise ValueError(f"{name}: expected [{len(images)}, S] with one S, found {list(tensor.shape)}")
    if images.device.type == "cpu" and ops.numel() and not 0 <= int(ops.min()) <= int(ops.max()) < len(OPS):
        raise ValueError(f"ops: expected values in 0..{len(OPS) - 1}, found {int(ops.min())}..{int(ops.max())}")
    images = images.contiguous()
    return choose_backend("apply_ops", backend, images)(images, ops, magnitudes)


def _apply_ops(images: Tensor, ops: Tensor, magnitudes: Tensor) -> Tensor:
    """The reference of `apply_ops`."""
    apply_one = _apply_grouped if images.device.type == "cpu" else _apply_masked
    for s in range(ops.shape[1]):
        images = apply_one(images, ops[:, s], magnitudes[:, s])
    return images


def _apply_grouped(images: Tensor, ops: Tensor, magnitudes: Tensor) -> Tensor:
    """On a host: each operation runs on the images that drew it."""
    result = torch.empty_like(images)
    for k, function in enumerate(FUNCTIONS.values()):
        rows = torch.nonzero(ops == k)[:, 0]
        if len(rows):
            result[rows] = function(images[rows], magnitudes[rows])
    return result


def _apply_masked(images: Tensor, ops: Tensor, magnitudes: Tensor) -> Tensor:
    """On a device: each operation runs on all images and a mask picks; selecting rows would make the host wait."""
    result = images
    for k, function in enumerate(FUNCTIONS.values()):
        result = torch.where((ops == k)[:, None, None, None], function(images, magnitudes), result)
    return result


@dataclass(frozen=True)
class Draws:
    """What was drawn for N views.

    Attributes:
        top, left: int64 [N], corner of the crop in the padded image.
        flip: bool [N], horizontal flip after the crop.
        ops, magnitudes: int64 and float64 [N, S], as `apply_ops` takes them; S = 0 for weak views.
        cutout: float64 [N, 4], the rectangle (x0, y0, x1, y1) as Pillow's ImageDraw.rectangle takes it; (0, 0, -1, -1)
            where there is none.
    """

    top: Tensor
    left: Tensor
    flip: Tensor
    ops: Tensor
    magnitudes: Tensor
    cutout: Tensor


@dataclass(frozen=True)
class ViewRequest:
    """One kind of view of some images, for `Augment.views`.

    Attributes:
        indices: int64 [n], rows of the pool.
        stream: the `Stream` the draws come from.
        strong: RandAugment and Cutout after crop and flip.
        first_slot: slot of the first image; rank r of a distributed job passes its offset in the global batch, and so
            makes the views that one process would make.
    """

    indices: Tensor
    stream: int
    strong: bool
    first_slot: int = 0


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
        spans = [_MAGNITUDES.get(name, (0.0, 0.0, "one")) for name in OPS]
        ranges = [[low, span, units[unit]] for low, span, unit in spans]
        # Low, span and unit of each operation's magnitude: float64 [3, 14].
        self.register_buffer("ranges", torch.tensor(ranges, dtype=torch.float64).T.contiguous(), persistent=False)
        self.register_buffer("cutout_color", torch.tensor(CUTOUT_COLOR, dtype=torch.uint8), persistent=False)

    # --- draws -----------------------------------------------------------------------------------------------------

    def draw_weak(self, count: int, seed: int, step: int | Tensor, stream: int, first_slot: int = 0) -> Draws:
        """Draws of `count` weak views; arguments as in `philox`, slots first_slot .. first_slot + count - 1."""
        words = self._words(_WEAK_WORDS, count, seed, step, stream, first_slot)
        none = words.new_empty((count, 0))
        box = torch.zeros((count, 4), dtype=torch.float64, device=words.device)
        box[:, 2:] = -1
        return Draws(*self._crop_and_flip(words), none, none.to(torch.float64), box)

    def draw_strong(self, count: int, seed: int, step: int | Tensor, stream: int, first_slot: int = 0) -> Draws:
        """Draws of `count` strong views; arguments as in `draw_weak`."""
        words = self._words(_WEAK_WORDS + 3 + 2 * self.num_ops, count, seed, step, stream, first_slot)
        ops = to_range(words[:, 6::2], len(OPS))
        low, span, unit = (row[ops] for row in self.ranges)
        magnitudes = (low + span * to_uniform(words[:, 7::2])) * unit
        magnitudes = torch.where(ops == OPS.index("posterize"), magnitudes.floor(), magnitudes)
        return Draws(*self._crop_and_flip(words), ops, magnitudes, self._cutout_box(to_uniform(words[:, 3:6])))

    def _words(self, words: int, count: int, seed: int, step: int | Tensor, stream: int, first_slot: int) -> Tensor:
        slots = torch.arange(first_slot, first_slot + count, device=self.table.device)
        return philox(seed, step, stream, slots, words)

    def _crop_and_flip(self, words: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        positions = 2 * self.padding + 1
        flip = words[:, 2] >= (1 << 31) if self.hflip else torch.zeros_like(words[:, 2], dtype=torch.bool)
        return to_range(words[:, 0], positions), to_range(words[:, 1], positions), flip

    def _cutout_box(self, u: Tensor) -> Tensor:
        """Rectangle from three uniform numbers: side, then center. All steps are exact in float64."""
        side = 0.5 * self.width * u[:, 0]
        # The peer draws the center with numpy's uniform(size), whose other end is 1: an interval (1, size].
        x0 = torch.floor((self.width + (1.0 - self.width) * u[:, 1] - side / 2).clamp(min=0))
        y0 = torch.floor((self.height + (1.0 - self.height) * u[:, 2] - side / 2).clamp(min=0))
        x1, y1 = (x0 + side).clamp(max=self.width), (y0 + side).clamp(max=self.height)
        wanted = (side > 0) & self.cutout
        return torch.stack([torch.where(wanted, v, none) for v, none in ((x0, 0), (y0, 0), (x1, -1), (y1, -1))], dim=1)

    # --- views -----------------------------------------------------------------------------------------------------

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
        rows = self._reflect(draws.top, self.height)
        columns = self._reflect(draws.left, self.width)
        columns = torch.where(draws.flip[:, None], columns.flip(1), columns)
        views = images[indices[:, None, None], rows[:, :, None], columns[:, None, :]]
        views = _apply_ops(views, draws.ops, draws.magnitudes)
        return self._fill_box(views, draws.cutout)

    def _reflect(self, start: Tensor, size: int) -> Tensor:
        """Source coordinates of a crop from the padded image: int64 [N, size]."""
        position = (start[:, None] - self.padding + torch.arange(size, device=start.device)).abs()
        return torch.minimum(position, 2 * (size - 1) - position)

    def _fill_box(self, images: Tensor, box: Tensor) -> Tensor:
        x0, y0, x1, y1 = box.to(torch.int64)[:, :, None].unbind(1)  # Pillow truncates; both ends are inside
        rows = torch.arange(self.height, device=images.device)
        columns = torch.arange(self.width, device=images.device)
        inside = ((rows >= y0) & (rows <= y1))[:, :, None] & ((columns >= x0) & (columns <= x1))[:, None, :]
        return torch.where(inside[..., None], self.cutout_color, images)

    def normalize(self, images: Tensor, dtype: torch.dtype = torch.float32, channels_last: bool = False) -> Tensor:
        """(image / 255 - mean) / std of uint8 [N, H, W, 3], rounded to float32, then to `dtype`: [N, 3, H, W]."""
        _check_images("images", images)
        channels = 256 * torch.arange(3, device=images.device)
        normalized = self.table.to(dtype).flatten()[images + channels].permute(0, 3, 1, 2)
        return normalized if channels_last else normalized.contiguous()

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
        """All views of a step, normalized, as one batch.

        Args:
            pool: uint8 [M, H, W, 3], the resident dataset.
            requests: the views wanted, in the order of the output's rows.
            seed: integer in [0, 2^64).
            step: integer, or a 0-d int64 tensor on the device of `pool` (never read by the host).
            dtype: float32, bfloat16 or float16.
            channels_last: memory format of the output.
            backend: "reference" (PyTorch), "cpp" (one thread a view), "cuda" (one launch, one thread block a view) or
                None, the best one usable; all of them give the same bits. None warns when it has to take the reference.

        Returns:
            `dtype` [sum of n, 3, H, W].

        Raises:
            TypeError, ValueError: an argument that is not as described.
            IndexError: on a CPU, an index outside of the pool.
            RuntimeError: `backend` is not usable here; the message says why.
        """
        self._check_size("pool", pool)
        if not requests:
            raise ValueError("requests: expected at least one, found none")
        if dtype not in _DTYPES:
            raise TypeError(f"dtype: expected one of {', '.join(map(str, _DTYPES))}, found {dtype}")
        check_seed(seed)
        for request in requests:
            if request.indices.dtype != torch.int64 or request.indices.dim() != 1:
                raise TypeError(
                    f"indices: expected int64 [n], found {request.indices.dtype} {list(request.indices.shape)}"
                )
        run = choose_backend("augment_views", backend, pool)
        if backend is None and run is _reference_views:
            reason = native_augment.why_not(pool)
            warnings.warn(f"the views are made by PyTorch instead of native code: {reason}", stacklevel=2)
        return run(self, pool, requests, seed, as_step_tensor(step, pool.device), dtype, channels_last)

    def _check_size(self, name: str, images: Tensor) -> None:
        _check_images(name, images)
        if images.shape[1:3] != (self.height, self.width):
            raise ValueError(f"{name}: expected size {self.height}x{self.width}, found {list(images.shape[1:3])}")


def _reference_views(
    augment: Augment,
    pool: Tensor,
    requests: Sequence[ViewRequest],
    seed: int,
    step: Tensor,
    dtype: torch.dtype,
    channels_last: bool,
) -> Tensor:
    views = []
    for request in requests:
        draw = augment.draw_strong if request.strong else augment.draw_weak
        draws = draw(len(request.indices), seed, step, request.stream, request.first_slot)
        views.append(augment.replay(pool, draws, request.indices))
    return augment.normalize(torch.cat(views), dtype, channels_last)


def _check_images(name: str, images: Tensor) -> None:
    if images.dtype != torch.uint8:
        raise TypeError(f"{name}: expected torch.uint8, found {images.dtype}")
    if images.dim() != 4 or images.shape[3] != 3:
        raise ValueError(f"{name}: expected [N, H, W, 3], found {list(images.shape)}")


def _register(operation: str, native: Callable[..., Tensor], reference: Callable[..., Tensor]) -> None:
    BACKENDS[operation] = {
        "cpp": Backend(native, native_augment.why_not_on("cpu")),
        "cuda": Backend(native, native_augment.why_not_on("cuda")),
        "reference": Backend(reference, lambda tensor: None),
    }


_register("apply_ops", native_augment.apply_ops, _apply_ops)
_register("augment_views", native_augment.views, _reference_views)
