"""`functional.batch_norm_act`'s fused backends as torch.library ops: schemas, fakes, autograd, and the choice.

A backend NAME is two ops, bacon_fast::batch_norm_act_NAME and bacon_fast::batch_norm_act_backward_NAME, with the
schemas below, both for training mode only. The forward changes the running statistics, and torch.library gives autograd
to ops that change nothing only: an autograd function ties the two together. The backward has no derivative of its own.
"""

from typing import Any

import torch
from torch import Tensor

from . import reference

# x, residual [N,C,H,W]; the vectors [C]. sum is x + residual, and empty without a residual: an output is no input.
# mean and inverse [C], in float32 (float64 for float64 inputs), are the batch's mean and 1 / sqrt(var + eps).
FORWARD = (
    "(Tensor x, Tensor? residual, Tensor weight, Tensor bias, Tensor(a!)? running_mean, Tensor(b!)? running_var, "
    "Tensor(c!)? num_batches_tracked, float momentum, float eps, float negative_slope) "
    "-> (Tensor activated, Tensor sum, Tensor mean, Tensor inverse)"
)
# sum is here what was normalized, x without a residual; grad_sum the gradient that reaches it from elsewhere, if any.
# grad_x is also that of the residual. activated, sum and grad_x are channels_last, whatever the inputs are.
BACKWARD = (
    "(Tensor grad_activated, Tensor? grad_sum, Tensor sum, Tensor weight, Tensor bias, Tensor mean, Tensor inverse, "
    "float negative_slope) -> (Tensor grad_x, Tensor grad_weight, Tensor grad_bias)"
)


def _fake_forward(x: Tensor, residual: Tensor | None, *rest: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dtype = torch.promote_types(x.dtype, torch.float32)
    activated = torch.empty_like(x, memory_format=torch.channels_last)
    total = x.new_empty(0) if residual is None else torch.empty_like(activated)
    return activated, total, x.new_empty(x.shape[1], dtype=dtype), x.new_empty(x.shape[1], dtype=dtype)


def _fake_backward(
    grad_activated: Tensor, grad_sum: Tensor | None, total: Tensor, weight: Tensor, bias: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    grad_x = torch.empty_like(total, memory_format=torch.channels_last)
    return grad_x, torch.empty_like(weight), torch.empty_like(bias)


def _refuse(ctx: Any, *gradients: Tensor) -> None:
    raise RuntimeError("batch_norm_act cannot be differentiated twice; backend='reference' can")


def _register(name: str) -> None:
    """Fakes of a backend's ops, and the refusal of a second derivative."""
    torch.library.register_fake(f"bacon_fast::batch_norm_act_{name}", _fake_forward)
    torch.library.register_fake(f"bacon_fast::batch_norm_act_backward_{name}", _fake_backward)
    torch.library.register_autograd(f"bacon_fast::batch_norm_act_backward_{name}", _refuse)


def _triton_forward(*arguments: Any) -> tuple[Tensor, ...]:
    from .kernels.batch_norm import batch_norm_forward

    return batch_norm_forward(*arguments)


def _triton_backward(*arguments: Any) -> tuple[Tensor, ...]:
    from .kernels.batch_norm import batch_norm_backward

    return batch_norm_backward(*arguments)


torch.library.define("bacon_fast::batch_norm_act_triton", FORWARD)
torch.library.define("bacon_fast::batch_norm_act_backward_triton", BACKWARD)
torch.library.impl("bacon_fast::batch_norm_act_triton", ("cpu", "cuda"), _triton_forward)
torch.library.impl("bacon_fast::batch_norm_act_backward_triton", ("cpu", "cuda"), _triton_backward)
_register("triton")


def register_native() -> None:
    """Fakes and autograd of csrc/norm; called where the extension is loaded."""
    _register("cpp")


class _BatchNormAct(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        name: str,
        x: Tensor,
        residual: Tensor | None,
        weight: Tensor,
        bias: Tensor,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        num_batches_tracked: Tensor | None,
        momentum: float,
        eps: float,
        negative_slope: float,
    ) -> Tensor | tuple[Tensor, Tensor]:
        op = getattr(torch.ops.bacon_fast, f"batch_norm_act_{name}")
        activated, total, mean, inverse = op(
            x,
            residual,
            weight,
            bias,
            running_mean,
            running_var,
            num_batches_tracked,
            momentum,
            eps,
            negative_slope,
        )
        ctx.save_for_backward(x if residual is None else total, weight, bias, mean, inverse)
        ctx.set_materialize_grads(False)
        ctx.name, ctx.negative_slope = name, negative_slope
        return activated if residual is None else (activated, total)

    @staticmethod
    def backward(ctx: Any, grad_activated: Tensor | None, grad_sum: Tensor | None = None) -> tuple[Tensor | None, ...]:
        grad_x, grad_weight, grad_bias = grad_sum, None, None
        if grad_activated is not None:
            op = getattr(torch.ops.bacon_fast, f"batch_norm_act_backward_{ctx.name}")
            grad_x, grad_weight, grad_bias = op(grad_activated, grad_sum, *ctx.saved_tensors, ctx.negative_slope)
        grad_residual = grad_x if ctx.needs_input_grad[2] else None
        return None, grad_x, grad_residual, grad_weight, grad_bias, *[None] * 6


def run(
    name: str,
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    num_batches_tracked: Tensor | None,
    residual: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
    negative_slope: float,
) -> tuple[Tensor, Tensor]:
    """`reference.batch_norm_act` by the ops of backend ``name``, which serve training mode; the rest is its own."""
    buffers = running_mean, running_var, num_batches_tracked
    if not training:
        return reference.batch_norm_act(x, weight, bias, *buffers, residual, False, momentum, eps, negative_slope)
    out = _BatchNormAct.apply(name, x, residual, weight, bias, *buffers, momentum, eps, negative_slope)
    return (out, x) if residual is None else out


def default_backend(x: Tensor) -> str | None:
    """What serves x when no backend is named: None is the best fused one. Whether fusing pays is decided here alone.

    torch.compile fuses by itself, and would take the fused ops for opaque. Other formats than channels_last would have
    to be copied first. benchmarks/batchnorm.py measures what this rests on.
    """
    plain = torch.compiler.is_compiling() or not x.is_contiguous(memory_format=torch.channels_last)
    return "reference" if plain else None
