"""Counter-based random numbers: Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011).

A draw is a pure function of (seed, step, view, slot). It is therefore the same on a CPU, on a GPU and in the native
kernels, needs no state, and a resumed run continues exactly where it stopped.
"""

from enum import IntEnum

import torch
from torch import Tensor

from bacon_fast.reference.philox import MASK, philox4x32


class Stream(IntEnum):
    """What a draw is for: the `view` part of a counter, so that no two uses share random bits.

    Recorded runs and split files depend on these numbers: append new ones, never renumber.
    """

    LABELED_WEAK = 0
    UNLABELED_WEAK = 1
    STRONG_0 = 2
    STRONG_1 = 3
    LABELED_STRONG = 4
    ROTATION = 5
    MIXUP = 6
    ABC_LABELED = 7
    ABC_UNLABELED = 8
    SAMPLER_LABELED = 9
    SAMPLER_UNLABELED = 10
    SPLIT = 11
    TRAIN_TEST = 12
    SSCL_KEYS = 13
    SSCL_MIXTURE = 14
    SIMCLR = 15
    SSCL_SHUFFLE = 16
    SAMPLER_BALANCED = 17
    COSSL_BLEND = 18
    COSSL_WARMUP = 19


def philox(seed: int, step: int | Tensor, view: int, slot: Tensor, words: int) -> Tensor:
    """Random 32-bit words of each slot.

    Key: (low, high) half of `seed`. Counter: (slot, step, view, block), where block b gives words 4b to 4b + 3; slot
    and step count modulo 2^32.

    Args:
        seed: integer in [0, 2^64).
        step: integer in [0, 2^32), or a 0-d int64 tensor on the device of `slot` (never read by the host).
        view: a `Stream`, or any integer in [0, 2^32).
        slot: int64 [N].
        words: number of words per slot, at least 1.

    Returns:
        int64 [N, words] with values in [0, 2^32).

    Raises:
        TypeError, ValueError: an argument that is not as described.
    """
    check_seed(seed)
    view = int(view)  # torch.compile does not compare members of an enumeration
    if not 0 <= view <= MASK:
        raise ValueError(f"view: expected an integer in [0, 2^32), found {view}")
    if slot.dtype != torch.int64 or slot.dim() != 1:
        raise TypeError(f"slot: expected int64 [N], found {slot.dtype} {list(slot.shape)}")
    if words < 1:
        raise ValueError(f"words: expected at least 1, found {words}")
    step = as_step_tensor(step, slot.device)
    blocks = torch.arange((words + 3) // 4, device=slot.device)
    counter = (slot[:, None] & MASK, step & MASK, torch.full_like(blocks, view), blocks)
    return philox4x32(counter, (seed & MASK, seed >> 32)).flatten(1)[:, :words]


def uniform(seed: int, step: int | Tensor, view: int, slot: Tensor, *, dtype: torch.dtype = torch.float32) -> Tensor:
    """One number in [0, 1) per slot, shape [N]: `to_uniform` of the first word of `philox` (arguments there)."""
    return to_uniform(philox(seed, step, view, slot, 1)[:, 0], dtype)


def to_uniform(words: Tensor, dtype: torch.dtype = torch.float64) -> Tensor:
    """Words in [0, 2^32) to numbers in [0, 1), exactly representable, so never rounded up to 1.

    float64 takes all 32 bits (word * 2^-32), float32 the upper 24 ((word >> 8) * 2^-24).
    """
    if dtype == torch.float64:
        return words.to(dtype) * 2.0**-32
    if dtype == torch.float32:
        return (words >> 8).to(dtype) * 2.0**-24
    raise TypeError(f"dtype: expected torch.float32 or torch.float64, found {dtype}")


def to_range(words: Tensor, n: int) -> Tensor:
    """Words in [0, 2^32) to integers in [0, n) by multiply and shift: int64, with bias below n / 2^32."""
    return (words * n) >> 32


def check_seed(seed: int) -> None:
    """Raises ValueError or TypeError unless `seed` is an integer in [0, 2^64)."""
    if not isinstance(seed, int):
        raise TypeError(f"seed: expected an integer, found {type(seed).__name__}")
    if not 0 <= seed < 2**64:
        raise ValueError(f"seed: expected an integer in [0, 2^64), found {seed}")


def as_step_tensor(step: int | Tensor, device: torch.device) -> Tensor:
    """A step counter as a 0-d int64 tensor on `device`; a tensor that is one already comes back as it is."""
    if not isinstance(step, Tensor):
        if not 0 <= step <= MASK:
            raise ValueError(f"step: expected an integer in [0, 2^32), found {step}")
        return torch.full((), step, dtype=torch.int64, device=device)  # a fill: no copy from the host
    if step.dim() != 0 or step.dtype != torch.int64 or step.device != device:
        raise ValueError(
            f"step: expected a 0-d int64 tensor on {device}, found {step.dtype} {list(step.shape)} on {step.device}"
        )
    return step
