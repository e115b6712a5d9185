"""The family of masked multi-positive contrastive losses in plain PyTorch: the specification that runs.

BaCon, SupCon/SSC, SsCL and InfoNCE are its instances (bacon_fast.functional). Differentiable with respect to rows,
columns and own; float64-capable; free of host synchronization. Builds the R x C matrices that other backends avoid.
"""

import math

import torch
from torch import Tensor

from .values import accumulator_dtype, normalize

FORMS = ("mean", "sum", "prod")
MATCHES = ("positive", "ignore")


def masked_logsumexp(values: Tensor, mask: Tensor) -> Tensor:
    """log of the sum over the last axis of exp(values) where ``mask``; 0 where the mask is empty.

    The sum is taken relative to a detached maximum, and masked values are replaced before any arithmetic on them, so
    that neither an empty mask nor a masked NaN reaches a value or a gradient.
    """
    if values.shape[-1] == 0:
        return values.new_zeros(values.shape[:-1])
    present = mask.any(dim=-1)
    lowest = torch.finfo(values.dtype).min
    peak = torch.where(mask, values.detach(), lowest).amax(dim=-1)
    peak = torch.where(present, peak, 0)
    total = torch.where(mask, torch.where(mask, values - peak[..., None], 0).exp(), 0).sum(dim=-1)
    return peak + torch.where(present, total, 1).log()


