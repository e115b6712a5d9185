"""One step of BaCon by phases: four launches, each of which reads what the one before it has found.

The step of kernels/bacon_step.py (methods.md E.2 to E.6, J.2) with its guarantees, cut so that no program walks over
all rows or classes, ranks what another one ranks, or waits for its own atomics:

1. `_rank_kernel`, a few rows a program, reads logits once and ranks them in registers. It leaves a row's classes,
   gates and inverse norm.
2. `_compare_kernel`, a tile of rows x columns a program, compares classes by number. It leaves the pairs' logits [R,R],
   EMPTY where the column is no negative of the row, and by split of the columns each row's log-sum over its negatives
   and their number. Programs of their own find the last row that names each slot, count classes and write the bank;
   they leave the unit center of each row's class and its cosine with that.
3. `_groups_kernel`, a few rows a program, sums over the rows of a row's class by comparing numbers: log-sum, slopes,
   the row's term in the loss, its weight in the gradient. Programs of their own set the centers from the sums.
4. `_gradient_kernel`, a block of rows a program: a pair's logit as (row, column) and as (column, row) is all it needs.

The result does not depend on the order of programs: what is added up by atomics is integer, the rest is reduced in the
order of rows. The centers that the loss pulls to are those of the step before: phase 2 has kept them before phase 3
sets new ones. The gradient is linear in the upstream one: the backward multiplies.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from .bacon_step_math import (
    BANK_SCALE,
    EPS_COSINE,
    EPS_LOG,
    FEATURE_LIMIT,
    can_be_written,
    read_labels,
    read_logits,
    read_slots,
    shortening,
    to_fixed_point,
)
from .config import bacon_phases_config
from .contrastive_math import (
    EMPTY,
    is_finite,
    load_vectors,
    log_add_exp,
    log_of_sum,
    matches,
    norms,
    sigmoid,
    store_vectors,
)
from .launch import TRITON_DTYPE, accumulator_dtype, architecture, dot_dtypes, launch

MAX_REGISTERS = 255  # of a thread: the grid is smaller than the card, no use in making room for more programs

# What a row leaves in rows_int [NUM_INT + splits, R]; its numbers of negatives by split follow.
GATES = tl.constexpr(0)
HAS_CENTER = tl.constexpr(1)  # whether its class has one
NUM_INT = tl.constexpr(2)
RELIABLE = tl.constexpr(1)  # bits of GATES
COUNTED = tl.constexpr(2)
INVALID = tl.constexpr(4)
WRITES = tl.constexpr(8)  # reliable and finite in the bank's dtype

# And in rows_float [NUM_FLOAT + splits, R]; its log-sums by split follow.
COSINE = tl.constexpr(0)  # with the center of its class
INVERSE = tl.constexpr(1)  # of its norm
LOSS = tl.constexpr(2)  # its term of the loss
LOG_SUM = tl.constexpr(3)  # over its negatives; in mode "authors" over those of its class
WEIGHT = tl.constexpr(4)  # derivative of the loss by LOG_SUM
PULL = tl.constexpr(5)  # and by COSINE, negative
NUM_FLOAT = tl.constexpr(6)


@triton.jit
def _rank_kernel(
    features,
    labels,
    logits,
    labeled_slots,
    unlabeled_slots,
    codes,
    rows_int,
    rows_float,
    num_rows,
    batch,
    num_labeled,
    num_slots,
    num_classes,
    dim,
    stride,
    stride_dim,
    stride_logits,
    stride_class,
    RELIABLE_FROM: tl.constexpr,
    COUNT_FROM: tl.constexpr,
    COUNT_BY_LOGIT: tl.constexpr,
    TOP_K: tl.constexpr,
    ACC: tl.constexpr,
    LOGIT: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Equal logits rank in the order of their classes, NaN first, as in torch.topk; NaN passes no gate."""
    row = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    inside = row < num_rows
    tile, is_class, k = read_logits(logits, row, inside, 0, num_classes, stride_logits, stride_class, LOGIT, BLOCK_K)
    x = load_vectors(features, row, inside, dim, stride, stride_dim, BLOCK_D).to(ACC)
    slot = read_slots(labeled_slots, unlabeled_slots, row, inside, batch, num_labeled)
    label, is_labeled, valid = read_labels(labels, row, inside, batch, num_classes)
    valid = valid & (slot >= 0) & (slot < num_slots)
    # What an invalid row ranks does not matter. That the ranking needs to know makes ptxas read all at once before it.
    tile = tl.where(valid[:, None], tile, 0.0)

    ranked = tl.where(tile == tile, tl.maximum(tile, -3.0e38), float("inf"))  # above the -inf of what is no candidate
    ranked = tl.where(is_class, ranked, float("-inf"))
    largest, code = tl.max(ranked, axis=1, return_indices=True)
    tl.store(codes + row * TOP_K, tl.where(is_labeled, label, code), mask=inside)
    for t in tl.static_range(1, TOP_K):
        ranked = tl.where(k == code[:, None], float("-inf"), ranked)
        value, code = tl.max(ranked, axis=1, return_indices=True)
        code = tl.where(value == float("-inf"), -1, code)
        tl.store(codes + row * TOP_K + t, tl.where(is_labeled, -1, code), mask=inside)

    total = tl.sum(tl.where(is_class, tl.exp(tile - largest[:, None]), 0.0), axis=1)
    probability = 1.0 / total
    if COUNT_BY_LOGIT:
        counted = tl.where(total == total, largest, float("nan")) >= COUNT_FROM
    else:
        counted = probability >= COUNT_FROM
    reliable = probability >= RELIABLE_FROM
    gates = reliable.to(tl.int32) * RELIABLE + (counted | is_labeled).to(tl.int32) * COUNTED
    gates += (reliable & can_be_written(x)).to(tl.int32) * WRITES
    tl.store(rows_int + GATES * num_rows + row, tl.where(valid, gates, INVALID), mask=inside)
    _, inverse = norms(x, EPS_COSINE)
    tl.store(rows_float + INVERSE * num_rows + row, inverse, mask=inside)


