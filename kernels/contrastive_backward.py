"""Backward of the contrastive family: gradients of rows, columns and own columns for any upstream gradient.

Similarities are computed again, tile by tile. A program owns a block of vectors and sums over the others, so nothing
is accumulated atomically. The same kernel serves rows (as anchors), columns (as somebody's positives and negatives, the
transposed sum) and, where the columns are the rows themselves, both at once from one product.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from .config import block_dim, rows_per_program, tile_config
from .contrastive_math import (
    DENOMINATOR,
    EMPTY,
    INVERSE_NORM,
    IS_EMPTY,
    NEGATIVES,
    POSITIVE_COUNT,
    POSITIVES,
    ROW_NEGATIVES,
    is_finite,
    load_vectors,
    log_add_exp,
    matches,
    norms,
    own_columns,
    sigmoid,
    similarities,
    store_vectors,
)
from .launch import accumulator_dtype, architecture, dot_dtypes, launch

# Rows of the coefficients [NUM_COEFFICIENTS, R]: the gradient of a positive's logit x is
# POSITIVE_WEIGHT · exp(±x - POSITIVE_SHIFT) - POSITIVE_UNIFORM, that of a negative's v is NEGATIVE_WEIGHT · exp(v - n).
POSITIVE_WEIGHT = tl.constexpr(0)
POSITIVE_SHIFT = tl.constexpr(1)
POSITIVE_UNIFORM = tl.constexpr(2)
NEGATIVE_WEIGHT = tl.constexpr(3)
NUM_COEFFICIENTS = tl.constexpr(4)

GROUP_BLOCK = 1024  # rows that a program of a group reads at a time


@triton.jit
def _coefficients(
    grad_row_loss,
    negative_offset,
    stats,
    coefficients,
    row,
    keep,
    num_rows,
    FORM: tl.constexpr,
    LOG_FLOOR: tl.constexpr,
):
    """Stores the positives' coefficients of some rows; returns what each contributes to the negatives' weight."""
    accumulator = stats.dtype.element_ty
    grad = tl.load(grad_row_loss + row, mask=keep, other=0.0).to(accumulator)
    negatives = tl.load(stats + NEGATIVES * num_rows + row, mask=keep, other=EMPTY)
    denominator = tl.load(stats + DENOMINATOR * num_rows + row, mask=keep, other=EMPTY)
    positives = tl.load(stats + POSITIVES * num_rows + row, mask=keep, other=EMPTY)
    count = tl.load(stats + POSITIVE_COUNT * num_rows + row, mask=keep, other=0.0)
    inverse = tl.load(stats + INVERSE_NORM * num_rows + row, mask=keep, other=0.0)
    live = (grad != 0.0) & ((count > 0.0) | (is_finite(inverse) == 0))

    uniform = tl.zeros(grad.shape, accumulator)
    shift = positives
    if FORM == "mean":
        shift = log_add_exp(positives, denominator)
        weight = grad
        uniform = grad / tl.maximum(count, 1.0)
        negative_weight = grad * tl.exp(denominator - shift)
    elif FORM == "sum":
        negative_weight = grad * sigmoid(denominator - positives)
        weight = -negative_weight
    else:
        negative_weight = grad * sigmoid(denominator + positives)
        weight = -negative_weight
    if LOG_FLOOR is not None:  # the floor's share of the denominator has no gradient
        offset = tl.zeros(grad.shape, accumulator)
        if negative_offset is not None:
            offset = tl.load(negative_offset + row, mask=keep, other=0.0).to(accumulator)
        negative_weight *= tl.exp(negatives + offset - denominator)
    tl.store(coefficients + POSITIVE_WEIGHT * num_rows + row, tl.where(live, weight, 0.0), mask=keep)
    tl.store(coefficients + POSITIVE_SHIFT * num_rows + row, tl.where(live, shift, 0.0), mask=keep)
    tl.store(coefficients + POSITIVE_UNIFORM * num_rows + row, tl.where(live, uniform, 0.0), mask=keep)
    return tl.where(live & ((negatives < IS_EMPTY) == 0), negative_weight, 0.0)


@triton.jit
def _row_coefficients_kernel(
    grad_row_loss,
    negative_offset,
    stats,
    coefficients,
    num_rows,
    FORM: tl.constexpr,
    LOG_FLOOR: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    keep = row < num_rows
    weight = _coefficients(grad_row_loss, negative_offset, stats, coefficients, row, keep, num_rows, FORM, LOG_FLOOR)
    tl.store(coefficients + NEGATIVE_WEIGHT * num_rows + row, weight, mask=keep)


@triton.jit
def _group_coefficients_kernel(
    grad_row_loss,
    negative_offset,
    group,
    stats,
    coefficients,
    num_rows,
    FORM: tl.constexpr,
    LOG_FLOOR: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program a group: every row of it, also one without a loss of its own, gets the sum of their weights."""
    this = tl.program_id(0)
    total = tl.zeros([BLOCK], stats.dtype.element_ty)
    for start in range(0, num_rows, BLOCK):
        row = start + tl.arange(0, BLOCK)
        member = tl.load(group + row, mask=row < num_rows, other=-1) == this
        total += _coefficients(
            grad_row_loss, negative_offset, stats, coefficients, row, member, num_rows, FORM, LOG_FLOOR
        )
    weight = tl.zeros([BLOCK], stats.dtype.element_ty) + tl.sum(total, axis=0)
    for start in range(0, num_rows, BLOCK):
        row = start + tl.arange(0, BLOCK)
        member = tl.load(group + row, mask=row < num_rows, other=-1) == this
        tl.store(coefficients + NEGATIVE_WEIGHT * num_rows + row, weight, mask=member)