def contrastive(
    rows: Tensor,
    columns: Tensor | None,
    own: Tensor | None,
    row_code: Tensor,
    column_code: Tensor | None,
    self_column: Tensor | None,
    positive_scale: Tensor,
    own_scale: Tensor | None,
    negative_scale: Tensor,
    negative_bias: Tensor | None,
    negative_offset: Tensor | None,
    group: Tensor | None,
    num_groups: int,
    *,
    form: str,
    match: str,
    floor: float = 0.0,
    eps: float = 1e-12,
) -> Tensor:
    """Loss of every row against its positive and negative columns.

    With û, ŵ, ô the normalized rows, columns and own columns, s_rj = û_r·ŵ_j and o_rm = û_r·ô_rm:

        x_rj = positive_scale_r · s_rj       logit of a positive column; own columns have own_scale_rm · o_rm instead
        v_rj = negative_scale_r · s_rj + negative_bias_r                                    logit of a negative column
        p_r, q_r, a_r = log Σ exp(x), log Σ exp(-x), mean of x                         over the positives of the row
        n_r = log Σ exp(v)                over the negatives of the row, or with ``group`` over those of its whole group
        N_r = log(exp(n_r + negative_offset_r) + floor)

        form "mean":  log(exp(p) + exp(N)) - a         SupCon, cross entropy
        form "sum":   log(1 + exp(N - p))              InfoNCE, BaCon
        form "prod":  log(1 + exp(N + q))              Circle loss, SsCL

    A column matches a row if the row's code is among the column's codes. match="positive": matching columns are its
    positives; match="ignore": they are ignored. All others are its negatives, except ``self_column``, which is ignored.

    Args:
        rows: [R,D] float16, bfloat16, float32 or float64, the anchors. Half precision is computed in float32.
        columns: [C,D], or None: the rows themselves.
        own: [R,M,D] or None, further positives that belong to one row each.
        row_code: [R] integer, >= 0.
        column_code: [C,T] integer, -1 pads; or None: no column matches any row.
        self_column: [R] integer, index of the column that a row ignores, -1 for none; or None: none for all.
        positive_scale, negative_scale: [R], 1/temperature of the positive and negative columns.
        own_scale: [R,M]; 0 keeps a positive of logit 0, NaN means that the row has no such positive.
        negative_bias, negative_offset: [R] or None (0).
        group: [R] integer in 0..num_groups-1, or None: every row is its own group. All rows of a group enter its n,
            also those without a loss of their own.
        floor: added to the negatives' sum, >= 0.
        eps: smallest norm a vector is divided by.

    Returns:
        [R] in float32 (float64 for float64 rows). A row with non-finite features or own columns has loss NaN, and so
        has every row of its group, but no NaN reaches the gradients of others. Any other row without a positive has 0.

    Only rows, columns and own receive a gradient. A column's gradient counts its part as negative and as positive.
    """
    dtype = accumulator_dtype(rows.dtype)
    scale, own_scale = positive_scale.to(dtype), None if own_scale is None else own_scale.to(dtype)
    columns = rows if columns is None else columns
    num_rows, num_columns = rows.shape[0], columns.shape[0]

    # The relation of each column to each row.
    if column_code is None:
        matches = torch.zeros(num_rows, num_columns, dtype=torch.bool, device=rows.device)
    else:
        matches = (row_code[:, None, None] == column_code).any(dim=2)
    candidate = torch.ones_like(matches)
    if self_column is not None:
        candidate = self_column[:, None] != torch.arange(num_columns, device=rows.device)
    is_negative = candidate & ~matches
    is_positive = candidate & matches if match == "positive" else torch.zeros_like(matches)

    # Non-finite rows and columns that no loss uses are replaced before the first arithmetic: 0 · NaN is NaN.
    broken = ~rows.isfinite().all(dim=1)
    if own is not None:
        present = ~own_scale.isnan()
        broken = broken | (present & ~own.isfinite().all(dim=2)).any(dim=1)
    row_broken = broken
    u = normalize(torch.where(broken[:, None], 0, rows.to(dtype)), eps)
    used = (is_negative | is_positive).any(dim=0)
    w = normalize(torch.where(used[:, None], columns.to(dtype), 0), eps)
    with torch.autocast(rows.device.type, enabled=False):  # which would round the similarities to half precision
        similarity = u @ w.T

    # Positive logits [R,M+C], own columns first.
    x = scale[:, None] * similarity
    if own is not None:
        own_used = (present & ~broken[:, None])[..., None]
        o = normalize(torch.where(own_used, own.to(dtype), 0), eps)
        own_logit = torch.where(present, own_scale, 0) * (u[:, None] * o).sum(dim=2)
        x = torch.cat([own_logit, x], dim=1)
        is_positive = torch.cat([present, is_positive], dim=1)
    num_positives = is_positive.sum(dim=1)

    # N, and whether it is more than log(0).
    v = negative_scale.to(dtype)[:, None] * similarity
    if negative_bias is not None:
        v = v + negative_bias.to(dtype)[:, None]
    bounded = is_negative.any(dim=1)
    negative = masked_logsumexp(v, is_negative)
    if group is not None:
        member = group == torch.arange(num_groups, device=rows.device)[:, None]  # [G,R]
        negative = masked_logsumexp(negative.expand(num_groups, -1), member & bounded & ~broken)[group]
        bounded = (member & bounded).any(dim=1)[group]
        broken = broken | (member & broken).any(dim=1)[group]
    if negative_offset is not None:
        negative = negative + torch.where(bounded, negative_offset.to(dtype), 0)
    if floor > 0:
        log_floor = torch.full_like(negative, math.log(floor))
        negative = torch.where(bounded, torch.logaddexp(negative, log_floor), log_floor)
        bounded = torch.ones_like(bounded)

    if form == "mean":
        p = masked_logsumexp(x, is_positive)
        a = torch.where(is_positive, x, 0).sum(dim=1) / num_positives.clamp_min(1)
        # log(exp(p) + exp(N)) - a, exact also where N is negligible and p = a.
        loss = p - a + torch.where(bounded, torch.logaddexp(negative - p, torch.zeros_like(p)), 0)
    else:
        sign = 1 if form == "sum" else -1
        exponent = negative - sign * masked_logsumexp(sign * x, is_positive)
        loss = torch.where(bounded | exponent.isnan(), torch.logaddexp(exponent, torch.zeros_like(exponent)), 0)
    # NaN in the loss of a broken row, and in its gradient, so that a gradient scaler sees it.
    loss = torch.where(broken, rows.to(dtype).sum(dim=1) * torch.where(broken, math.nan, 0), loss)
    return torch.where((num_positives > 0) | row_broken, loss, 0)
