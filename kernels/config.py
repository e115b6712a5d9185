"""Launch configurations of the kernels: pure functions of shape, dtype and architecture.

`python -m bacon_fast.kernels.aot` shows that the tiles fit: no spilled register, shared memory within the limit, for
every loss and padded dimension.
"""

import os
from dataclasses import dataclass

import torch

# Streaming multiprocessors of the usual card of an architecture: so many programs fill it.
MULTIPROCESSORS = {80: 108, 86: 84, 89: 128, 90: 132, 100: 148, 103: 148, 120: 170}
INTERPRETER = 0  # the "architecture" of Triton's interpreter, where small tiles let small inputs span several
MAX_DIM = 512  # the most elements of a vector that a program can keep
MAX_BLOCK = 128  # the most vectors of a tile: tiles may be read as a whole
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # Triton reads it when it is imported, so a constant


@dataclass(frozen=True)
class TileConfig:
    """How a kernel tiles similarities: a program keeps one block resident and streams its split's blocks past it."""

    block_resident: int
    block_streamed: int
    block_slice: int  # elements of a vector that are multiplied at a time
    block_dim: int  # elements of a vector, padded
    splits: int
    num_warps: int
    num_stages: int


def block_dim(dim: int) -> int:
    """The padded size of a vector: a power of two, at least the 16 of a tensor-core product."""
    return max(16, 1 << max(dim - 1, 0).bit_length())


