"""Makes Triton's interpreter, in which the kernels are tested without a GPU, work with current numpy.

triton 3.6 turns a one-element array into a loop bound with int(), which numpy 2.4 refuses.
"""

from triton.runtime import interpreter

_patch_lang_tensor = interpreter._patch_lang_tensor


def _patch_with_index(tensor, scope) -> None:
    _patch_lang_tensor(tensor, scope)
    scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())


def repair() -> None:
    interpreter._patch_lang_tensor = _patch_with_index
