"""Launch configurations of the kernels: pure functions of shape, dtype and architecture.

`python -m bacon_fast.kernels.aot` shows that the tiles fit: no spilled register, shared memory within the limit, for
every loss and padded dimension.
"""

from dataclasses import dataclass

import torch

# Streaming multiprocessors of the usual card of an architecture: so many programs fill it.
MULTIPROCESSORS = {80: 108, 86: 84, 89: 128, 90: 132, 100: 148, 103: 148, 120: 170}
INTERPRETER = 0  # the "architecture" of Triton's interpreter, where small tiles let small inputs span several
MAX_DIM = 512  # the most elements of a vector that a program can keep


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


def tile_config(
    kernel: str, resident: int, streamed: int, dim: int, dtype: torch.dtype, input_precision: str, arch: int
) -> TileConfig:
    """Tiles for ``resident`` vectors, each against ``streamed`` others, of ``dim`` elements.

    ``kernel``: "statistics"; "mean", which also keeps a sum of vectors [block_resident, block_dim]; or "gradient",
    which keeps such a sum and more scalars.
    """
    padded = block_dim(dim)
    num_warps = 8
    if arch == INTERPRETER:
        block_resident, block_streamed, block_slice, num_warps = 32, 32, min(padded, 32), 1
    elif dtype in (torch.float32, torch.float64) and input_precision != "tf32":
        # Exact float32 products hold several copies of their operands in registers.
        block_resident, block_streamed = (16 if padded > 256 else 32), (16 if kernel == "gradient" else 32)
        block_slice = min(padded, 32)
    elif padded > 256:
        block_resident, block_streamed, block_slice = 32, 32, 32
    elif padded > 128:
        block_resident, block_streamed, block_slice, num_warps = 32, 32, 64, 4
    elif 90 <= arch < 120:  # tensor cores work by warpgroup, on 64 rows
        block_resident, block_streamed, block_slice = (128, 64, padded) if kernel == "mean" else (64, 32, padded)
    else:
        block_resident, block_streamed, block_slice = (64 if kernel == "mean" else 32), 64, padded
    # Few resident blocks leave the card idle: the streamed vectors are divided too, at least four blocks a split.
    fill, least, num_stages = (4, 1, 1) if arch == INTERPRETER else (MULTIPROCESSORS.get(arch, 132), 4, 2)
    programs, blocks = -(-resident // block_resident), -(-streamed // block_streamed)
    splits = max(1, min(fill // max(1, programs), blocks // least))
    return TileConfig(block_resident, block_streamed, block_slice, padded, splits, num_warps, num_stages)


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
