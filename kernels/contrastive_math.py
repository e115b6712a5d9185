"""Shared by the forward and the backward kernels of the contrastive family: layouts of their buffers, and formulas.

Logarithms of empty sums are EMPTY, which is finite, so that no inf - inf arises. Masked values are replaced, never
multiplied by 0, so that no NaN stays. Every computation takes its dtype from its inputs: float64 works wherever float32
does.
"""

import triton
import triton.language as tl

EMPTY = tl.constexpr(-1e30)
IS_EMPTY = tl.constexpr(-1e29)  # anything below is EMPTY; a NaN is not

# Rows of the statistics [NUM_STATS + M, R] that the forward saves for the backward; the M own logits follow.
INVERSE_NORM = tl.constexpr(0)
ROW_NEGATIVES = tl.constexpr(1)  # n_r of the row alone
NEGATIVES = tl.constexpr(2)  # n of its group, or n_r
DENOMINATOR = tl.constexpr(3)  # N
POSITIVES = tl.constexpr(4)  # p, or q in form "prod"
POSITIVE_COUNT = tl.constexpr(5)
POSITIVE_MEAN = tl.constexpr(6)  # a
NUM_STATS = tl.constexpr(7)

# Prepared vectors are shorter than this, and 11 bits of float16 go down to 2^-36 of it: far below what a sum of
# float32 keeps. Weights of vectors are brought below it too.
LENGTH = tl.constexpr(2.0**12)


@triton.jit
def is_finite(x):
    return tl.abs(x) < float("inf")


@triton.jit
def log1p(x):
    """log(1 + x) for x in [0, 1], to the last bits also for small x. (The interpreter has no libdevice.)"""
    total = 1.0 + x
    kept = total - 1.0
    return tl.where(kept == 0.0, x, tl.log(total) * (x / tl.where(kept == 0.0, 1.0, kept)))


@triton.jit
def log_add_exp(a, b):
    return tl.maximum(a, b) + log1p(tl.exp(-tl.abs(a - b)))


@triton.jit
def log_of_sum(peak, total):
    """peak + log(total), EMPTY for an empty sum: one with a term has total >= 1, the term of its peak."""
    return tl.where(total == 0.0, EMPTY, peak + tl.log(tl.where(total == 0.0, 1.0, total)))


@triton.jit
def sigmoid(x):
    small = tl.exp(-tl.abs(x))
    return tl.where(x >= 0, 1.0, small) / (1.0 + small)


@triton.jit
def load_vectors(base, index, keep, dim, stride, stride_dim, BLOCK_D: tl.constexpr):
    """Tile [len(index), BLOCK_D] of vectors, 0 where not ``keep`` and beyond ``dim``. Offsets are 64-bit."""
    d = tl.arange(0, BLOCK_D)
    offsets = index.to(tl.int64)[:, None] * stride + d.to(tl.int64)[None, :] * stride_dim
    return tl.load(base + offsets, mask=keep[:, None] & (d < dim)[None, :], other=0.0)


@triton.jit
def store_vectors(base, index, keep, dim, stride, vectors, BLOCK_D: tl.constexpr):
    """Stores a tile of vectors whose elements are contiguous."""
    d = tl.arange(0, BLOCK_D)
    offsets = index.to(tl.int64)[:, None] * stride + d[None, :]
    tl.store(base + offsets, vectors.to(base.dtype.element_ty), mask=keep[:, None] & (d < dim)[None, :])


@triton.jit
def norms(vectors, EPS: tl.constexpr):
    """Norm of each vector, and 1 / max(norm, EPS), NaN if an element is not finite."""
    # The squares of huge vectors would overflow: they are shrunk by a power of two, which is exact, and multiplied by 1
    # all others keep their bits.
    largest = tl.max(tl.abs(vectors), axis=1)
    wide: tl.constexpr = vectors.dtype == tl.float64
    one = tl.full(largest.shape, 1.0, vectors.dtype)
    huge = largest > (2.0**384 if wide else 2.0**48)
    shrink = tl.where(huge, (2.0**-640 if wide else 2.0**-80) * one, one)
    shrunk = vectors * shrink[:, None]
    norm = tl.sqrt(tl.sum(shrunk * shrunk, axis=1))
    finite = tl.min(is_finite(vectors).to(tl.int32), axis=1) == 1
    inverse = shrink / tl.maximum(norm, EPS * shrink)
    norm *= tl.where(huge, (2.0**640 if wide else 2.0**80) * one, one)
    return norm, tl.where(finite, inverse, float("nan"))


