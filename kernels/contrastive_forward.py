"""Forward of the contrastive family: the loss of every row, and the statistics that its backward needs.

Formulas: bacon_fast/reference/contrastive.py. Similarities exist one tile at a time. A program owns a block of rows,
streams columns past it, and keeps each row's log-sums by their running maximum. If the columns need no gradient, it
also keeps the softmax-weighted mean of the negatives. The rows' gradient needs nothing else, so one pass serves forward
and backward.
"""

import math

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
    NUM_STATS,
    POSITIVE_COUNT,
    POSITIVE_MEAN,
    POSITIVES,
    ROW_NEGATIVES,
    is_finite,
    load_vectors,
    log_add_exp,
    log_of_sum,
    matches,
    norms,
    own_columns,
    similarities,
    store_vectors,
)
from .launch import accumulator_dtype, architecture, dot_dtypes, launch

# Rows of the partial statistics [splits, NUM_PARTIAL, R] of the columns of one split.
NEGATIVE_MAX = tl.constexpr(0)
NEGATIVE_SUM = tl.constexpr(1)
POSITIVE_MAX = tl.constexpr(2)
POSITIVE_SUM = tl.constexpr(3)
POSITIVE_NUMBER = tl.constexpr(4)
POSITIVE_TOTAL = tl.constexpr(5)
NUM_PARTIAL = tl.constexpr(6)

GROUP_BLOCK = 1024  # rows that a program of a group reads at a time


