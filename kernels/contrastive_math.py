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
def shortening(inverse, dtype: tl.constexpr):
    """Powers of two that make vectors shorter than 1/32, by their inverse norms.

    No product with another vector of up to MAX_DIM finite elements overflows then. Vectors of float16 keep their
    length: their products cannot overflow, and shorter ones would lose bits.
    """
    if dtype == tl.float16:
        power = tl.full(inverse.shape, 1.0, inverse.dtype)
    elif dtype == tl.float64:
        bits = inverse.to(tl.int64, bitcast=True) & 0x7FF0000000000000
        power = tl.maximum(bits.to(tl.float64, bitcast=True), tl.full(inverse.shape, 2.0**-1028, tl.float64)) * 2.0**-6
    else:
        bits = inverse.to(tl.int32, bitcast=True) & 0x7F800000
        # Filled, as a number that is no normal float32 would make everything float64.
        power = tl.maximum(bits.to(tl.float32, bitcast=True), tl.full(inverse.shape, 2.0**-132, tl.float32)) * 2.0**-6
    return power


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
def similarities(
    x, x_base, x_index, x_keep, x_inverse, x_stride, x_stride_dim,
    y, y_base, y_index, y_keep, y_inverse, y_stride, y_stride_dim,
    dim, DOT: tl.constexpr, PRECISION: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Cosines [X, Y] of raw vectors. Rounding x·y once beats normalizing half-precision vectors first.

    BLOCK_K = BLOCK_D multiplies the tiles x and y. A smaller BLOCK_K reads them again in slices of that many elements:
    whole float32 tiles, split for "tf32x3", do not fit into the registers.
    """
    accumulator: tl.constexpr = x_inverse.dtype
    power = shortening(x_inverse, x_base.dtype.element_ty)
    if BLOCK_K == BLOCK_D:
        short = (x.to(accumulator) * power[:, None]).to(DOT)
        product = tl.dot(short, tl.trans(y.to(DOT)), input_precision=PRECISION, out_dtype=accumulator)
    else:
        product = tl.zeros([x_inverse.shape[0], y_inverse.shape[0]], accumulator)
        for k in range(0, dim, BLOCK_K):
            x_start = x_base + tl.cast(k, tl.int64) * x_stride_dim
            y_start = y_base + tl.cast(k, tl.int64) * y_stride_dim
            x_slice = load_vectors(x_start, x_index, x_keep, dim - k, x_stride, x_stride_dim, BLOCK_K)
            y_slice = load_vectors(y_start, y_index, y_keep, dim - k, y_stride, y_stride_dim, BLOCK_K)
            short = (x_slice.to(accumulator) * power[:, None]).to(DOT)
            product = tl.dot(
                short, tl.trans(y_slice.to(DOT)), product, input_precision=PRECISION, out_dtype=accumulator
            )
    return product * y_inverse[None, :] * (x_inverse / power)[:, None]


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
