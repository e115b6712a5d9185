"""BaCon's loss as an instance of the contrastive family: the codes, scales and offsets that make it one."""

import math

import torch
from torch import Tensor

from .contrastive_ops import contrastive
from .reference.bacon import EPS_COSINE, EPS_LOG, balanced_temperatures, row_codes


def _count(classes: Tensor, weight: Tensor, num_classes: int) -> Tensor:
    """Sum [K] of the weights (integers: the same in any order) of the entries of each class; class -1 is dropped."""
    bins = weight.new_zeros(num_classes + 1)
    return bins.scatter_add_(0, classes.where(classes >= 0, num_classes).flatten(), weight.flatten())[:num_classes]


def bacon_loss(
    features: Tensor,
    labels: Tensor,
    logits: Tensor,
    centers: Tensor,
    selected: Tensor,
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
    backend: str,
) -> Tensor:
    """`functional.bacon_loss` by the family's backend "cpp" or "triton": memory linear in the rows, not quadratic."""
    num_rows, num_classes = features.shape[0], centers.shape[0]
    dtype = torch.promote_types(features.dtype, torch.float32)
    classes, codes = row_codes(labels, logits.detach(), num_classes, top_k)
    one = torch.ones_like(codes)
    num_negatives = num_rows - _count(codes, one, num_classes)  # [K]
    class_size = _count(classes, one[:, 0], num_classes)

    # Anchors that count: selected, with a center to be pulled to and negatives to be pushed from.
    contributes = selected & (num_negatives > 0)[classes]
    if has_center is not None:
        contributes = contributes & has_center[classes]
    live = _count(classes, contributes.long(), num_classes) > 0  # classes with a term in the loss
    # A row takes part as member of a live class, or as negative of one: of any that is not among its codes.
    own_live = torch.where(codes >= 0, live[codes.clamp_min(0)], False).sum(dim=1)
    used = live[classes] | (live.sum() > own_live)

    tau = balanced_temperatures(class_counts, progress, temperature, bta, min_temperature).to(dtype)
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
    return torch.where(contributes, row_loss, 0).sum() / selected.sum().clamp_min(1)
