"""What both designs of BaCon's step share: how slots, labels and logits are read, and the bank's format of numbers."""

import triton
import triton.language as tl

from .contrastive_math import is_finite

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
