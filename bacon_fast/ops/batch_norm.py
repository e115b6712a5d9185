"""Batch normalization with the residual sum before and the LeakyReLU after it: `batch_norm_act`."""

from functools import partial
from typing import Any

import torch
from torch import Tensor

from .. import reference
from ..reference.values import accumulator_dtype
from .backends import (
    BACKENDS,
    Backend,
    always,
    choose_backend,
    has_native_code,
    why_not_cpp,
    why_not_cuda,
    why_not_triton,
)
from .checks import check_devices, check_kind, check_number, check_shape


def batch_norm_act(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    num_batches_tracked: Tensor | None = None,
    *,
    residual: Tensor | None = None,
    training: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
    negative_slope: float = 0.01,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """LeakyReLU(BatchNorm(x + residual)) and x + residual: the beginning of a pre-activation residual block.

    BatchNorm: Ioffe and Szegedy, ICML 2015; pre-activation blocks: He et al., ECCV 2016. The formula, and the update of
    the running statistics in training: `reference.batch_norm.batch_norm_act`.

    Args:
        x: [N,C,H,W] float. Statistics of float16 and bfloat16 are computed in float32. The fused backends read memory
            format channels_last and convert other formats to it.
        weight, bias: [C] float, scale and shift of the normalized values.
        running_mean, running_var: [C] float. Training updates them in place, unless both are None; else they are read.
        num_batches_tracked: 0-d int64 or None. Training increments it in place.
        residual: same shape and dtype as x; added to x first.
        training: normalize with the statistics of this batch instead of the running ones.
        momentum: weight of this batch in the running statistics.
        eps: added to the variance.
        negative_slope: slope of the LeakyReLU; 0 is ReLU, 1 no activation.
        backend: None for the best one, "reference", "cpp", "triton" or "cuda"; the last one is a launch each way, takes
            channels in multiples of 16 bytes, and is chosen only by name until a GPU has measured it. Without
            ``training`` always the reference.

    Returns:
        (activated, sum), both [N,C,H,W] in the dtype of x; the sum is x itself without a residual. Both can be
        differentiated once, with respect to x, residual, weight and bias.

    Raises:
        TypeError, ValueError: an argument does not fit; the message names it.
        RuntimeError: the named backend is not available here; or the gradient is differentiated and the backend is not
            "reference".

        >>> x = torch.randn(2, 3, 4, 4, requires_grad=True)
        >>> mean, variance = torch.zeros(3), torch.ones(3)
        >>> activated, total = batch_norm_act(x, torch.ones(3), torch.zeros(3), mean, variance)
        >>> activated.shape, total is x
        (torch.Size([2, 3, 4, 4]), True)
    """
    check_shape("x", x, "N", "C", "H", "W")
    check_kind("x", x, "float")
    channels = x.shape[1]
    vectors = {"weight": weight, "bias": bias, "running_mean": running_mean, "running_var": running_var}
    for name, tensor in vectors.items():
        if tensor is not None or name in ("weight", "bias"):
            check_shape(name, tensor, channels)
            check_kind(name, tensor, "float")
            if name.startswith("running") and not tensor.is_contiguous():
                raise ValueError(f"{name}: expected a contiguous tensor")
    if (running_mean is None) != (running_var is None):
        raise ValueError("running_var: expected both running_mean and running_var, or neither")
    if num_batches_tracked is not None:
        check_shape("num_batches_tracked", num_batches_tracked)
        check_kind("num_batches_tracked", num_batches_tracked, "int64")
    if residual is not None:
        check_shape("residual", residual, *x.shape)
        if residual.dtype != x.dtype:
            raise TypeError(f"residual: expected dtype {x.dtype}, that of x, found {residual.dtype}")
    check_devices("x", x, **vectors, num_batches_tracked=num_batches_tracked, residual=residual)
    if not training and running_mean is None:
        raise ValueError("running_mean: expected a tensor, as training is False, found None")
    if training and x.numel() <= channels:
        raise ValueError(f"x: expected more than one value per channel when training, found shape {list(x.shape)}")
    check_number("momentum", momentum, low=0, low_allowed=True)
    check_number("eps", eps, low=0)
    check_number("negative_slope", negative_slope, low=0, low_allowed=True)
    if backend is None:
        backend = default_backend(x)
    run = choose_backend("batch_norm_act", backend, x)
    return run(
        x,
        weight,
        bias,
        running_mean,
        running_var,
        num_batches_tracked,
        residual,
        training,
        momentum,
        eps,
        negative_slope,
    )


def default_backend(x: Tensor) -> str | None:
    """The backend for x when none is named: None is the best fused one. Only this function decides whether fusing pays.

    torch.compile fuses by itself, and could not look into the fused ops. Other formats than channels_last would have to
    be copied first. benchmarks/batchnorm.py measures both.
    """
    plain = torch.compiler.is_compiling() or not x.is_contiguous(memory_format=torch.channels_last)
    return "reference" if plain else None


# A backend is two ops, bacon_fast::batch_norm_act_BACKEND and bacon_fast::batch_norm_act_backward_BACKEND, both for
# training mode only. Backend "cuda" is the pair of "cpp" on a GPU: csrc/batch_norm has code for both. The forward
# changes the running statistics, and torch.library gives autograd only to ops that change nothing: so an autograd
# function ties the two together. The backward has no derivative of its own.
#
# x, residual [N,C,H,W]; the vectors [C]. sum is x + residual, and empty without a residual: an output is no input.
# mean and inverse [C], in float32 (float64 for float64 inputs), are the batch's mean and 1 / sqrt(var + eps).
_FORWARD = (
    "(Tensor x, Tensor? residual, Tensor weight, Tensor bias, Tensor(a!)? running_mean, Tensor(b!)? running_var, "
    "Tensor(c!)? num_batches_tracked, float momentum, float eps, float negative_slope) "
    "-> (Tensor activated, Tensor sum, Tensor mean, Tensor inverse)"
)
# sum is here what was normalized, x without a residual; grad_sum the gradient that reaches it from elsewhere, if any.
# grad_x is the residual's gradient too. activated, sum and grad_x are channels_last, whatever the inputs are.
_BACKWARD = (
    "(Tensor grad_activated, Tensor? grad_sum, Tensor sum, Tensor weight, Tensor bias, Tensor mean, Tensor inverse, "
    "float negative_slope) -> (Tensor grad_x, Tensor grad_weight, Tensor grad_bias)"
)


def _fake_forward(x: Tensor, residual: Tensor | None, *rest: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dtype = accumulator_dtype(x.dtype)
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


def _define(backend: str) -> None:
    """A backend's pair of ops: schemas, fakes, and the refusal of a second derivative."""
    forward, backward = f"bacon_fast::batch_norm_act_{backend}", f"bacon_fast::batch_norm_act_backward_{backend}"
    torch.library.define(forward, _FORWARD)
    torch.library.define(backward, _BACKWARD)
    torch.library.register_fake(forward, _fake_forward)
    torch.library.register_fake(backward, _fake_backward)
    torch.library.register_autograd(backward, _refuse)


_define("cpp")
_define("triton")


@torch.library.impl("bacon_fast::batch_norm_act_triton", ("cpu", "cuda"))
def _(*arguments: Any) -> tuple[Tensor, ...]:
    from ..kernels.batch_norm import batch_norm_forward

    return batch_norm_forward(*arguments)


@torch.library.impl("bacon_fast::batch_norm_act_backward_triton", ("cpu", "cuda"))
def _(*arguments: Any) -> tuple[Tensor, ...]:
    from ..kernels.batch_norm import batch_norm_backward

    return batch_norm_backward(*arguments)


class _BatchNormAct(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        backend: str,
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
        op = getattr(torch.ops.bacon_fast, f"batch_norm_act_{backend}")
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
        ctx.backend, ctx.negative_slope = backend, negative_slope
        return activated if residual is None else (activated, total)

    @staticmethod
    def backward(ctx: Any, grad_activated: Tensor | None, grad_sum: Tensor | None = None) -> tuple[Tensor | None, ...]:
        grad_x, grad_weight, grad_bias = grad_sum, None, None
        if grad_activated is not None:
            op = getattr(torch.ops.bacon_fast, f"batch_norm_act_backward_{ctx.backend}")
            grad_x, grad_weight, grad_bias = op(grad_activated, grad_sum, *ctx.saved_tensors, ctx.negative_slope)
        grad_residual = grad_x if ctx.needs_input_grad[2] else None
        return None, grad_x, grad_residual, grad_weight, grad_bias, *[None] * 6


def _run(
    backend: str,
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
    """`reference.batch_norm_act` by the ops of ``backend``, which serve training mode; the rest is its own."""
    buffers = running_mean, running_var, num_batches_tracked
    if not training:
        return reference.batch_norm_act(x, weight, bias, *buffers, residual, False, momentum, eps, negative_slope)
    out = _BatchNormAct.apply(backend, x, residual, weight, bias, *buffers, momentum, eps, negative_slope)
    return (out, x) if residual is None else out


def _why_not_one_launch(x: Tensor) -> str | None:
    """Why the CUDA code cannot serve x: it reads 16 bytes at a time, of one pixel."""
    if (reason := why_not_cuda(x)) is not None:
        return reason
    if not has_native_code("bacon_fast::batch_norm_act_cpp", "cuda"):  # the CPU code is older
        return "the native extension bacon_fast._C was built before it had this code"
    size = x.shape[1] * x.element_size()
    return f"16 bytes do not divide {x.shape[1]} channels of {x.dtype}" if size % 16 else None


# "cuda" comes last, which leaves it to those who name it (docs/gpu_design.md).
BACKENDS["batch_norm_act"] = {
    "cpp": Backend(partial(_run, "cpp"), why_not_cpp),
    "triton": Backend(partial(_run, "triton"), why_not_triton),
    "reference": Backend(reference.batch_norm_act, always),
    "cuda": Backend(partial(_run, "cpp"), _why_not_one_launch),
}
