"""BatchNorm in training mode with the residual sum before and the LeakyReLU after it, two launches each way.

Memory is [rows, channels], rows being pixels (channels_last). Normalizing needs the sums over all rows first, and a
launch has no barrier across its programs, so each direction is cut in two: program (i, j) of the first launch reduces
the rows of split i in channel block j to two numbers a channel; in the second every program merges these of all splits,
which are few, for its own channel block, and treats its own rows. No atomics: the result is the same at every run.

The backward finds the LeakyReLU's side from the normalized values, computed again: the activated ones are not needed.
"""

import functools
from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor

from .config import BatchNormConfig, batch_norm_config
from .launch import TRITON_DTYPE, accumulator_dtype, architecture, launch

MAX_REGISTERS = 128  # of a thread: 512 threads have all of a multiprocessor's


@triton.jit
def _tile(start, end, num_channels, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr):
    """Offsets and mask of a block of rows, of those before ``end``, in the channel block of this program."""
    row = start + tl.arange(0, BLOCK_R)
    channel = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    offsets = row.to(tl.int64)[:, None] * num_channels + channel[None, :]
    return offsets, (row < end)[:, None] & (channel < num_channels)[None, :]


@triton.jit
def _sum(x, residual, offsets, inside, ACC: tl.constexpr):
    """x + residual in the dtype of x, as it is stored."""
    value = tl.load(x + offsets, mask=inside, other=0.0)
    if residual is not None:
        other = tl.load(residual + offsets, mask=inside, other=0.0)
        value = (value.to(ACC) + other.to(ACC)).to(x.dtype.element_ty)
    return value


@triton.jit
def _merge(count, mean, squares):
    """Joins means and sums of squared deviations of parts, along axis 0 (Chan et al. 1979)."""
    average = tl.sum(count * mean, axis=0) / tl.sum(count, axis=0)
    deviation = mean - average[None, :]
    return average, tl.sum(squares + count * deviation * deviation, axis=0)


@triton.jit
def _moments_kernel(
    x,
    residual,
    total,
    partial,
    num_rows,
    num_channels,
    rows_per_split,
    ACC: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
    STAGES: tl.constexpr,
):
    """partial [2, splits, channels]: of the rows of each split, mean less the value of row 0, and sum of squared
    deviations from the mean. Writes the sum, if there is a residual."""
    split, splits = tl.program_id(0), tl.num_programs(0)
    start = split * rows_per_split
    end = tl.minimum(start + rows_per_split, num_rows)
    channel = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    # Sums of values far from zero would lose their small differences: means are taken relative to row 0, and values
    # relative to the first one at their place of the block, of which there are few.
    origin = _sum(x, residual, channel, channel < num_channels, ACC).to(ACC)
    offsets, inside = _tile(start, end, num_channels, BLOCK_R, BLOCK_C)
    value = _sum(x, residual, offsets, inside, ACC)
    if residual is not None:
        tl.store(total + offsets, value, mask=inside)
    first = value.to(ACC)
    deviations = tl.zeros([BLOCK_R, BLOCK_C], ACC)
    squares = tl.zeros([BLOCK_R, BLOCK_C], ACC)
    for current in tl.range(start + BLOCK_R, end, BLOCK_R, num_stages=STAGES):
        offsets, inside = _tile(current, end, num_channels, BLOCK_R, BLOCK_C)
        value = _sum(x, residual, offsets, inside, ACC)
        if residual is not None:
            tl.store(total + offsets, value, mask=inside)
        deviation = tl.where(inside, value.to(ACC) - first, 0.0)
        deviations += deviation
        squares += deviation * deviation
    number = tl.maximum(end - start - tl.arange(0, BLOCK_R) + BLOCK_R - 1, 0) // BLOCK_R
    count = tl.broadcast_to(number[:, None], [BLOCK_R, BLOCK_C]).to(ACC)
    mean = deviations / tl.maximum(count, 1.0)
    squares = tl.maximum(squares - deviations * mean, 0.0)
    mean, squared = _merge(count, first - origin[None, :] + mean, squares)
    here = partial + split * num_channels + channel
    tl.store(here, mean, mask=channel < num_channels)
    tl.store(here + splits * num_channels, squared, mask=channel < num_channels)


