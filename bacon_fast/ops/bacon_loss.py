"""BaCon's loss: `bacon_loss` and its temperatures."""

import math
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .. import reference
from ..reference.bacon_loss import EPS_COSINE, EPS_LOG, row_codes
from ..reference.values import accumulator_dtype
from .backends import BACKENDS, PREFERENCES, Backend, always, choose_backend, why_not_cpp
from .checks import (
    check_choice,
    check_devices,
    check_integer,
    check_kind,
    check_number,
    check_progress,
    check_shape,
    check_temperatures,
)
from .contrastive import contrastive, why_not_triton_family
from .contrastive_times import fastest_on_gpu

NEG_MODES = ("authors", "paper")


def bacon_loss(
    features: Tensor,
    labels: Tensor,
    logits: Tensor,
    centers: Tensor,
    reliable: Tensor,
    class_counts: Tensor,
    *,
    progress: float | Tensor,
    temperature: float = 0.1,
    bta: float = 0.005,
    negative_weight: float | None = 64.0,
    top_k: int = 3,
    neg_mode: str = "authors",
    has_center: Tensor | None = None,
    min_temperature: float = 0.0,
    backend: str | None = None,
) -> Tensor:
    """Balanced feature-level contrastive loss of BaCon (AAAI 2024, arXiv 2403.12986), a 0-d tensor.

    Each reliable row is pulled to the center of its class, at a temperature that depends on how many samples are
    selected as the class (balanced temperature adjusting). It is pushed from the rows of the batch that surely belong
    to another class (reliable negative selection). Only ``features`` receives a gradient. Formula:
    `reference.bacon_loss.bacon_loss`.

    Training on a GPU does not call this: there `losses.BaConLoss` takes the whole step, loss, gradient and memory bank,
    in four launches of kernels/bacon_step_phases.py (`ops.bacon_step`).

    Args:
        features: [R,D] float, projections, the B labeled rows first, then R-B weakly augmented unlabeled rows. Need not
            be normalized. float16 and bfloat16 are computed in float32.
        labels: [B] int64, classes of the labeled rows, 0..K-1.
        logits: [R-B,K] float, the auxiliary head's logits of the unlabeled rows. The largest gives a row's class; the
            row is no negative of the classes of its ``top_k`` largest.
        centers: [K,D] float, class centers.
        reliable: [R] bool, the rows that are anchors; the others have no term of their own but still are negatives.
        class_counts: [K] number, >= 0, how many samples are selected as each class; sets the temperatures.
        progress: t/T in 0..1, a number or a 0-d tensor.
        temperature: tau, of the negatives, and of the positives before the adjustment.
        bta: strength of the temperature adjustment; 0 turns it off. It must be below 1 unless ``min_temperature`` is
            above 0, so that all temperatures are positive.
        negative_weight: the mean over the negatives counts as this many negatives; None takes the plain sum instead.
        top_k: an unlabeled row is no negative of this many classes, its likeliest. With top_k >= K unlabeled rows are
            nobody's negatives; `losses.BaConLoss` therefore lowers it to K-1.
        neg_mode: "authors" averages exp(similarity) over all rows of the class and all its negatives, as the released
            code does; "paper" averages over the negatives of the row alone.
        has_center: [K] bool, False for classes without a center; None means that all have one. Rows of classes without
            a center, and of classes without a negative in the batch, have no term.
        min_temperature: lower bound of the positives' temperatures.
        backend: None for the best one, "reference", "cpp", "triton" or "chunks".

    Returns:
        Mean over the reliable rows; exactly 0 with zero gradient where no row has a term.

    Raises:
        TypeError, ValueError: an argument does not fit; the message names it.
        RuntimeError: the named backend is not available here.

    Two labeled rows of class 0 and two unlabeled ones of class 1, at the end of training:

        >>> features = torch.eye(4, requires_grad=True)
        >>> labels, logits = torch.tensor([0, 0]), torch.tensor([[0.0, 9.0], [0.0, 9.0]])
        >>> reliable, counts = torch.tensor([True, True, True, False]), torch.tensor([2, 1])
        >>> loss = bacon_loss(features, labels, logits, torch.eye(2, 4), reliable, counts, progress=1.0, top_k=1)
        >>> loss.backward()
        >>> features.grad.any(dim=1)
        tensor([True, True, True, True])
    """
    check_shape("features", features, "R", "D")
    check_shape("labels", labels, "B")
    rows, dim, batch = features.shape[0], features.shape[1], labels.shape[0]
    if batch > rows:
        raise ValueError(f"labels: expected at most {rows} entries, one a row of features, found {batch}")
    check_shape("centers", centers, "K", dim)
    num_classes = centers.shape[0]
    if num_classes < 1:
        raise ValueError("centers: expected at least one class, found shape [0, D]")
    check_shape("logits", logits, rows - batch, num_classes)
    check_shape("reliable", reliable, rows)
    check_shape("class_counts", class_counts, num_classes)
    check_kind("features", features, "float")
    check_kind("labels", labels, "int64")
    check_kind("logits", logits, "float")
    check_kind("centers", centers, "float")
    check_kind("reliable", reliable, "bool")
    check_kind("class_counts", class_counts, "number")
    if has_center is not None:
        check_shape("has_center", has_center, num_classes)
        check_kind("has_center", has_center, "bool")
    check_devices(
        "features",
        features,
        labels=labels,
        logits=logits,
        centers=centers,
        reliable=reliable,
        class_counts=class_counts,
        has_center=has_center,
    )
    check_progress(progress)
    check_temperatures(temperature, bta, min_temperature)
    if negative_weight is not None:
        check_number("negative_weight", negative_weight, low=0)
    check_integer("top_k", top_k, low=1)
    check_choice("neg_mode", neg_mode, NEG_MODES)
    run = choose_backend("bacon_loss", backend, features)
    # Under autocast the similarities would be rounded to half precision.
    with torch.autocast(features.device.type, enabled=False):
        return run(
            features,
            labels,
            logits,
            centers,
            reliable,
            class_counts,
            progress=progress,
            temperature=temperature,
            bta=bta,
            negative_weight=negative_weight,
            top_k=top_k,
            neg_mode=neg_mode,
            has_center=has_center,
            min_temperature=min_temperature,
        )


