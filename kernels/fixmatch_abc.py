"""FixMatch's and ABC's losses of both heads with their gradients (formulas: bacon_fast.reference.fixmatch_abc).

One program treats a few samples: a labeled sample is one row of each head, an unlabeled one its weak and its strong
row. Every row enters one loss, which is linear in its upstream gradient, so the forward returns the gradient at
upstream 1 and the backward scales rows. A second kernel adds up the samples' contributions, always in the same order.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import TRITON_DTYPE, accumulator_dtype, launch

STREAM_LABELED = tl.constexpr(7)  # bacon_fast.data.philox.Stream
STREAM_UNLABELED = tl.constexpr(8)

# Rows of the buffer [NUM_PARTS, samples] of each sample's contributions: the four losses, then the four statistics.
SUPERVISED = tl.constexpr(0)
UNSUPERVISED = tl.constexpr(1)
BALANCED_LABELED = tl.constexpr(2)
BALANCED_UNLABELED = tl.constexpr(3)
CONFIDENT = tl.constexpr(4)
BALANCED_WEIGHT = tl.constexpr(5)
KNOWN = tl.constexpr(6)
RIGHT = tl.constexpr(7)
NUM_PARTS = tl.constexpr(8)


@dataclass(frozen=True)
class FixMatchABCConfig:
    """Tiles [block_rows, block_classes] of logits, one a program, and the warps that work on it."""

    block_rows: int
    block_classes: int
    num_warps: int


def fixmatch_abc_config(num_classes: int) -> FixMatchABCConfig:
    """Four logits a thread: several tiles are alive at once, and with more of them registers would spill."""
    block_classes = max(16, triton.next_power_of_2(num_classes))
    block_rows = max(1, 128 // block_classes)
    return FixMatchABCConfig(block_rows, block_classes, min(16, block_rows * block_classes // 128))


@triton.jit
def _load_rows(base, row, keep, num_classes, stride, stride_class, BLOCK_K: tl.constexpr, ACC: tl.constexpr):
    """Tile of logits, -inf beyond the last class and 0 in rows that are not kept."""
    k = tl.arange(0, BLOCK_K)
    offsets = row.to(tl.int64)[:, None] * stride + k.to(tl.int64)[None, :] * stride_class
    tile = tl.load(base + offsets, mask=keep[:, None] & (k < num_classes)[None, :], other=0.0).to(ACC)
    return tl.where((k < num_classes)[None, :], tile, float("-inf"))


@triton.jit
def _store_rows(base, row, keep, num_classes, tile, BLOCK_K: tl.constexpr):
    k = tl.arange(0, BLOCK_K)
    offsets = row.to(tl.int64)[:, None] * num_classes + k[None, :]
    tl.store(base + offsets, tile.to(base.dtype.element_ty), mask=keep[:, None] & (k < num_classes)[None, :])


@triton.jit
def _cross_entropy(logits, label, weight, num_classes):
    """weight · cross entropy of every row, and its gradient. A row of weight 0 takes no part, not even with a NaN."""
    used = weight > 0
    k = tl.arange(0, logits.shape[1])
    logits = tl.where(used[:, None] | (k >= num_classes)[None, :], logits, 0.0)
    largest = tl.max(logits, axis=1)
    exps = tl.exp(logits - largest[:, None])
    total = tl.sum(exps, axis=1)
    lse = largest + tl.log(total)
    chosen = k[None, :] == label[:, None]
    loss = lse - tl.sum(tl.where(chosen, logits, 0.0), axis=1)
    slope = exps / total[:, None] - tl.where(chosen, 1.0, 0.0)
    return tl.where(used, weight * loss, 0.0), tl.where(used[:, None], weight[:, None] * slope, 0.0)


@triton.jit
def _draw(probability, seed, step, stream, row):
    """A 0 or 1, drawn with the probability."""
    zero = tl.zeros_like(row)
    word, _, _, _ = tl.philox(seed, row, zero + step, zero + stream, zero)
    uniform = (word >> 8).to(tl.float32) * 5.9604644775390625e-08  # 2^-24
    return tl.where(uniform < probability, 1.0, 0.0)


@triton.jit
def _pseudo_label(logits, threshold):
    """Class of weak rows, and whether their confidence reaches the threshold."""
    exps = tl.exp(logits - tl.max(logits, axis=1)[:, None])
    total = tl.sum(exps, axis=1)
    return tl.argmax(logits, axis=1), 1.0 / total >= threshold


@triton.jit
def _samples_kernel(
    logits,
    balanced,
    labels,
    true_labels,
    keep_labeled,
    keep_unlabeled,
    step,
    parts,
    pseudo_labels,
    grad_logits,
    grad_balanced,
    seed,
    threshold,
    batch,
    num_unlabeled,
    num_classes,
    stride_logits,
    stride_logits_class,
    stride_balanced,
    stride_balanced_class,
    ACC: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Samples are numbered labeled first; a program has only labeled or only unlabeled ones."""
    samples = batch + num_unlabeled
    labeled_programs = tl.cdiv(batch, BLOCK_N)
    program = tl.program_id(0)
    now = tl.load(step).to(tl.int32)
    if program < labeled_programs:
        row = program * BLOCK_N + tl.arange(0, BLOCK_N)
        keep = row < batch
        label = tl.load(labels + row, mask=keep, other=0).to(tl.int32)
        valid = (label >= 0) & (label < num_classes)
        probability = tl.load(keep_labeled + label, mask=keep & valid, other=0.0)
        # In one dtype on both sides of the branch, or Triton refuses the name.
        kept = _draw(probability, seed, now, STREAM_LABELED, row).to(ACC)
        share = tl.where(keep, tl.full([BLOCK_N], 1.0, ACC) / batch, 0.0)

        tile = _load_rows(logits, row, keep, num_classes, stride_logits, stride_logits_class, BLOCK_K, ACC)
        loss, slope = _cross_entropy(tile, label, share, num_classes)
        # A label that is no class must not pass for a loss of nothing.
        tl.store(parts + SUPERVISED * samples + row, tl.where(valid, loss, float("nan")), mask=keep)
        _store_rows(grad_logits, row, keep, num_classes, slope, BLOCK_K)

        tile = _load_rows(balanced, row, keep, num_classes, stride_balanced, stride_balanced_class, BLOCK_K, ACC)
        loss, slope = _cross_entropy(tile, label, share * kept, num_classes)
        tl.store(parts + BALANCED_LABELED * samples + row, loss, mask=keep)
        _store_rows(grad_balanced, row, keep, num_classes, slope, BLOCK_K)

        zero = tl.zeros([BLOCK_N], dtype=ACC)
        tl.store(parts + UNSUPERVISED * samples + row, zero, mask=keep)
        for part in tl.static_range(BALANCED_UNLABELED, NUM_PARTS):
            tl.store(parts + part * samples + row, zero, mask=keep)
    else:
        row = (program - labeled_programs) * BLOCK_N + tl.arange(0, BLOCK_N)
        keep = row < num_unlabeled
        weak = batch + row
        nothing = tl.zeros([BLOCK_N, BLOCK_K], dtype=ACC)
        share = tl.full([BLOCK_N], 1.0, ACC) / num_unlabeled

        tile = _load_rows(logits, weak, keep, num_classes, stride_logits, stride_logits_class, BLOCK_K, ACC)
        label, confident = _pseudo_label(tile, threshold)
        confident = confident & keep
        tl.store(pseudo_labels + row, tl.where(confident, label, -1).to(tl.int64), mask=keep)
        _store_rows(grad_logits, weak, keep, num_classes, nothing, BLOCK_K)

        tile = _load_rows(balanced, weak, keep, num_classes, stride_balanced, stride_balanced_class, BLOCK_K, ACC)
        second_label, second_confident = _pseudo_label(tile, threshold)
        second_confident = second_confident & keep
        probability = tl.load(keep_unlabeled + second_label, mask=second_confident, other=0.0)
        kept = _draw(probability, seed, now, STREAM_UNLABELED, row).to(ACC)
        kept = tl.where(second_confident, kept, 0.0)
        _store_rows(grad_balanced, weak, keep, num_classes, nothing, BLOCK_K)

        strong = weak + num_unlabeled
        tile = _load_rows(logits, strong, keep, num_classes, stride_logits, stride_logits_class, BLOCK_K, ACC)
        unsupervised, slope = _cross_entropy(tile, label, tl.where(confident, share, 0.0), num_classes)
        _store_rows(grad_logits, strong, keep, num_classes, slope, BLOCK_K)
        tile = _load_rows(balanced, strong, keep, num_classes, stride_balanced, stride_balanced_class, BLOCK_K, ACC)
        balanced_unlabeled, slope = _cross_entropy(tile, second_label, share * kept, num_classes)
        _store_rows(grad_balanced, strong, keep, num_classes, slope, BLOCK_K)

        truth = tl.load(true_labels + row, mask=keep, other=-1)
        zero = tl.zeros([BLOCK_N], dtype=ACC)
        tl.store(parts + SUPERVISED * samples + weak, zero, mask=keep)
        tl.store(parts + UNSUPERVISED * samples + weak, unsupervised, mask=keep)
        tl.store(parts + BALANCED_LABELED * samples + weak, zero, mask=keep)
        tl.store(parts + BALANCED_UNLABELED * samples + weak, balanced_unlabeled, mask=keep)
        tl.store(parts + CONFIDENT * samples + weak, tl.where(confident, share, 0.0), mask=keep)
        tl.store(parts + BALANCED_WEIGHT * samples + weak, share * kept, mask=keep)
        tl.store(parts + KNOWN * samples + weak, tl.where(confident & (truth >= 0), 1.0, 0.0), mask=keep)
        tl.store(parts + RIGHT * samples + weak, tl.where(confident & (truth == label), 1.0, 0.0), mask=keep)


