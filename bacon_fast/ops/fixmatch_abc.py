"""FixMatch's and ABC's losses of both heads in one pass: `fixmatch_abc_loss`."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import reference
from ..reference.fixmatch_abc import FixMatchABCLosses
from ..reference.values import accumulator_dtype
from .backends import BACKENDS, Backend, always, choose_backend, why_not_cpp, why_not_triton
from .checks import check_devices, check_integer, check_kind, check_number, check_seed, check_shape, check_values


class FixMatchABCOutput(NamedTuple):
    """The result of `fixmatch_abc_loss`. The losses are 0-d and differentiable, the rest is for logs.

    supervised, unsupervised: FixMatch's losses of the main head.
    abc_labeled, abc_unlabeled: ABC's losses of the balanced head.
    pseudo_rate: 0-d, share of unlabeled rows with a confident pseudo-label of the main head.
    abc_rate: 0-d, share of unlabeled rows that enter ``abc_unlabeled``.
    pseudo_known, pseudo_correct: 0-d, confident rows with a known true label, and those among them that are right.
    pseudo_labels: [U] int64, the main head's pseudo-labels, -1 where not confident.
    """

    supervised: Tensor
    unsupervised: Tensor
    abc_labeled: Tensor
    abc_unlabeled: Tensor
    pseudo_rate: Tensor
    abc_rate: Tensor
    pseudo_known: Tensor
    pseudo_correct: Tensor
    pseudo_labels: Tensor


def fixmatch_abc_loss(
    logits: Tensor,
    balanced: Tensor,
    labels: Tensor,
    true_labels: Tensor,
    keep_labeled: Tensor,
    keep_unlabeled: Tensor,
    *,
    step: int | Tensor,
    seed: int,
    threshold: float = 0.95,
    backend: str | None = None,
) -> FixMatchABCOutput:
    """FixMatch's loss of the main head and ABC's of the balanced head: masks, statistics and gradients in one pass.

    FixMatch (NeurIPS 2020): cross entropy on the labels, and of the strong views against the confident pseudo-labels of
    the weak views. ABC (NeurIPS 2021): the same on a second head, which keeps a row of class c with a probability that
    falls with the size of the class. The masks are drawn here. Formulas: `reference.fixmatch_abc.fixmatch_abc_loss`.

    Args:
        logits, balanced: [B+2U,K] float, main and balanced head's logits of the B labeled, the U weak and the U strong
            rows. float16 and bfloat16 are computed in float32.
        labels: [B] int64, classes of the labeled rows.
        true_labels: [U] int64, -1 where unknown; only for the statistics.
        keep_labeled: [K] float in 0..1, probability of keeping a labeled row of each class: N_min / N_c.
        keep_unlabeled: [K] float, the same for unlabeled rows, by their pseudo-label: 1 - (e/E)(1 - N_min / N_c).
        step: completed optimizer steps, an integer or a 0-d int64 tensor.
        seed: key of the draws, 0..2^64-1. The draws are counters (`data.philox`).
        threshold: least confidence of a pseudo-label that is used.
        backend: None for the best one, "reference", "cpp" or "triton".

    Returns:
        FixMatchABCOutput. A loss without rows is exactly 0. The weak rows have no gradient.

    Raises:
        TypeError, ValueError: an argument does not fit; the message names it.
        RuntimeError: the named backend is not available here; or the gradient is differentiated.

    One labeled row, and one unlabeled row in its weak and its strong view, which is confident of class 1:

        >>> logits = torch.tensor([[2.0, 0.0], [0.0, 9.0], [0.0, 1.0]], requires_grad=True)
        >>> labels, true_labels, keep = torch.tensor([0]), torch.tensor([1]), torch.ones(2)
        >>> out = fixmatch_abc_loss(logits, logits, labels, true_labels, keep, keep, step=0, seed=0)
        >>> out.pseudo_rate.item(), round(out.unsupervised.item(), 4)
        (1.0, 0.3133)
    """
    check_shape("logits", logits, "N", "K")
    check_shape("balanced", balanced, *logits.shape)
    check_shape("labels", labels, "B")
    check_shape("true_labels", true_labels, "U")
    num_classes = logits.shape[1]
    if num_classes < 1:
        raise ValueError("logits: expected at least one class, found shape [N, 0]")
    rows = labels.shape[0] + 2 * true_labels.shape[0]
    if logits.shape[0] != rows:
        raise ValueError(
            f"logits: expected {rows} rows, {labels.shape[0]} labeled and 2 times {true_labels.shape[0]} unlabeled "
            f"ones, found {logits.shape[0]}"
        )
    check_kind("logits", logits, "float")
    if balanced.dtype != logits.dtype:
        raise TypeError(f"balanced: expected dtype {logits.dtype}, that of logits, found {balanced.dtype}")
    check_kind("labels", labels, "int64")
    check_kind("true_labels", true_labels, "int64")
    check_shape("keep_labeled", keep_labeled, num_classes)
    check_kind("keep_labeled", keep_labeled, "float")
    check_shape("keep_unlabeled", keep_unlabeled, num_classes)
    check_kind("keep_unlabeled", keep_unlabeled, "float")
    for name, keep in (("keep_labeled", keep_labeled), ("keep_unlabeled", keep_unlabeled)):
        check_values(name, keep.detach(), "probabilities in 0..1", 0, 1)
    check_number("threshold", threshold, low=0, low_allowed=True)
    check_seed(seed)
    if not isinstance(step, Tensor):
        check_integer("step", step, low=0)
        step = torch.full((), step, dtype=torch.int64, device=logits.device)
    check_shape("step", step)
    check_kind("step", step, "int64")
    check_devices(
        "logits",
        logits,
        balanced=balanced,
        labels=labels,
        true_labels=true_labels,
        keep_labeled=keep_labeled,
        keep_unlabeled=keep_unlabeled,
        step=step,
    )
    run = choose_backend("fixmatch_abc_loss", backend, logits)
    losses, stats, pseudo_labels = run(
        logits,
        balanced,
        labels,
        true_labels,
        keep_labeled.detach().float(),
        keep_unlabeled.detach().float(),
        step,
        seed=seed,
        threshold=threshold,
    )
    return FixMatchABCOutput(*losses.unbind(), *stats.unbind(), pseudo_labels)


# Two forward ops, one for each backend, share a schema and an autograd formula. The backward is an op too, so that
# torch.compile sees both; it has no derivative of its own.
_FORWARD = (
    "(Tensor logits, Tensor balanced, Tensor labels, Tensor true_labels, Tensor keep_labeled, Tensor keep_unlabeled, "
    "Tensor step, int seed, float threshold) "
    "-> (Tensor losses, Tensor stats, Tensor pseudo_labels, Tensor grad_logits, Tensor grad_balanced)"
)
_BACKWARD = (
    "(Tensor grad_losses, Tensor grad_logits, Tensor grad_balanced, Tensor logits, Tensor balanced, int batch, "
    "int num_unlabeled) -> (Tensor, Tensor)"
)
_NUM_INPUTS = 9


def _fake_forward(
    logits: Tensor, balanced: Tensor, labels: Tensor, true_labels: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    dtype = accumulator_dtype(logits.dtype)
    return (
        logits.new_empty(4, dtype=dtype),
        logits.new_empty(4, dtype=torch.float32),
        torch.empty_like(true_labels, memory_format=torch.contiguous_format),
        logits.new_empty(logits.shape, dtype=dtype),
        logits.new_empty(logits.shape, dtype=dtype),
    )


def _fake_backward(
    grad_losses: Tensor, grad_logits: Tensor, grad_balanced: Tensor, logits: Tensor, balanced: Tensor, *rest: int
) -> tuple[Tensor, Tensor]:
    return logits.new_empty(logits.shape), balanced.new_empty(balanced.shape)


def _refuse(ctx: Any, *gradients: Tensor) -> None:
    raise RuntimeError("fixmatch_abc_loss cannot be differentiated twice; backend='reference' can")


def _define(backend: str) -> None:
    """A backend's pair of ops: schemas, fakes and autograd."""
    forward, backward = f"bacon_fast::fixmatch_abc_{backend}", f"bacon_fast::fixmatch_abc_backward_{backend}"
    torch.library.define(forward, _FORWARD)
    torch.library.define(backward, _BACKWARD)
    backward_op = getattr(torch.ops.bacon_fast, f"fixmatch_abc_backward_{backend}")

    def setup_context(ctx: Any, inputs: tuple, output: tuple[Tensor, ...]) -> None:
        logits, balanced, labels, true_labels = inputs[:4]
        _, *rest = output
        ctx.mark_non_differentiable(*rest)
        ctx.set_materialize_grads(False)  # zeros of the size of each of them would only be made
        *_, grad_logits, grad_balanced = rest
        # The logits give the dtype, and make a second derivative reach `_refuse`.
        ctx.save_for_backward(grad_logits, grad_balanced, logits, balanced)
        ctx.sizes = labels.shape[0], true_labels.shape[0]

    def differentiate(ctx: Any, grad_losses: Tensor | None, *unused: None) -> tuple[Tensor | None, ...]:
        if grad_losses is None:
            return (None,) * _NUM_INPUTS
        gradients = backward_op(grad_losses, *ctx.saved_tensors, *ctx.sizes)
        return (*gradients, *[None] * (_NUM_INPUTS - 2))

    torch.library.register_fake(forward, _fake_forward)
    torch.library.register_fake(backward, _fake_backward)
    torch.library.register_autograd(forward, differentiate, setup_context=setup_context)
    torch.library.register_autograd(backward, _refuse)


