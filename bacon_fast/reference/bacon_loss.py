"""BaCon's contrastive loss in plain PyTorch: the specification that runs.

Feng et al., "BaCon: Boosting Imbalanced Semi-supervised Learning via Balanced Feature-Level Contrastive Learning",
AAAI 2024 (arXiv 2403.12986). A batch has R rows: B labeled ones, then weakly augmented unlabeled ones. Every reliable
row is pulled to the center of its class and pushed from the rows that surely belong to another class.

Differentiable with respect to the features, float64-capable, free of host synchronization and of data-dependent shapes.
"""

import math
import sys

import torch
from torch import Tensor

from .values import accumulator_dtype, check_values, normalize

EPS_COSINE = 1e-8  # smallest norm a vector is divided by
EPS_LOG = 1e-8  # added to the denominator of the softmax, as in the authors' code
MASKED = -1e30  # stands for log(0): finite, so that no gradient is ever inf - inf


def balanced_temperatures(
    class_counts: Tensor, progress: float | Tensor, temperature: float, bta: float, min_temperature: float = 0.0
) -> Tensor:
    """Balanced temperature adjusting: the temperature [K] of the positive logit of each class.

    tau_c = tau · (1 - bta · (1 - t/T)² · sqrt(count_c / max count)), never below ``min_temperature``.
    """
    check_values("class_counts", class_counts, "finite numbers >= 0", 0, sys.float_info.max)
    if isinstance(progress, Tensor):
        check_values("progress", progress, "a number >= 0 and <= 1", 0, 1)
    counts = class_counts.to(accumulator_dtype(class_counts.dtype))
    share = counts / counts.max().clamp_min(1)
    return (temperature * (1 - bta * (1 - progress) ** 2 * share.sqrt())).clamp_min(min_temperature)


def row_codes(labels: Tensor, logits: Tensor, num_classes: int, top_k: int) -> tuple[Tensor, Tensor]:
    """The class of every row and the classes that the row may belong to.

    A labeled row may belong to its label only; an unlabeled row to the ``top_k`` classes of largest logit (all K if
    there are no more), the first of which is its class.

    Returns:
        classes [R] and codes [R,k] (int64), labeled rows padded with -1.
    """
    check_values("labels", labels, f"classes in 0..{num_classes - 1}", 0, num_classes - 1)
    k = min(top_k, num_classes)
    top = logits.topk(k, dim=1).indices
    labeled = torch.cat([labels[:, None], labels.new_full((labels.shape[0], k - 1), -1)], dim=1)
    codes = torch.cat([labeled, top])
    return codes[:, 0], codes


def negatives_of_classes(codes: Tensor, num_classes: int) -> Tensor:
    """Reliable negative selection: bool [K,R], row j is a negative of class c if it surely is not of class c."""
    classes = torch.arange(num_classes, device=codes.device)
    return (codes[None] != classes[:, None, None]).all(dim=2)


def masked_logsumexp(values: Tensor, mask: Tensor, dim: int) -> Tensor:
    """log of the sum of exp(values) where ``mask``; about `MASKED` where the mask is empty."""
    return torch.where(mask, values, MASKED).logsumexp(dim)


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
) -> Tensor:
    """The contrastive loss. `bacon_fast.functional.bacon_loss` has the same arguments, and validates them.

    Per row r of class c, with cosine similarities s:

        x_r = s(r, center of c) / tau_c                                             positive logit
        G_r = log(negative_weight · mean over negatives j of exp(s(r, j) / tau))    neg_mode "paper"
        G_c = the same, but the mean is over all rows of class c and all negatives  neg_mode "authors"
        loss_r = log(exp(x_r) + exp(G_r) + eps) - x_r

    and the loss is the mean of loss_r over the reliable rows. ``negative_weight=None`` takes the sum in place of the
    weighted mean. Rows whose class has no center or no negative drop out of the sum, not out of the divisor.
    """
    num_classes = centers.shape[0]
    dtype = accumulator_dtype(features.dtype)
    classes, codes = row_codes(labels, logits.detach(), num_classes, top_k)
    negative_table = negatives_of_classes(codes, num_classes)  # [K,R]
    is_negative = negative_table[classes]  # [R,R]: row r, negative j
    num_negatives = negative_table.sum(dim=1)[classes]  # [R]

    # Anchors that count: reliable, with a center to be pulled to and negatives to be pushed from.
    contributes = reliable & (num_negatives > 0)
    if has_center is not None:
        contributes = contributes & has_center[classes]
    member = classes == torch.arange(num_classes, device=classes.device)[:, None]  # [K,R]
    live_class = (member & contributes).any(dim=1)  # [K]: classes with a term in the loss
    enters_mean = live_class[classes] if neg_mode == "authors" else contributes

    # Rows without a part in the loss are replaced before the first arithmetic on them: NaN · 0 would still be NaN.
    used = enters_mean | (negative_table & live_class[:, None]).any(dim=0)
    unit = normalize(torch.where(used[:, None], features.to(dtype), 0), EPS_COSINE)
    unit_centers = normalize(torch.where(live_class[:, None], centers.detach().to(dtype), 0), EPS_COSINE)

    tau = balanced_temperatures(class_counts, progress, temperature, bta, min_temperature).to(dtype)
    positive = (unit * unit_centers[classes]).sum(dim=1) / tau[classes]  # x_r
    similarity = unit @ unit.T / temperature  # v_rj
    log_sum = masked_logsumexp(similarity, is_negative & enters_mean[:, None], dim=1)  # over the negatives of row r
    log_count = num_negatives.clamp_min(1).to(dtype).log()
    if neg_mode == "authors":
        log_sum = masked_logsumexp(log_sum, member & enters_mean, dim=1)[classes]  # and over the rows of the class
        log_count = log_count + member.sum(dim=1).clamp_min(1).to(dtype).log()[classes]
    if negative_weight is None:
        # The sum over the negatives of one row: |N| times the mean.
        log_weight = num_negatives.clamp_min(1).to(dtype).log()
    else:
        log_weight = math.log(negative_weight)
    negative = log_weight - log_count + log_sum  # G_r

    floor = torch.full_like(positive, math.log(EPS_LOG))
    row_loss = torch.stack([positive, negative, floor]).logsumexp(dim=0) - positive
    total = torch.where(contributes, row_loss, 0).sum()
    return total / (reliable.sum().clamp_min(1))
