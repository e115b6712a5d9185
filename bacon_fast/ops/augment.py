"""Views of a batch, and RandAugment's operations on images: `augment_views` and `apply_ops`."""

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..reference import augment as reference
from ..reference.augment import OPS
from .backends import BACKENDS, Backend, always, choose_backend, why_not_native
from .checks import as_step_tensor, check_images, check_integer, check_seed, check_stream

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def apply_ops(images: Tensor, ops: Tensor, magnitudes: Tensor, *, backend: str | None = None) -> Tensor:
    """Applies its own chain of S operations to each image, bit for bit as Pillow 13 does.

    Args:
        images: uint8 [N, H, W, 3].
        ops: int64 [N, S], indices into `reference.augment.OPS`; column 0 is applied first.
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
    check_images("images", images)
    for name, tensor, dtype in (("ops", ops, torch.int64), ("magnitudes", magnitudes, torch.float64)):
        if tensor.dtype != dtype:
            raise TypeError(f"{name}: expected {dtype}, found {tensor.dtype}")
        if tensor.dim() != 2 or len(tensor) != len(images) or tensor.shape != ops.shape:
            raise ValueError(f"{name}: expected [{len(images)}, S] with one S, found {list(tensor.shape)}")
    if images.device.type == "cpu" and ops.numel() and not 0 <= int(ops.min()) <= int(ops.max()) < len(OPS):
        raise ValueError(f"ops: expected values in 0..{len(OPS) - 1}, found {int(ops.min())}..{int(ops.max())}")
    images = images.contiguous()
    return choose_backend("apply_ops", backend, images)(images, ops, magnitudes)


@dataclass(frozen=True)
class ViewRequest:
    """One kind of view of some images, for `augment_views`.

    Attributes:
        indices: int64 [n], rows of the pool.
        stream: the `data.philox.Stream` the draws come from.
        strong: RandAugment and Cutout after crop and flip.
        first_slot: slot of the first image. A rank of a distributed job passes its offset in the global batch, and so
            makes the views that one process would make.
    """

    indices: Tensor
    stream: int
    strong: bool
    first_slot: int = 0


def augment_views(
    pool: Tensor,
    requests: Sequence[ViewRequest],
    seed: int,
    step: int | Tensor,
    *,
    table: Tensor,
    ranges: Tensor,
    padding: int,
    hflip: bool,
    num_ops: int,
    cutout: bool,
    size: tuple[int, int] | None = None,
    resized_crop: bool = False,
    dtype: torch.dtype = torch.float32,
    channels_last: bool = False,
    backend: str | None = None,
) -> Tensor:
    """All views of a step, normalized, as one batch. `data.augment.Augment` owns the settings and calls this.

    Args:
        pool: uint8 [M, H, W, 3], the resident dataset.
        requests: the views wanted, in the order of the output's rows.
        seed: integer in [0, 2^64).
        step: integer, or a 0-d int64 tensor on the device of `pool` (never read by the host).
        table: float32 [3, 256], the normalized value of each level of each channel.
        ranges: float64 [3, 14], low, span and unit of each operation's magnitude.
        padding, hflip, num_ops, cutout: as in `Augment`.
        size: (h, w) of the views; default: the size of the images.
        resized_crop: a strong view is a random part of the image, resized; else a crop of size h x w, like a weak one.
        dtype: float32, bfloat16 or float16.
        channels_last: memory format of the output.
        backend: "reference" (PyTorch), "cpp" (one thread a view), "cuda" (one launch, one thread block a view) or None,
            the best one usable; all of them give the same bits. None warns when it has to take the reference.

    Returns:
        `dtype` [sum of n, 3, h, w].

    Raises:
        TypeError, ValueError: an argument is not as described.
        IndexError: on a CPU, an index is outside of the pool.
        RuntimeError: `backend` is not usable here; the message says why.
    """
    check_images("pool", pool)
    if not requests:
        raise ValueError("requests: expected at least one, found none")
    if dtype not in _DTYPES:
        raise TypeError(f"dtype: expected one of {', '.join(map(str, _DTYPES))}, found {dtype}")
    check_seed(seed)
    for request in requests:
        if request.indices.dtype != torch.int64 or request.indices.dim() != 1:
            raise TypeError(f"indices: expected int64 [n], found {request.indices.dtype} {list(request.indices.shape)}")
        check_stream(request.stream)
        check_integer("first_slot", request.first_slot, low=0)
    height, width = pool.shape[1:3] if size is None else size
    for name, side, source in (("height", height, pool.shape[1]), ("width", width, pool.shape[2])):
        if not 1 <= side <= source + 2 * padding:
            raise ValueError(f"{name}: expected 1 to {source + 2 * padding}, the padded image's, found {side}")
    run = choose_backend("augment_views", backend, pool)
    if backend is None and run is reference.augment_views:
        reason = why_not(pool)
        warnings.warn(f"the views are made by PyTorch instead of native code: {reason}", stacklevel=3)
    return run(
        pool,
        [request.indices for request in requests],
        [int(request.stream) for request in requests],
        [request.strong for request in requests],
        [request.first_slot for request in requests],
        seed,
        as_step_tensor(step, pool.device),
        table,
        ranges,
        padding,
        hflip,
        num_ops,
        cutout,
        height,
        width,
        resized_crop,
        dtype,
        channels_last,
    )


# One request is an index tensor with its stream, 0 for weak or 1 for strong, and first slot.
torch.library.define(
    "bacon_fast::augment_views",
    "(Tensor pool, Tensor[] indices, int[] streams, int[] strong, int[] first_slots, int seed, Tensor step, "
    "Tensor table, Tensor ranges, int padding, bool hflip, int num_ops, bool cutout, int height, int width, "
    "bool resized_crop, ScalarType dtype, bool channels_last) -> Tensor",
)
torch.library.define("bacon_fast::augment_ops", "(Tensor images, Tensor ops, Tensor magnitudes) -> Tensor")


@torch.library.register_fake("bacon_fast::augment_views")
def _(pool: Tensor, indices: list[Tensor], *arguments: Any) -> Tensor:
    rows = sum(index.shape[0] for index in indices)
    height, width, _, dtype, channels_last = arguments[-5:]
    shape = (rows, 3, height, width)
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    return torch.empty(shape, dtype=dtype, device=pool.device, memory_format=memory_format)


@torch.library.register_fake("bacon_fast::augment_ops")
def _(images: Tensor, ops: Tensor, magnitudes: Tensor) -> Tensor:
    return torch.empty_like(images)


def why_not(images: Tensor) -> str | None:
    """None, or why the native code for the device of `images` ([N, H, W, 3]) cannot serve them."""
    if (reason := why_not_native(images, images.device.type)) is not None:
        return reason
    if not images.is_contiguous():
        return "it needs contiguous images"
    return None


def _why_not_on(device: str) -> Callable[[Tensor], str | None]:
    """`why_not` of the backend for one kind of device."""

    def reason(images: Tensor) -> str | None:
        if images.device.type != device:
            return f"it serves {device} tensors, and these are on {images.device}"
        return why_not(images)

    return reason


def _run_ops(images: Tensor, ops: Tensor, magnitudes: Tensor) -> Tensor:
    return torch.ops.bacon_fast.augment_ops(images, ops.contiguous(), magnitudes.contiguous())


def _run_views(
    pool: Tensor,
    indices: list[Tensor],
    streams: list[int],
    strong: list[bool],
    first_slots: list[int],
    seed: int,
    *settings: Any,
) -> Tensor:
    return torch.ops.bacon_fast.augment_views(
        pool,
        [index.contiguous() for index in indices],
        streams,
        [int(is_strong) for is_strong in strong],
        first_slots,
        seed - (seed >> 63 << 64),  # the same 64 bits as a signed number
        *settings,
    )


def _register(operation: str, native: Callable[..., Tensor], plain: Callable[..., Tensor]) -> None:
    BACKENDS[operation] = {
        "cpp": Backend(native, _why_not_on("cpu")),
        "cuda": Backend(native, _why_not_on("cuda")),
        "reference": Backend(plain, always),
    }


_register("apply_ops", _run_ops, reference.apply_ops)
_register("augment_views", _run_views, reference.augment_views)
