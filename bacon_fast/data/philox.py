"""Counter-based random numbers: Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011).

A draw is a pure function of (seed, step, view, slot). It is therefore the same on a CPU, on a GPU and in the native
kernels, needs no state, and a resumed run continues exactly where it stopped.
"""

from enum import IntEnum

import torch
from torch import Tensor

from bacon_fast.ops.checks import as_step_tensor, check_seed
from bacon_fast.reference import philox as reference
from bacon_fast.reference.philox import MASK, to_range, to_uniform

__all__ = ["Stream", "philox", "to_range", "to_uniform", "uniform"]


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
    LABELED_STRONG_VIEW = 20  # of the batch's own labeled images; LABELED_STRONG is of those drawn class by class


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
    return reference.philox(seed, as_step_tensor(step, slot.device), view, slot, words)


def uniform(seed: int, step: int | Tensor, view: int, slot: Tensor, *, dtype: torch.dtype = torch.float32) -> Tensor:
    """One number in [0, 1) per slot, shape [N]: `to_uniform` of the first word of `philox` (arguments there)."""
    return to_uniform(philox(seed, step, view, slot, 1)[:, 0], dtype)