@triton.jit
def _similarity_gradient(
    s,
    anchor,
    anchor_inside,
    column,
    column_inside,
    row_code,
    column_code,
    self_column,
    positive_scale,
    negative_scale,
    negative_bias,
    stats,
    coefficients,
    num_rows,
    AXIS: tl.constexpr,
    NUM_CODES: tl.constexpr,
    MATCH_IS_POSITIVE: tl.constexpr,
    SIGN: tl.constexpr,
):
    """Gradient of the loss by a tile of similarities; anchors lie along ``AXIS`` of it, columns along the other."""
    across: tl.constexpr = 1 - AXIS  # the axis that an anchor's values are broadcast over
    accumulator = s.dtype
    shift = tl.load(stats + NEGATIVES * num_rows + anchor, mask=anchor_inside, other=0.0)
    if negative_bias is not None:
        shift -= tl.load(negative_bias + anchor, mask=anchor_inside, other=0.0).to(accumulator)
    scale = tl.load(negative_scale + anchor, mask=anchor_inside, other=0.0).to(accumulator)
    weight = tl.load(coefficients + NEGATIVE_WEIGHT * num_rows + anchor, mask=anchor_inside, other=0.0)
    live = weight != 0.0
    exponent = tl.expand_dims(scale, across) * s - tl.expand_dims(shift, across)
    factor = tl.expand_dims(scale * weight, across)
    if MATCH_IS_POSITIVE:
        positive_weight = tl.load(coefficients + POSITIVE_WEIGHT * num_rows + anchor, mask=anchor_inside, other=0.0)
        live = live | (positive_weight != 0.0)
    valid = tl.expand_dims(anchor_inside & live, across) & tl.expand_dims(column_inside, AXIS)
    if self_column is not None:
        itself = tl.load(self_column + anchor, mask=anchor_inside, other=-1)
        valid = valid & (tl.expand_dims(itself, across) != tl.expand_dims(column, AXIS))
    if NUM_CODES > 0:
        code = tl.load(row_code + anchor, mask=anchor_inside, other=-2)
        match = matches(tl.expand_dims(code, across), column_code, column, column_inside, AXIS, NUM_CODES)
        if MATCH_IS_POSITIVE:
            positive = tl.load(positive_scale + anchor, mask=anchor_inside, other=0.0).to(accumulator)
            positive_shift = tl.load(coefficients + POSITIVE_SHIFT * num_rows + anchor, mask=anchor_inside, other=0.0)
            uniform = tl.load(coefficients + POSITIVE_UNIFORM * num_rows + anchor, mask=anchor_inside, other=0.0)
            positive_exponent = tl.expand_dims(SIGN * positive, across) * s - tl.expand_dims(positive_shift, across)
            exponent = tl.where(match, positive_exponent, exponent)
            factor = tl.where(match, tl.expand_dims(positive * positive_weight, across), factor)
        else:
            valid = valid & (match == 0)
    gradient = factor * tl.exp(tl.where(valid, exponent, EMPTY))
    if MATCH_IS_POSITIVE:
        gradient -= tl.where(match, tl.expand_dims(positive * uniform, across), 0.0)
    return tl.where(valid, gradient, 0.0)


