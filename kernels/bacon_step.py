"""One step of BaCon for a training batch in two launches: selection, loss with gradient, memory bank, centers.

Formulas: reference/bacon_loss.py and memory_bank.py (methods.md E.2 to E.6, J.2). A launch has no barrier across its
programs, so the step is cut where every row has to know something about every other one:

1. `_compare_kernel` changes no state. It ranks the logits, compares rows with columns, and leaves what each row has
   found: classes, gates, cosine with its center, log-sum over its negatives, and the last row that names its slot.
2. `_update_kernel` adds that up by class. Every program does so for itself, in tables of its own: R rows are few. Then
   it treats its own rows: gradient as anchor and as column, and the slots whose changes they own. The program that
   finishes last sets the centers.

The result does not depend on the order of programs: a slot has one owner, and what is added up by atomics is integer,
the sums of exponentials on a fixed-point grid. The gradient is linear in the upstream one: the backward multiplies.

Why Triton and not CUDA C++: the same source runs in Triton's interpreter, so that every line is tested without a GPU,
in float64 too (equal to the reference to 1e-12); it shares its tiles with the contrastive family, in float32, bfloat16
and float16; and it needs no nvcc where it is installed. `kernels.aot` compiles it for sm_80, 90, 100 and 120 without a
spilled register, in at most 17 KiB of shared memory. Two launches are what C++ without a cooperative grid needs too.
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
    similarities,
    to_fixed_point,
)
from .config import bacon_step_config
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

# What a row leaves in rows_int [NUM_INT + 2 · splits, R]; its last rows by split follow.
GATES = tl.constexpr(0)
OLD_LABEL = tl.constexpr(1)
NUM_INT = tl.constexpr(2)
RELIABLE = tl.constexpr(1)  # bits of GATES
COUNTED = tl.constexpr(2)
INVALID = tl.constexpr(4)

# Tables [NUM_TABLES, K] of int64, one set a program.
CODED = tl.constexpr(0)  # rows that may be of the class
MEMBERS = tl.constexpr(1)  # rows of the class
GAINED = tl.constexpr(2)  # slots that the class gains by this step's selection
PEAK = tl.constexpr(3)  # integer not below the log-sum of any member
EXP_SUM = tl.constexpr(4)  # of exp(log-sum - PEAK), fixed point
SLOPE_SUM = tl.constexpr(5)  # of the loss's slopes by the negatives' log-sum, fixed point
NUM_TABLES = tl.constexpr(6)
NO_PEAK = tl.constexpr(-(2**40))
NAN_PEAK = tl.constexpr(2**40)
SHARE_SCALE = tl.constexpr(2.0**52)  # of numbers in 0..1, of which 1024 rows' fit into 63 bits


@triton.jit
def _next_class(
    value, code, logits, row, inside, num_classes, stride, stride_class, LOGIT: tl.constexpr, BLOCK_K: tl.constexpr
):
    """Logit and class that follow (value, code) in each row's ranking: by logit, equal ones in the order of classes.

    NaN ranks first, as in torch.topk. Reading the logits once a rank keeps a thousand classes out of the registers.
    """
    best = tl.full(row.shape, float("-inf"), LOGIT)
    best_code = tl.full(row.shape, -1, tl.int32)
    for first in range(0, num_classes, BLOCK_K):
        tile, is_class, k = read_logits(logits, row, inside, first, num_classes, stride, stride_class, LOGIT, BLOCK_K)
        tile = tl.where(tile == tile, tl.maximum(tile, -3.0e38), float("inf"))  # above the -inf of what is no candidate
        follows = (tile < value[:, None]) | ((tile == value[:, None]) & (k > code[:, None]))
        tile = tl.where(is_class & follows, tile, float("-inf"))
        largest = tl.max(tile, axis=1)
        better = largest > best
        best_code = tl.where(better, first + tl.argmax(tile, axis=1), best_code)
        best = tl.where(better, largest, best)
    return best, best_code


@triton.jit
def _gates(
    largest,
    logits,
    row,
    inside,
    batch,
    num_classes,
    stride,
    stride_class,
    RELIABLE_FROM: tl.constexpr,
    COUNT_FROM: tl.constexpr,
    COUNT_BY_LOGIT: tl.constexpr,
    LOGIT: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Whether rows are reliable and counted, from their largest logits. Labeled rows count; NaN passes no gate."""
    total = tl.zeros(row.shape, LOGIT)
    for first in range(0, num_classes, BLOCK_K):
        tile, is_class, _ = read_logits(logits, row, inside, first, num_classes, stride, stride_class, LOGIT, BLOCK_K)
        total += tl.sum(tl.where(is_class, tl.exp(tile - largest[:, None]), 0.0), axis=1)
    probability = 1.0 / total
    if COUNT_BY_LOGIT:
        counted = tl.where(total == total, largest, float("nan")) >= COUNT_FROM
    else:
        counted = probability >= COUNT_FROM
    return inside & (probability >= RELIABLE_FROM), inside & (counted | (row < batch))