@triton.jit
def own_columns(
    unit,
    own,
    own_scale,
    m,
    num_own,
    index,
    inside,
    dim,
    stride,
    stride_own,
    stride_dim,
    EPS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Own column m of every row, normalized, and its norm, inverse norm, scale, presence and cosine with the row."""
    scale = tl.load(own_scale + index.to(tl.int64) * num_own + m, mask=inside, other=float("nan")).to(unit.dtype)
    present = scale == scale
    start = own + tl.cast(m, tl.int64) * stride_own
    vectors = load_vectors(start, index, present, dim, stride, stride_dim, BLOCK_D).to(unit.dtype)
    norm, inverse = norms(vectors, EPS)
    vectors = vectors * inverse[:, None]
    return vectors, norm, inverse, scale, present, tl.sum(unit * vectors, axis=1)


@triton.jit
def power_of_two(positive, SMALLEST: tl.constexpr):
    """The largest power of two that is not above a positive number, and ``SMALLEST`` for smaller numbers."""
    if positive.dtype == tl.float64:
        bits = positive.to(tl.int64, bitcast=True) & 0x7FF0000000000000
        power = bits.to(tl.float64, bitcast=True)
    else:
        bits = positive.to(tl.int32, bitcast=True) & 0x7F800000
        power = bits.to(tl.float32, bitcast=True)
    # Filled, as a number that is no normal float32 would make everything float64.
    return tl.maximum(power, tl.full(power.shape, SMALLEST, power.dtype))


@triton.jit
def as_operands(values, DOT: tl.constexpr, PARTS: tl.constexpr):
    """One or two operands of a product whose sum is the values, to 11 bits of float16 each; else the same one twice."""
    high = values.to(DOT)
    low = high
    if PARTS == 2:
        low = (values - high.to(values.dtype)).to(DOT)
    return high, low


@triton.jit
def multiply(a_high, a_low, b_high, b_low, total, PARTS: tl.constexpr):
    """total + a·b. With two parts three products; the fourth is below 2^-22 of each term."""
    if PARTS == 2:
        total = tl.dot(a_low, b_high, total, input_precision="ieee", out_dtype=total.dtype)
        total = tl.dot(a_high, b_low, total, input_precision="ieee", out_dtype=total.dtype)
    return tl.dot(a_high, b_high, total, input_precision="ieee", out_dtype=total.dtype)


@triton.jit
def load_operands(
    operands, size, start, k, PARTS: tl.constexpr, BLOCK: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr
):
    """Parts [BLOCK, BLOCK_K] of prepared vectors from ``start`` on, their elements from ``k`` on. All of it exists.

    ``size``: elements of one part of all vectors.
    """
    place = operands + tl.cast(start, tl.int64) * BLOCK_D + k
    offsets = tl.arange(0, BLOCK)[:, None] * BLOCK_D + tl.arange(0, BLOCK_K)[None, :]
    high = tl.load(place + offsets)
    low = high
    if PARTS == 2:
        low = tl.load(place + size + offsets)
    return high, low


@triton.jit
def cosines(
    x, x_size, x_start, x_high, x_low, x_scale, y, y_size, y_start, y_high, y_low, y_scale,
    PARTS: tl.constexpr, BLOCK_X: tl.constexpr, BLOCK_Y: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Cosines [BLOCK_X, BLOCK_Y] of prepared vectors.

    BLOCK_K = BLOCK_D multiplies the tiles that were loaded. A smaller one reads slices of that many elements.
    """
    product = tl.zeros([BLOCK_X, BLOCK_Y], x_scale.dtype)
    if BLOCK_K == BLOCK_D:
        product = multiply(x_high, x_low, tl.trans(y_high), tl.trans(y_low), product, PARTS)
    else:
        for k in range(0, BLOCK_D, BLOCK_K):
            a_high, a_low = load_operands(x, x_size, x_start, k, PARTS, BLOCK_X, BLOCK_K, BLOCK_D)
            b_high, b_low = load_operands(y, y_size, y_start, k, PARTS, BLOCK_Y, BLOCK_K, BLOCK_D)
            product = multiply(a_high, a_low, tl.trans(b_high), tl.trans(b_low), product, PARTS)
    return product * y_scale[None, :] * x_scale[:, None]


@triton.jit
def matches(anchor_code, column_code, columns, inside, AXIS: tl.constexpr, NUM_CODES: tl.constexpr):
    """Whether an anchor's code is among a column's; anchors lie along ``AXIS`` of the tile, columns along the other.

    ``anchor_code`` is a tile with one element along the columns' axis.
    """
    codes = column_code + columns.to(tl.int64) * NUM_CODES
    found = anchor_code == tl.expand_dims(tl.load(codes, mask=inside, other=-1), AXIS)
    for t in tl.static_range(1, NUM_CODES):
        found = found | (anchor_code == tl.expand_dims(tl.load(codes + t, mask=inside, other=-1), AXIS))
    return found
