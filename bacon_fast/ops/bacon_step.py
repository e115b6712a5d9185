"""BaCon's whole step by kernels/bacon_step_phases.py: `bacon_step_`. Training runs it on a GPU (`fuses_bacon_step`).

The step changes the bank, and torch.library gives autograd only to ops that change nothing. So one op takes the step
and returns the gradient along with the loss, and an autograd function ties both to the features. Its backward is an op
too, without a derivative of its own.
"""

from typing import Any

import torch
from torch import Tensor

from ..reference.values import accumulator_dtype
from .backends import why_not_triton
from .checks import check_devices, check_kind, check_progress, check_shape
from .contrastive import input_precision

BUFFERS = (
    "features",
    "written",
    "selected_label",
    "class_counts",
    "class_sums",
    "class_sizes",
    "centers",
    "has_center",
)
MAX_ROWS, MAX_DIM, MAX_CLASSES, MAX_TOP_K = 1024, 128, 1000, 8


def bacon_step_(
    features: Tensor,
    labels: Tensor,
    logits: Tensor,
    labeled_slots: Tensor,
    unlabeled_slots: Tensor,
    buffers: dict[str, Tensor],
    *,
    progress: float | Tensor,
    **options: Any,
) -> tuple[Tensor, Tensor]:
    """One step of `losses.BaConLoss` after the projection: its loss (0-d, differentiable) and share of reliable rows.

    Args:
        features: [R,D] float projections of the B labeled, then the U unlabeled rows.
        labels, logits: [B] int64 and [R,K] float.
        labeled_slots, unlabeled_slots: [B] and [U] int64, counted within the labeled and within the unlabeled set.
        buffers: of `losses.MemoryBank`, by name; contiguous, changed in place.
        progress: t/T, a number or a 0-d tensor.
        options: the other arguments of the op. Equal logits are ranked in the order of their classes.

    A label or slot out of range makes the loss NaN.

    Raises:
        TypeError, ValueError: an argument does not fit; the message names it.
        RuntimeError: the gradient is differentiated.
    """
    check_shape("features", features, "R", "D")
    check_shape("labels", labels, "B")
    rows, dim, batch = *features.shape, labels.shape[0]
    check_shape("buffers['class_counts']", buffers["class_counts"], "K")
    check_shape("logits", logits, rows, buffers["class_counts"].shape[0])
    check_shape("labeled_slots", labeled_slots, batch)
    check_shape("unlabeled_slots", unlabeled_slots, rows - batch)
    check_shape("buffers['features']", buffers["features"], "n", dim)
    check_kind("features", features, "float")
    check_kind("logits", logits, "float")
    for name, tensor in (("labels", labels), ("labeled_slots", labeled_slots), ("unlabeled_slots", unlabeled_slots)):
        check_kind(name, tensor, "int64")
    check_progress(progress)
    check_devices(
        "features",
        features,
        labels=labels,
        logits=logits,
        labeled_slots=labeled_slots,
        unlabeled_slots=unlabeled_slots,
        progress=progress if isinstance(progress, Tensor) else None,
        **{f"buffers[{name!r}]": buffer for name, buffer in buffers.items()},
    )
    for name in BUFFERS:
        if not buffers[name].is_contiguous():
            raise ValueError(f"buffers[{name!r}]: expected a contiguous tensor")
    is_tensor = isinstance(progress, Tensor)
    loss, gradient, reliable = _step(
        features.detach(),
        labels,
        logits.detach(),
        labeled_slots,
        unlabeled_slots,
        progress if is_tensor else None,
        0.0 if is_tensor else float(progress),
        *(buffers[name] for name in BUFFERS),
        **options,
    )
    return _Differentiable.apply(features, loss, gradient), reliable


def fuses_bacon_step(name: str | None, features: Tensor, logits: Tensor, top_k: int) -> bool:
    """Whether backend ``name`` takes a whole step of `losses.BaConLoss` at once: Triton's, at the usual sizes."""
    # In the interpreter it is a matter of tests, not of speed, and has to be asked for.
    chosen = name == "triton" or (name is None and features.device.type == "cuda")
    return chosen and why_not_triton(features) is None and _why_not(features, logits.shape[1], top_k) is None


