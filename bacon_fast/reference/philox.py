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


def philox(seed: int, step: Tensor, stream: int, slots: Tensor, words: int) -> Tensor:
    """int64 [N, words]: words of slots [N], from counters (slot, step, stream, block) of four words each.

    Args:
        seed: integer in [0, 2^64), the key.
        step: 0-d int64, modulo 2^32.
        stream: what the draw is for, in [0, 2^32).
        slots: [N] int64, modulo 2^32.
        words: number of words a slot, at least 1.
    """
    blocks = torch.arange((words + 3) // 4, device=slots.device)
    counter = (slots[:, None] & MASK, step & MASK, torch.full_like(blocks, stream), blocks)
    return philox4x32(counter, (seed & MASK, seed >> 32)).flatten(1)[:, :words]


def sort_keys(seed: int, step: Tensor, stream: int, count: int) -> Tensor:
    """int64 [count]: 63 bits of the first two words of slots 0 to count - 1, by which to sort them into a random order.

    Args: as in `philox`.
    """
    words = philox(seed, step, stream, torch.arange(count, device=step.device), 2)
    return (words[:, 0] << 31) | (words[:, 1] >> 1)


def philox_uniform(seed: int, step: Tensor, stream: int, slots: Tensor) -> Tensor:
    """One float32 in [0, 1) per slot: `to_uniform` of the first word of `philox`, with the same arguments."""
    return to_uniform(philox(seed, step, stream, slots, 1)[:, 0], torch.float32)


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