@triton.jit
def _inverse_norm_kernel(
    vectors,
    inverse_norm,
    own,
    own_scale,
    own_logit,
    count,
    num_own,
    dim,
    stride,
    stride_dim,
    own_stride,
    own_stride_own,
    own_stride_dim,
    EPS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Inverse norm of every vector [N] and, for rows, the logits [M,N] of their own columns."""
    index = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = index < count
    unit = load_vectors(vectors, index, inside, dim, stride, stride_dim, BLOCK_D).to(inverse_norm.dtype.element_ty)
    _, inverse = norms(unit, EPS)
    tl.store(inverse_norm + index, inverse, mask=inside)
    if own is not None:
        unit = unit * inverse[:, None]
        for m in range(num_own):
            _, _, _, scale, present, cosine = own_columns(
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
            offsets = tl.cast(m, tl.int64) * count + index
            tl.store(own_logit + offsets, tl.where(present, scale * cosine, EMPTY), mask=inside)


@triton.jit
def _statistics_kernel(
    rows,
    columns,
    row_inverse,
    column_inverse,
    row_code,
    column_code,
    self_column,
    positive_scale,
    negative_scale,
    negative_bias,
    partial,
    partial_mean,
    num_rows,
    num_columns,
    columns_per_split,
    dim,
    row_stride,
    row_stride_dim,
    column_stride,
    column_stride_dim,
    NUM_CODES: tl.constexpr,
    MATCH_IS_POSITIVE: tl.constexpr,
    SIGN: tl.constexpr,
    DOT: tl.constexpr,
    GRADIENT_DOT: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Running log-sums of the positives' and negatives' logits of a block of rows, over the columns of one split.

    SIGN is -1 in form "prod", whose positives enter as exp(-x).
    """
    split = tl.program_id(1)
    row = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    row_inside = row < num_rows
    accumulator = row_inverse.dtype.element_ty
    x = None
    if BLOCK_K == BLOCK_D:
        x = load_vectors(rows, row, row_inside, dim, row_stride, row_stride_dim, BLOCK_D)
    x_inverse = tl.load(row_inverse + row, mask=row_inside, other=0.0)
    positive = tl.load(positive_scale + row, mask=row_inside, other=0.0).to(accumulator)[:, None]
    negative = tl.load(negative_scale + row, mask=row_inside, other=0.0).to(accumulator)[:, None]
    if negative_bias is not None:
        bias = tl.load(negative_bias + row, mask=row_inside, other=0.0).to(accumulator)[:, None]
    if self_column is not None:
        itself = tl.load(self_column + row, mask=row_inside, other=-1)[:, None]
    code = tl.load(row_code + row, mask=row_inside, other=-2)[:, None]

    negative_max = tl.full([BLOCK_R], EMPTY, accumulator)
    negative_sum = tl.zeros([BLOCK_R], accumulator)
    if MATCH_IS_POSITIVE:
        positive_max = tl.full([BLOCK_R], EMPTY, accumulator)
        positive_sum = tl.zeros([BLOCK_R], accumulator)
        positive_number = tl.zeros([BLOCK_R], accumulator)
        positive_total = tl.zeros([BLOCK_R], accumulator)
    if partial_mean is not None:
        mean = tl.zeros([BLOCK_R, BLOCK_D], accumulator)

    first = split * columns_per_split
    for start in range(first, tl.minimum(first + columns_per_split, num_columns), BLOCK_C):
        column = start + tl.arange(0, BLOCK_C)
        column_inside = column < num_columns
        y_inverse = tl.load(column_inverse + column, mask=column_inside, other=0.0)
        # A column that is not finite is read as zeros; its inverse norm is NaN and makes its similarities NaN.
        y_finite = is_finite(y_inverse)
        y_keep = column_inside & y_finite
        y = None
        if BLOCK_K == BLOCK_D or partial_mean is not None:
            y = load_vectors(columns, column, y_keep, dim, column_stride, column_stride_dim, BLOCK_D)
        s = similarities(
            x, rows, row, row_inside, x_inverse, row_stride, row_stride_dim,
            y, columns, column, y_keep, y_inverse, column_stride, column_stride_dim,
            dim, DOT, PRECISION, BLOCK_K, BLOCK_D,
        )  # fmt: skip

        is_negative = row_inside[:, None] & column_inside[None, :]
        if self_column is not None:
            is_negative = is_negative & (itself != column[None, :])
        if NUM_CODES > 0:
            match = matches(code, column_code, column, column_inside, 0, NUM_CODES)
            if MATCH_IS_POSITIVE:
                is_positive = is_negative & match
            is_negative = is_negative & (match == 0)

        v = negative * s
        if negative_bias is not None:
            v = v + bias
        v = tl.where(is_negative, v, EMPTY)
        highest = tl.maximum(negative_max, tl.max(v, axis=1))
        scaling = tl.exp(negative_max - highest)
        negative_max = highest
        if MATCH_IS_POSITIVE:
            logit = tl.where(is_positive, positive * s, 0.0)
            positive_total += tl.sum(logit, axis=1)
            positive_number += tl.sum(is_positive.to(accumulator), axis=1)
            signed = tl.where(is_positive, SIGN * logit, EMPTY)
            highest = tl.maximum(positive_max, tl.max(signed, axis=1))
            positive_scaling = tl.exp(positive_max - highest)
            positive_max = highest
            # An element is positive, negative or neither: one exponential serves both sums.
            exponential = tl.exp(tl.where(is_positive, signed - positive_max[:, None], v - negative_max[:, None]))
            positive_sum = positive_sum * positive_scaling + tl.sum(tl.where(is_positive, exponential, 0.0), axis=1)
        else:
            exponential = tl.exp(v - negative_max[:, None])
        exponential = tl.where(is_negative, exponential, 0.0)
        negative_sum = negative_sum * scaling + tl.sum(exponential, axis=1)
        if partial_mean is not None:
            weight = exponential * tl.where(y_finite, y_inverse, 0.0)[None, :]
            mean = tl.dot(
                weight.to(GRADIENT_DOT),
                y.to(GRADIENT_DOT),
                mean * scaling[:, None],
                input_precision=PRECISION,
                out_dtype=accumulator,
            )

    out = partial + split.to(tl.int64) * NUM_PARTIAL * num_rows + row
    tl.store(out + NEGATIVE_MAX * num_rows, negative_max, mask=row_inside)
    tl.store(out + NEGATIVE_SUM * num_rows, negative_sum, mask=row_inside)
    if MATCH_IS_POSITIVE:
        tl.store(out + POSITIVE_MAX * num_rows, positive_max, mask=row_inside)
        tl.store(out + POSITIVE_SUM * num_rows, positive_sum, mask=row_inside)
        tl.store(out + POSITIVE_NUMBER * num_rows, positive_number, mask=row_inside)
        tl.store(out + POSITIVE_TOTAL * num_rows, positive_total, mask=row_inside)
    if partial_mean is not None:
        mean = mean / tl.where(negative_sum == 0.0, 1.0, negative_sum)[:, None]
        out = partial_mean + split.to(tl.int64) * num_rows * dim
        store_vectors(out, row, row_inside, dim, dim, mean, BLOCK_D)


@triton.jit
def _loss(negatives, positives, mean, count, inverse_norm, offset, FORM: tl.constexpr, LOG_FLOOR: tl.constexpr):
    """N and the loss of rows from their log-sums; LOG_FLOOR is None for no floor. A row that is not finite has NaN."""
    denominator = tl.where(negatives < IS_EMPTY, EMPTY, negatives + offset)
    if LOG_FLOOR is not None:
        denominator = log_add_exp(denominator, tl.full(denominator.shape, LOG_FLOOR, denominator.dtype))
    zero = tl.zeros(denominator.shape, denominator.dtype)
    if FORM == "mean":  # log(exp(p) + exp(N)) - a, exact also where N is negligible and p = a
        loss = (positives - mean) + log_add_exp(denominator - positives, zero)
    elif FORM == "sum":
        loss = log_add_exp(denominator - positives, zero)
    else:
        loss = log_add_exp(denominator + positives, zero)
    return denominator, tl.where(count > 0, loss, tl.where(is_finite(inverse_norm), 0.0, float("nan")))


@triton.jit
def _row_loss_kernel(
    partial,
    partial_mean,
    negative_offset,
    stats,
    row_loss,
    mean_column,
    num_rows,
    splits,
    num_own,
    dim,
    MATCH_IS_POSITIVE: tl.constexpr,
    GROUPED: tl.constexpr,
    FORM: tl.constexpr,
    LOG_FLOOR: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Merges the splits and the own columns of every row; the loss too, unless it needs the row's group first."""
    row = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    inside = row < num_rows
    accumulator = stats.dtype.element_ty
    negative_max = tl.full([BLOCK_R], EMPTY, accumulator)
    negative_sum = tl.zeros([BLOCK_R], accumulator)
    positive_max = tl.full([BLOCK_R], EMPTY, accumulator)
    positive_sum = tl.zeros([BLOCK_R], accumulator)
    count = tl.zeros([BLOCK_R], accumulator)
    total = tl.zeros([BLOCK_R], accumulator)
    for split in range(splits):
        source = partial + tl.cast(split, tl.int64) * NUM_PARTIAL * num_rows + row
        split_max = tl.load(source + NEGATIVE_MAX * num_rows, mask=inside, other=EMPTY)
        split_sum = tl.load(source + NEGATIVE_SUM * num_rows, mask=inside, other=0.0)
        highest = tl.maximum(negative_max, split_max)
        negative_sum = negative_sum * tl.exp(negative_max - highest) + split_sum * tl.exp(split_max - highest)
        negative_max = highest
        if MATCH_IS_POSITIVE:
            split_max = tl.load(source + POSITIVE_MAX * num_rows, mask=inside, other=EMPTY)
            split_sum = tl.load(source + POSITIVE_SUM * num_rows, mask=inside, other=0.0)
            highest = tl.maximum(positive_max, split_max)
            positive_sum = positive_sum * tl.exp(positive_max - highest) + split_sum * tl.exp(split_max - highest)
            positive_max = highest
            count += tl.load(source + POSITIVE_NUMBER * num_rows, mask=inside, other=0.0)
            total += tl.load(source + POSITIVE_TOTAL * num_rows, mask=inside, other=0.0)
    for m in range(num_own):
        logit = tl.load(stats + (NUM_STATS + tl.cast(m, tl.int64)) * num_rows + row, mask=inside, other=EMPTY)
        present = (logit < IS_EMPTY) == 0
        signed = logit
        if FORM == "prod":
            signed = tl.where(present, -logit, EMPTY)
        highest = tl.maximum(positive_max, signed)
        positive_sum = positive_sum * tl.exp(positive_max - highest)
        positive_sum += tl.where(present, tl.exp(signed - highest), 0.0)
        positive_max = highest
        count += present.to(accumulator)
        total += tl.where(present, logit, 0.0)

    negatives = log_of_sum(negative_max, negative_sum)
    positives = log_of_sum(positive_max, positive_sum)
    mean = total / tl.maximum(count, 1.0)
    tl.store(stats + ROW_NEGATIVES * num_rows + row, negatives, mask=inside)
    tl.store(stats + POSITIVES * num_rows + row, positives, mask=inside)
    tl.store(stats + POSITIVE_COUNT * num_rows + row, count, mask=inside)
    tl.store(stats + POSITIVE_MEAN * num_rows + row, mean, mask=inside)
    if not GROUPED:
        offset = tl.zeros([BLOCK_R], accumulator)
        if negative_offset is not None:
            offset = tl.load(negative_offset + row, mask=inside, other=0.0).to(accumulator)
        inverse = tl.load(stats + INVERSE_NORM * num_rows + row, mask=inside, other=0.0)
        denominator, loss = _loss(negatives, positives, mean, count, inverse, offset, FORM, LOG_FLOOR)
        tl.store(stats + NEGATIVES * num_rows + row, negatives, mask=inside)
        tl.store(stats + DENOMINATOR * num_rows + row, denominator, mask=inside)
        tl.store(row_loss + row, loss, mask=inside)
    if partial_mean is not None:
        merged = tl.zeros([BLOCK_R, BLOCK_D], accumulator)
        for split in range(splits):
            source = partial + tl.cast(split, tl.int64) * NUM_PARTIAL * num_rows + row
            split_max = tl.load(source + NEGATIVE_MAX * num_rows, mask=inside, other=EMPTY)
            split_sum = tl.load(source + NEGATIVE_SUM * num_rows, mask=inside, other=0.0)
            share = split_sum * tl.exp(split_max - negative_max) / tl.where(negative_sum == 0.0, 1.0, negative_sum)
            source = partial_mean + tl.cast(split, tl.int64) * num_rows * dim
            merged += share[:, None] * load_vectors(source, row, inside, dim, dim, 1, BLOCK_D)
        store_vectors(mean_column, row, inside, dim, dim, merged, BLOCK_D)


@triton.jit
def _group_loss_kernel(
    group,
    negative_offset,
    stats,
    row_loss,
    num_rows,
    FORM: tl.constexpr,
    LOG_FLOOR: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program a group: log-sum over the negatives of all its rows, then the loss of each of them."""
    this = tl.program_id(0)
    accumulator = stats.dtype.element_ty
    running_max = tl.full([BLOCK], EMPTY, accumulator)
    running_sum = tl.zeros([BLOCK], accumulator)
    for start in range(0, num_rows, BLOCK):
        row = start + tl.arange(0, BLOCK)
        member = tl.load(group + row, mask=row < num_rows, other=-1) == this
        value = tl.load(stats + ROW_NEGATIVES * num_rows + row, mask=member, other=EMPTY)
        highest = tl.maximum(running_max, value)
        running_sum = running_sum * tl.exp(running_max - highest)
        running_sum += tl.where(value < IS_EMPTY, 0.0, tl.exp(value - highest))
        running_max = highest
    highest = tl.max(running_max, axis=0)
    total = tl.sum(running_sum * tl.exp(running_max - highest), axis=0)
    shared = log_of_sum(highest, total)
    for start in range(0, num_rows, BLOCK):
        row = start + tl.arange(0, BLOCK)
        member = tl.load(group + row, mask=row < num_rows, other=-1) == this
        positives = tl.load(stats + POSITIVES * num_rows + row, mask=member, other=0.0)
        count = tl.load(stats + POSITIVE_COUNT * num_rows + row, mask=member, other=0.0)
        mean = tl.load(stats + POSITIVE_MEAN * num_rows + row, mask=member, other=0.0)
        negatives = tl.zeros([BLOCK], accumulator) + shared
        offset = tl.zeros([BLOCK], accumulator)
        if negative_offset is not None:
            offset = tl.load(negative_offset + row, mask=member, other=0.0).to(accumulator)
        inverse = tl.load(stats + INVERSE_NORM * num_rows + row, mask=member, other=0.0)
        denominator, loss = _loss(negatives, positives, mean, count, inverse, offset, FORM, LOG_FLOOR)
        tl.store(stats + NEGATIVES * num_rows + row, negatives, mask=member)
        tl.store(stats + DENOMINATOR * num_rows + row, denominator, mask=member)
        tl.store(row_loss + row, loss, mask=member)


def inverse_norms(
    vectors: Tensor,
    out: Tensor,
    eps: float,
    own: Tensor | None = None,
    own_scale: Tensor | None = None,
    own_logit: Tensor | None = None,
) -> None:
    """Writes 1/max(norm, eps) of vectors [N,D] to out [N], and the logits of own [N,M,D] to own_logit [M,N]."""
    count, dim = vectors.shape
    block = rows_per_program(dim)
    own_strides = (0, 0, 0) if own is None else own.stride()
    num_own = 0 if own is None else own.shape[1]
    launch(
        _inverse_norm_kernel,
        (triton.cdiv(count, block),),
        vectors,
        out,
        own,
        own_scale,
        own_logit,
        count,
        num_own,
        dim,
        *vectors.stride(),
        *own_strides,
        EPS=eps,
        BLOCK_N=block,
        BLOCK_D=block_dim(dim),
    )


def contrastive_forward(
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
    keep_mean: bool,
    input_precision: str,
    arch: int | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Arguments as in the reference, integer codes in int32, all but rows, columns and own contiguous.

    ``keep_mean``: also keep the mean of the negatives, from which the backward derives the rows' gradient without
    looking at the columns again; requires that no column is a positive of a row. ``input_precision``: of the products
    of float32 vectors, "ieee", "tf32x3" or "tf32".

    Returns:
        loss [R], statistics [NUM_STATS + M, R], inverse norms of the columns [C] (empty if they are the rows), and the
        mean [R,D] (empty without ``keep_mean``), in the accumulator's dtype.
    """
    arch = architecture(rows) if arch is None else arch
    num_rows, dim = rows.shape
    dtype = accumulator_dtype(rows.dtype)
    num_own = 0 if own is None else own.shape[1]
    num_columns = num_rows if columns is None else columns.shape[0]
    kernel = "mean" if keep_mean else "statistics"
    config = tile_config(kernel, num_rows, num_columns, dim, rows.dtype, input_precision, arch)
    has_match = column_code is not None and match == "positive"
    log_floor = math.log(floor) if floor > 0 else None

    row_loss = rows.new_empty(num_rows, dtype=dtype)
    stats = rows.new_empty(NUM_STATS.value + num_own, num_rows, dtype=dtype)
    partial = rows.new_empty(config.splits, NUM_PARTIAL.value, num_rows, dtype=dtype)
    mean_column = rows.new_empty(num_rows if keep_mean else 0, dim, dtype=dtype)
    partial_mean = None
    if keep_mean:  # the mean of a single split is the mean
        single = config.splits == 1
        partial_mean = mean_column if single else rows.new_empty(config.splits, num_rows, dim, dtype=dtype)

    own_logit = None if own is None else stats[NUM_STATS.value :]
    inverse_norms(rows, stats[INVERSE_NORM.value], eps, own=own, own_scale=own_scale, own_logit=own_logit)
    column_inverse = rows.new_empty(0 if columns is None else num_columns, dtype=dtype)
    if columns is not None:
        inverse_norms(columns, column_inverse, eps)

    seen = rows if columns is None else columns
    dot, gradient_dot = dot_dtypes(rows.dtype)
    tiles = triton.cdiv(num_columns, config.block_streamed)
    launch(
        _statistics_kernel,
        (triton.cdiv(num_rows, config.block_resident), config.splits),
        rows,
        seen,
        stats[INVERSE_NORM.value],
        stats[INVERSE_NORM.value] if columns is None else column_inverse,
        row_code,
        column_code,
        self_column,
        positive_scale,
        negative_scale,
        negative_bias,
        partial,
        partial_mean,
        num_rows,
        num_columns,
        triton.cdiv(tiles, config.splits) * config.block_streamed,
        dim,
        *rows.stride(),
        *seen.stride(),
        NUM_CODES=0 if column_code is None else column_code.shape[1],
        MATCH_IS_POSITIVE=has_match,
        SIGN=-1 if form == "prod" else 1,
        DOT=dot,
        GRADIENT_DOT=gradient_dot,
        PRECISION=input_precision,
        BLOCK_R=config.block_resident,
        BLOCK_C=config.block_streamed,
        BLOCK_K=config.block_slice,
        BLOCK_D=config.block_dim,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
    block = rows_per_program(dim)
    launch(
        _row_loss_kernel,
        (triton.cdiv(num_rows, block),),
        partial,
        partial_mean if config.splits > 1 else None,
        negative_offset,
        stats,
        row_loss,
        mean_column,
        num_rows,
        config.splits,
        num_own,
        dim,
        MATCH_IS_POSITIVE=has_match,
        GROUPED=group is not None,
        FORM=form,
        LOG_FLOOR=log_floor,
        BLOCK_R=block,
        BLOCK_D=config.block_dim,
    )
    if group is not None:
        launch(
            _group_loss_kernel,
            (num_groups,),
            group,
            negative_offset,
            stats,
            row_loss,
            num_rows,
            FORM=form,
            LOG_FLOOR=log_floor,
            BLOCK=GROUP_BLOCK,
        )
    return row_loss, stats, column_inverse, mean_column
