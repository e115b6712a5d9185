"""The contrastive losses beside BaCon's, as instances of the fused family: `sup_con_loss`, `info_nce`, `sscl_loss`.

No backend but the reference builds a matrix of similarities, and all are deterministic. On a GPU, products of float32
vectors are as exact as torch.set_float32_matmul_precision says: as three tf32 products by default, as one for "high".
"""

import math

import torch
from torch import Tensor

from ..reference.values import accumulator_dtype
from .backends import choose_backend
from .checks import check_choice, check_devices, check_kind, check_number, check_shape, check_values

REDUCTIONS = ("mean", "none")
SUP_CON_REDUCTIONS = ("wmean", "pml", "none")
LARGEST_LABEL = 2**31 - 1  # the kernels compare 32-bit integers


def _per_row(rows: Tensor, value: float) -> Tensor:
    """The value for each row, in the dtype of the rows' losses."""
    return torch.full((rows.shape[0],), value, dtype=accumulator_dtype(rows.dtype), device=rows.device)


def _same_dtype(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors in the widest of their dtypes: queries may be half precision beside a float32 queue."""
    dtype = tensors[0].dtype
    for tensor in tensors[1:]:
        dtype = torch.promote_types(dtype, tensor.dtype)
    return tuple(tensor.to(dtype) for tensor in tensors)


def _divide(total: Tensor, divisor: Tensor) -> Tensor:
    """total / divisor, or the total, which then is 0 or NaN, where the divisor is 0."""
    return total / torch.where(divisor == 0, 1, divisor)


def _has_duplicate(labels: Tensor) -> Tensor:
    """bool [R], whether another row has the same label; without a matrix of pairs."""
    ordered, order = labels.sort()
    equal = ordered[1:] == ordered[:-1]
    edge = equal.new_zeros(1)
    paired = torch.cat([edge, equal]) | torch.cat([equal, edge])
    return torch.empty_like(paired).scatter_(0, order, paired)


def sup_con_loss(
    features: Tensor,
    labels: Tensor,
    *,
    prototypes: Tensor | None = None,
    weights: Tensor | None = None,
    prototype_weight: float = 1.0,
    temperature: float = 0.1,
    reduction: str = "wmean",
    backend: str | None = None,
) -> Tensor:
    """Supervised contrastive loss (SupCon, NeurIPS 2020, L_out); with prototypes the loss of SSC (arXiv 2409.07292).

    Rows are the prototypes, if any, then the features. Each row is compared with all others by cosine similarity s:

        loss_r = log Σ_{j≠r} exp(s_rj / temperature) - mean over the rows j≠r of the same label of s_rj / temperature

    and 0 for a row whose label no other row has. SSC: features are the labeled rows and both strong views of the
    unlabeled ones; an unconfident sample gets a label of its own, such as K plus its index, so its other view is its
    only positive. Gradients reach features and prototypes, both as anchors and as the rows that anchors compare with.

    Args:
        features: [N,D] float, D up to 512 on a GPU. Need not be normalized. Half precision is computed in float32.
        labels: [N] int64 in 0..2^31-1; with prototypes, labels below K name the classes of the prototypes.
        prototypes: [K,D] float or None, one row a class.
        weights: [N] float, >= 0, weight of each feature's loss; None means 1. Receives no gradient.
        prototype_weight: weight of each prototype's loss.
        temperature: > 0.
        reduction: "wmean", Σ w·loss / Σ w over the rows that have a positive; "pml", as pytorch-metric-learning's
            SupConLoss for losses multiplied by w / mean(w), which averages over losses above 0; "none".
        backend: None for the best one, "reference", "cpp", "triton" or "chunks".

    Returns:
        0-d tensor, or with "none" the weighted loss of each row [K+N], prototypes first. Exactly 0 with zero gradient
        if no row has a positive or all weights are 0; for "pml" also if all labels are equal. Not finite if features or
        weights are not.

    Raises:
        TypeError, ValueError: an argument does not fit; the message names it.
        RuntimeError: the named backend is not available here.

        >>> features, labels = torch.eye(4, 8, requires_grad=True), torch.tensor([0, 0, 1, 1])
        >>> loss = sup_con_loss(features, labels)
        >>> loss.backward()
        >>> round(loss.item(), 4), features.grad.shape
        (1.0986, torch.Size([4, 8]))
    """
    check_shape("features", features, "N", "D")
    check_kind("features", features, "float")
    check_shape("labels", labels, features.shape[0])
    check_kind("labels", labels, "int64")
    check_values("labels", labels, "values in 0..2^31-1", 0, LARGEST_LABEL)
    if prototypes is not None:
        check_shape("prototypes", prototypes, "K", features.shape[1])
        check_kind("prototypes", prototypes, "float")
    if weights is not None:
        check_shape("weights", weights, features.shape[0])
        check_kind("weights", weights, "float")
    check_devices("features", features, labels=labels, prototypes=prototypes, weights=weights)
    check_number("prototype_weight", prototype_weight, low=0, low_allowed=True)
    check_number("temperature", temperature, low=0)
    check_choice("reduction", reduction, SUP_CON_REDUCTIONS)
    run = choose_backend("contrastive", backend, features)
    if prototypes is not None:
        num_classes = prototypes.shape[0]
        features = torch.cat(_same_dtype(prototypes, features))
        labels = torch.cat([torch.arange(num_classes, device=labels.device), labels])
    scale = _per_row(features, 1 / temperature)
    weight = torch.ones_like(scale)
    if weights is not None:
        weight[labels.shape[0] - weights.shape[0] :] = weights.detach()
    if prototypes is not None:
        weight[:num_classes].fill_(prototype_weight)
    row_loss = run(
        features,
        None,
        None,
        labels,
        labels[:, None],
        torch.arange(labels.shape[0], device=labels.device),
        scale,
        None,
        scale,
        None,
        None,
        None,
        0,
        form="mean",
        match="positive",
    )
    # Written so that a NaN, of which no comparison holds, stays one.
    weighted = torch.where(weight <= 0, 0, weight * row_loss)
    if reduction == "none":
        return weighted
    if reduction == "wmean":
        return _divide(weighted.sum(), torch.where(_has_duplicate(labels), weight, 0).sum())
    if labels.shape[0] == 0:
        return weighted.sum()
    mean_of_positive = _divide(weighted.sum() * labels.shape[0], weight.sum() * (~(weighted <= 0)).sum())
    return torch.where((labels.amax() == labels.amin()) & mean_of_positive.isfinite(), 0, mean_of_positive)


def info_nce(
    queries: Tensor,
    positives: Tensor,
    negatives: Tensor | None = None,
    *,
    temperature: float = 0.1,
    reduction: str = "mean",
    backend: str | None = None,
) -> Tensor:
    """InfoNCE (arXiv 1807.03748), as used with a queue in MoCo (CVPR 2020) and within the batch in SimCLR and CLIP.

        loss_r = log( 1 + Σ over the negatives j of exp((s(r, j) - s(r, positive of r)) / temperature) )

    with cosine similarities s. Memory is linear in queries plus negatives. If the negatives need no gradient, like a
    queue, the GPU code finds loss and gradient in one pass over them.

    Args:
        queries: [R,D] float, D up to 512 on a GPU. Need not be normalized. Half precision is computed in float32.
        positives: [R,D] float, the positive of each query.
        negatives: [C,D] float, the negatives of every query, a queue for instance; None: the positives of the others.
        temperature: > 0.
        reduction: "mean" or "none".
        backend: None for the best one, "reference", "cpp", "triton" or "chunks".

    Returns:
        0-d tensor, the mean over the queries (0 for none), or the loss of each [R]. All inputs receive gradients;
        detach those that need none.

    Raises:
        TypeError, ValueError: an argument does not fit; the message names it.
        RuntimeError: the named backend is not available here.

        >>> queries, queue = torch.eye(3, 8, requires_grad=True), -torch.eye(3, 8)
        >>> info_nce(queries, queries.detach(), queue).item() < 1e-3
        True
    """
    check_shape("queries", queries, "R", "D")
    check_shape("positives", positives, *queries.shape)
    if negatives is not None:
        check_shape("negatives", negatives, "C", queries.shape[1])
        check_kind("negatives", negatives, "float")
    check_kind("queries", queries, "float")
    check_kind("positives", positives, "float")
    check_devices("queries", queries, positives=positives, negatives=negatives)
    check_number("temperature", temperature, low=0)
    check_choice("reduction", reduction, REDUCTIONS)
    run = choose_backend("contrastive", backend, queries, None if negatives is None else negatives.shape[0])
    index = torch.arange(queries.shape[0], device=queries.device)
    if negatives is None:
        queries, positives = _same_dtype(queries, positives)
        columns, own, column_code = positives, None, index[:, None]
    else:
        queries, positives, columns = _same_dtype(queries, positives, negatives)
        own, column_code = positives[:, None], None
    scale = _per_row(queries, 1 / temperature)
    row_loss = run(
        queries,
        columns,
        own,
        index,
        column_code,
        None,
        scale,
        None if own is None else scale[:, None],
        scale,
        None,
        None,
        None,
        0,
        form="sum",
        match="positive",
    )
    return row_loss if reduction == "none" else row_loss.sum() / max(queries.shape[0], 1)


def sscl_loss(
    queries: Tensor,
    keys: Tensor,
    queue: Tensor,
    *,
    alpha: Tensor | None = None,
    key_mask: Tensor | None = None,
    gamma: float = 5.0,
    margin: float = -0.25,
    form: str = "prod",
    query_classes: Tensor | None = None,
    queue_classes: Tensor | None = None,
    reduction: str = "mean",
    backend: str | None = None,
) -> Tensor:
    """Contrastive loss of SsCL (arXiv 2105.07387, eq. 5) with several positives a query and a queue of negatives.

        form "prod", line 3:  log( 1 + Σ_n exp(gamma·(s_n + margin)) · Σ_p exp(-gamma·alpha_p·s_p) )
        form "sum", line 2:   log( 1 + Σ_n exp(gamma·(s_n + margin)) / Σ_p exp(gamma·alpha_p·s_p) )

    with cosine similarities s of the query to its positives p and the negatives n. "prod" pulls all positives close,
    "sum" one of them; with one positive they agree. Only the queries receive a gradient, in one pass over the queue.

    Args:
        queries: [R,D] float, D up to 512 on a GPU. Need not be normalized. Half precision is computed in float32.
        keys: [R,P,D] float, positives of each query: its own key and P-1 keys of labeled images of its class.
        queue: [C,D] float, the negatives.
        alpha: [R,P] float in 0..1, trust in each positive; with 0 its logit is 0. None means 1.
        key_mask: [R,P] bool, False for keys that do not exist, such as those of a class with too few. None: all exist.
        gamma: > 0, one over the temperature.
        margin: added to the negatives' similarities; negative relaxes.
        form: "prod" or "sum".
        query_classes, queue_classes: [R] and [C] int64 in 0..2^31-1. A queue entry of the query's class is no negative;
            -1 is nobody's class. None, as in the paper: all entries are negatives.
        reduction: "mean" or "none".
        backend: None for the best one, "reference", "cpp", "triton" or "chunks".

    Returns:
        0-d tensor, the mean over the queries (0 for none), or the loss of each [R]. 0 for a query without keys.

    Raises:
        TypeError, ValueError: an argument does not fit; the message names it.
        RuntimeError: the named backend is not available here.

        >>> queries, keys, queue = torch.eye(2, 4, requires_grad=True), torch.eye(2, 4)[:, None], -torch.eye(2, 4)
        >>> loss = sscl_loss(queries, keys, queue)
        >>> loss.backward()
        >>> loss.item() > 0
        True
    """
    check_shape("queries", queries, "R", "D")
    rows, dim = queries.shape
    check_shape("keys", keys, rows, "P", dim)
    check_shape("queue", queue, "C", dim)
    for name, tensor in (("queries", queries), ("keys", keys), ("queue", queue)):
        check_kind(name, tensor, "float")
    if alpha is not None:
        check_shape("alpha", alpha, rows, keys.shape[1])
        check_kind("alpha", alpha, "float")
    if key_mask is not None:
        check_shape("key_mask", key_mask, rows, keys.shape[1])
        check_kind("key_mask", key_mask, "bool")
    if (query_classes is None) != (queue_classes is None):
        raise ValueError("query_classes, queue_classes: expected both or neither")
    if query_classes is not None:
        check_shape("query_classes", query_classes, rows)
        check_shape("queue_classes", queue_classes, queue.shape[0])
        check_kind("query_classes", query_classes, "int64")
        check_kind("queue_classes", queue_classes, "int64")
        check_values("query_classes", query_classes, "values in 0..2^31-1", 0, LARGEST_LABEL)
        check_values("queue_classes", queue_classes, "values in -1..2^31-1", -1, LARGEST_LABEL)
    check_devices(
        "queries",
        queries,
        keys=keys,
        queue=queue,
        alpha=alpha,
        key_mask=key_mask,
        query_classes=query_classes,
        queue_classes=queue_classes,
    )
    check_number("gamma", gamma, low=0)
    check_number("margin", margin, low=-math.inf)
    check_choice("form", form, ("prod", "sum"))
    check_choice("reduction", reduction, REDUCTIONS)
    run = choose_backend("contrastive", backend, queries, queue.shape[0])
    queries, keys, queue = _same_dtype(queries, keys.detach(), queue.detach())
    scale = _per_row(queries, gamma)
    own_scale = scale[:, None].expand(rows, keys.shape[1])
    if alpha is not None:
        own_scale = own_scale * alpha.detach()
    # To the family a scale that is NaN is a key that is not there; one of a key that is there shows in the loss.
    broken = ~own_scale.isfinite() if key_mask is None else ~own_scale.isfinite() & key_mask
    if key_mask is not None:
        own_scale = own_scale.where(key_mask, math.nan)
    row_loss = run(
        queries,
        queue,
        keys,
        torch.zeros_like(scale, dtype=torch.int32) if query_classes is None else query_classes,
        None if queue_classes is None else queue_classes[:, None],
        None,
        scale,
        own_scale,
        scale,
        scale * margin,
        None,
        None,
        0,
        form=form,
        match="ignore",
    )
    if alpha is not None:
        row_loss = torch.where(broken.any(dim=1), math.nan, row_loss)
    return row_loss if reduction == "none" else row_loss.sum() / max(rows, 1)
