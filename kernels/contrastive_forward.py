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

from .config import TileConfig, block_dim, chunk_columns, chunk_config, operand_shape, rows_per_program, tile_config
from .contrastive_chunks import chunks_of, load_products, multiply_all
from .contrastive_math import (
    DENOMINATOR,
    EMPTY,
    INVERSE_NORM,
    IS_EMPTY,
    LENGTH,
    NEGATIVES,
    NUM_STATS,
    POSITIVE_COUNT,
    POSITIVE_MEAN,
    POSITIVES,
    ROW_NEGATIVES,
    as_operands,
    cosines,
    is_finite,
    load_operands,
    load_vectors,
    log_add_exp,
    log_of_sum,
    matches,
    multiply,
    norms,
    own_columns,
    power_of_two,
    store_vectors,
)
from .launch import accumulator_dtype, architecture, launch

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
def _prepare_kernel(
    vectors,
    operands,
    operand_scale,
    inverse_norm,
    own,
    own_scale,
    own_logit,
    count,
    padded_count,
    num_own,
    dim,
    stride,
    stride_dim,
    own_stride,
    own_stride_own,
    own_stride_dim,
    PARTS: tl.constexpr,
    EPS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Operands [PARTS,N,D] of products, padded by zeros, and their scales [N]: cosines are products times both scales.

    A vector is multiplied by a power of two, so that its norm is in (2^11, 2^12]. One that is not finite becomes zeros,
    with a scale of NaN. Of rows also the inverse norms [N] are kept, and the logits [M,N] of their own columns.
    """
    index = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = index < count
    accumulator = operand_scale.dtype.element_ty
    dot = operands.dtype.element_ty
    raw = load_vectors(vectors, index, inside, dim, stride, stride_dim, BLOCK_D).to(accumulator)
    _, inverse = norms(raw, EPS)
    finite = is_finite(inverse)
    power = power_of_two(inverse, 2.0**-1028 if accumulator == tl.float64 else 2.0**-132) * LENGTH
    tl.store(operand_scale + index, tl.where(inside, inverse / power, 0.0), mask=index < padded_count)
    high, low = as_operands(tl.where(finite[:, None], raw * power[:, None], 0.0), dot, PARTS)
    place = operands + index.to(tl.int64)[:, None] * BLOCK_D + tl.arange(0, BLOCK_D)[None, :]
    exists = (index < padded_count)[:, None]
    tl.store(place, high, mask=exists)
    if PARTS == 2:
        tl.store(place + tl.cast(padded_count, tl.int64) * BLOCK_D, low, mask=exists)
    if inverse_norm is not None:
        tl.store(inverse_norm + index, inverse, mask=inside)
    if own is not None:
        unit = raw * inverse[:, None]
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
    products,
    row_scale,
    column_scale,
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
    first_column,
    row_part,
    column_part,
    columns_per_split,
    dim,
    NUM_CODES: tl.constexpr,
    MATCH_IS_POSITIVE: tl.constexpr,
    SIGN: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Running log-sums of the positives' and negatives' logits of a block of rows, over the columns of one split.

    Products come from prepared rows and columns, or are there: ``products`` [R,C] are those of the rows with C columns
    from ``first_column`` on, which all other arguments of columns then are about. ``row_part`` and ``column_part``:
    elements of one part of the prepared vectors. SIGN is -1 in form "prod", whose positives enter as exp(-x).
    """
    split = tl.program_id(1)
    row_start = tl.program_id(0) * BLOCK_R
    row = row_start + tl.arange(0, BLOCK_R)
    row_inside = row < num_rows
    accumulator = row_scale.dtype.element_ty
    x_high = None
    x_low = None
    if products is None and BLOCK_K == BLOCK_D:
        x_high, x_low = load_operands(rows, row_part, row_start, 0, PARTS, BLOCK_R, BLOCK_K, BLOCK_D)
    x_scale = tl.load(row_scale + row)
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
        y_scale = tl.load(column_scale + column, mask=column_inside, other=0.0)
        if products is None:
            y_high = None
            y_low = None
            if BLOCK_K == BLOCK_D or partial_mean is not None:
                y_high, y_low = load_operands(columns, column_part, start, 0, PARTS, BLOCK_C, BLOCK_D, BLOCK_D)
            s = cosines(
                rows, row_part, row_start, x_high, x_low, x_scale, columns, column_part, start, y_high, y_low, y_scale,
                PARTS, BLOCK_R, BLOCK_C, BLOCK_K, BLOCK_D,
            )  # fmt: skip
        else:
            s = load_products(products, row, row_inside, x_scale, column, column_inside, y_scale, num_columns)

        is_negative = row_inside[:, None] & column_inside[None, :]
        if self_column is not None:
            is_negative = is_negative & (itself != (column + first_column)[None, :])
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
            # In [0, LENGTH]. A column that is not finite has made the row's sum NaN already.
            weight = exponential * tl.where(is_finite(y_scale), y_scale * (LENGTH * (LENGTH / 2)), 0.0)[None, :]
            weight_high, weight_low = as_operands(weight, columns.dtype.element_ty, PARTS)
            mean = multiply(weight_high, weight_low, y_high, y_low, mean * scaling[:, None], PARTS)

    out = partial + split.to(tl.int64) * NUM_PARTIAL * num_rows + row
    tl.store(out + NEGATIVE_MAX * num_rows, negative_max, mask=row_inside)
    tl.store(out + NEGATIVE_SUM * num_rows, negative_sum, mask=row_inside)
    if MATCH_IS_POSITIVE:
        tl.store(out + POSITIVE_MAX * num_rows, positive_max, mask=row_inside)
        tl.store(out + POSITIVE_SUM * num_rows, positive_sum, mask=row_inside)
        tl.store(out + POSITIVE_NUMBER * num_rows, positive_number, mask=row_inside)
        tl.store(out + POSITIVE_TOTAL * num_rows, positive_total, mask=row_inside)
    if partial_mean is not None:
        mean = mean / (tl.where(negative_sum == 0.0, 1.0, negative_sum) * (LENGTH * (LENGTH / 2)))[:, None]
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


def prepare(
    vectors: Tensor,
    eps: float,
    input_precision: str,
    inverse_norm: Tensor | None = None,
    own: Tensor | None = None,
    own_scale: Tensor | None = None,
    own_logit: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Operands of products with the vectors [N,D]: [parts, N', D'] of `operand_shape`, and their scales [N'].

    Of rows it also writes 1/max(norm, eps) to ``inverse_norm`` [N], and the logits of own [N,M,D] to own_logit [M,N].
    """
    count, dim = vectors.shape
    shape, dtype = operand_shape(count, dim, vectors.dtype, input_precision)
    operands = vectors.new_empty(shape, dtype=dtype)
    scale = vectors.new_empty(shape[1], dtype=accumulator_dtype(vectors.dtype))
    block = rows_per_program(dim)
    launch(
        _prepare_kernel,
        (triton.cdiv(shape[1], block),),
        vectors,
        operands,
        scale,
        inverse_norm,
        own,
        own_scale,
        own_logit,
        count,
        shape[1],
        0 if own is None else own.shape[1],
        dim,
        *vectors.stride(),
        *((0, 0, 0) if own is None else own.stride()),
        PARTS=shape[0],
        EPS=eps,
        BLOCK_N=block,
        BLOCK_D=shape[2],
    )
    return operands, scale


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
    in_chunks: bool = False,
    arch: int | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Arguments as in the reference, integer codes in int32, all but rows, columns and own contiguous.

    ``keep_mean``: also keep the mean of the negatives, from which the backward derives the rows' gradient without
    looking at the columns again; requires that no column is a positive of a row. ``input_precision``: of the products
    of float32 vectors, "tf32x3" (as exact as three TF32 products) or "tf32". ``in_chunks``: products by torch.mm, a
    chunk of columns at a time (contrastive_chunks.py), without ``keep_mean``.

    Returns:
        loss [R]; statistics [NUM_STATS + M, R]; prepared rows, their scales, prepared columns, theirs (`prepare`; the
        columns' are empty if they are the rows, and all four are with ``keep_mean``, as the backward needs none); and
        the mean [R,D] (empty without ``keep_mean``).
    """
    arch = architecture(rows) if arch is None else arch
    num_rows, dim = rows.shape
    dtype = accumulator_dtype(rows.dtype)
    num_own = 0 if own is None else own.shape[1]
    num_columns = num_rows if columns is None else columns.shape[0]
    has_match = column_code is not None and match == "positive"
    if in_chunks:
        chunk = chunk_columns(num_rows, num_columns, arch)
        config = chunk_config(num_rows, chunk, dim, arch)
        splits = config.splits * len(chunks_of(num_columns, chunk))
    else:
        kernel = "mean" if keep_mean else "statistics"
        chunk, config = 0, tile_config(kernel, num_rows, num_columns, dim, rows.dtype, input_precision, arch, has_match)
        splits = config.splits
    log_floor = math.log(floor) if floor > 0 else None

    row_loss = rows.new_empty(num_rows, dtype=dtype)
    stats = rows.new_empty(NUM_STATS.value + num_own, num_rows, dtype=dtype)
    partial = rows.new_empty(splits, NUM_PARTIAL.value, num_rows, dtype=dtype)
    mean_column = rows.new_empty(num_rows if keep_mean else 0, dim, dtype=dtype)
    partial_mean = None
    if keep_mean:  # the mean of a single split is the mean
        single = config.splits == 1
        partial_mean = mean_column if single else rows.new_empty(config.splits, num_rows, dim, dtype=dtype)

    precision = "ieee" if in_chunks else input_precision
    operands, scale = prepare(
        rows,
        eps,
        precision,
        inverse_norm=stats[INVERSE_NORM.value],
        own=own,
        own_scale=own_scale,
        own_logit=None if own is None else stats[NUM_STATS.value :],
    )
    nothing = operands.new_empty(0, 0, 0), scale.new_empty(0)
    of_columns = nothing if columns is None else prepare(columns, eps, precision)
    seen, seen_scale = (operands, scale) if columns is None else of_columns
    num_codes = 0 if column_code is None else column_code.shape[1]

    def statistics(tiles: TileConfig, partial: Tensor, first: int, last: int, products: Tensor | None) -> None:
        """Statistics of the columns first..last-1, from their products with the rows if these are there."""
        launch(
            _statistics_kernel,
            (triton.cdiv(num_rows, tiles.block_resident), tiles.splits),
            operands if products is None else None,
            seen if products is None else None,
            products,
            scale,
            seen_scale[first:],
            row_code,
            None if column_code is None else column_code[first:],
            self_column,
            positive_scale,
            negative_scale,
            negative_bias,
            partial,
            partial_mean,
            num_rows,
            last - first,
            first,
            operands[0].numel(),
            seen[0].numel(),
            triton.cdiv(triton.cdiv(last - first, tiles.block_streamed), tiles.splits) * tiles.block_streamed,
            dim,
            NUM_CODES=num_codes,
            MATCH_IS_POSITIVE=has_match,
            SIGN=-1 if form == "prod" else 1,
            PARTS=operands.shape[0],
            BLOCK_R=tiles.block_resident,
            BLOCK_C=tiles.block_streamed,
            BLOCK_K=tiles.block_slice,
            BLOCK_D=tiles.block_dim,
            num_warps=tiles.num_warps,
            num_stages=tiles.num_stages,
        )

    if chunk:
        for index, (first, last) in enumerate(chunks_of(num_columns, chunk)):
            products = multiply_all(operands[0, :num_rows], seen[0, first:last].t())
            statistics(config, partial[index * config.splits :], first, last, products)
    else:
        statistics(config, partial, 0, num_columns, None)
    block = rows_per_program(dim)
    launch(
        _row_loss_kernel,
        (triton.cdiv(num_rows, block),),
        partial,
        partial_mean if splits > 1 else None,
        negative_offset,
        stats,
        row_loss,
        mean_column,
        num_rows,
        splits,
        num_own,
        dim,
        MATCH_IS_POSITIVE=has_match,
        GROUPED=group is not None,
        FORM=form,
        LOG_FLOOR=log_floor,
        BLOCK_R=block,
        BLOCK_D=block_dim(dim),
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
    if keep_mean:
        return row_loss, stats, *nothing, *(value.clone() for value in nothing), mean_column
    return row_loss, stats, operands, scale, *of_columns, mean_column
