"""What both designs of BaCon's step share: how slots, labels and logits are read, and the bank's format of numbers."""

import triton
import triton.language as tl

from .contrastive_math import is_finite, load_vectors

EPS_COSINE = tl.constexpr(1e-8)  # smallest norm a vector is divided by
EPS_LOG = 1e-8  # added to the denominator of the softmax

# The bank's fixed-point grid (bacon_fast/reference/memory_bank.py).
FEATURE_LIMIT = tl.constexpr(4096.0)
BANK_SCALE = tl.constexpr(2.0**30)
ROUND_TO_INTEGER = tl.constexpr(1.5 * 2.0**52)  # added to and subtracted from a double below 2^51: rounds half to even


@triton.jit
def read_slots(labeled_slots, unlabeled_slots, row, inside, batch, num_labeled):
    """Slots of rows in the whole bank, that of the unlabeled set behind that of the labeled one."""
    labeled = tl.load(labeled_slots + row, mask=inside & (row < batch), other=0)
    unlabeled = tl.load(unlabeled_slots + (row - batch), mask=inside & (row >= batch), other=0) + num_labeled
    return tl.where(row < batch, labeled, unlabeled)


@triton.jit
def read_logits(
    logits, row, inside, first, num_classes, stride, stride_class, LOGIT: tl.constexpr, BLOCK_K: tl.constexpr
):
    """Tile of the logits of BLOCK_K classes from ``first`` on; which of them are classes; their numbers."""
    k = first + tl.arange(0, BLOCK_K)
    is_class = (k < num_classes)[None, :]
    offsets = row.to(tl.int64)[:, None] * stride + k.to(tl.int64)[None, :] * stride_class
    return tl.load(logits + offsets, mask=inside[:, None] & is_class, other=0.0).to(LOGIT), is_class, k[None, :]


@triton.jit
def read_labels(labels, row, inside, batch, num_classes):
    """Labels of labeled rows, -2 if one is no class; whether a row is labeled; whether its label is a class."""
    is_labeled = row < batch
    label = tl.load(labels + row, mask=inside & is_labeled, other=0)
    valid = (label >= 0) & (label < num_classes)
    return tl.where(valid, label, -2).to(tl.int32), is_labeled, valid


@triton.jit
def can_be_written(vectors):
    """Whether every component is finite in float32, the dtype of the bank."""
    return tl.min(is_finite(vectors.to(tl.float32)).to(tl.int32), axis=1) == 1


@triton.jit
def to_fixed_point(features):
    """Features on the bank's grid, int64."""
    return ((features.to(tl.float64) * BANK_SCALE + ROUND_TO_INTEGER) - ROUND_TO_INTEGER).to(tl.int64)


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
