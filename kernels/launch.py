"""Shared by the launchers: the dtypes of a computation, the architecture it runs on, and the launch itself."""

from collections.abc import Callable

import torch
import triton.language as tl
from torch import Tensor

from ..reference.values import accumulator_dtype as accumulator_dtype  # for the launchers
from .config import INTERPRETED, INTERPRETER

TRITON_DTYPE = {
    torch.float16: tl.float16,
    torch.bfloat16: tl.bfloat16,
    torch.float32: tl.float32,
    torch.float64: tl.float64,
}


# If set, the architecture whose tiles all launches get: what is recorded for a card that is not here.
pretended: int | None = None


def architecture(tensor: Tensor) -> int:
    """Compute capability as a number (90 for 9.0) of the tensor's device, `INTERPRETER` off the GPU."""
    if pretended is not None:
        return pretended
    if not tensor.is_cuda:
        return INTERPRETER
    major, minor = torch.cuda.get_device_capability(tensor.device)
    return 10 * major + minor


def dot_dtypes(dtype: torch.dtype) -> tuple[tl.dtype, tl.dtype]:
    """Operand dtypes of the products vector · vector and gradient · vector.

    Gradients of float16 vectors stay float32 (tf32 in the product): a loss scale takes them out of float16's range.
    The interpreter's product of bfloat16 is wrong (triton 3.6), so it gets float32.
    """
    similarity = torch.float32 if INTERPRETED and dtype == torch.bfloat16 else dtype
    gradient = torch.float32 if dtype == torch.float16 else similarity
    return TRITON_DTYPE[similarity], TRITON_DTYPE[gradient]


# If set, it receives the launches in place of the device: kernels.aot compiles them for cards that are not here.
recorder: Callable[..., None] | None = None


def launch(
    kernel,
    grid: tuple[int, ...],
    *arguments,
    num_warps: int = 4,
    num_stages: int = 2,
    maxnreg: int | None = None,
    **constants,
) -> None:
    """Runs ``kernel`` over ``grid`` on the device of its tensors; an empty grid is no work.

    ``maxnreg``: registers a thread may take. Given, ptxas spills none to fit more programs on a multiprocessor.
    """
    if recorder is not None:
        recorder(kernel, arguments, constants, num_warps, num_stages, maxnreg)
    elif 0 not in grid:
        with torch.cuda.device_of(next(value for value in arguments if isinstance(value, Tensor))):
            kernel[grid](*arguments, num_warps=num_warps, num_stages=num_stages, maxnreg=maxnreg, **constants)
