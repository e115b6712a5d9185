"""Makes Triton's interpreter work with numpy, and round as a GPU does. The kernels are tested in it without a GPU.

triton 3.6 turns a one-element array into a loop bound with int(), which numpy 2.4 refuses. It cuts float32 off to
bfloat16, where the hardware rounds to the nearest.
"""

import numpy as np
import triton.language as tl
from triton.runtime import interpreter

_patch_lang_tensor = interpreter._patch_lang_tensor
_cast = interpreter.InterpreterBuilder.cast_impl


def _patch_with_index(tensor, scope) -> None:
    _patch_lang_tensor(tensor, scope)
    scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())


def to_bfloat16(values: np.ndarray) -> np.ndarray:
    """The bits [...] uint16 of float32 values rounded to bfloat16, ties to even."""
    bits = values.view(np.uint32)
    # A carry out of the mantissa may go into the exponent, but must not turn NaN into infinity or zero.
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> 16) & 1)) >> 16
    return np.where(np.isnan(values), (bits >> 16) | 0x40, rounded).astype(np.uint16)


def _cast_and_round(self, source, target):
    kinds = source.dtype.scalar, target.scalar
    if kinds == (tl.float32, tl.bfloat16):
        return interpreter.TensorHandle(to_bfloat16(source.data), target.scalar)
    return _cast(self, source, target)


def repair() -> None:
    interpreter._patch_lang_tensor = _patch_with_index
    interpreter.InterpreterBuilder.cast_impl = _cast_and_round
