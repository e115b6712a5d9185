"""Launch configurations of the contrastive kernels: pure functions of shape, dtype and architecture."""

from dataclasses import dataclass

import torch

# Streaming multiprocessors of the usual card of an architecture: how many programs fill it.
MULTIPROCESSORS = {80: 108, 86: 84, 89: 128, 90: 132, 100: 148, 103: 148, 120: 170}
INTERPRETER = 0  # the "architecture" of Triton's interpreter, where small tiles let small inputs span several


@dataclass(frozen=True)
class TileConfig:
    """How a kernel tiles similarities: a program keeps one block resident and streams the blocks of its split past it."""

    block_resident: int
    block_streamed: int
    block_dim: int
    splits: int
    num_warps: int
    num_stages: int


def next_power_of_two(value: int) -> int:
    return 1 << max(value - 1, 0).bit_length()


def block_dim(dim: int) -> int:
    """The padded feature size; a tensor-core product needs 16."""
    return max(16, next_power_of_two(dim))


def rows_per_program(dim: int) -> int:
    """Block of the kernels that treat vectors one by one: about 4096 elements a program."""
    return max(1, min(64, 4096 // block_dim(dim)))


def tile_config(resident: int, streamed: int, dim: int, dtype: torch.dtype, arch: int, accumulates: bool) -> TileConfig:
    """Tiles for ``resident`` vectors, each against ``streamed`` others, of ``dim`` elements.

    ``accumulates``: the kernel also keeps a sum of vectors [block_resident, block_dim] in registers.
    """
    padded = block_dim(dim)
    if arch == INTERPRETER:
        block_resident, block_streamed, num_warps, num_stages = 16, 16, 1, 1
        fill = 4
    else:
        block_resident, block_streamed, num_warps, num_stages = 64, 64, 4, 2
        fill = MULTIPROCESSORS.get(arch, 132)
    programs = -(-resident // block_resident)
    tiles = -(-streamed // block_streamed)
    # Few resident blocks leave the card idle: the streamed side is divided too, at least four tiles a split.
    splits = max(1, min(fill // max(programs, 1), tiles // 4))
    return TileConfig(block_resident, block_streamed, padded, splits, num_warps, num_stages)
