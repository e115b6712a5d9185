"""FixMatch's and ABC's fused losses as torch.library ops: schemas, fakes, autograd, and how each backend is called.

Two forward ops, one a backend, share an autograd formula; the backward is an op too, so that torch.compile sees both,
and has no derivative of its own.
"""

from typing import Any

import torch
from torch import Tensor

from .reference.heads import HeadLosses

_FORWARD = (
    "(Tensor logits, Tensor balanced, Tensor labels, Tensor true_labels, Tensor keep_labeled, Tensor keep_unlabeled, "
    "Tensor step, int seed, bool expected, float threshold, int num_views, bool soft_targets) "
    "-> (Tensor losses, Tensor stats, Tensor counts, Tensor grad_logits, Tensor grad_balanced)"
)
_BACKWARD = (
    "(Tensor grad_losses, Tensor grad_logits, Tensor grad_balanced, Tensor logits, Tensor balanced, int batch, "
    "int num_unlabeled) -> (Tensor, Tensor)"
)
_NUM_INPUTS = 12
MAX_TRITON_CLASSES = 8192  # one program holds rows of logits in its registers


def _fake_forward(logits: Tensor, balanced: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    dtype = torch.promote_types(logits.dtype, torch.float32)
    return (
        logits.new_empty(4, dtype=dtype),
        logits.new_empty(4, dtype=torch.float32),
        logits.new_empty(2, logits.shape[1], dtype=torch.int64),
        logits.new_empty(logits.shape, dtype=dtype),
        logits.new_empty(logits.shape, dtype=dtype),
    )


def _fake_backward(
    grad_losses: Tensor, grad_logits: Tensor, grad_balanced: Tensor, logits: Tensor, balanced: Tensor, *rest: int
) -> tuple[Tensor, Tensor]:
    return logits.new_empty(logits.shape), balanced.new_empty(balanced.shape)


def _refuse(ctx: Any, *gradients: Tensor) -> None:
    raise RuntimeError("fixmatch_abc_loss cannot be differentiated twice; backend='reference' can")


def _register(forward: str, backward: str) -> None:
    """Fakes and autograd of a pair of ops with the schemas above."""
    backward_op = getattr(torch.ops.bacon_fast, backward.split("::")[1])

    def setup_context(ctx: Any, inputs: tuple, output: tuple[Tensor, ...]) -> None:
        logits, balanced, labels, true_labels = inputs[:4]
        _, stats, counts, grad_logits, grad_balanced = output
        ctx.mark_non_differentiable(stats, counts, grad_logits, grad_balanced)
        # The logits give the dtype, and make a second derivative reach `_refuse`.
        ctx.save_for_backward(grad_logits, grad_balanced, logits, balanced)
        ctx.sizes = labels.shape[0], true_labels.shape[0]

    def differentiate(ctx: Any, grad_losses: Tensor, *unused: Tensor) -> tuple[Tensor | None, ...]:
        gradients = backward_op(grad_losses, *ctx.saved_tensors, *ctx.sizes)
        return (*gradients, *[None] * (_NUM_INPUTS - 2))

    torch.library.register_fake(forward, _fake_forward)
    torch.library.register_fake(backward, _fake_backward)
    torch.library.register_autograd(forward, differentiate, setup_context=setup_context)
    torch.library.register_autograd(backward, _refuse)


def register_native() -> None:
    """For the ops of bacon_fast._C, which has to be imported."""
    _register("bacon_fast::fixmatch_abc_cpu", "bacon_fast::fixmatch_abc_backward_cpu")


def _triton_forward(*arguments: Any) -> tuple[Tensor, ...]:
    from .kernels.heads import heads_forward

    return heads_forward(*arguments)


def _triton_backward(*arguments: Any) -> tuple[Tensor, ...]:
    from .kernels.heads import heads_backward

    return heads_backward(*arguments)


torch.library.define("bacon_fast::fixmatch_abc_triton", _FORWARD)
torch.library.define("bacon_fast::fixmatch_abc_backward_triton", _BACKWARD)
torch.library.impl("bacon_fast::fixmatch_abc_triton", ("cpu", "cuda"), _triton_forward)
torch.library.impl("bacon_fast::fixmatch_abc_backward_triton", ("cpu", "cuda"), _triton_backward)
_register("bacon_fast::fixmatch_abc_triton", "bacon_fast::fixmatch_abc_backward_triton")


def _call(
    op: Any, *tensors: Tensor, seed: int | None, threshold: float, num_views: int, soft_targets: bool
) -> HeadLosses:
    expected = seed is None
    # An op's integers are signed 64-bit: the same bits, read back unsigned on the other side.
    signed = 0 if expected else seed - (seed >> 63 << 64)
    losses, stats, counts, _, _ = op(*tensors, signed, expected, threshold, num_views, soft_targets)
    return HeadLosses(losses, stats, counts)


def run_cpp(*tensors: Tensor, **options: Any) -> HeadLosses:
    return _call(torch.ops.bacon_fast.fixmatch_abc_cpu, *tensors, **options)


def run_triton(*tensors: Tensor, **options: Any) -> HeadLosses:
    return _call(torch.ops.bacon_fast.fixmatch_abc_triton, *tensors, **options)
