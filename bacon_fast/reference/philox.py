"""Counter-based uniform numbers, the same on every device: Philox4x32-10 (Salmon et al., SC 2011).

The bits are those of `bacon_fast.data.philox`, which serves the augmentation; the heads draw them in their kernels.
"""

import torch
from torch import Tensor

MASK = 0xFFFFFFFF
MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
KEY_INCREMENTS = (0x9E3779B9, 0xBB67AE85)


def philox_uniform(seed: int, step: Tensor, stream: int, slots: Tensor) -> Tensor:
    """One float32 in [0, 1) per slot, a multiple of 2^-24: the upper bits of word 0 at counter (slot, step, stream, 0).

    Args:
        seed: integer in [0, 2^64), the key.
        step: 0-d int64, modulo 2^32.
        stream: what the draw is for, in [0, 2^32).
        slots: [N] int64, modulo 2^32.
    """
    c0, c1 = slots & MASK, (step & MASK).expand_as(slots)
    c2, c3 = torch.full_like(slots, stream), torch.zeros_like(slots)
    k0, k1 = seed & MASK, seed >> 32
    for _ in range(10):
        # A product of two 32-bit numbers wraps around in int64, but both of its halves keep the right bits.
        p0, p1 = c0 * MULTIPLIERS[0], c2 * MULTIPLIERS[1]
        c0, c1, c2, c3 = ((p1 >> 32) & MASK) ^ c1 ^ k0, p1 & MASK, ((p0 >> 32) & MASK) ^ c3 ^ k1, p0 & MASK
        k0, k1 = (k0 + KEY_INCREMENTS[0]) & MASK, (k1 + KEY_INCREMENTS[1]) & MASK
    return (c0 >> 8).float() * 2.0**-24