@triton.jit
def _sum_kernel(parts, losses, stats, samples, BLOCK_S: tl.constexpr):
    """One program adds up losses and statistics."""
    part = tl.arange(0, NUM_PARTS)
    sums = tl.zeros([NUM_PARTS, BLOCK_S], dtype=parts.dtype.element_ty)
    for start in range(0, samples, BLOCK_S):
        sample = start + tl.arange(0, BLOCK_S)
        offsets = part[:, None] * samples + sample[None, :]
        sums += tl.load(parts + offsets, mask=(sample < samples)[None, :], other=0.0)
    total = tl.sum(sums, axis=1)
    tl.store(losses + part, total, mask=part < CONFIDENT)
    tl.store(stats + part - CONFIDENT, total.to(tl.float32), mask=part >= CONFIDENT)


@triton.jit
def _scale_kernel(
    upstream,
    grad_logits,
    grad_balanced,
    out_logits,
    out_balanced,
    num_rows,
    num_classes,
    batch,
    num_unlabeled,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    row = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    keep = row < num_rows
    labeled = row < batch
    strong = keep & (row >= batch + num_unlabeled)
    k = tl.arange(0, BLOCK_K)
    offsets = row.to(tl.int64)[:, None] * num_classes + k[None, :]
    mask = keep[:, None] & (k < num_classes)[None, :]
    scale = tl.where(labeled, tl.load(upstream + SUPERVISED), tl.where(strong, tl.load(upstream + UNSUPERVISED), 0.0))
    slope = tl.load(grad_logits + offsets, mask=mask, other=0.0)
    # An upstream gradient that is not finite must not reach rows without part in the loss.
    result = tl.where(slope == 0, 0.0, slope * scale[:, None])
    tl.store(out_logits + offsets, result.to(out_logits.dtype.element_ty), mask=mask)
    second = tl.where(strong, tl.load(upstream + BALANCED_UNLABELED), 0.0)
    scale = tl.where(labeled, tl.load(upstream + BALANCED_LABELED), second)
    slope = tl.load(grad_balanced + offsets, mask=mask, other=0.0)
    result = tl.where(slope == 0, 0.0, slope * scale[:, None])
    tl.store(out_balanced + offsets, result.to(out_balanced.dtype.element_ty), mask=mask)


def fixmatch_abc_forward(
    logits: Tensor,
    balanced: Tensor,
    labels: Tensor,
    true_labels: Tensor,
    keep_labeled: Tensor,
    keep_unlabeled: Tensor,
    step: Tensor,
    seed: int,
    threshold: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Losses [4], stats [4] float32, pseudo-labels [U] int64, and the gradients [N,K] of both heads at upstream 1.

    The gradients are contiguous and in the accumulator dtype: unscaled, half precision could not hold them.
    """
    batch, num_unlabeled, (num_rows, num_classes) = labels.shape[0], true_labels.shape[0], logits.shape
    samples = batch + num_unlabeled
    dtype = accumulator_dtype(logits.dtype)
    losses = logits.new_empty(4, dtype=dtype)
    stats = logits.new_empty(4, dtype=torch.float32)
    pseudo_labels = true_labels.new_empty(num_unlabeled)
    grad_logits = logits.new_empty(num_rows, num_classes, dtype=dtype)
    grad_balanced = logits.new_empty(num_rows, num_classes, dtype=dtype)
    parts = logits.new_empty(NUM_PARTS.value, samples, dtype=dtype)
    config = fixmatch_abc_config(num_classes)
    programs = triton.cdiv(batch, config.block_rows) + triton.cdiv(num_unlabeled, config.block_rows)
    launch(
        _samples_kernel,
        (programs,),
        logits,
        balanced,
        labels.contiguous(),
        true_labels.contiguous(),
        keep_labeled.contiguous(),
        keep_unlabeled.contiguous(),
        step,
        parts,
        pseudo_labels,
        grad_logits,
        grad_balanced,
        seed,
        threshold,
        batch,
        num_unlabeled,
        num_classes,
        logits.stride(0),
        logits.stride(1),
        balanced.stride(0),
        balanced.stride(1),
        num_warps=config.num_warps,
        ACC=TRITON_DTYPE[dtype],
        BLOCK_N=config.block_rows,
        BLOCK_K=config.block_classes,
    )
    launch(_sum_kernel, (1,), parts, losses, stats, samples, num_warps=4, BLOCK_S=64)
    return losses, stats, pseudo_labels, grad_logits, grad_balanced


def fixmatch_abc_backward(
    grad_losses: Tensor,
    grad_logits: Tensor,
    grad_balanced: Tensor,
    logits: Tensor,
    balanced: Tensor,
    batch: int,
    num_unlabeled: int,
) -> tuple[Tensor, Tensor]:
    """Gradients of both heads' logits in their dtype: those of `fixmatch_abc_forward` times the upstream ones [4]."""
    num_rows, num_classes = logits.shape
    config = fixmatch_abc_config(num_classes)
    out_logits = torch.empty_like(logits, memory_format=torch.contiguous_format)
    out_balanced = torch.empty_like(balanced, memory_format=torch.contiguous_format)
    launch(
        _scale_kernel,
        (triton.cdiv(num_rows, config.block_rows),),
        grad_losses.contiguous(),
        grad_logits.contiguous(),
        grad_balanced.contiguous(),
        out_logits,
        out_balanced,
        num_rows,
        num_classes,
        batch,
        num_unlabeled,
        num_warps=config.num_warps,
        BLOCK_N=config.block_rows,
        BLOCK_K=config.block_classes,
    )
    return out_logits, out_balanced


def _compile(arch: int, num_classes: int, dtype: torch.dtype) -> None:
    """FixMatch's and ABC's losses, 64 labeled and 128 unlabeled rows; their tiles are the same for every ``arch``."""
    meta = functools.partial(torch.empty, device="meta")
    index = functools.partial(meta, dtype=torch.int64)
    batch, unlabeled = 64, 128
    rows = [meta(batch + 2 * unlabeled, num_classes, dtype=dtype) for _ in range(2)]
    keep = [meta(num_classes), meta(num_classes)]
    inputs = (*rows, index(batch), index(unlabeled), *keep, index(()))
    losses, _, _, *gradients = fixmatch_abc_forward(*inputs, 2**40, 0.95)
    fixmatch_abc_backward(losses, *gradients, *rows, batch, unlabeled)


def aot_subjects() -> dict[str, Callable[[int], None]]:
    """The launches that `kernels.aot` compiles, by name."""
    return {
        f"fixmatch-abc-320x{num_classes}-{str(dtype).removeprefix('torch.')}": functools.partial(
            _compile, num_classes=num_classes, dtype=dtype
        )
        for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16)
        for num_classes in (10, 100, 1000, 8192)
        if num_classes <= 100 or dtype != torch.float64  # what gradients are checked in
    }
