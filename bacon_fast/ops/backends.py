"""Which backend serves a tensor, and why another does not.

An operation's file enters its backends into `BACKENDS`: "reference" is plain PyTorch, "cpp" the native CPU code, "cuda"
the native GPU code, "triton" the kernels, which serve a GPU, "chunks" matrix products by torch beside smaller kernels.
"""

import os
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
from torch import Tensor

native_error: str | None = "the native extension bacon_fast._C is not loaded"
"""Why no operation can use bacon_fast._C; None when they can."""


def load_native() -> None:
    """Loads bacon_fast._C, once all schemas are defined. What was built for other schemas is not used."""
    global native_error
    try:
        from .. import _C  # noqa: F401  registers its code
    except ImportError as error:
        native_error = f"the native extension bacon_fast._C is not usable: {(str(error).splitlines() or ['?'])[0]}"
        return
    names = [n for n in torch._C._dispatch_get_all_op_names() if n.startswith("bacon_fast::")]
    missing = [name for name in names if not has_native_code(name, "cpu")]
    lacks = f"it was built before {', '.join(sorted(missing))}"
    native_error = f"the native extension bacon_fast._C is not usable: {lacks}" if missing else None


def has_native_code(op: str, device: str) -> bool:
    """Whether bacon_fast._C as it was built has code of the op "bacon_fast::NAME" for "cpu" or "cuda"."""
    return torch._C._dispatch_has_computed_kernel_for_dispatch_key(op, device.upper())


class Backend(NamedTuple):
    """One implementation of an operation. ``why_not(tensor)`` is None, or the reason why it cannot serve the tensor."""

    run: Callable[..., Any]
    why_not: Callable[[Tensor], str | None]


BACKEND_NAMES = ("reference", "cpp", "triton", "chunks", "cuda")
# Operation -> its backends, the preferred one first.
BACKENDS: dict[str, dict[str, Backend]] = {}
# Operation -> which of its backends to prefer for a tensor and a number of columns it is compared with, if it has one.
PREFERENCES: dict[str, Callable[[Tensor, int], str | None]] = {}


def always(tensor: Tensor) -> None:
    """The reference runs everywhere."""


def why_not_native(tensor: Tensor, device: str) -> str | None:
    """Why the code of bacon_fast._C for ``device`` cannot serve the tensor."""
    if tensor.device.type != device:
        return f"it serves {device} tensors, and these are on {tensor.device}"
    if native_error is not None or device == "cpu":
        return native_error
    from .. import _C

    return None if _C.built_with_cuda else "the native extension bacon_fast._C was built without CUDA"


def why_not_cpp(tensor: Tensor) -> str | None:
    return why_not_native(tensor, "cpu")


def why_not_cuda(tensor: Tensor) -> str | None:
    return why_not_native(tensor, "cuda")


# Triton reads the variable once, when it is imported.
_TRITON_INSTALLED, _TRITON_INTERPRETED = find_spec("triton") is not None, os.environ.get("TRITON_INTERPRET") == "1"


def why_not_triton(tensor: Tensor) -> str | None:
    """Why Triton kernels cannot serve the tensor."""
    if not _TRITON_INSTALLED:
        return "triton is not installed"
    if tensor.device.type == "cuda" or (tensor.device.type == "cpu" and _TRITON_INTERPRETED):
        return None
    return f"it serves cuda tensors (cpu ones under TRITON_INTERPRET=1), and these are on {tensor.device}"


def choose_backend(operation: str, name: str | None, tensor: Tensor, columns: int | None = None) -> Callable[..., Any]:
    """The implementation called ``name``, or for None the best one, of an operation on ``tensor``.

    Which is the best may depend on the number of ``columns`` that the tensor's rows are compared with: None means with
    each other. Raises ValueError for a name that no backend has, RuntimeError with the reason for one that cannot serve
    the tensor.
    """
    table = BACKENDS[operation]
    if name is None:
        if operation in PREFERENCES:
            preferred = PREFERENCES[operation](tensor, tensor.shape[0] if columns is None else columns)
            if preferred in table and table[preferred].why_not(tensor) is None:
                return table[preferred].run
        # On a CPU Triton can only interpret its kernels: good for tests, never the best choice.
        skipped = ("triton", "chunks") if tensor.device.type == "cpu" else ()
        return next(b.run for key, b in table.items() if key not in skipped and b.why_not(tensor) is None)
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
