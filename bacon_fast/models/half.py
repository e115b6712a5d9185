"""Parameters in half precision for a step under autocast: all of them cast at once, and all of their gradients."""

from typing import Any

import torch
from torch import Tensor, nn

from bacon_fast.models.convolution import Conv2d
from bacon_fast.models.heads import Linear

_ALIGNMENT = 64
"""Elements, so that each gradient begins at a full line of memory."""


class HalfCopies:
    """Half-precision copies of the weights and biases of a module's convolutions and linear layers.

    Autocast casts each of them by itself, forth and back: for WRN-28-2 some 70 operations a step. Inside this context,
    under autocast, the layers take copies that one operation has written, and one operation turns their gradients into
    float32 ones of the parameters. The bits are those of autocast.

    Args:
        module: whose `Conv2d` and `Linear` layers have float32 parameters; frozen ones are left to autocast.
        dtype: bfloat16 or float16.

    Example:
        >>> layer, images = Conv2d(3, 8, 3), torch.randn(2, 3, 4, 4)
        >>> with torch.autocast("cpu", dtype=torch.bfloat16), HalfCopies(layer, torch.bfloat16):
        ...     layer(images).float().sum().backward()
        >>> layer.weight.grad.dtype
        torch.float32
    """

    def __init__(self, module: nn.Module, dtype: torch.dtype) -> None:
        self._layers = [
            layer
            for layer in module.modules()
            if isinstance(layer, Conv2d | Linear) and all(p.requires_grad for p in layer.parameters(recurse=False))
        ]
        parameters = [p for layer in self._layers for p in (layer.weight, layer.bias) if p is not None]
        self._copies = [torch.empty_like(p, dtype=dtype, requires_grad=False) for p in parameters]
        self._offsets = [0]
        for parameter in parameters:
            self._offsets.append(self._offsets[-1] + -(-parameter.numel() // _ALIGNMENT) * _ALIGNMENT)

    def __enter__(self) -> None:
        pairs = [(layer.weight, layer.bias) for layer in self._layers]
        parameters = [p for pair in pairs for p in pair if p is not None]
        cast = iter(_Cast.apply(self._copies, self._offsets, *parameters) if parameters else ())
        for layer, pair in zip(self._layers, pairs):
            layer.half = tuple(None if p is None else next(cast) for p in pair)

    def __exit__(self, *exception: Any) -> None:
        for layer in self._layers:
            layer.half = None


class _Cast(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, copies: list[Tensor], offsets: list[int], *parameters: Tensor) -> tuple[Tensor, ...]:
        torch._foreach_copy_(copies, parameters)
        ctx.set_materialize_grads(False)
        ctx.offsets, ctx.like = offsets, copies
        return tuple(copy.detach() for copy in copies)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        found = [(g, like, at) for g, like, at in zip(gradients, ctx.like, ctx.offsets) if g is not None]
        if not found:
            return (None,) * (2 + len(gradients))
        memory = torch.empty(ctx.offsets[-1], device=found[0][0].device)
        wide = [memory.as_strided(like.shape, like.stride(), at) for _, like, at in found]
        torch._foreach_copy_(wide, [_in_strides_of(like, gradient) for gradient, like, _ in found])
        own = iter(wide)
        return (None, None, *(None if g is None else next(own) for g in gradients))


def _in_strides_of(like: Tensor, tensor: Tensor) -> Tensor:
    """The tensor with the strides of `like`, if they differ at sizes of 1 alone: torch fuses what has equal strides."""
    same = all(n == 1 or a == b for n, a, b in zip(like.shape, like.stride(), tensor.stride()))
    return tensor.as_strided(like.shape, like.stride()) if same else tensor