@triton.jit
def _normalize_kernel(
    total,
    weight,
    bias,
    partial,
    activated,
    mean_out,
    inverse_out,
    running_mean,
    running_var,
    num_batches_tracked,
    num_rows,
    num_channels,
    rows_per_split,
    MOMENTUM: tl.constexpr,
    EPS: tl.constexpr,
    SLOPE: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
    STAGES: tl.constexpr,
):
    split, splits = tl.program_id(0), tl.num_programs(0)
    channel = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    is_channel = channel < num_channels
    part = tl.arange(0, BLOCK_S)
    known = (part < splits)[:, None] & is_channel[None, :]
    place = partial + part[:, None] * num_channels + channel[None, :]
    number = tl.minimum(tl.maximum(num_rows - part * rows_per_split, 0), rows_per_split)
    count = tl.broadcast_to(number[:, None], [BLOCK_S, BLOCK_C]).to(ACC)
    means = tl.load(place, mask=known, other=0.0)
    squares = tl.load(place + splits * num_channels, mask=known, other=0.0)
    mean, squared = _merge(count, means, squares)
    mean += tl.load(total + channel, mask=is_channel, other=0.0).to(ACC)
    inverse = 1.0 / tl.sqrt(squared / num_rows + EPS)
    if split == 0:
        tl.store(mean_out + channel, mean, mask=is_channel)
        tl.store(inverse_out + channel, inverse, mask=is_channel)
        if running_mean is not None:
            old_mean = tl.load(running_mean + channel, mask=is_channel).to(ACC)
            old_var = tl.load(running_var + channel, mask=is_channel).to(ACC)
        if num_batches_tracked is not None:
            once = tl.program_id(1) == 0
            before = tl.load(num_batches_tracked, mask=once)
        tl.debug_barrier()  # a value is held by several warps: all have read it before one writes
        if running_mean is not None:
            new = old_mean + MOMENTUM * (mean - old_mean)
            tl.store(running_mean + channel, new.to(running_mean.dtype.element_ty), mask=is_channel)
            new = old_var + MOMENTUM * (squared / (num_rows - 1) - old_var)
            tl.store(running_var + channel, new.to(running_var.dtype.element_ty), mask=is_channel)
        if num_batches_tracked is not None:
            tl.store(num_batches_tracked, before + 1, mask=once)

    scale = tl.load(weight + channel, mask=is_channel, other=0.0).to(ACC) * inverse
    shift = tl.load(bias + channel, mask=is_channel, other=0.0).to(ACC)
    start = split * rows_per_split
    end = tl.minimum(start + rows_per_split, num_rows)
    for current in tl.range(start, end, BLOCK_R, num_stages=STAGES):
        offsets, inside = _tile(current, end, num_channels, BLOCK_R, BLOCK_C)
        value = tl.load(total + offsets, mask=inside, other=0.0).to(ACC)
        value = (value - mean[None, :]) * scale[None, :] + shift[None, :]
        value = tl.where(value > 0, value, value * SLOPE)
        tl.store(activated + offsets, value.to(activated.dtype.element_ty), mask=inside)


@triton.jit
def _before_activation(
    grad_activated, total, offsets, inside, mean, inverse, scale, shift, SLOPE: tl.constexpr, ACC: tl.constexpr
):
    """Gradient of a tile before the LeakyReLU, and the tile normalized. Zeros outside."""
    value = tl.load(total + offsets, mask=inside, other=0.0).to(ACC) - mean[None, :]
    gradient = tl.load(grad_activated + offsets, mask=inside, other=0.0).to(ACC)
    # The same operations as in the forward, so that both see the same side.
    positive = value * scale[None, :] + shift[None, :] > 0
    return tl.where(positive, gradient, gradient * SLOPE), value * inverse[None, :]


@triton.jit
def _vectors(weight, bias, mean, inverse, num_channels, ACC: tl.constexpr, BLOCK_C: tl.constexpr):
    channel = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    is_channel = channel < num_channels
    mean = tl.load(mean + channel, mask=is_channel, other=0.0)
    inverse = tl.load(inverse + channel, mask=is_channel, other=0.0)
    scale = tl.load(weight + channel, mask=is_channel, other=0.0).to(ACC) * inverse
    return mean, inverse, scale, tl.load(bias + channel, mask=is_channel, other=0.0).to(ACC)