@triton.jit
def _gradient_kernel(
    x_vectors,
    y_vectors,
    x_inverse_norm,
    y_inverse_norm,
    row_code,
    column_code,
    self_column,
    positive_scale,
    negative_scale,
    negative_bias,
    stats,
    coefficients,
    partial,
    num_x,
    num_y,
    num_rows,
    y_per_split,
    dim,
    x_stride,
    x_stride_dim,
    y_stride,
    y_stride_dim,
    AS_ANCHOR: tl.constexpr,
    AS_COLUMN: tl.constexpr,
    NUM_CODES: tl.constexpr,
    MATCH_IS_POSITIVE: tl.constexpr,
    SIGN: tl.constexpr,
    DOT: tl.constexpr,
    GRADIENT_DOT: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_X: tl.constexpr,
    BLOCK_Y: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Gradient of normalized vectors x, summed over the vectors y of one split: partial [splits, num_x, dim].

    AS_ANCHOR: x are rows, compared with columns y. AS_COLUMN: x are columns, compared with rows y. Both: x and y are
    the same vectors, which are rows and columns.
    """
    split = tl.program_id(1)
    x_index = tl.program_id(0) * BLOCK_X + tl.arange(0, BLOCK_X)
    x_inside = x_index < num_x
    accumulator = x_inverse_norm.dtype.element_ty
    x = None
    if BLOCK_K == BLOCK_D:
        x = load_vectors(x_vectors, x_index, x_inside, dim, x_stride, x_stride_dim, BLOCK_D)
    x_inverse = tl.load(x_inverse_norm + x_index, mask=x_inside, other=0.0)
    total = tl.zeros([BLOCK_X, BLOCK_D], accumulator)
    first = split * y_per_split
    for start in range(first, tl.minimum(first + y_per_split, num_y), BLOCK_Y):
        y_index = start + tl.arange(0, BLOCK_Y)
        y_inside = y_index < num_y
        y_inverse = tl.load(y_inverse_norm + y_index, mask=y_inside, other=0.0)
        y_finite = is_finite(y_inverse)
        y_keep = y_inside & y_finite
        y = load_vectors(y_vectors, y_index, y_keep, dim, y_stride, y_stride_dim, BLOCK_D)
        s = similarities(
            x, x_vectors, x_index, x_inside, x_inverse, x_stride, x_stride_dim,
            y, y_vectors, y_index, y_keep, y_inverse, y_stride, y_stride_dim,
            dim, DOT, PRECISION, BLOCK_K, BLOCK_D,
        )  # fmt: skip
        gradient = tl.zeros([BLOCK_X, BLOCK_Y], accumulator)
        if AS_ANCHOR:
            gradient += _similarity_gradient(
                s, x_index, x_inside, y_index, y_inside, row_code, column_code, self_column, positive_scale,
                negative_scale, negative_bias, stats, coefficients, num_rows, 0, NUM_CODES, MATCH_IS_POSITIVE, SIGN,
            )  # fmt: skip
        if AS_COLUMN:
            gradient += _similarity_gradient(
                s, y_index, y_inside, x_index, x_inside, row_code, column_code, self_column, positive_scale,
                negative_scale, negative_bias, stats, coefficients, num_rows, 1, NUM_CODES, MATCH_IS_POSITIVE, SIGN,
            )  # fmt: skip
        gradient = gradient * tl.where(y_finite, y_inverse, 0.0)[None, :]
        total = tl.dot(
            gradient.to(GRADIENT_DOT), y.to(GRADIENT_DOT), total, input_precision=PRECISION, out_dtype=accumulator
        )
    store_vectors(partial + split.to(tl.int64) * num_x * dim, x_index, x_inside, dim, dim, total, BLOCK_D)


@triton.jit
def _through_norm(gradient, unit, norm, inverse, EPS: tl.constexpr):
    """Gradient of vectors from the normalized vectors' gradient; unused vectors get 0 even if they are not finite."""
    radial = tl.where(norm > EPS, tl.sum(gradient * unit, axis=1), 0.0)
    touched = tl.max((gradient != 0.0).to(tl.int32), axis=1) == 1
    return tl.where(touched[:, None], (gradient - radial[:, None] * unit) * inverse[:, None], 0.0)


@triton.jit
def _finish_kernel(
    vectors,
    partial,
    grad_vectors,
    own,
    own_scale,
    grad_own,
    stats,
    coefficients,
    mean_scale,
    count,
    splits,
    num_own,
    dim,
    stride,
    stride_dim,
    own_stride,
    own_stride_own,
    own_stride_dim,
    SIGN: tl.constexpr,
    EPS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Sums the splits, adds the own columns, and takes the gradient through the normalization.

    ``mean_scale`` is negative_scale [R] if ``partial`` holds the forward's mean of the negatives, else None.
    """
    index = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = index < count
    accumulator = stats.dtype.element_ty
    unit = load_vectors(vectors, index, inside, dim, stride, stride_dim, BLOCK_D).to(accumulator)
    norm, inverse = norms(unit, EPS)
    unit = unit * inverse[:, None]
    gradient = tl.zeros([BLOCK_N, BLOCK_D], accumulator)
    if partial is not None:
        for split in range(splits):
            source = partial + tl.cast(split, tl.int64) * count * dim
            gradient += load_vectors(source, index, inside, dim, dim, 1, BLOCK_D)
        if mean_scale is not None:
            scale = tl.load(mean_scale + index, mask=inside, other=0.0).to(accumulator)
            row_negatives = tl.load(stats + ROW_NEGATIVES * count + index, mask=inside, other=0.0)
            negatives = tl.load(stats + NEGATIVES * count + index, mask=inside, other=0.0)
            weight = tl.load(coefficients + NEGATIVE_WEIGHT * count + index, mask=inside, other=0.0)
            weight = tl.where(weight == 0.0, 0.0, scale * weight * tl.exp(row_negatives - negatives))
            gradient = tl.where((weight == 0.0)[:, None], 0.0, weight[:, None] * gradient)
    if own is not None:
        positive_weight = tl.load(coefficients + POSITIVE_WEIGHT * count + index, mask=inside, other=0.0)
        positive_shift = tl.load(coefficients + POSITIVE_SHIFT * count + index, mask=inside, other=0.0)
        uniform = tl.load(coefficients + POSITIVE_UNIFORM * count + index, mask=inside, other=0.0)
        for m in range(num_own):
            own_unit, own_norm, own_inverse, scale, present, cosine = own_columns(
                unit,
                own,
                own_scale,
                m,
                num_own,
                index,
                inside,
                dim,
                own_stride,
                own_stride_own,
                own_stride_dim,
                EPS,
                BLOCK_D,
            )
            live = present & (positive_weight != 0.0)
            exponent = tl.where(live, SIGN * scale * cosine - positive_shift, EMPTY)
            slope = tl.where(live, scale * (positive_weight * tl.exp(exponent) - uniform), 0.0)[:, None]
            if grad_vectors is not None:
                gradient += tl.where(slope == 0.0, 0.0, slope * own_unit)
            if grad_own is not None:
                from_unit = tl.where(slope == 0.0, 0.0, slope * unit)
                own_gradient = _through_norm(from_unit, own_unit, own_norm, own_inverse, EPS)
                store_vectors(grad_own + m * dim, index, inside, dim, num_own * dim, own_gradient, BLOCK_D)
    if grad_vectors is not None:
        gradient = _through_norm(gradient, unit, norm, inverse, EPS)
        store_vectors(grad_vectors, index, inside, dim, dim, gradient, BLOCK_D)


def contrastive_backward(
    grad_row_loss: Tensor,
    stats: Tensor,
    column_inverse: Tensor,
    mean_column: Tensor,
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
    floor: float,
    eps: float,
    needs_rows: bool,
    needs_columns: bool,
    needs_own: bool,
    input_precision: str,
    arch: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of rows [R,D], columns [C,D] and own [R,M,D], each in its input's dtype, empty where not needed.

    The first four arguments are the upstream gradient [R] and the results of `contrastive_forward`; the others are its
    arguments. With ``columns=None`` the gradient of the rows includes their part as columns.
    """
    arch = architecture(rows) if arch is None else arch
    num_rows, dim = rows.shape
    dtype = accumulator_dtype(rows.dtype)
    sign = -1 if form == "prod" else 1
    has_match = column_code is not None and match == "positive"
    log_floor = math.log(floor) if floor > 0 else None
    coefficients = rows.new_empty(NUM_COEFFICIENTS.value, num_rows, dtype=dtype)
    constants = {"FORM": form, "LOG_FLOOR": log_floor, "BLOCK": GROUP_BLOCK}
    if group is None:
        launch(
            _row_coefficients_kernel,
            (triton.cdiv(num_rows, GROUP_BLOCK),),
            grad_row_loss,
            negative_offset,
            stats,
            coefficients,
            num_rows,
            **constants,
        )
    else:
        launch(
            _group_coefficients_kernel,
            (num_groups,),
            grad_row_loss,
            negative_offset,
            group,
            stats,
            coefficients,
            num_rows,
            **constants,
        )

    row_inverse = stats[INVERSE_NORM.value]
    dot, gradient_dot = dot_dtypes(rows.dtype)

    def unit_gradient(x, x_inverse, y, y_inverse, as_anchor: bool, as_column: bool) -> Tensor:
        """Gradient of the normalized x [splits,X,D]."""
        tiles = tile_config("gradient", x.shape[0], y.shape[0], dim, x.dtype, input_precision, arch)
        partial = x.new_empty(tiles.splits, x.shape[0], dim, dtype=dtype)
        launch(
            _gradient_kernel,
            (triton.cdiv(x.shape[0], tiles.block_resident), tiles.splits),
            x,
            y,
            x_inverse,
            y_inverse,
            row_code,
            column_code,
            self_column,
            positive_scale,
            negative_scale,
            negative_bias,
            stats,
            coefficients,
            partial,
            x.shape[0],
            y.shape[0],
            num_rows,
            triton.cdiv(triton.cdiv(y.shape[0], tiles.block_streamed), tiles.splits) * tiles.block_streamed,
            dim,
            *x.stride(),
            *y.stride(),
            AS_ANCHOR=as_anchor,
            AS_COLUMN=as_column,
            NUM_CODES=0 if column_code is None else column_code.shape[1],
            MATCH_IS_POSITIVE=has_match,
            SIGN=sign,
            DOT=dot,
            GRADIENT_DOT=gradient_dot,
            PRECISION=input_precision,
            BLOCK_X=tiles.block_resident,
            BLOCK_Y=tiles.block_streamed,
            BLOCK_K=tiles.block_slice,
            BLOCK_D=tiles.block_dim,
            num_warps=tiles.num_warps,
            num_stages=tiles.num_stages,
        )
        return partial

    def finish(vectors, partial, grad, own=None, grad_own=None, from_mean: bool = False) -> None:
        block = rows_per_program(dim)
        launch(
            _finish_kernel,
            (triton.cdiv(vectors.shape[0], block),),
            vectors,
            partial,
            grad,
            own,
            own_scale,
            grad_own,
            stats,
            coefficients,
            negative_scale if from_mean else None,
            vectors.shape[0],
            0 if partial is None else partial.shape[0],
            0 if own is None else own.shape[1],
            dim,
            *vectors.stride(),
            *((0, 0, 0) if own is None else own.stride()),
            SIGN=sign,
            EPS=eps,
            BLOCK_N=block,
            BLOCK_D=block_dim(dim),
        )

    grad_rows = torch.empty_like(rows, memory_format=torch.contiguous_format) if needs_rows else rows.new_empty(0)
    grad_columns = columns.new_empty(columns.shape) if needs_columns and columns is not None else rows.new_empty(0)
    grad_own = own.new_empty(own.shape) if needs_own and own is not None else rows.new_empty(0)
    if needs_rows or needs_own:
        from_mean = mean_column.shape[0] == num_rows and num_rows > 0
        if not needs_rows:
            partial = None
        elif columns is None:
            partial = unit_gradient(rows, row_inverse, rows, row_inverse, True, True)
        elif from_mean:
            partial = mean_column[None]
        else:
            partial = unit_gradient(rows, row_inverse, columns, column_inverse, True, False)
        finish(
            rows,
            partial,
            grad_rows if needs_rows else None,
            own,
            grad_own if needs_own and own is not None else None,
            from_mean=from_mean,
        )
    if needs_columns and columns is not None:
        partial = unit_gradient(columns, column_inverse, rows, row_inverse, False, True)
        finish(columns, partial, grad_columns)
    return grad_rows, grad_columns, grad_own