def balanced_temperatures(
    class_counts: Tensor,
    *,
    progress: float | Tensor,
    temperature: float = 0.1,
    bta: float = 0.005,
    min_temperature: float = 0.0,
) -> Tensor:
    """BaCon's temperature of each class's positive logit, [K] float32 (float64 where the counts are).

    tau_c = temperature · (1 - bta · (1 - progress)² · sqrt(class_counts_c / max class_counts)), at least
    ``min_temperature``. Arguments as in `bacon_loss`.

        >>> balanced_temperatures(torch.tensor([100, 25]), progress=0.0, bta=0.5)
        tensor([0.0500, 0.0750])
    """
    check_shape("class_counts", class_counts, "K")
    check_kind("class_counts", class_counts, "number")
    if class_counts.shape[0] < 1:
        raise ValueError("class_counts: expected at least one class, found shape [0]")
    check_progress(progress)
    check_temperatures(temperature, bta, min_temperature)
    return reference.balanced_temperatures(class_counts, progress, temperature, bta, min_temperature)


# One native pass over the batch (csrc/bacon_loss). Its derivative is registered in C++, where it costs less a call.
torch.library.define(
    "bacon_fast::bacon_loss_cpp",
    "(Tensor features, Tensor labels, Tensor logits, Tensor centers, Tensor? has_center, Tensor reliable, "
    "Tensor class_counts, Tensor progress, float temperature, float bta, float? negative_weight, int top_k, "
    "str neg_mode, float min_temperature) -> (Tensor loss, Tensor grad_features)",
)
torch.library.define(
    "bacon_fast::bacon_loss_backward_cpp", "(Tensor grad_loss, Tensor grad_features, Tensor features) -> Tensor"
)