def rows_per_program(dim: int) -> int:
    """Block of the kernels that treat vectors one by one: about 1024 elements a program."""
    return min(32, 1024 // block_dim(dim))


def operand_shape(
    count: int, dim: int, dtype: torch.dtype, input_precision: str
) -> tuple[tuple[int, int, int], torch.dtype]:
    """Shape and dtype of the operands that products with vectors [count, dim] have: parts, padded count, padded dim.

    Tensor cores are fastest on 16-bit operands. float32 vectors become two float16 ones, of 11 bits each, whose three
    products are as exact as three TF32 products; or, where the caller allows TF32, one, which has TF32's 11 bits. For
    torch.mm ("ieee") they stay what they are, and float16 becomes float32, so that weights have its exponents.
    """
    if input_precision == "ieee" and dtype != torch.bfloat16:
        parts, operand = 1, torch.promote_types(dtype, torch.float32)
    elif dtype == torch.float32:
        parts, operand = (1 if input_precision == "tf32" else 2), torch.float16
    else:
        # The interpreter's product of bfloat16 is wrong (triton 3.6).
        parts, operand = 1, torch.float32 if dtype == torch.bfloat16 and INTERPRETED else dtype
    return (parts, -(-count // MAX_BLOCK) * MAX_BLOCK, block_dim(dim)), operand


def tile_config(
    kernel: str,
    resident: int,
    streamed: int,
    dim: int,
    dtype: torch.dtype,
    input_precision: str,
    arch: int,
    has_positives: bool = False,
) -> TileConfig:
    """Tiles for ``resident`` vectors, each against ``streamed`` others, of ``dim`` elements.

    ``kernel``: "statistics"; "mean", which also keeps a sum of vectors [block_resident, block_dim]; or "gradient",
    which keeps such a sum and more scalars. ``has_positives``: columns may be positives, which takes more registers.
    """
    padded = block_dim(dim)
    width = operand_shape(0, dim, dtype, input_precision)[0][0] * padded  # elements of all operands of a vector
    block_slice, num_warps, num_stages = padded, 8, 2
    if arch == INTERPRETER:
        block_resident, block_streamed, block_slice, num_warps, num_stages = 32, 32, min(padded, 32), 1, 1
    elif dtype == torch.float64:
        block_resident, block_streamed = (16 if padded > 256 else 32), (16 if kernel == "gradient" else 32)
        block_slice = min(padded, 32)
    elif 90 <= arch < 120 and padded <= 128:
        # Tensor cores work by groups of four warps, on 64 rows each, and want wide tiles: as wide as registers allow.
        block_resident, num_warps = (128, 8) if resident > 256 else (64, 4)
        if kernel == "mean":
            # sm_100 keeps more of a product in shared memory: float32's two parts of 128 vectors do not fit there.
            block_streamed = min(block_resident, 64) if arch >= 100 and width > 128 else block_resident
        else:
            block_streamed = 32 if has_positives or (kernel == "gradient" and width > 128) else 64
    elif 90 <= arch < 120 and width <= (256 if dtype == torch.float32 and kernel == "gradient" else 512):
        block_resident = 64
        block_streamed = 64 if width <= 256 and not has_positives else 32
        if width > 256 and kernel == "gradient":
            block_streamed = 16
    elif padded <= 128:
        few = width > 128 or (kernel == "gradient" and has_positives)
        block_resident, block_streamed, num_warps = (32 if few else 64), 32, 4
        if arch >= 120 and dtype != torch.bfloat16 and kernel == "gradient":  # four warps spill a register there
            num_warps = 8
    else:
        block_resident, block_streamed, block_slice = (16 if kernel == "gradient" and width > 512 else 32), 32, 64
    # Few resident blocks leave the card idle: the streamed vectors are divided too, at least four blocks a split.
    fill, least = (4, 1) if arch == INTERPRETER else (MULTIPROCESSORS.get(arch, 132), 4)
    programs, blocks = -(-resident // block_resident), -(-streamed // block_streamed)
    splits = max(1, min(fill // max(1, programs), blocks // least))
    return TileConfig(block_resident, block_streamed, block_slice, padded, splits, num_warps, num_stages)


def chunk_columns(rows: int, columns: int, arch: int) -> int:
    """How many columns' products with all rows are made at a time: 16 MB, which stay in the L2 cache."""
    size = 64 if arch == INTERPRETER else max(MAX_BLOCK, 2**22 // max(rows, 1) // MAX_BLOCK * MAX_BLOCK)
    return min(size, max(MAX_BLOCK, -(-columns // MAX_BLOCK) * MAX_BLOCK))


def chunk_config(rows: int, columns: int, dim: int, arch: int) -> TileConfig:
    """Tiles of the kernel that reads the products of a chunk: each program a few rows, and enough programs."""
    block_resident, block_streamed = (16, 32) if arch == INTERPRETER else (8, 256)
    programs, blocks = -(-rows // block_resident), -(-columns // block_streamed)
    fill = 4 if arch == INTERPRETER else 4 * MULTIPROCESSORS.get(arch, 132)
    splits = max(1, min(fill // max(1, programs), blocks))
    return TileConfig(block_resident, block_streamed, block_dim(dim), block_dim(dim), splits, 4, 2)


@dataclass(frozen=True)
class BaconStepConfig:
    """Tiles of BaCon's step: blocks of rows and columns, of classes, and of rows that are scanned as plain vectors."""

    block_rows: int
    block_columns: int
    block_slice: int  # elements of a vector that are multiplied at a time
    block_dim: int  # elements of a vector, padded
    block_classes: int  # a row's logits are read this many at a time
    block_scan: int
    splits: int  # of the columns, in the first launch
    compare_warps: int  # of the first launch
    update_warps: int  # of the second


def bacon_step_config(
    rows: int, dim: int, num_classes: int, dtype: torch.dtype, input_precision: str, arch: int
) -> BaconStepConfig:
    """Small blocks: a batch has few rows, and a launch takes as long as its slowest program."""
    padded = block_dim(dim)
    exact = dtype in (torch.float32, torch.float64) and input_precision != "tf32"
    block, block_classes, block_scan = 16, min(64, block_dim(num_classes)), 256
    compare_warps, update_warps = 4, 8 if padded <= 32 else 4
    block_slice = min(padded, 16 if padded > 64 else 32) if exact else padded
    if arch == INTERPRETER:
        block, block_classes, block_scan, compare_warps, update_warps = 32, 32, 64, 1, 1
    programs = -(-rows // block)
    splits = max(1, min(programs, (4 if arch == INTERPRETER else MULTIPROCESSORS.get(arch, 132)) // programs))
    return BaconStepConfig(
        block, block, block_slice, padded, block_classes, block_scan, splits, compare_warps, update_warps
    )


@dataclass(frozen=True)
class BaconPhasesConfig:
    """Tiles of BaCon's step by phases: rows a program by phase, and what a program holds at once."""

    rank_rows: int
    bank_rows: int
    group_rows: int
    gradient_rows: int
    block_rows: int  # of a tile of pairs
    block_columns: int
    gradient_columns: int
    block_slice: int  # elements of a vector that are multiplied at a time
    block_dim: int  # elements of a vector, padded
    block_classes: int  # all of them, padded
    block_all: int  # all rows, padded
    block_centers: int  # elements of centers a program
    splits: int  # of the columns, in the comparison
    rank_warps: int
    num_warps: int  # of the other phases


def bacon_phases_config(
    rows: int, dim: int, num_classes: int, dtype: torch.dtype, input_precision: str, arch: int
) -> BaconPhasesConfig:
    """Many small programs: the time of a phase is that of its longest chain of reads, not of its bytes.

    A tile of pairs is read once: with few rows all tiles are programs of their own, with many a program takes several
    of its row block, of which the third phase merges what up to eight splits have found.
    """
    padded, classes = block_dim(dim), block_dim(num_classes)
    exact = dtype in (torch.float32, torch.float64) and input_precision != "tf32"
    block_slice = min(padded, 32) if exact else padded
    rank_rows, rank_warps = (4 if classes <= 64 else 2), (1 if classes <= 128 else 4)
    bank_rows, group_rows, num_warps = 4, (2 if rows <= 512 else 4), 4
    block_rows, block_columns, gradient_columns = 16, 64, 64 if padded <= 32 else 32
    if arch == INTERPRETER:
        rank_rows = bank_rows = group_rows = block_columns = gradient_columns = 16
        rank_warps = num_warps = 1
    programs, tiles = -(-rows // block_rows), -(-rows // block_columns)
    most = 2 if arch == INTERPRETER else min(8, 2 * MULTIPROCESSORS.get(arch, 132) // programs)
    columns_a_split = -(-tiles // max(1, min(tiles, most)))
    return BaconPhasesConfig(
        rank_rows=rank_rows,
        bank_rows=bank_rows,
        group_rows=group_rows,
        gradient_rows=16,
        block_rows=block_rows,
        block_columns=block_columns,
        gradient_columns=gradient_columns,
        block_slice=block_slice,
        block_dim=padded,
        block_classes=classes,
        block_all=block_dim(rows),
        block_centers=128,
        splits=-(-tiles // columns_a_split),
        rank_warps=rank_warps,
        num_warps=num_warps,
    )


@dataclass(frozen=True)
class BatchNormConfig:
    """How [rows, channels] are divided: a program treats one split of the rows of one channel block, tile by tile."""

    block_rows: int
    block_channels: int
    splits: int
    channel_blocks: int
    rows_per_split: int  # a multiple of block_rows; the last split may have fewer rows, but has some
    num_warps: int
    num_stages: int  # tiles that are on their way at a time

    @property
    def grid(self) -> tuple[int, int]:
        return self.splits, self.channel_blocks


def batch_norm_config(rows: int, channels: int, dtype: torch.dtype, arch: int) -> BatchNormConfig:
    """One program a multiprocessor: each merges the results of all splits, so many splits would cost twice.

    A thread has eight elements of a tile, 16 bytes in half precision. Tiles of three tensors are on their way at once,
    as many as fit into shared memory, of which some architectures have only 99 KiB.
    """
    block_channels, num_warps = min(32, block_dim(channels)), 16
    num_stages = {2: 4, 4: 3 if arch in (80, 90, 100, 103) else 2, 8: 2}[dtype.itemsize]
    block_rows, fill = 4096 // block_channels, MULTIPROCESSORS.get(arch, 132)
    if dtype == torch.float64:
        block_rows //= 2
    if arch == INTERPRETER:
        block_rows, block_channels, fill, num_warps, num_stages = 32, 16, 8, 1, 1
    channel_blocks, tiles = -(-channels // block_channels), -(-rows // block_rows)
    tiles_per_split = -(-tiles // max(1, min(fill // channel_blocks, tiles)))
    return BatchNormConfig(
        block_rows,
        block_channels,
        -(-tiles // tiles_per_split),
        channel_blocks,
        tiles_per_split * block_rows,
        num_warps,
        num_stages,
    )
