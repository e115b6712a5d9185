"""The Philox4x32-10 block function (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011) in torch."""

import torch
from torch import Tensor

MASK = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_INCREMENTS = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10


def philox4x32(counter: tuple[Tensor, ...], key: tuple[int, int]) -> Tensor:
    """Random words of counters.

    Args:
        counter: four int64 tensors of broadcastable shapes S with values in [0, 2^32).
        key: two integers in [0, 2^32).

    Returns:
        int64 [*S, 4] with values in [0, 2^32).
    """
    c0, c1, c2, c3 = torch.broadcast_tensors(*counter)
    k0, k1 = key
    for _ in range(_ROUNDS):
        # 32 x 32 -> 64 bit products: int64 wraps around, and both halves of the wrapped product are the right bits.
        p0, p1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1, c2, c3 = ((p1 >> 32) & MASK) ^ c1 ^ k0, p1 & MASK, ((p0 >> 32) & MASK) ^ c3 ^ k1, p0 & MASK
        k0, k1 = (k0 + _KEY_INCREMENTS[0]) & MASK, (k1 + _KEY_INCREMENTS[1]) & MASK
    return torch.stack((c0, c1, c2, c3), dim=-1)


def philox_uniform(seed: int, step: Tensor, stream: int, slots: Tensor) -> Tensor:
    """One float32 in [0, 1) per slot, a multiple of 2^-24: the upper bits of word 0 at counter (slot, step, stream, 0).

    Args:
        seed: integer in [0, 2^64), the key.
        step: 0-d int64, modulo 2^32.
        stream: what the draw is for, in [0, 2^32).
        slots: [N] int64, modulo 2^32.
    """
    counter = (slots & MASK, step & MASK, torch.full_like(slots, stream), torch.zeros_like(slots))
    return (philox4x32(counter, (seed & MASK, seed >> 32))[:, 0] >> 8).float() * 2.0**-24