@torch.library.register_fake("bacon_fast::bacon_loss_cpp")
def _(features: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
    dtype = accumulator_dtype(features.dtype)
    return features.new_empty((), dtype=dtype), features.new_empty(features.shape, dtype=dtype)


@torch.library.register_fake("bacon_fast::bacon_loss_backward_cpp")
def _(grad_loss: Tensor, grad_features: Tensor, features: Tensor) -> Tensor:
    return torch.empty_like(grad_features, dtype=features.dtype)


def _run_cpp(
    features: Tensor,
    labels: Tensor,
    logits: Tensor,
    centers: Tensor,
    reliable: Tensor,
    class_counts: Tensor,
    *,
    progress: float | Tensor,
    temperature: float,
    bta: float,
    negative_weight: float | None,
    top_k: int,
    neg_mode: str,
    has_center: Tensor | None,
    min_temperature: float,
) -> Tensor:
    """Backend "cpp" of `bacon_loss`: same arguments, same value. Half precision is computed in float32.

    Equal logits are ranked as torch.topk ranks them on a CPU, which follows no documented rule. Labels outside 0..K-1
    raise ValueError.
    """
    if not isinstance(progress, Tensor):
        progress = torch.tensor(progress, dtype=torch.float64)
    loss, _ = torch.ops.bacon_fast.bacon_loss_cpp(
        features,
        labels,
        logits,
        centers,
        has_center,
        reliable,
        class_counts,
        progress,
        temperature,
        bta,
        negative_weight,
        top_k,
        neg_mode,
        min_temperature,
    )
    return loss


def _count(classes: Tensor, weight: Tensor, num_classes: int) -> Tensor:
    """Sum [K] of the weights (integers: the same in any order) of the entries of each class; class -1 is dropped."""
    bins = weight.new_zeros(num_classes + 1)
    return bins.scatter_add_(0, classes.where(classes >= 0, num_classes).flatten(), weight.flatten())[:num_classes]


def _run_family(
    features: Tensor,
    labels: Tensor,
    logits: Tensor,
    centers: Tensor,
    reliable: Tensor,
    class_counts: Tensor,
    *,
    progress: float | Tensor,
    temperature: float,
    bta: float,
    negative_weight: float | None,
    top_k: int,
    neg_mode: str,
    has_center: Tensor | None,
    min_temperature: float,
    backend: str,
) -> Tensor:
    """Backends "triton" and "chunks": BaCon's loss as an instance of the family, by its codes, scales and offsets."""
    num_rows, num_classes = features.shape[0], centers.shape[0]
    dtype = accumulator_dtype(features.dtype)
    classes, codes = row_codes(labels, logits.detach(), num_classes, top_k)
    one = torch.ones_like(codes)
    num_negatives = num_rows - _count(codes, one, num_classes)  # [K]
    class_size = _count(classes, one[:, 0], num_classes)

    # Anchors that count: reliable, with a center to be pulled to and negatives to be pushed from.
    contributes = reliable & (num_negatives > 0)[classes]
    if has_center is not None:
        contributes = contributes & has_center[classes]
    live = _count(classes, contributes.long(), num_classes) > 0  # classes with a term in the loss
    # A row takes part as a member of a live class, or as a negative of one that is not among its codes.
    own_live = torch.where(codes >= 0, live[codes.clamp_min(0)], False).sum(dim=1)
    used = live[classes] | (live.sum() > own_live)

    tau = reference.balanced_temperatures(class_counts, progress, temperature, bta, min_temperature).to(dtype)
    log_count = num_negatives.clamp_min(1).to(dtype).log()
    log_mean = -log_count if neg_mode == "paper" else -log_count - class_size.clamp_min(1).to(dtype).log()
    offset = log_mean + (log_count if negative_weight is None else math.log(negative_weight))
    scale = torch.full((num_rows,), 1 / temperature, dtype=dtype, device=features.device)
    row_loss = contrastive(
        torch.where(used[:, None], features, 0),  # NaN in an unused row must not reach the loss
        None,
        torch.where(live[:, None], centers.detach(), 0)[classes][:, None],
        classes,
        codes,
        None,
        scale,
        tau.reciprocal()[classes][:, None],
        scale,
        None,
        offset[classes],
        classes if neg_mode == "authors" else None,
        num_classes,
        form="sum",
        match="ignore",
        floor=EPS_LOG,
        eps=EPS_COSINE,
        backend=backend,
    )
    return torch.where(contributes, row_loss, 0).sum() / reliable.sum().clamp_min(1)


BACKENDS["bacon_loss"] = {
    "cpp": Backend(_run_cpp, why_not_cpp),
    "triton": Backend(partial(_run_family, backend="triton"), why_not_triton_family),
    "chunks": Backend(partial(_run_family, backend="chunks"), why_not_triton_family),
    "reference": Backend(reference.bacon_loss, always),
}
PREFERENCES["bacon_loss"] = fastest_on_gpu
