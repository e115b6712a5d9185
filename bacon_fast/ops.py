"""The operations' backends: what torch.library has to know about the native ones, and which one serves a tensor."""

import os
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import bacon_family, bacon_ops, bacon_step_ops, batch_norm_ops, contrastive_ops, heads_ops, reference

try:
    from . import _C
except ImportError as error:
    native_error: str | None = f"the native extension bacon_fast._C is not usable: {error}"
else:
    native_error = None


class Backend(NamedTuple):
    """One implementation of an operation. ``why_not(tensor)`` is None, or the reason why it cannot serve the tensor."""

    run: Callable[..., Any]
    why_not: Callable[[Tensor], str | None]


def _always(tensor: Tensor) -> None:
    """The reference runs everywhere."""


def _native(tensor: Tensor, device: str) -> str | None:
    """Why the code of bacon_fast._C for ``device`` cannot serve the tensor."""
    if tensor.device.type != device:
        return f"it serves {device} tensors, and these are on {tensor.device}"
    if native_error is None and device == "cuda" and not _C.built_with_cuda:
        return "the native extension bacon_fast._C was built without CUDA"
    return native_error


def _cpp(tensor: Tensor) -> str | None:
    return _native(tensor, "cpu")


def _cuda(tensor: Tensor) -> str | None:
    return _native(tensor, "cuda")


# Triton reads the variable once, when it is imported.
_TRITON_INSTALLED, _TRITON_INTERPRETED = find_spec("triton") is not None, os.environ.get("TRITON_INTERPRET") == "1"


def _triton(tensor: Tensor) -> str | None:
    """Why Triton kernels cannot serve the tensor."""
    if not _TRITON_INSTALLED:
        return "triton is not installed"
    if tensor.device.type == "cuda" or (tensor.device.type == "cpu" and _TRITON_INTERPRETED):
        return None
    return f"it serves cuda tensors (cpu ones under TRITON_INTERPRET=1), and these are on {tensor.device}"


def _triton_heads(logits: Tensor) -> str | None:
    if logits.shape[1] > heads_ops.MAX_TRITON_CLASSES:
        return f"it serves up to {heads_ops.MAX_TRITON_CLASSES} classes, and these are {logits.shape[1]}"
    return _triton(logits)


def _triton_contrastive(vectors: Tensor) -> str | None:
    if (reason := _triton(vectors)) is None:
        from .kernels.config import MAX_DIM

        if vectors.shape[1] > MAX_DIM:
            reason = f"it serves vectors of up to {MAX_DIM} elements, and these have {vectors.shape[1]}"
    return reason


def _in_place(*arguments: Any) -> None:
    """Fake of an op that returns nothing: its mutations are in its schema."""


if native_error is None:
    torch.library.register_fake("bacon_fast::bank_select_", _in_place)
    torch.library.register_fake("bacon_fast::bank_write_", _in_place)
    torch.library.register_fake("bacon_fast::sgd_ema_", _in_place)
    bacon_ops.register_native()
    batch_norm_ops.register_native()
    heads_ops.register_native()


def _bank_select_(*arguments: Tensor) -> None:
    torch.ops.bacon_fast.bank_select_(*arguments)


def _bank_write_(*arguments: Tensor) -> None:
    torch.ops.bacon_fast.bank_write_(*arguments)


def _sgd_ema_(*arguments: Any) -> None:
    torch.ops.bacon_fast.sgd_ema_(*arguments)


@torch.library.custom_op("bacon_fast::snapshot", mutates_args=())
def _snapshot(buffer: Tensor) -> Tensor:
    return buffer.clone()


@_snapshot.register_fake
def _(buffer: Tensor) -> Tensor:
    return torch.empty_like(buffer)


def snapshot(buffer: Tensor) -> Tensor:
    """The buffer's present value, for a compiled function that uses it and then overwrites it.

    torch.compile may recompute what backward needs from the buffer itself, after it was overwritten, and so return a
    wrong gradient in silence (seen with torch 2.11). It never recomputes an opaque op, so backward gets this copy.
    Eager autograd refuses saved values that were overwritten: there the buffer itself will do.
    """
    return _snapshot(buffer) if torch.compiler.is_compiling() else buffer