@triton.jit
def _gradient_sums_kernel(
    grad_activated,
    total,
    weight,
    bias,
    mean,
    inverse,
    partial,
    num_rows,
    num_channels,
    rows_per_split,
    SLOPE: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
    STAGES: tl.constexpr,
):
    """partial [2, splits, channels]: sums over each split's rows of the gradient, and of its product with the
    normalized values."""
    split, splits = tl.program_id(0), tl.num_programs(0)
    mean, inverse, scale, shift = _vectors(weight, bias, mean, inverse, num_channels, ACC, BLOCK_C)
    plain = tl.zeros([BLOCK_R, BLOCK_C], ACC)
    along = tl.zeros([BLOCK_R, BLOCK_C], ACC)
    start = split * rows_per_split
    end = tl.minimum(start + rows_per_split, num_rows)
    for current in tl.range(start, end, BLOCK_R, num_stages=STAGES):
        offsets, inside = _tile(current, end, num_channels, BLOCK_R, BLOCK_C)
        gradient, normalized = _before_activation(
            grad_activated, total, offsets, inside, mean, inverse, scale, shift, SLOPE, ACC
        )
        plain += gradient
        along += gradient * normalized
    channel = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    here = partial + split * num_channels + channel
    tl.store(here, tl.sum(plain, axis=0), mask=channel < num_channels)
    tl.store(here + splits * num_channels, tl.sum(along, axis=0), mask=channel < num_channels)


@triton.jit
def _input_gradient_kernel(
    grad_activated,
    grad_total,
    total,
    weight,
    bias,
    mean,
    inverse,
    partial,
    grad_x,
    grad_weight,
    grad_bias,
    num_rows,
    num_channels,
    rows_per_split,
    SLOPE: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
    STAGES: tl.constexpr,
):
    split, splits = tl.program_id(0), tl.num_programs(0)
    mean, inverse, scale, shift = _vectors(weight, bias, mean, inverse, num_channels, ACC, BLOCK_C)
    channel = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    is_channel = channel < num_channels
    part = tl.arange(0, BLOCK_S)
    known = (part < splits)[:, None] & is_channel[None, :]
    place = partial + part[:, None] * num_channels + channel[None, :]
    plain = tl.sum(tl.load(place, mask=known, other=0.0), axis=0)
    along = tl.sum(tl.load(place + splits * num_channels, mask=known, other=0.0), axis=0)
    if split == 0:
        tl.store(grad_bias + channel, plain.to(grad_bias.dtype.element_ty), mask=is_channel)
        tl.store(grad_weight + channel, along.to(grad_weight.dtype.element_ty), mask=is_channel)

    plain /= num_rows
    along /= num_rows
    start = split * rows_per_split
    end = tl.minimum(start + rows_per_split, num_rows)
    for current in tl.range(start, end, BLOCK_R, num_stages=STAGES):
        offsets, inside = _tile(current, end, num_channels, BLOCK_R, BLOCK_C)
        gradient, normalized = _before_activation(
            grad_activated, total, offsets, inside, mean, inverse, scale, shift, SLOPE, ACC
        )
        gradient = (gradient - plain[None, :] - normalized * along[None, :]) * scale[None, :]
        if grad_total is not None:
            gradient += tl.load(grad_total + offsets, mask=inside, other=0.0).to(ACC)
        tl.store(grad_x + offsets, gradient.to(grad_x.dtype.element_ty), mask=inside)


def _rows_first(images: Tensor) -> Tensor:
    return images.contiguous(memory_format=torch.channels_last)


def _configuration(images: Tensor, arch: int | None) -> tuple[int, int, BatchNormConfig]:
    """Rows, channels, and how they are divided."""
    channels = images.shape[1]
    rows = images.numel() // channels
    arch = architecture(images) if arch is None else arch
    return rows, channels, batch_norm_config(rows, channels, images.dtype, arch)


