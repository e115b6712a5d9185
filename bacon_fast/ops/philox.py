"""Counter-based random words, one launch a draw: `philox` and `sort_keys`."""

from typing import Any

import torch
from torch import Tensor

from ..reference import philox as reference
from .backends import BACKENDS, Backend, always, choose_backend, why_not_cpp, why_not_cuda
from .checks import as_step_tensor, check_seed


def philox(seed: int, step: int | Tensor, view: int, slot: Tensor, words: int, *, backend: str | None = None) -> Tensor:
    """Random 32-bit words of each slot.

    Key: (low, high) half of `seed`. Counter: (slot, step, view, block), where block b gives words 4b to 4b + 3; slot
    and step count modulo 2^32.

    Args:
        seed: integer in [0, 2^64).
        step: integer in [0, 2^32), or a 0-d int64 tensor on the device of `slot` (never read by the host).
        view: a `data.philox.Stream`, or any integer in [0, 2^32).
        slot: int64 [N].
        words: number of words per slot, at least 1.
        backend: None for the best one, "reference", "cpp" or "cuda"; all of them give the same bits.

    Returns:
        int64 [N, words] with values in [0, 2^32).

    Raises:
        TypeError, ValueError: an argument that is not as described.
        RuntimeError: the named backend is not available here.

        >>> philox(0, 0, 0, torch.tensor([0]), 2)  # Random123's first known answer: 6627e8d5 e169c58d
        tensor([[1713891541, 3781805453]])
    """
    view = _check_counter(seed, view)
    if slot.dtype != torch.int64 or slot.dim() != 1:
        raise TypeError(f"slot: expected int64 [N], found {slot.dtype} {list(slot.shape)}")
    if words < 1:
        raise ValueError(f"words: expected at least 1, found {words}")
    run = choose_backend("philox", backend, slot)
    return run(seed, as_step_tensor(step, slot.device), view, slot, words)


def sort_keys(seed: int, step: Tensor, view: int, count: int, *, backend: str | None = None) -> Tensor:
    """Keys of slots 0 to count - 1, whose order is a random one: 63 bits of the slot's first two words.

    Args:
        seed, view, backend: as in `philox`.
        step: 0-d int64, on the device where the keys are wanted.
        count: number of keys, at least 0.

    Returns:
        int64 [count] with values in [0, 2^63).

        >>> sort_keys(0, torch.tensor(0), 0, 1).item() == (0x6627E8D5 << 31) | (0xE169C58D >> 1)
        True
    """
    view = _check_counter(seed, view)
    if count < 0:
        raise ValueError(f"count: expected at least 0, found {count}")
    run = choose_backend("philox_sort_keys", backend, step)
    return run(seed, as_step_tensor(step, step.device), view, count)


def _check_counter(seed: int, view: int) -> int:
    check_seed(seed)
    view = int(view)  # torch.compile does not compare members of an enumeration
    if not 0 <= view <= reference.MASK:
        raise ValueError(f"view: expected an integer in [0, 2^32), found {view}")
    return view


torch.library.define("bacon_fast::philox", "(int seed, Tensor step, int stream, Tensor slots, int words) -> Tensor")
torch.library.define("bacon_fast::philox_sort_keys", "(int seed, Tensor step, int stream, int count) -> Tensor")


@torch.library.register_fake("bacon_fast::philox")
def _(seed: int, step: Tensor, stream: int, slots: Tensor, words: int) -> Tensor:
    return slots.new_empty(slots.shape[0], words)


@torch.library.register_fake("bacon_fast::philox_sort_keys")
def _(seed: int, step: Tensor, stream: int, count: int) -> Tensor:
    return step.new_empty(count)


def _run(seed: int, *rest: Any) -> Tensor:
    return torch.ops.bacon_fast.philox(seed - (seed >> 63 << 64), *rest)  # the same 64 bits as a signed number


def _run_sort_keys(seed: int, *rest: Any) -> Tensor:
    return torch.ops.bacon_fast.philox_sort_keys(seed - (seed >> 63 << 64), *rest)


BACKENDS["philox"] = {
    "cpp": Backend(_run, why_not_cpp),
    "cuda": Backend(_run, why_not_cuda),
    "reference": Backend(reference.philox, always),
}
BACKENDS["philox_sort_keys"] = {
    "cpp": Backend(_run_sort_keys, why_not_cpp),
    "cuda": Backend(_run_sort_keys, why_not_cuda),
    "reference": Backend(reference.sort_keys, always),
}