_define("cpp")
_define("triton")


@torch.library.impl("bacon_fast::fixmatch_abc_triton", ("cpu", "cuda"))
def _(*arguments: Any) -> tuple[Tensor, ...]:
    from ..kernels.fixmatch_abc import fixmatch_abc_forward

    return fixmatch_abc_forward(*arguments)


@torch.library.impl("bacon_fast::fixmatch_abc_backward_triton", ("cpu", "cuda"))
def _(*arguments: Any) -> tuple[Tensor, ...]:
    from ..kernels.fixmatch_abc import fixmatch_abc_backward

    return fixmatch_abc_backward(*arguments)


MAX_TRITON_CLASSES = 8192  # one program holds rows of logits in its registers


def _why_not_triton(logits: Tensor) -> str | None:
    if logits.shape[1] > MAX_TRITON_CLASSES:
        return f"it serves up to {MAX_TRITON_CLASSES} classes, and these are {logits.shape[1]}"
    return why_not_triton(logits)


def _call(op: Any, *tensors: Tensor, seed: int, threshold: float) -> FixMatchABCLosses:
    # An op's integers are signed 64-bit: the same bits, read back unsigned on the other side.
    losses, stats, pseudo_labels, _, _ = op(*tensors, seed - (seed >> 63 << 64), threshold)
    return FixMatchABCLosses(losses, stats, pseudo_labels)


def _run_cpp(*tensors: Tensor, **options: Any) -> FixMatchABCLosses:
    return _call(torch.ops.bacon_fast.fixmatch_abc_cpp, *tensors, **options)


def _run_triton(*tensors: Tensor, **options: Any) -> FixMatchABCLosses:
    return _call(torch.ops.bacon_fast.fixmatch_abc_triton, *tensors, **options)


BACKENDS["fixmatch_abc_loss"] = {
    "cpp": Backend(_run_cpp, why_not_cpp),
    "triton": Backend(_run_triton, _why_not_triton),
    "reference": Backend(reference.fixmatch_abc_loss, always),
}