def _why_not(features: Tensor, num_classes: int, top_k: int) -> str | None:
    """None if one step can be taken by the kernels, up to the backend; otherwise the reason."""
    rows, dim = features.shape
    for name, value, most in (
        ("rows", rows, MAX_ROWS),
        ("elements of a feature", dim, MAX_DIM),
        ("classes", num_classes, MAX_CLASSES),
        ("top_k classes", top_k, MAX_TOP_K),
    ):
        if not 1 <= value <= most:
            return f"it serves 1 to {most} {name}, and these are {value}"
    return None


@torch.library.custom_op(
    "bacon_fast::bacon_step_triton",
    mutates_args=(
        "bank",
        "written",
        "selected_label",
        "class_counts",
        "class_sums",
        "class_sizes",
        "centers",
        "has_center",
    ),
    device_types=("cpu", "cuda"),
)
def _step(
    features: Tensor,
    labels: Tensor,
    logits: Tensor,
    labeled_slots: Tensor,
    unlabeled_slots: Tensor,
    progress: Tensor | None,
    progress_number: float,
    bank: Tensor,
    written: Tensor,
    selected_label: Tensor,
    class_counts: Tensor,
    class_sums: Tensor,
    class_sizes: Tensor,
    centers: Tensor,
    has_center: Tensor,
    num_labeled: int,
    temperature: float,
    bta: float,
    min_temperature: float,
    negative_weight: float | None,
    neg_mode: str,
    top_k: int,
    reliable_threshold: float,
    count_threshold: float,
    count_gate: str,
    labeled_counts: str,
) -> tuple[Tensor, Tensor, Tensor]:
    from ..kernels.bacon_step_design import bacon_step

    return bacon_step(
        features,
        labels,
        logits,
        labeled_slots,
        unlabeled_slots,
        progress_number if progress is None else progress,
        bank,
        written,
        selected_label,
        class_counts,
        class_sums,
        class_sizes,
        centers,
        has_center,
        num_labeled=num_labeled,
        temperature=temperature,
        bta=bta,
        min_temperature=min_temperature,
        negative_weight=negative_weight,
        neg_mode=neg_mode,
        top_k=top_k,
        reliable_threshold=reliable_threshold,
        count_threshold=count_threshold,
        count_gate=count_gate,
        labeled_counts=labeled_counts,
        input_precision=input_precision(features.dtype),
    )


@_step.register_fake
def _(features: Tensor, *others: Any, **options: Any) -> tuple[Tensor, Tensor, Tensor]:
    dtype = accumulator_dtype(features.dtype)
    return (
        features.new_empty((), dtype=dtype),
        features.new_empty(features.shape, dtype=dtype),
        features.new_empty((), dtype=torch.float32),
    )


@torch.library.custom_op("bacon_fast::bacon_step_backward_triton", mutates_args=(), device_types=("cpu", "cuda"))
def _scale(grad_loss: Tensor, gradient: Tensor, features: Tensor) -> Tensor:
    """The saved gradient times the upstream one, in one launch, in the features' dtype."""
    return torch.mul(gradient, grad_loss, out=torch.empty_like(gradient, dtype=features.dtype))


@_scale.register_fake
def _(grad_loss: Tensor, gradient: Tensor, features: Tensor) -> Tensor:
    return torch.empty_like(gradient, dtype=features.dtype)


def _refuse(ctx: Any, grad: Tensor) -> None:
    raise RuntimeError("BaCon's fused step cannot be differentiated twice; backend='reference' can")


_scale.register_autograd(_refuse, setup_context=lambda ctx, inputs, output: None)


class _Differentiable(torch.autograd.Function):
    """The loss as a function of the features whose gradient is known."""

    @staticmethod
    def forward(ctx: Any, features: Tensor, loss: Tensor, gradient: Tensor) -> Tensor:
        # The features give the dtype, and make a second derivative reach `_refuse`.
        ctx.save_for_backward(gradient, features)
        return loss.view(())

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor, None, None]:
        return _scale(grad_loss, *ctx.saved_tensors), None, None