@triton.jit
def _move_bank(
    program,
    features,
    labeled_slots,
    unlabeled_slots,
    bank,
    written,
    selected_label,
    class_counts,
    class_sums,
    class_sizes,
    centers,
    has_center,
    codes,
    rows_int,
    rows_float,
    unit_centers,
    num_rows,
    batch,
    num_labeled,
    dim,
    stride,
    stride_dim,
    WITH_PSEUDO: tl.constexpr,
    TOP_K: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK_W: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_A: tl.constexpr,
):
    """Selects and writes slots. The last row that does either to a slot owns it: no other row touches its buffers.

    Also compares rows with the centers of the step before, which phase 3 will replace.
    """
    row = program * BLOCK_W + tl.arange(0, BLOCK_W)
    inside = row < num_rows
    column = tl.arange(0, BLOCK_A)
    column_inside = column < num_rows
    gates = tl.load(rows_int + GATES * num_rows + row, mask=inside, other=INVALID)
    column_gates = tl.load(rows_int + GATES * num_rows + column, mask=column_inside, other=0)
    slot = read_slots(labeled_slots, unlabeled_slots, row, inside, batch, num_labeled)
    column_slot = read_slots(labeled_slots, unlabeled_slots, column, column_inside, batch, num_labeled)
    label = tl.load(codes + row * TOP_K, mask=inside, other=-1)
    x = load_vectors(features, row, inside, dim, stride, stride_dim, BLOCK_D).to(ACC)
    inverse = tl.load(rows_float + INVERSE * num_rows + row, mask=inside, other=0.0)

    valid = inside & ((gates & INVALID) == 0)
    same = valid[:, None] & (slot[:, None] == column_slot[None, :])
    selects = same & ((column_gates & COUNTED) != 0)[None, :]
    last_selected = tl.max(tl.where(selects, column[None, :], -1), axis=1)
    if WITH_PSEUDO:  # labeled rows are selected only along with an unlabeled one
        pseudo = tl.max(tl.where(column >= batch, column_gates & COUNTED, 0), axis=0)
        last_selected = tl.where(pseudo != 0, last_selected, -1)
    writes = same & ((column_gates & WRITES) != 0)[None, :]
    last_written = tl.max(tl.where(writes, column[None, :], -1), axis=1)

    changes = valid & (tl.maximum(last_selected, last_written) == row)
    selects = changes & (last_selected >= 0)
    writes = changes & (last_written >= 0)
    known = inside & (label >= 0)
    center = load_vectors(centers, label, known, dim, dim, 1, BLOCK_D).to(ACC)
    has = tl.load(has_center + label, mask=known, other=0)
    old = tl.load(selected_label + slot, mask=changes, other=-1).to(tl.int32)
    new = tl.where(selects, tl.load(codes + last_selected * TOP_K, mask=selects, other=-1), old)
    flag = tl.load(written + slot, mask=changes, other=0)
    d = tl.arange(0, BLOCK_D)
    within = (d < dim)[None, :]
    place = bank + slot[:, None] * dim + d[None, :]
    before = tl.load(place, mask=changes[:, None] & within, other=0.0)
    incoming = load_vectors(features, last_written, writes, dim, stride, stride_dim, BLOCK_D).to(tl.float32)

    _, center_inverse = norms(center, EPS_COSINE)
    center = center * center_inverse[:, None]
    store_vectors(unit_centers, row, inside, dim, dim, center, BLOCK_D)
    tl.store(rows_float + COSINE * num_rows + row, tl.sum(x * inverse[:, None] * center, axis=1), mask=inside)
    tl.store(rows_int + HAS_CENTER * num_rows + row, (has != 0).to(tl.int32), mask=inside)

    was_written, is_first = flag != 0, flag == 0
    stays, moves = old == new, old != new
    one = tl.full([BLOCK_W], 1, tl.int64)
    tl.atomic_add(class_counts + new, one, mask=selects & moves, sem="relaxed")
    tl.atomic_add(class_counts + old, -one, mask=selects & moves & (old >= 0), sem="relaxed")
    changes = changes & (writes | moves)
    joins = changes & (writes | was_written) & (new >= 0)
    leaves = changes & was_written & moves & (old >= 0)
    incoming = tl.minimum(tl.maximum(incoming, -FEATURE_LIMIT), FEATURE_LIMIT)
    before = tl.where(was_written[:, None], before, 0.0)
    fixed_before = to_fixed_point(before)
    gained = to_fixed_point(tl.where(writes[:, None], incoming, before)) - tl.where(stays[:, None], fixed_before, 0)
    total = class_sums + new.to(tl.int64)[:, None] * dim + d[None, :]
    tl.atomic_add(total, gained, mask=joins[:, None] & within, sem="relaxed")
    total = class_sums + old.to(tl.int64)[:, None] * dim + d[None, :]
    tl.atomic_add(total, -fixed_before, mask=leaves[:, None] & within, sem="relaxed")
    tl.atomic_add(class_sizes + new, one, mask=joins & (moves | is_first), sem="relaxed")
    tl.atomic_add(class_sizes + old, -one, mask=leaves, sem="relaxed")
    tl.debug_barrier()  # a value may be held by several warps: all have read it, and the flag, before one writes
    tl.store(place, incoming, mask=writes[:, None] & within)
    tl.store(written + slot, writes, mask=writes)
    tl.store(selected_label + slot, new.to(tl.int64), mask=selects)


