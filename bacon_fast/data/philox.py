"""Counter-based random numbers: Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011).

A draw is a pure function of (seed, step, view, slot). It is therefore the same on a CPU, on a GPU and in the native
kernels, needs no state, and a resumed run continues exactly where it stopped.
"""

from enum import IntEnum

import torch
from torch import Tensor

from bacon_fast.ops.philox import philox, sort_keys
from bacon_fast.reference.philox import to_range, to_uniform

__all__ = ["Stream", "philox", "sort_keys", "to_range", "to_uniform", "uniform"]


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
    VALIDATION = 21
    CACHED_WEAK = 22  # the views of cached features (engine/features.py); their step is the view's number
    CACHED_STRONG = 23


def uniform(seed: int, step: int | Tensor, view: int, slot: Tensor, *, dtype: torch.dtype = torch.float32) -> Tensor:
    """One number in [0, 1) per slot, shape [N]: `to_uniform` of the first word of `philox` (arguments there)."""
    return to_uniform(philox(seed, step, view, slot, 1)[:, 0], dtype)