# Operation -> its backends, the preferred one first.
BACKENDS: dict[str, dict[str, Backend]] = {
    "bacon_loss": {
        "cpp": Backend(bacon_ops.run_cpp, _cpp),
        "triton": Backend(partial(bacon_family.bacon_loss, backend="triton"), _triton_contrastive),
        "reference": Backend(reference.bacon_loss, _always),
    },
    "contrastive": {
        "cpp": Backend(partial(contrastive_ops.contrastive, backend="cpp"), _cpp),
        "triton": Backend(partial(contrastive_ops.contrastive, backend="triton"), _triton_contrastive),
        "reference": Backend(reference.contrastive, _always),
    },
    "batch_norm_act": {
        "cpp": Backend(partial(batch_norm_ops.run, "cpp"), _cpp),
        "triton": Backend(partial(batch_norm_ops.run, "triton"), _triton),
        "reference": Backend(reference.batch_norm_act, _always),
    },
    "bank_select_": {
        "cpp": Backend(_bank_select_, _cpp),
        "cuda": Backend(_bank_select_, _cuda),
        "reference": Backend(reference.bank_select_, _always),
    },
    "bank_write_": {
        "cpp": Backend(_bank_write_, _cpp),
        "cuda": Backend(_bank_write_, _cuda),
        "reference": Backend(reference.bank_write_, _always),
    },
    "fixmatch_abc_loss": {
        "cpp": Backend(heads_ops.run_cpp, _cpp),
        "triton": Backend(heads_ops.run_triton, _triton_heads),
        "reference": Backend(reference.fixmatch_abc_loss, _always),
    },
    "sgd_ema_": {
        "cpp": Backend(_sgd_ema_, _cpp),
        "cuda": Backend(_sgd_ema_, _cuda),
        "reference": Backend(reference.sgd_ema_, _always),
    },
}
BACKEND_NAMES = ("reference", "cpp", "triton", "cuda")


bacon_step_ = bacon_step_ops.bacon_step_


def fuses_bacon_step(name: str | None, features: Tensor, logits: Tensor, top_k: int) -> bool:
    """Whether backend ``name`` takes a whole step of `losses.BaConLoss` at once: Triton's, at the usual sizes."""
    # In the interpreter it is a matter of tests, not of speed, and has to be asked for.
    chosen = name == "triton" or (name is None and features.device.type == "cuda")
    return chosen and _triton(features) is None and bacon_step_ops.why_not(features, logits.shape[1], top_k) is None


def choose_backend(operation: str, name: str | None, tensor: Tensor) -> Callable[..., Any]:
    """The implementation called ``name``, or for None the best one, of an operation on ``tensor``.

    Raises ValueError for a name that no backend has, RuntimeError with the reason for one that cannot serve the tensor.
    """
    table = BACKENDS[operation]
    if name is None:
        # On a CPU Triton can only interpret its kernels: good for tests, never the best choice.
        skipped = "triton" if tensor.device.type == "cpu" else ""
        return next(b.run for key, b in table.items() if key != skipped and b.why_not(tensor) is None)
    if name not in BACKEND_NAMES:
        raise ValueError(f"backend: expected None or one of {', '.join(BACKEND_NAMES)}, found {name!r}")
    if name not in table:
        raise RuntimeError(f"backend {name!r} does not implement {operation}, which has {', '.join(table)}")
    if (reason := table[name].why_not(tensor)) is not None:
        raise RuntimeError(f"backend {name!r} cannot run {operation} here: {reason}")
    return table[name].run


def is_native(operation: str, tensor: Tensor) -> bool:
    """Whether an operation on ``tensor`` has a backend other than the reference."""
    return any(b.why_not(tensor) is None for name, b in BACKENDS[operation].items() if name != "reference")