@triton.jit
def _compare(
    tile,
    features,
    codes,
    rows_int,
    rows_float,
    pairs,
    num_rows,
    columns_per_split,
    dim,
    stride,
    stride_dim,
    TEMPERATURE: tl.constexpr,
    TOP_K: tl.constexpr,
    ACC: tl.constexpr,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """Pairs of a block of rows with the columns of a split. Rounding x·y once beats rounding unit vectors first."""
    row = tile // SPLITS * BLOCK_R + tl.arange(0, BLOCK_R)
    split = tile % SPLITS
    inside = row < num_rows
    label = tl.load(codes + row * TOP_K, mask=inside, other=-1)
    inverse = tl.load(rows_float + INVERSE * num_rows + row, mask=inside, other=0.0)
    power = shortening(inverse, features.dtype.element_ty)  # a product of two features of 1e19 would overflow
    running_max = tl.full([BLOCK_R], EMPTY, ACC)
    running_sum = tl.zeros([BLOCK_R], ACC)
    number = tl.zeros([BLOCK_R], tl.int32)
    start = split * columns_per_split
    for first in range(start, tl.minimum(start + columns_per_split, num_rows), BLOCK_C):
        column = first + tl.arange(0, BLOCK_C)
        column_inside = column < num_rows
        column_inverse = tl.load(rows_float + INVERSE * num_rows + column, mask=column_inside, other=0.0)
        pair = inside[:, None] & column_inside[None, :]
        negative = pair & (matches(label[:, None], codes, column, column_inside, 0, TOP_K) == 0)
        product = tl.zeros([BLOCK_R, BLOCK_C], ACC)
        for d in range(0, dim, BLOCK_S):
            part = features + tl.cast(d, tl.int64) * stride_dim
            x = load_vectors(part, row, inside, dim - d, stride, stride_dim, BLOCK_S)
            y = load_vectors(part, column, column_inside, dim - d, stride, stride_dim, BLOCK_S)
            short = (x.to(ACC) * power[:, None]).to(DOT)
            product = tl.dot(short, tl.trans(y.to(DOT)), product, input_precision=PRECISION, out_dtype=ACC)
        cosine = product * column_inverse[None, :] * (inverse / power)[:, None]
        v = tl.where(negative, cosine / TEMPERATURE, EMPTY)
        tl.store(pairs + row[:, None] * num_rows + column[None, :], v, mask=pair)
        highest = tl.maximum(running_max, tl.max(v, axis=1))
        exponential = tl.where(negative, tl.exp(v - highest[:, None]), 0.0)
        running_sum = running_sum * tl.exp(running_max - highest) + tl.sum(exponential, axis=1)
        running_max = highest
        number += tl.sum(negative.to(tl.int32), axis=1)
    tl.store(rows_float + (NUM_FLOAT + split) * num_rows + row, log_of_sum(running_max, running_sum), mask=inside)
    tl.store(rows_int + (NUM_INT + split) * num_rows + row, number, mask=inside)


@triton.jit
def _compare_kernel(
    features,
    labeled_slots,
    unlabeled_slots,
    bank,
    written,
    selected_label,
    class_counts,
    class_sums,
    class_sizes,
    centers,
    has_center,
    codes,
    rows_int,
    rows_float,
    unit_centers,
    pairs,
    num_rows,
    batch,
    num_labeled,
    bank_programs,
    columns_per_split,
    dim,
    stride,
    stride_dim,
    TEMPERATURE: tl.constexpr,
    WITH_PSEUDO: tl.constexpr,
    TOP_K: tl.constexpr,
    ACC: tl.constexpr,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_W: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_A: tl.constexpr,
):
    """The bank's programs come first: they wait for memory most often."""
    program = tl.program_id(0)
    if program < bank_programs:
        _move_bank(
            program, features, labeled_slots, unlabeled_slots, bank, written, selected_label, class_counts, class_sums,
            class_sizes, centers, has_center, codes, rows_int, rows_float, unit_centers, num_rows, batch, num_labeled,
            dim, stride, stride_dim, WITH_PSEUDO, TOP_K, ACC, BLOCK_W, BLOCK_D, BLOCK_A,
        )  # fmt: skip
    else:
        _compare(
            program - bank_programs, features, codes, rows_int, rows_float, pairs, num_rows, columns_per_split, dim,
            stride, stride_dim, TEMPERATURE, TOP_K, ACC, DOT, PRECISION, SPLITS, BLOCK_R, BLOCK_C, BLOCK_S,
        )  # fmt: skip


@triton.jit
def _log_sum(rows_float, row, inside, num_rows, SPLITS: tl.constexpr):
    """Log-sum over the negatives of each row, EMPTY where it has none."""
    place = rows_float + NUM_FLOAT * num_rows + row
    peak = tl.load(place, mask=inside, other=EMPTY)
    for split in tl.static_range(1, SPLITS):
        peak = tl.maximum(peak, tl.load(place + split * num_rows, mask=inside, other=EMPTY))
    total = tl.zeros(row.shape, rows_float.dtype.element_ty)
    for split in tl.static_range(SPLITS):
        value = tl.load(place + split * num_rows, mask=inside, other=EMPTY)
        total += tl.where(value == EMPTY, 0.0, tl.exp(value - peak))
    return log_of_sum(peak, total)


@triton.jit
def _groups(
    program,
    progress,
    progress_number,
    class_counts,
    codes,
    rows_int,
    rows_float,
    reliable_share,
    num_rows,
    num_classes,
    TEMPERATURE: tl.constexpr,
    BTA: tl.constexpr,
    MIN_TEMPERATURE: tl.constexpr,
    LOG_WEIGHT: tl.constexpr,
    LOG_FLOOR: tl.constexpr,
    AUTHORS: tl.constexpr,
    TOP_K: tl.constexpr,
    ACC: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_A: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """With the positive logit x of a row and N, the negatives' logit and the floor summed, its term is softplus(N - x).

    Rows of a class share their temperature, center and negatives; in mode "authors" N too, so that a program that has
    its rows' N has that of all rows of their classes.
    """
    row = program * BLOCK_R + tl.arange(0, BLOCK_R)
    inside = row < num_rows
    column = tl.arange(0, BLOCK_A)
    column_inside = column < num_rows
    label = tl.load(codes + row * TOP_K, mask=inside, other=-1)
    gates = tl.load(rows_int + GATES * num_rows + row, mask=inside, other=0)
    has = tl.load(rows_int + HAS_CENTER * num_rows + row, mask=inside, other=0)
    cosine = tl.load(rows_float + COSINE * num_rows + row, mask=inside, other=0.0)
    negatives = tl.zeros([BLOCK_R], tl.int32)
    for split in tl.static_range(SPLITS):
        negatives += tl.load(rows_int + (NUM_INT + split) * num_rows + row, mask=inside, other=0)
    column_gates = tl.load(rows_int + GATES * num_rows + column, mask=column_inside, other=0)
    if AUTHORS:
        column_label = tl.load(codes + column * TOP_K, mask=column_inside, other=-1)
        column_cosine = tl.load(rows_float + COSINE * num_rows + column, mask=column_inside, other=0.0)
        column_n = _log_sum(rows_float, column, column_inside, num_rows, SPLITS)
    else:
        row_n = _log_sum(rows_float, row, inside, num_rows, SPLITS)
    k = tl.arange(0, BLOCK_K)
    counts = tl.load(class_counts + k, mask=k < num_classes, other=0)
    if progress is None:
        remaining = 1.0 - progress_number
    else:
        remaining = 1.0 - tl.load(progress).to(tl.float32)
    known = inside & (label >= 0)
    count = tl.load(class_counts + label, mask=known, other=0)
    tl.debug_barrier()  # ptxas moves no read past it: all are on their way before the first value is waited for

    most = tl.max(counts, axis=0)
    num_reliable = tl.sum(column_gates & RELIABLE, axis=0)
    num_invalid = tl.sum((column_gates & INVALID) // INVALID, axis=0)
    if program == 0:
        tl.store(reliable_share, num_reliable.to(tl.float32) / num_rows)
    # A label or slot out of range must not pass for a loss.
    scale = 1.0 / tl.where(num_invalid > 0, float("nan"), tl.maximum(num_reliable, 1).to(ACC))
    adjustment = BTA * (remaining * remaining)
    share_of_most = count.to(tl.float32) / tl.maximum(most, 1).to(tl.float32)
    temperature = TEMPERATURE * (1.0 - adjustment * tl.sqrt(share_of_most))
    temperature = tl.maximum(temperature, MIN_TEMPERATURE).to(ACC)

    has_terms = known & (has != 0) & (negatives > 0)
    contributes = has_terms & ((gates & RELIABLE) != 0)
    number = tl.maximum(negatives, 1).to(ACC)
    if LOG_WEIGHT is None:  # the sum over the negatives of one row: their number times the mean
        log_weight = tl.log(number)
    else:
        log_weight = tl.full([BLOCK_R], LOG_WEIGHT, ACC)
    floor = tl.full([BLOCK_R], LOG_FLOOR, ACC)
    if AUTHORS:
        same = known[:, None] & (label[:, None] == column_label[None, :])
        number *= tl.maximum(tl.sum(same.to(tl.int32), axis=1), 1).to(ACC)
        some = same & (column_n != EMPTY)[None, :]
        peak = tl.max(tl.where(some, column_n[None, :], EMPTY), axis=1)
        gap = tl.where(some, column_n[None, :] - peak[:, None], 0.0)
        n = log_of_sum(peak, tl.sum(tl.where(some, tl.exp(gap), 0.0), axis=1))
        negative = log_weight - tl.log(number) + n
        denominator = log_add_exp(negative, floor)
        anchor = same & has_terms[:, None] & ((column_gates & RELIABLE) != 0)[None, :]
        slopes = sigmoid(denominator[:, None] - column_cosine[None, :] / temperature[:, None])
        slope = tl.sum(tl.where(anchor, slopes, 0.0), axis=1)
    else:
        n = row_n
        negative = log_weight - tl.log(number) + n
        denominator = log_add_exp(negative, floor)
        slope = tl.where(contributes, sigmoid(denominator - cosine / temperature), 0.0)
    gap = denominator - cosine / temperature
    term = tl.where(contributes, log_add_exp(gap, tl.zeros([BLOCK_R], ACC)), 0.0)
    weight = tl.where(slope == 0.0, 0.0, tl.exp(negative - denominator) * slope)
    pull = tl.where(contributes, sigmoid(gap) / temperature, 0.0)
    tl.store(rows_float + LOSS * num_rows + row, term * scale, mask=inside)
    tl.store(rows_float + LOG_SUM * num_rows + row, n, mask=inside)
    tl.store(rows_float + WEIGHT * num_rows + row, weight * scale, mask=inside)
    tl.store(rows_float + PULL * num_rows + row, pull * scale, mask=inside)


@triton.jit
def _set_centers(program, class_sums, class_sizes, centers, has_center, num_classes, dim, BLOCK: tl.constexpr):
    index = program * BLOCK + tl.arange(0, BLOCK)
    keep = index < num_classes * dim
    label = index // dim
    size = tl.load(class_sizes + label, mask=keep, other=0)
    total = tl.load(class_sums + index, mask=keep, other=0)
    mean = total.to(tl.float64) / (tl.maximum(size, 1).to(tl.float64) * BANK_SCALE)
    tl.store(centers + index, tl.where(size > 0, mean, 0.0).to(tl.float32), mask=keep)
    tl.store(has_center + label, size > 0, mask=keep & (index % dim == 0))


@triton.jit
def _groups_kernel(
    progress,
    progress_number,
    class_counts,
    class_sums,
    class_sizes,
    centers,
    has_center,
    codes,
    rows_int,
    rows_float,
    reliable_share,
    num_rows,
    num_classes,
    group_programs,
    dim,
    TEMPERATURE: tl.constexpr,
    BTA: tl.constexpr,
    MIN_TEMPERATURE: tl.constexpr,
    LOG_WEIGHT: tl.constexpr,
    LOG_FLOOR: tl.constexpr,
    AUTHORS: tl.constexpr,
    TOP_K: tl.constexpr,
    ACC: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_A: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_CENTERS: tl.constexpr,
):
    program = tl.program_id(0)
    if program < group_programs:
        _groups(
            program, progress, progress_number, class_counts, codes, rows_int, rows_float, reliable_share, num_rows,
            num_classes, TEMPERATURE, BTA, MIN_TEMPERATURE, LOG_WEIGHT, LOG_FLOOR, AUTHORS, TOP_K, ACC, SPLITS,
            BLOCK_R, BLOCK_A, BLOCK_K,
        )  # fmt: skip
    else:
        _set_centers(
            program - group_programs, class_sums, class_sizes, centers, has_center, num_classes, dim, BLOCK_CENTERS
        )


@triton.jit
def _gradient(
    program,
    features,
    rows_float,
    unit_centers,
    pairs,
    gradient,
    num_rows,
    dim,
    stride,
    stride_dim,
    TEMPERATURE: tl.constexpr,
    ACC: tl.constexpr,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    row = program * BLOCK_R + tl.arange(0, BLOCK_R)
    inside = row < num_rows
    n = tl.load(rows_float + LOG_SUM * num_rows + row, mask=inside, other=0.0)
    weight = tl.load(rows_float + WEIGHT * num_rows + row, mask=inside, other=0.0)
    pull = tl.load(rows_float + PULL * num_rows + row, mask=inside, other=0.0)
    center = load_vectors(unit_centers, row, inside, dim, dim, 1, BLOCK_D)
    x = load_vectors(features, row, inside, dim, stride, stride_dim, BLOCK_D).to(ACC)

    unit_gradient = tl.zeros([BLOCK_R, BLOCK_D], ACC)
    for first in range(0, num_rows, BLOCK_C):
        column = first + tl.arange(0, BLOCK_C)
        column_inside = column < num_rows
        pair = inside[:, None] & column_inside[None, :]
        as_anchor = tl.load(pairs + row[:, None] * num_rows + column[None, :], mask=pair, other=EMPTY)
        as_column = tl.load(pairs + column[None, :] * num_rows + row[:, None], mask=pair, other=EMPTY)
        column_n = tl.load(rows_float + LOG_SUM * num_rows + column, mask=column_inside, other=0.0)
        column_weight = tl.load(rows_float + WEIGHT * num_rows + column, mask=column_inside, other=0.0)
        inverse = tl.load(rows_float + INVERSE * num_rows + column, mask=column_inside, other=0.0)
        y = load_vectors(features, column, column_inside, dim, stride, stride_dim, BLOCK_D).to(ACC)
        takes = (as_anchor != EMPTY) & (weight != 0.0)[:, None]
        w = tl.where(takes, weight[:, None] * tl.exp(tl.where(takes, as_anchor - n[:, None], 0.0)), 0.0)
        gives = (as_column != EMPTY) & (column_weight != 0.0)[None, :]
        w += tl.where(gives, column_weight[None, :] * tl.exp(tl.where(gives, as_column - column_n[None, :], 0.0)), 0.0)
        finite = is_finite(inverse)
        # The NaN of a pair is in w already. Weights times the inverse norm of huge features would be too small.
        y = tl.where(finite[:, None], y * inverse[:, None], 0.0)
        unit_gradient = tl.dot(w.to(DOT), y.to(DOT), unit_gradient, input_precision=PRECISION, out_dtype=ACC)
    unit_gradient = unit_gradient / TEMPERATURE - pull[:, None] * center
    norm, inverse = norms(x, EPS_COSINE)
    finite = is_finite(inverse)
    inverse = tl.where(finite, inverse, 0.0)  # a row of NaN without part in the loss has the gradient 0
    unit = tl.where(finite[:, None], x, 0.0) * inverse[:, None]
    along = tl.where(norm > EPS_COSINE, tl.sum(unit_gradient * unit, axis=1), 0.0)
    store_vectors(gradient, row, inside, dim, dim, (unit_gradient - along[:, None] * unit) * inverse[:, None], BLOCK_D)


@triton.jit
def _gradient_kernel(
    features,
    rows_float,
    unit_centers,
    pairs,
    loss,
    gradient,
    num_rows,
    gradient_programs,
    dim,
    stride,
    stride_dim,
    TEMPERATURE: tl.constexpr,
    ACC: tl.constexpr,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_A: tl.constexpr,
):
    """The last program sums the loss."""
    program = tl.program_id(0)
    if program < gradient_programs:
        _gradient(
            program, features, rows_float, unit_centers, pairs, gradient, num_rows, dim, stride, stride_dim,
            TEMPERATURE, ACC, DOT, PRECISION, BLOCK_R, BLOCK_C, BLOCK_D,
        )  # fmt: skip
    else:
        row = tl.arange(0, BLOCK_A)
        tl.store(loss, tl.sum(tl.load(rows_float + LOSS * num_rows + row, mask=row < num_rows, other=0.0), axis=0))


def bacon_step_by_phases(
    features: Tensor,
    labels: Tensor,
    logits: Tensor,
    labeled_slots: Tensor,
    unlabeled_slots: Tensor,
    progress: Tensor | float,
    bank: Tensor,
    written: Tensor,
    selected_label: Tensor,
    class_counts: Tensor,
    class_sums: Tensor,
    class_sizes: Tensor,
    centers: Tensor,
    has_center: Tensor,
    *,
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
    input_precision: str,
    arch: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """One step on at least one row and at most 1024: the bank's contiguous buffers are changed in place.

    Arguments and results as of `kernels.bacon_step.bacon_step`.
    """
    arch = architecture(features) if arch is None else arch
    (num_rows, dim), (num_classes, batch) = features.shape, (logits.shape[1], labels.shape[0])
    dtype = accumulator_dtype(features.dtype)
    acc = TRITON_DTYPE[dtype]
    config = bacon_phases_config(num_rows, dim, num_classes, features.dtype, input_precision, arch)
    dot, gradient_dot = dot_dtypes(features.dtype)
    labeled_slots, unlabeled_slots = labeled_slots.contiguous(), unlabeled_slots.contiguous()

    loss = features.new_empty((), dtype=dtype)
    gradient = features.new_empty(num_rows, dim, dtype=dtype)
    reliable_share = features.new_empty((), dtype=torch.float32)
    codes = features.new_empty(num_rows, top_k, dtype=torch.int32)
    rows_int = features.new_empty(NUM_INT.value + config.splits, num_rows, dtype=torch.int32)
    rows_float = features.new_empty(NUM_FLOAT.value + config.splits, num_rows, dtype=dtype)
    unit_centers = features.new_empty(num_rows, dim, dtype=dtype)
    pairs = features.new_empty(num_rows, num_rows, dtype=dtype)
    launch(
        _rank_kernel,
        (triton.cdiv(num_rows, config.rank_rows),),
        features,
        labels.contiguous(),
        logits,
        labeled_slots,
        unlabeled_slots,
        codes,
        rows_int,
        rows_float,
        num_rows,
        batch,
        num_labeled,
        bank.shape[0],
        num_classes,
        dim,
        *features.stride(),
        *logits.stride(),
        RELIABLE_FROM=reliable_threshold,
        COUNT_FROM=count_threshold,
        COUNT_BY_LOGIT=count_gate == "logit",
        TOP_K=top_k,
        ACC=acc,
        LOGIT=TRITON_DTYPE[accumulator_dtype(logits.dtype)],
        BLOCK_R=config.rank_rows,
        BLOCK_D=config.block_dim,
        BLOCK_K=config.block_classes,
        num_warps=config.rank_warps,
        maxnreg=MAX_REGISTERS,
    )
    bank_programs = triton.cdiv(num_rows, config.bank_rows)
    tiles = triton.cdiv(num_rows, config.block_columns)
    launch(
        _compare_kernel,
        (bank_programs + triton.cdiv(num_rows, config.block_rows) * config.splits,),
        features,
        labeled_slots,
        unlabeled_slots,
        bank,
        written,
        selected_label,
        class_counts,
        class_sums,
        class_sizes,
        centers,
        has_center,
        codes,
        rows_int,
        rows_float,
        unit_centers,
        pairs,
        num_rows,
        batch,
        num_labeled,
        bank_programs,
        triton.cdiv(tiles, config.splits) * config.block_columns,
        dim,
        *features.stride(),
        TEMPERATURE=temperature,
        WITH_PSEUDO=labeled_counts == "with_pseudo",
        TOP_K=top_k,
        ACC=acc,
        DOT=dot,
        PRECISION=input_precision,
        SPLITS=config.splits,
        BLOCK_R=config.block_rows,
        BLOCK_C=config.block_columns,
        BLOCK_S=config.block_slice,
        BLOCK_W=config.bank_rows,
        BLOCK_D=config.block_dim,
        BLOCK_A=config.block_all,
        num_warps=config.num_warps,
        maxnreg=MAX_REGISTERS,
    )
    group_programs = triton.cdiv(num_rows, config.group_rows)
    launch(
        _groups_kernel,
        (group_programs + triton.cdiv(num_classes * dim, config.block_centers),),
        progress if isinstance(progress, Tensor) else None,
        0.0 if isinstance(progress, Tensor) else float(progress),
        class_counts,
        class_sums,
        class_sizes,
        centers,
        has_center,
        codes,
        rows_int,
        rows_float,
        reliable_share,
        num_rows,
        num_classes,
        group_programs,
        dim,
        TEMPERATURE=temperature,
        BTA=bta,
        MIN_TEMPERATURE=min_temperature,
        LOG_WEIGHT=None if negative_weight is None else math.log(negative_weight),
        LOG_FLOOR=math.log(EPS_LOG),
        AUTHORS=neg_mode == "authors",
        TOP_K=top_k,
        ACC=acc,
        SPLITS=config.splits,
        BLOCK_R=config.group_rows,
        BLOCK_A=config.block_all,
        BLOCK_K=config.block_classes,
        BLOCK_CENTERS=config.block_centers,
        num_warps=config.num_warps,
        maxnreg=MAX_REGISTERS,
    )
    gradient_programs = triton.cdiv(num_rows, config.gradient_rows)
    launch(
        _gradient_kernel,
        (gradient_programs + 1,),
        features,
        rows_float,
        unit_centers,
        pairs,
        loss,
        gradient,
        num_rows,
        gradient_programs,
        dim,
        *features.stride(),
        TEMPERATURE=temperature,
        ACC=acc,
        DOT=gradient_dot,
        PRECISION=input_precision,
        BLOCK_R=config.gradient_rows,
        BLOCK_C=config.gradient_columns,
        BLOCK_D=config.block_dim,
        BLOCK_A=config.block_all,
        num_warps=config.num_warps,
        num_stages=3,  # with few rows all tiles are on their way at once
        maxnreg=MAX_REGISTERS,
    )
    return loss, gradient, reliable_share
