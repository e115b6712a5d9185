"""The augmentation's native backends (csrc/augment): when they can serve, and how they are called."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from bacon_fast.ops import native_error

if TYPE_CHECKING:
    from bacon_fast.data.augment import Augment, ViewRequest

# Of a thread block on a GPU: two images of 4 bytes a pixel, and csrc/augment/pixel_ops.h's Scratch.
_BYTES_PER_PIXEL = 8
_SCRATCH_BYTES = 4 * 1024


def why_not(images: Tensor) -> str | None:
    """None, or why the native code for the device of `images` ([N, H, W, 3]) cannot serve them."""
    if native_error is not None:
        return native_error
    if not images.is_contiguous():
        return "it needs contiguous images"
    if images.device.type != "cuda":
        return None
    from bacon_fast import _C

    if not _C.built_with_cuda:
        return "the native extension bacon_fast._C was built without CUDA"
    available = torch.cuda.get_device_properties(images.device).shared_memory_per_block_optin
    needed = _BYTES_PER_PIXEL * images.shape[1] * images.shape[2] + _SCRATCH_BYTES
    if needed > available:
        return f"an image of {images.shape[1]}x{images.shape[2]} needs {needed} bytes of shared memory of {available}"
    return None


def why_not_on(device: str) -> Callable[[Tensor], str | None]:
    """`why_not` of the backend for one kind of device."""

    def reason(images: Tensor) -> str | None:
        if images.device.type != device:
            return f"it serves {device} tensors, and these are on {images.device}"
        return why_not(images)

    return reason


def apply_ops(images: Tensor, ops: Tensor, magnitudes: Tensor) -> Tensor:
    """`bacon_fast.data.augment.apply_ops` on checked arguments."""
    return torch.ops.bacon_fast.augment_ops(images, ops.contiguous(), magnitudes.contiguous())


def views(
    augment: Augment,
    pool: Tensor,
    requests: Sequence[ViewRequest],
    seed: int,
    step: Tensor,
    dtype: torch.dtype,
    channels_last: bool,
) -> Tensor:
    """`Augment.views` on checked arguments."""
    return torch.ops.bacon_fast.augment_views(
        pool,
        [request.indices.contiguous() for request in requests],
        [int(request.stream) for request in requests],
        [int(request.strong) for request in requests],
        [request.first_slot for request in requests],
        seed - 2**64 if seed >= 2**63 else seed,  # the same 64 bits as a signed number
        step,
        augment.table,
        augment.ranges,
        augment.padding,
        augment.hflip,
        augment.num_ops,
        augment.cutout,
        dtype,
        channels_last,
    )


def _fake_views(pool, indices, *arguments):
    rows = sum(index.shape[0] for index in indices)
    dtype, channels_last = arguments[-2:]
    shape = (rows, 3, pool.shape[1], pool.shape[2])
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    return torch.empty(shape, dtype=dtype, device=pool.device, memory_format=memory_format)


if native_error is None:
    torch.library.register_fake("bacon_fast::augment_views", _fake_views)
    torch.library.register_fake("bacon_fast::augment_ops", lambda images, ops, magnitudes: torch.empty_like(images))