def batch_norm_forward(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    num_batches_tracked: Tensor | None,
    momentum: float,
    eps: float,
    negative_slope: float,
    *,
    arch: int | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Activated [N,C,H,W], the sum likewise (empty without a residual), mean and inverse deviation [C].

    ``arch``: the architecture to configure for; None for the device's.
    """
    rows, channels, config = _configuration(x, arch)
    dtype = accumulator_dtype(x.dtype)
    x = _rows_first(x)
    total = x.new_empty(0) if residual is None else torch.empty_like(x)
    activated = torch.empty_like(x)
    mean, inverse = x.new_empty(channels, dtype=dtype), x.new_empty(channels, dtype=dtype)
    partial = x.new_empty(2, config.splits, channels, dtype=dtype)
    shared = {
        "num_warps": config.num_warps,
        "maxnreg": MAX_REGISTERS,
        "ACC": TRITON_DTYPE[dtype],
        "STAGES": config.num_stages,
    }
    shared |= {"BLOCK_R": config.block_rows, "BLOCK_C": config.block_channels}
    sizes = rows, channels, config.rows_per_split
    launch(
        _moments_kernel,
        config.grid,
        x,
        None if residual is None else _rows_first(residual),
        None if residual is None else total,
        partial,
        *sizes,
        **shared,
    )
    launch(
        _normalize_kernel,
        config.grid,
        x if residual is None else total,
        weight.contiguous(),
        bias.contiguous(),
        partial,
        activated,
        mean,
        inverse,
        running_mean,
        running_var,
        num_batches_tracked,
        *sizes,
        MOMENTUM=momentum,
        EPS=eps,
        SLOPE=negative_slope,
        BLOCK_S=triton.next_power_of_2(config.splits),
        **shared,
    )
    return activated, total, mean, inverse


def batch_norm_backward(
    grad_activated: Tensor,
    grad_total: Tensor | None,
    total: Tensor,
    weight: Tensor,
    bias: Tensor,
    mean: Tensor,
    inverse: Tensor,
    negative_slope: float,
    *,
    arch: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x (and the residual), weight and bias; ``grad_total`` is what reaches the sum from elsewhere."""
    rows, channels, config = _configuration(total, arch)
    total, grad_activated = _rows_first(total), _rows_first(grad_activated)
    grad_x = torch.empty_like(total)
    grad_weight, grad_bias = weight.new_empty(channels), bias.new_empty(channels)
    partial = mean.new_empty(2, config.splits, channels)
    vectors = weight.contiguous(), bias.contiguous(), mean, inverse
    shared = {
        "num_warps": config.num_warps,
        "maxnreg": MAX_REGISTERS,
        "ACC": TRITON_DTYPE[mean.dtype],
        "STAGES": config.num_stages,
    }
    shared |= {"BLOCK_R": config.block_rows, "BLOCK_C": config.block_channels, "SLOPE": negative_slope}
    sizes = rows, channels, config.rows_per_split
    launch(_gradient_sums_kernel, config.grid, grad_activated, total, *vectors, partial, *sizes, **shared)
    launch(
        _input_gradient_kernel,
        config.grid,
        grad_activated,
        None if grad_total is None else _rows_first(grad_total),
        total,
        *vectors,
        partial,
        grad_x,
        grad_weight,
        grad_bias,
        *sizes,
        BLOCK_S=triton.next_power_of_2(config.splits),
        **shared,
    )
    return grad_x, grad_weight, grad_bias


def _compile(arch: int, images: int, channels: int, size: int, dtype: torch.dtype, *, residual: bool) -> None:
    """BatchNorm with LeakyReLU, both directions, at the input of a layer."""
    meta = functools.partial(torch.empty, device="meta")
    x = meta(images, channels, size, size, dtype=dtype).to(memory_format=torch.channels_last)
    statistics = meta(channels), meta(channels), meta((), dtype=torch.int64)
    weight, bias, other = meta(channels), meta(channels), x if residual else None
    activated, _, *vectors = batch_norm_forward(x, other, weight, bias, *statistics, 0.001, 1e-5, 0.1, arch=arch)
    batch_norm_backward(activated, other, x, weight, bias, *vectors, 0.1, arch=arch)


def aot_subjects() -> dict[str, Callable[[int], None]]:
    """The launches that `kernels.aot` compiles, by name."""
    layers = ((16, 32, False), (32, 32, True), (128, 8, True), (640, 8, False), (33, 7, True))
    return {
        f"batch-norm-320x{channels}x{size}-{str(dtype).removeprefix('torch.')}": functools.partial(
            _compile, images=320, channels=channels, size=size, dtype=dtype, residual=residual
        )
        for dtype in (torch.float32, torch.bfloat16, torch.float16)
        for channels, size, residual in layers
    }