@triton.jit
def _compare_kernel(
    features,
    labels,
    logits,
    labeled_slots,
    unlabeled_slots,
    selected_label,
    class_counts,
    centers,
    codes,
    rows_int,
    rows_float,
    tables,
    ticket,
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
    columns_per_split,
    TEMPERATURE: tl.constexpr,
    RELIABLE_FROM: tl.constexpr,
    COUNT_FROM: tl.constexpr,
    COUNT_BY_LOGIT: tl.constexpr,
    TOP_K: tl.constexpr,
    ACC: tl.constexpr,
    LOGIT: tl.constexpr,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Program (i, s) compares the i-th block of rows with the columns of split s."""
    row = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    split, splits = tl.program_id(1), tl.num_programs(1)
    inside = row < num_rows
    x = load_vectors(features, row, inside, dim, stride, stride_dim, BLOCK_D).to(ACC)
    _, x_inverse = norms(x, EPS_COSINE)
    slot = read_slots(labeled_slots, unlabeled_slots, row, inside, batch, num_labeled)
    label, is_labeled, valid = read_labels(labels, row, inside, batch, num_classes)
    highest_logit = tl.full([BLOCK_R], float("inf"), LOGIT)
    before_first = tl.full([BLOCK_R], -1, tl.int32)
    largest, best = _next_class(
        highest_logit, before_first, logits, row, inside, num_classes, stride_logits, stride_class, LOGIT, BLOCK_K
    )
    own_class = tl.where(is_labeled, label, best)

    if split == 0:
        tl.store(codes + row * TOP_K, own_class, mask=inside)
        value = largest
        code = best
        for t in tl.static_range(1, TOP_K):
            value, code = _next_class(
                value, code, logits, row, inside, num_classes, stride_logits, stride_class, LOGIT, BLOCK_K
            )
            tl.store(codes + row * TOP_K + t, tl.where(is_labeled, -1, code), mask=inside)
        reliable, counted = _gates(
            largest, logits, row, inside, batch, num_classes, stride_logits, stride_class,
            RELIABLE_FROM, COUNT_FROM, COUNT_BY_LOGIT, LOGIT, BLOCK_K,
        )  # fmt: skip
        valid = valid & (slot >= 0) & (slot < num_slots)
        gates = reliable.to(tl.int32) * RELIABLE + counted.to(tl.int32) * COUNTED
        gates = tl.where(valid, gates, INVALID)
        tl.store(rows_int + GATES * num_rows + row, gates, mask=inside)
        old = tl.load(selected_label + slot, mask=inside & valid, other=-1)
        tl.store(rows_int + OLD_LABEL * num_rows + row, old.to(tl.int32), mask=inside)
        keep = inside & (own_class >= 0)
        center = load_vectors(centers, own_class, keep, dim, dim, 1, BLOCK_D).to(ACC)
        _, inverse = norms(center, EPS_COSINE)
        cosine = tl.sum((x * x_inverse[:, None]) * (center * inverse[:, None]), axis=1)
        tl.store(rows_float + row, cosine, mask=inside)
        if tl.program_id(0) == 0:  # the counts before this step, out of reach of its second launch
            for start in range(0, num_classes, BLOCK_K):
                k = start + tl.arange(0, BLOCK_K)
                tl.store(tables + k, tl.load(class_counts + k, mask=k < num_classes, other=0), mask=k < num_classes)
            tl.store(ticket, 0)

    running_max = tl.full([BLOCK_R], EMPTY, ACC)
    running_sum = tl.zeros([BLOCK_R], ACC)
    last_selected = tl.full([BLOCK_R], -1, tl.int32)
    last_written = tl.full([BLOCK_R], -1, tl.int32)
    start = split * columns_per_split
    for first in range(start, tl.minimum(start + columns_per_split, num_rows), BLOCK_C):
        column = first + tl.arange(0, BLOCK_C)
        column_inside = column < num_rows
        y = load_vectors(features, column, column_inside, dim, stride, stride_dim, BLOCK_D).to(ACC)
        _, y_inverse = norms(y, EPS_COSINE)
        s = similarities(
            x, features, row, inside, x_inverse, stride, stride_dim,
            y, features, column, column_inside, y_inverse, stride, stride_dim,
            dim, DOT, PRECISION, BLOCK_S, BLOCK_D,
        )  # fmt: skip
        label, is_labeled, valid = read_labels(labels, column, column_inside, batch, num_classes)
        negative = inside[:, None] & column_inside[None, :]
        value = tl.full([BLOCK_C], float("inf"), LOGIT)
        code = tl.full([BLOCK_C], -1, tl.int32)
        for t in tl.static_range(TOP_K):
            value, code = _next_class(
                value, code, logits, column, column_inside, num_classes, stride_logits, stride_class, LOGIT, BLOCK_K
            )
            if t == 0:
                reliable, counted = _gates(
                    value, logits, column, column_inside, batch, num_classes, stride_logits, stride_class,
                    RELIABLE_FROM, COUNT_FROM, COUNT_BY_LOGIT, LOGIT, BLOCK_K,
                )  # fmt: skip
                candidate = tl.where(is_labeled, label, code)
            else:
                candidate = tl.where(is_labeled, -1, code)
            negative = negative & (own_class[:, None] != candidate[None, :])
        v = tl.where(negative, s / TEMPERATURE, EMPTY)
        highest = tl.maximum(running_max, tl.max(v, axis=1))
        exponential = tl.where(negative, tl.exp(v - highest[:, None]), 0.0)
        running_sum = running_sum * tl.exp(running_max - highest) + tl.sum(exponential, axis=1)
        running_max = highest

        other_slot = read_slots(labeled_slots, unlabeled_slots, column, column_inside, batch, num_labeled)
        same = (slot[:, None] == other_slot[None, :]) & valid[None, :]
        selects = same & counted[None, :]
        last_selected = tl.maximum(last_selected, tl.max(tl.where(selects, column[None, :], -1), axis=1))
        writes = same & (reliable & can_be_written(y))[None, :]
        last_written = tl.maximum(last_written, tl.max(tl.where(writes, column[None, :], -1), axis=1))
    tl.store(rows_float + (1 + split) * num_rows + row, log_of_sum(running_max, running_sum), mask=inside)
    tl.store(rows_int + (NUM_INT + split) * num_rows + row, last_selected, mask=inside)
    tl.store(rows_int + (NUM_INT + splits + split) * num_rows + row, last_written, mask=inside)


@triton.jit
def _last_row(rows_int, row, inside, num_rows, splits, first):
    """The last row of the batch that selects, or writes, the slot of each row; -1 for none."""
    last = tl.full(row.shape, -1, tl.int32)
    for split in range(splits):
        last = tl.maximum(last, tl.load(rows_int + (first + split) * num_rows + row, mask=inside, other=-1))
    return last


@triton.jit
def _log_sum(rows_float, row, inside, num_rows, splits):
    """Log-sum over the negatives of each row, EMPTY where it has none."""
    peak = tl.full(row.shape, EMPTY, rows_float.dtype.element_ty)
    total = tl.zeros(row.shape, rows_float.dtype.element_ty)
    for split in range(splits):
        value = tl.load(rows_float + (1 + split) * num_rows + row, mask=inside, other=EMPTY)
        highest = tl.maximum(peak, value)
        total = total * tl.exp(peak - highest) + tl.where(value == EMPTY, 0.0, tl.exp(value - highest))
        peak = highest
    return log_of_sum(peak, total)


@triton.jit
def _entry(own, TABLE: tl.constexpr, label, mask, num_classes):
    """Entries of a table that atomics of this program filled before its last barrier."""
    return tl.load(own + TABLE * num_classes + label, mask=mask, other=0, cache_modifier=".cg")


@triton.jit
def _anchors(
    row,
    inside,
    codes,
    rows_int,
    rows_float,
    tables,
    own,
    has_center,
    adjustment,
    most,
    num_rows,
    num_classes,
    splits,
    TEMPERATURE: tl.constexpr,
    MIN_TEMPERATURE: tl.constexpr,
    LOG_WEIGHT: tl.constexpr,
    LOG_FLOOR: tl.constexpr,
    AUTHORS: tl.constexpr,
    TOP_K: tl.constexpr,
):
    """What rows are as anchors: class, whether they have a term, their negatives' log-sum n, the term's two sides.

    Returns (label, contributes, n, x, G, N, temperature) with the positive logit x, the negatives' logit G, and N its
    sum with the floor: the term is log(1 + exp(N - x)). In mode "authors" n and G are the class's.
    """
    accumulator: tl.constexpr = rows_float.dtype.element_ty
    label = tl.load(codes + row * TOP_K, mask=inside, other=-1)
    known = inside & (label >= 0)
    gates = tl.load(rows_int + GATES * num_rows + row, mask=inside, other=0)
    negatives = num_rows - _entry(own, CODED, label, known, num_classes)
    has = tl.load(has_center + label, mask=known, other=0) != 0
    contributes = known & has & (negatives > 0) & ((gates & RELIABLE) != 0)

    count = tl.load(tables + label, mask=known, other=0) + _entry(own, GAINED, label, known, num_classes)
    temperature = TEMPERATURE * (1.0 - adjustment * tl.sqrt(count.to(tl.float32) / most))
    temperature = tl.maximum(temperature, MIN_TEMPERATURE).to(accumulator)
    x = tl.load(rows_float + row, mask=inside, other=0.0) / temperature

    number = tl.maximum(negatives, 1).to(accumulator)
    if AUTHORS:
        peak = _entry(own, PEAK, label, known, num_classes)
        total = _entry(own, EXP_SUM, label, known, num_classes).to(accumulator) / SHARE_SCALE
        n = log_of_sum(peak.to(accumulator), total)
        n = tl.where(peak == NAN_PEAK, float("nan"), n)
        number = number * tl.maximum(_entry(own, MEMBERS, label, known, num_classes), 1).to(accumulator)
    else:
        n = _log_sum(rows_float, row, inside, num_rows, splits)
    if LOG_WEIGHT is None:  # the sum over the negatives of one row: their number times the mean
        negative = tl.log(tl.maximum(negatives, 1).to(accumulator)) - tl.log(number) + n
    else:
        negative = LOG_WEIGHT - tl.log(number) + n
    floor = tl.full(row.shape, LOG_FLOOR, accumulator)
    return label, contributes, n, x, negative, log_add_exp(negative, floor), temperature


@triton.jit
def _weights(shares, row, inside, label, own, scale, num_classes, AUTHORS: tl.constexpr):
    """Weight of a row's negatives in the gradient: the derivative of the loss by n, with the group's in "authors"."""
    weight = tl.load(shares + row, mask=inside, other=0.0) * scale
    if AUTHORS:
        slope = _entry(own, SLOPE_SUM, label, label >= 0, num_classes)
        weight = tl.where(slope == 0, 0.0, weight * (slope.to(weight.dtype) / SHARE_SCALE))
    return weight


@triton.jit
def _update_bank(
    features,
    bank,
    written,
    selected_label,
    class_sums,
    class_sizes,
    codes,
    rows_int,
    row,
    inside,
    slot,
    last_selected,
    last_written,
    num_rows,
    num_classes,
    dim,
    stride,
    stride_dim,
    TOP_K: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """Selects and writes slots. The last row that does either to a slot owns it: no other row touches its buffers."""
    changes = inside & (tl.maximum(last_selected, last_written) == row)
    selects = changes & (last_selected >= 0)
    writes = changes & (last_written >= 0)
    old = tl.load(rows_int + OLD_LABEL * num_rows + row, mask=changes, other=-1)
    new = tl.where(selects, tl.load(codes + last_selected * TOP_K, mask=selects, other=-1), old)
    flag = tl.load(written + slot, mask=changes, other=0)
    was_written, is_first = flag != 0, flag == 0
    stays, moves = old == new, old != new
    changes = changes & (writes | moves)
    joins = changes & (writes | was_written) & (new >= 0)
    leaves = changes & was_written & moves & (old >= 0)
    for first in range(0, dim, BLOCK_S):
        d = first + tl.arange(0, BLOCK_S)
        within = (d < dim)[None, :]
        place = bank + slot[:, None] * dim + d[None, :]
        before = tl.load(place, mask=(changes & was_written)[:, None] & within, other=0.0)
        source = features + last_written.to(tl.int64)[:, None] * stride + d.to(tl.int64)[None, :] * stride_dim
        incoming = tl.load(source, mask=writes[:, None] & within, other=0.0).to(tl.float32)
        incoming = tl.minimum(tl.maximum(incoming, -FEATURE_LIMIT), FEATURE_LIMIT)
        after = tl.where(writes[:, None], incoming, before)
        fixed_before = to_fixed_point(before)
        gained = to_fixed_point(after) - tl.where(stays[:, None], fixed_before, 0)
        total = class_sums + new.to(tl.int64)[:, None] * dim + d[None, :]
        tl.atomic_add(total, gained, mask=joins[:, None] & within, sem="relaxed")
        total = class_sums + old.to(tl.int64)[:, None] * dim + d[None, :]
        tl.atomic_add(total, -fixed_before, mask=leaves[:, None] & within, sem="relaxed")
        tl.debug_barrier()  # a value may be held by several warps: all have read it, and the flag, before one writes
        tl.store(place, incoming, mask=writes[:, None] & within)
    one = tl.full(row.shape, 1, tl.int64)
    tl.atomic_add(class_sizes + new, one, mask=joins & (moves | is_first), sem="relaxed")
    tl.atomic_add(class_sizes + old, -one, mask=leaves, sem="relaxed")
    tl.store(written + slot, writes, mask=writes)
    tl.store(selected_label + slot, new.to(tl.int64), mask=selects)


@triton.jit
def _set_centers(class_sums, class_sizes, centers, has_center, num_classes, dim, BLOCK: tl.constexpr):
    for first in range(0, num_classes * dim, BLOCK):
        index = first + tl.arange(0, BLOCK)
        keep = index < num_classes * dim
        label = index // dim
        size = tl.load(class_sizes + label, mask=keep, other=0, cache_modifier=".cg")
        total = tl.load(class_sums + index, mask=keep, other=0, cache_modifier=".cg")
        mean = total.to(tl.float64) / (tl.maximum(size, 1).to(tl.float64) * BANK_SCALE)
        tl.store(centers + index, tl.where(size > 0, mean, 0.0).to(tl.float32), mask=keep)
        tl.store(has_center + label, size > 0, mask=keep & (index % dim == 0))


@triton.jit
def _update_kernel(
    features,
    labeled_slots,
    unlabeled_slots,
    progress,
    progress_number,
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
    tables,
    ticket,
    loss,
    reliable_share,
    gradient,
    num_rows,
    batch,
    num_labeled,
    num_classes,
    splits,
    dim,
    stride,
    stride_dim,
    TEMPERATURE: tl.constexpr,
    BTA: tl.constexpr,
    MIN_TEMPERATURE: tl.constexpr,
    LOG_WEIGHT: tl.constexpr,
    LOG_FLOOR: tl.constexpr,
    AUTHORS: tl.constexpr,
    WITH_PSEUDO: tl.constexpr,
    TOP_K: tl.constexpr,
    ACC: tl.constexpr,
    DOT: tl.constexpr,
    GRADIENT_DOT: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_A: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    program = tl.program_id(0)
    own = tables + (1 + program.to(tl.int64) * NUM_TABLES) * num_classes  # after the counts before this step
    log_sums = rows_float + (1 + splits + 2 * program.to(tl.int64)) * num_rows
    shares = log_sums + num_rows
    for first in range(0, num_classes, BLOCK_A):
        k = first + tl.arange(0, BLOCK_A)
        for table in tl.static_range(NUM_TABLES):
            empty = tl.full([BLOCK_A], NO_PEAK if table == PEAK else 0, tl.int64)
            tl.store(own + table * num_classes + k, empty, mask=k < num_classes)
    any_counted = 1
    if WITH_PSEUDO:  # labeled rows are selected only along with an unlabeled one
        any_counted = 0
        for first in range(0, num_rows, BLOCK_A):
            row = first + tl.arange(0, BLOCK_A)
            pseudo = (row >= batch) & (row < num_rows)
            gates = tl.load(rows_int + GATES * num_rows + row, mask=pseudo, other=0)
            any_counted = tl.maximum(any_counted, tl.max((gates & COUNTED), axis=0))
    tl.debug_barrier()

    # Tables of the rows by class. Only this program's threads see them, so their atomics need no wider order.
    num_reliable = 0
    num_invalid = 0
    for first in range(0, num_rows, BLOCK_A):
        row = first + tl.arange(0, BLOCK_A)
        inside = row < num_rows
        gates = tl.load(rows_int + GATES * num_rows + row, mask=inside, other=0)
        num_reliable += tl.sum((gates & RELIABLE) // RELIABLE, axis=0)
        num_invalid += tl.sum((gates & INVALID) // INVALID, axis=0)
        one = tl.full([BLOCK_A], 1, tl.int64)
        for t in tl.static_range(TOP_K):
            code = tl.load(codes + row * TOP_K + t, mask=inside, other=-1)
            tl.atomic_add(own + CODED * num_classes + code, one, mask=code >= 0, sem="relaxed", scope="cta")
        label = tl.load(codes + row * TOP_K, mask=inside, other=-1)
        old = tl.load(rows_int + OLD_LABEL * num_rows + row, mask=inside, other=-1)
        selected = _last_row(rows_int, row, inside, num_rows, splits, NUM_INT) == row
        moves = inside & selected & (any_counted != 0) & (old != label) & ((gates & INVALID) == 0)
        tl.atomic_add(own + GAINED * num_classes + label, one, mask=moves, sem="relaxed", scope="cta")
        tl.atomic_add(own + GAINED * num_classes + old, -one, mask=moves & (old >= 0), sem="relaxed", scope="cta")
        if AUTHORS:
            member = inside & (label >= 0)
            tl.atomic_add(own + MEMBERS * num_classes + label, one, mask=member, sem="relaxed", scope="cta")
            n = _log_sum(rows_float, row, inside, num_rows, splits)
            peak = tl.where(n == n, tl.ceil(tl.maximum(n, -1e9)), 0.0).to(tl.int64)
            peak = tl.where(n == n, peak, NAN_PEAK)
            tl.atomic_max(own + PEAK * num_classes + label, peak, mask=member, sem="relaxed", scope="cta")
    tl.debug_barrier()

    largest = tl.zeros([BLOCK_A], tl.int64)
    for first in range(0, num_classes, BLOCK_A):
        k = first + tl.arange(0, BLOCK_A)
        is_class = k < num_classes
        count = tl.load(tables + k, mask=is_class, other=0) + _entry(own, GAINED, k, is_class, num_classes)
        largest = tl.maximum(largest, count)
        if program == 0:
            tl.store(class_counts + k, count, mask=is_class)
    most = tl.maximum(tl.max(largest, axis=0), 1).to(tl.float32)
    if progress is None:
        remaining = 1.0 - progress_number
    else:
        remaining = 1.0 - tl.load(progress).to(tl.float32)
    adjustment = BTA * (remaining * remaining)
    if AUTHORS:
        for first in range(0, num_rows, BLOCK_A):
            row = first + tl.arange(0, BLOCK_A)
            label = tl.load(codes + row * TOP_K, mask=row < num_rows, other=-1)
            member = label >= 0
            peak = _entry(own, PEAK, label, member, num_classes)
            n = _log_sum(rows_float, row, row < num_rows, num_rows, splits)
            share = tl.where(peak == NAN_PEAK, 0.0, tl.exp(n - peak.to(ACC))) * SHARE_SCALE
            share = share.to(tl.int64)
            tl.atomic_add(own + EXP_SUM * num_classes + label, share, mask=member, sem="relaxed", scope="cta")
        tl.debug_barrier()

    total = tl.zeros([BLOCK_A], ACC)
    for first in range(0, num_rows, BLOCK_A):
        row = first + tl.arange(0, BLOCK_A)
        label, contributes, n, x, negative, denominator, temperature = _anchors(
            row, row < num_rows, codes, rows_int, rows_float, tables, own, has_center, adjustment, most, num_rows,
            num_classes, splits, TEMPERATURE, MIN_TEMPERATURE, LOG_WEIGHT, LOG_FLOOR, AUTHORS, TOP_K,
        )  # fmt: skip
        total += tl.where(contributes, log_add_exp(denominator - x, tl.zeros([BLOCK_A], ACC)), 0.0)
        slope = tl.where(contributes, sigmoid(denominator - x), 0.0)
        share = tl.exp(negative - denominator)
        if AUTHORS:
            slope = (tl.where(slope == slope, slope, 0.0) * SHARE_SCALE).to(tl.int64)
            tl.atomic_add(own + SLOPE_SUM * num_classes + label, slope, mask=contributes, sem="relaxed", scope="cta")
        else:
            share = tl.where(contributes, share * slope, 0.0)
        tl.store(log_sums + row, n, mask=row < num_rows)
        tl.store(shares + row, share, mask=row < num_rows)
    tl.debug_barrier()
    # A label or slot out of range must not pass for a loss.
    divisor = tl.where(num_invalid > 0, float("nan"), tl.maximum(num_reliable, 1).to(ACC))
    scale = 1.0 / divisor
    if program == 0:
        tl.store(loss, tl.sum(total, axis=0) / divisor)
        tl.store(reliable_share, num_reliable.to(tl.float32) / num_rows)

    # Gradient of the program's rows. Cosines are symmetric: one tile serves rows as anchors and as columns.
    row = program * BLOCK_R + tl.arange(0, BLOCK_R)
    inside = row < num_rows
    label, contributes, n, x, negative, denominator, temperature = _anchors(
        row, inside, codes, rows_int, rows_float, tables, own, has_center, adjustment, most, num_rows,
        num_classes, splits, TEMPERATURE, MIN_TEMPERATURE, LOG_WEIGHT, LOG_FLOOR, AUTHORS, TOP_K,
    )  # fmt: skip
    weight = _weights(shares, row, inside, label, own, scale, num_classes, AUTHORS)
    vectors = load_vectors(features, row, inside, dim, stride, stride_dim, BLOCK_D).to(ACC)
    norm, inverse = norms(vectors, EPS_COSINE)
    unit_gradient = tl.zeros([BLOCK_R, BLOCK_D], ACC)
    for first in range(0, num_rows, BLOCK_C):
        column = first + tl.arange(0, BLOCK_C)
        column_inside = column < num_rows
        column_label = tl.load(codes + column * TOP_K, mask=column_inside, other=-1)
        column_n = tl.load(log_sums + column, mask=column_inside, other=0.0)
        column_weight = _weights(shares, column, column_inside, column_label, own, scale, num_classes, AUTHORS)
        y = load_vectors(features, column, column_inside, dim, stride, stride_dim, BLOCK_D).to(ACC)
        _, y_inverse = norms(y, EPS_COSINE)
        v = similarities(
            vectors, features, row, inside, inverse, stride, stride_dim,
            y, features, column, column_inside, y_inverse, stride, stride_dim,
            dim, DOT, PRECISION, BLOCK_S, BLOCK_D,
        ) / TEMPERATURE  # fmt: skip
        pair = inside[:, None] & column_inside[None, :]
        as_anchor = matches(label[:, None], codes, column, column_inside, 0, TOP_K) == 0
        as_anchor = as_anchor & pair & (weight != 0.0)[:, None]
        as_column = matches(column_label[None, :], codes, row, inside, 1, TOP_K) == 0
        as_column = as_column & pair & (column_weight != 0.0)[None, :]
        w = tl.where(as_anchor, weight[:, None] * tl.exp(tl.where(as_anchor, v - n[:, None], 0.0)), 0.0)
        w += tl.where(as_column, column_weight[None, :] * tl.exp(tl.where(as_column, v - column_n[None, :], 0.0)), 0.0)
        finite = is_finite(y_inverse)
        power = shortening(tl.where(finite, y_inverse, 1.0), features.dtype.element_ty)  # 1 / 1e38 has few bits
        w = w * tl.where(finite, y_inverse / power, 0.0)[None, :]  # the NaN of a pair is in w already
        unit_gradient = tl.dot(
            w.to(GRADIENT_DOT),
            tl.where(finite[:, None], y * power[:, None], 0.0).to(GRADIENT_DOT),
            unit_gradient,
            input_precision=PRECISION,
            out_dtype=ACC,
        )
    center = load_vectors(centers, label, inside & (label >= 0), dim, dim, 1, BLOCK_D).to(ACC)
    _, center_inverse = norms(center, EPS_COSINE)
    pull = tl.where(contributes, sigmoid(denominator - x) * scale / temperature, 0.0)
    unit_gradient = unit_gradient / TEMPERATURE - (pull * center_inverse)[:, None] * center
    finite = is_finite(inverse)
    inverse = tl.where(finite, inverse, 0.0)  # a row of NaN without part in the loss has the gradient 0
    unit = tl.where(finite[:, None], vectors, 0.0) * inverse[:, None]
    along = tl.where(norm > EPS_COSINE, tl.sum(unit_gradient * unit, axis=1), 0.0)
    store_vectors(gradient, row, inside, dim, dim, (unit_gradient - along[:, None] * unit) * inverse[:, None], BLOCK_D)

    valid = inside & ((tl.load(rows_int + GATES * num_rows + row, mask=inside, other=0) & INVALID) == 0)
    last_selected = _last_row(rows_int, row, valid, num_rows, splits, NUM_INT)
    _update_bank(
        features,
        bank,
        written,
        selected_label,
        class_sums,
        class_sizes,
        codes,
        rows_int,
        row,
        valid,
        read_slots(labeled_slots, unlabeled_slots, row, inside, batch, num_labeled),
        tl.where(any_counted != 0, last_selected, -1),
        _last_row(rows_int, row, valid, num_rows, splits, NUM_INT + splits),
        num_rows,
        num_classes,
        dim,
        stride,
        stride_dim,
        TOP_K,
        BLOCK_S,
    )
    # All of this program's reads of centers and additions to sums come before its ticket, whose release and acquire
    # put them before what the last program does.
    tl.debug_barrier()
    if tl.atomic_add(ticket, 1, sem="acq_rel", scope="gpu") == tl.num_programs(0) - 1:
        _set_centers(class_sums, class_sizes, centers, has_center, num_classes, dim, BLOCK_A)


def bacon_step(
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
    """One step on at least one row: the bank's contiguous buffers are changed in place.

    Returns the loss (0-d) and its gradient [R,D], both in the accumulator's dtype, and the share of reliable rows (0-d
    float32). Arguments as in `bacon_fast.ops.bacon_step.bacon_step_`, ``input_precision`` as in `contrastive_forward`.
    """
    arch = architecture(features) if arch is None else arch
    (num_rows, dim), num_classes = features.shape, logits.shape[1]
    dtype = accumulator_dtype(features.dtype)
    config = bacon_step_config(num_rows, dim, num_classes, features.dtype, input_precision, arch)
    programs = triton.cdiv(num_rows, config.block_rows)
    tiles = triton.cdiv(num_rows, config.block_columns)
    labeled_slots, unlabeled_slots = labeled_slots.contiguous(), unlabeled_slots.contiguous()

    loss = features.new_empty((), dtype=dtype)
    gradient = features.new_empty(num_rows, dim, dtype=dtype)
    reliable_share = features.new_empty((), dtype=torch.float32)
    codes = features.new_empty(num_rows, top_k, dtype=torch.int32)
    rows_int = features.new_empty(NUM_INT.value + 2 * config.splits, num_rows, dtype=torch.int32)
    rows_float = features.new_empty(1 + config.splits + 2 * programs, num_rows, dtype=dtype)
    tables = features.new_empty(1 + programs * NUM_TABLES.value, num_classes, dtype=torch.int64)
    ticket = features.new_empty((), dtype=torch.int32)
    dot, gradient_dot = dot_dtypes(features.dtype)
    shared = {
        "TEMPERATURE": temperature,
        "TOP_K": top_k,
        "ACC": TRITON_DTYPE[dtype],
        "DOT": dot,
        "PRECISION": input_precision,
        "BLOCK_R": config.block_rows,
        "BLOCK_C": config.block_columns,
        "BLOCK_S": config.block_slice,
        "BLOCK_D": config.block_dim,
        "num_stages": 1,
        "maxnreg": 255,  # the grid is smaller than the card: no use in making room for more programs
    }
    launch(
        _compare_kernel,
        (programs, config.splits),
        features,
        labels.contiguous(),
        logits,
        labeled_slots,
        unlabeled_slots,
        selected_label,
        class_counts,
        centers,
        codes,
        rows_int,
        rows_float,
        tables,
        ticket,
        num_rows,
        labels.shape[0],
        num_labeled,
        bank.shape[0],
        num_classes,
        dim,
        *features.stride(),
        *logits.stride(),
        triton.cdiv(tiles, config.splits) * config.block_columns,
        RELIABLE_FROM=reliable_threshold,
        COUNT_FROM=count_threshold,
        COUNT_BY_LOGIT=count_gate == "logit",
        LOGIT=TRITON_DTYPE[accumulator_dtype(logits.dtype)],
        BLOCK_K=config.block_classes,
        num_warps=config.compare_warps,
        **shared,
    )
    launch(
        _update_kernel,
        (programs,),
        features,
        labeled_slots,
        unlabeled_slots,
        progress if isinstance(progress, Tensor) else None,
        0.0 if isinstance(progress, Tensor) else float(progress),
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
        tables,
        ticket,
        loss,
        reliable_share,
        gradient,
        num_rows,
        labels.shape[0],
        num_labeled,
        num_classes,
        config.splits,
        dim,
        *features.stride(),
        BTA=bta,
        MIN_TEMPERATURE=min_temperature,
        LOG_WEIGHT=None if negative_weight is None else math.log(negative_weight),
        LOG_FLOOR=math.log(EPS_LOG),
        AUTHORS=neg_mode == "authors",
        WITH_PSEUDO=labeled_counts == "with_pseudo",
        GRADIENT_DOT=gradient_dot,
        BLOCK_A=config.block_scan,
        num_warps=config.update_warps,
        **shared,
    )
    return loss, gradient, reliable_share
