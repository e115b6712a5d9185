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

from .config import block_dim, chunk_columns, chunk_config, rows_per_program, tile_config
from .contrastive_chunks import chunks_of, load_products, multiply_all
from .contrastive_math import (
    DENOMINATOR,
    EMPTY,
    INVERSE_NORM,
    IS_EMPTY,
    LENGTH,
    NEGATIVES,
    POSITIVE_COUNT,
    POSITIVES,
    ROW_NEGATIVES,
    as_operands,
    cosines,
    is_finite,
    load_operands,
    load_vectors,
    log_add_exp,
    matches,
    multiply,
    norms,
    own_columns,
    power_of_two,
    sigmoid,
    store_vectors,
)
from .launch import accumulator_dtype, architecture, launch

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
    x_vectors_scale,
    y_vectors_scale,
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
    x_part,
    y_part,
    y_per_split,
    dim,
    AS_ANCHOR: tl.constexpr,
    AS_COLUMN: tl.constexpr,
    NUM_CODES: tl.constexpr,
    MATCH_IS_POSITIVE: tl.constexpr,
    SIGN: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK_X: tl.constexpr,
    BLOCK_Y: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Gradient of normalized vectors x, summed over the vectors y of one split: partial [splits, num_x, dim].

    AS_ANCHOR: x are rows, compared with columns y. AS_COLUMN: x are columns, compared with rows y. Both: x and y are
    the same vectors, which are rows and columns. ``x_part``, ``y_part``: elements of one part of the prepared vectors.
    """
    split = tl.program_id(1)
    x_start = tl.program_id(0) * BLOCK_X
    x_index = x_start + tl.arange(0, BLOCK_X)
    x_inside = x_index < num_x
    accumulator = x_vectors_scale.dtype.element_ty
    dot = x_vectors.dtype.element_ty
    x_high = None
    x_low = None
    if BLOCK_K == BLOCK_D:
        x_high, x_low = load_operands(x_vectors, x_part, x_start, 0, PARTS, BLOCK_X, BLOCK_K, BLOCK_D)
    x_scale = tl.load(x_vectors_scale + x_index)
    total = tl.zeros([BLOCK_X, BLOCK_D], accumulator)
    # float16 has few exponents: each row of weights is divided by a power of two near the largest so far.
    largest = tl.full([BLOCK_X], 2.0**-100, accumulator)
    first = split * y_per_split
    for start in range(first, tl.minimum(first + y_per_split, num_y), BLOCK_Y):
        y_index = start + tl.arange(0, BLOCK_Y)
        y_inside = y_index < num_y
        y_scale = tl.load(y_vectors_scale + y_index)
        y_high, y_low = load_operands(y_vectors, y_part, start, 0, PARTS, BLOCK_Y, BLOCK_D, BLOCK_D)
        s = cosines(
            x_vectors, x_part, x_start, x_high, x_low, x_scale, y_vectors, y_part, start, y_high, y_low, y_scale,
            PARTS, BLOCK_X, BLOCK_Y, BLOCK_K, BLOCK_D,
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
        weight = gradient * tl.where(is_finite(y_scale), y_scale * (LENGTH / 2), 0.0)[None, :]
        if dot == tl.float16:
            larger = tl.maximum(largest, power_of_two(tl.max(tl.abs(weight), axis=1), 2.0**-100))
            total *= (largest / larger)[:, None]
            largest = larger
            weight *= (1.0 / larger * (LENGTH / 2))[:, None]
        weight_high, weight_low = as_operands(weight, dot, PARTS)
        total = multiply(weight_high, weight_low, y_high, y_low, total, PARTS)
    if dot == tl.float16:
        total *= (largest * (2 / LENGTH))[:, None]
    total *= 2 / LENGTH
    store_vectors(partial + split.to(tl.int64) * num_x * dim, x_index, x_inside, dim, dim, total, BLOCK_D)


@triton.jit
def _weights_kernel(
    products,
    x_vectors_scale,
    y_vectors_scale,
    row_code,
    column_code,
    self_column,
    positive_scale,
    negative_scale,
    negative_bias,
    stats,
    coefficients,
    weights,
    num_x,
    num_y,
    num_rows,
    first_y,
    AS_ANCHOR: tl.constexpr,
    AS_COLUMN: tl.constexpr,
    NUM_CODES: tl.constexpr,
    MATCH_IS_POSITIVE: tl.constexpr,
    SIGN: tl.constexpr,
    BLOCK_X: tl.constexpr,
    BLOCK_Y: tl.constexpr,
):
    """Weights [num_x, num_y] of the vectors y from ``first_y`` on in the gradient of x, from their products."""
    x_index = tl.program_id(0) * BLOCK_X + tl.arange(0, BLOCK_X)
    x_inside = x_index < num_x
    local = tl.program_id(1) * BLOCK_Y + tl.arange(0, BLOCK_Y)
    y_inside = local < num_y
    y_index = local + first_y
    x_scale = tl.load(x_vectors_scale + x_index, mask=x_inside, other=0.0)
    y_scale = tl.load(y_vectors_scale + y_index, mask=y_inside, other=0.0)
    s = load_products(products, x_index, x_inside, x_scale, local, y_inside, y_scale, num_y)
    gradient = tl.zeros([BLOCK_X, BLOCK_Y], x_scale.dtype)
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
    weight = gradient * tl.where(is_finite(y_scale), y_scale, 0.0)[None, :]
    place = weights + x_index.to(tl.int64)[:, None] * num_y + local[None, :]
    tl.store(place, weight.to(weights.dtype.element_ty), mask=x_inside[:, None] & y_inside[None, :])


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
    row_operands: Tensor,
    row_operand_scale: Tensor,
    column_operands: Tensor,
    column_operand_scale: Tensor,
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
    in_chunks: bool = False,
    arch: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of rows [R,D], columns [C,D] and own [R,M,D], each in its input's dtype, empty where not needed.

    The first seven arguments are the upstream gradient [R] and the results of `contrastive_forward`; the others are its
    arguments. With ``columns=None`` the gradient of the rows includes their part as columns.
    """
    arch = architecture(rows) if arch is None else arch
    num_rows, dim = rows.shape
    dtype = accumulator_dtype(rows.dtype)
    sign = -1 if form == "prod" else 1
    has_match = column_code is not None and match == "positive"
    log_floor = math.log(floor) if floor > 0 else None
    coefficients = rows.new_empty(NUM_COEFFICIENTS.value, num_rows, dtype=dtype)
    row_constants = {"FORM": form, "LOG_FLOOR": log_floor, "BLOCK": GROUP_BLOCK}
    if group is None:
        launch(
            _row_coefficients_kernel,
            (triton.cdiv(num_rows, GROUP_BLOCK),),
            grad_row_loss,
            negative_offset,
            stats,
            coefficients,
            num_rows,
            **row_constants,
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
            **row_constants,
        )

    num_columns = num_rows if columns is None else columns.shape[0]
    as_rows, as_columns = (row_operands, row_operand_scale), (column_operands, column_operand_scale)

    constants = {
        "NUM_CODES": 0 if column_code is None else column_code.shape[1],
        "MATCH_IS_POSITIVE": has_match,
        "SIGN": sign,
    }
    labels = row_code, column_code, self_column
    logits = positive_scale, negative_scale, negative_bias, stats, coefficients

    def unit_gradient(num_x: int, x, x_scale, num_y: int, y, y_scale, as_anchor: bool, as_column: bool) -> Tensor:
        """Gradient [splits,X,D] of normalized x, of which and of y come what `prepare` has made."""
        if num_x == 0 or num_y == 0:
            return stats.new_zeros(1, num_x, dim)
        if in_chunks:
            return unit_gradient_in_chunks(num_x, x, x_scale, num_y, y, y_scale, as_anchor, as_column)
        tiles = tile_config("gradient", num_x, num_y, dim, rows.dtype, input_precision, arch, has_match)
        partial = stats.new_empty(tiles.splits, num_x, dim)
        launch(
            _gradient_kernel,
            (triton.cdiv(num_x, tiles.block_resident), tiles.splits),
            x,
            y,
            x_scale,
            y_scale,
            *labels,
            *logits,
            partial,
            num_x,
            num_y,
            num_rows,
            x[0].numel(),
            y[0].numel(),
            triton.cdiv(triton.cdiv(num_y, tiles.block_streamed), tiles.splits) * tiles.block_streamed,
            dim,
            AS_ANCHOR=as_anchor,
            AS_COLUMN=as_column,
            **constants,
            PARTS=x.shape[0],
            BLOCK_X=tiles.block_resident,
            BLOCK_Y=tiles.block_streamed,
            BLOCK_K=tiles.block_slice,
            BLOCK_D=tiles.block_dim,
            num_warps=tiles.num_warps,
            num_stages=tiles.num_stages,
        )
        return partial

    def unit_gradient_in_chunks(num_x, x, x_scale, num_y, y, y_scale, as_anchor: bool, as_column: bool) -> Tensor:
        chunk = chunk_columns(num_x, num_y, arch)
        tiles = chunk_config(num_x, chunk, dim, arch)
        total = stats.new_zeros(num_x, x.shape[2])
        for first, last in chunks_of(num_y, chunk):
            seen = y[0, first:last]
            products = multiply_all(x[0, :num_x], seen.t())
            weights = x.new_empty(num_x, last - first)
            launch(
                _weights_kernel,
                (triton.cdiv(num_x, tiles.block_resident), triton.cdiv(last - first, tiles.block_streamed)),
                products,
                x_scale,
                y_scale,
                *labels,
                *logits,
                weights,
                num_x,
                last - first,
                num_rows,
                first,
                AS_ANCHOR=as_anchor,
                AS_COLUMN=as_column,
                **constants,
                BLOCK_X=tiles.block_resident,
                BLOCK_Y=tiles.block_streamed,
                num_warps=tiles.num_warps,
                num_stages=tiles.num_stages,
            )
            total += multiply_all(weights, seen)
        return total[None, :, :dim].contiguous()

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
            partial = unit_gradient(num_rows, *as_rows, num_rows, *as_rows, True, True)
        elif from_mean:
            partial = mean_column[None]
        else:
            partial = unit_gradient(num_rows, *as_rows, num_columns, *as_columns, True, False)
        finish(
            rows,
            partial,
            grad_rows if needs_rows else None,
            own,
            grad_own if needs_own and own is not None else None,
            from_mean=from_mean,
        )
    if needs_columns and columns is not None:
        partial = unit_gradient(num_columns, *as_columns, num_rows, *as_rows, False, True)
        finish(columns, partial, grad_columns)
    return grad_rows, grad_columns, grad_own
