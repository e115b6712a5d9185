"""Shadow memory for Triton's interpreter: what a GPU does in any order, and the interpreter in one, becomes visible.

While a `ShadowMemory` watches, programs of a launch run in a random order, what is allocated holds NaN and integers
that are no index, and every load, store and atomic is remembered by address. Reported are

- accesses out of the bounds of the tensors that the launch was given;
- races: an address that one program writes and another one accesses, unless both by atomics. What the program that
  drew the last ticket (an atomic that acquires) does after it comes after all others' work;
- missing barriers: an address that a program writes and accesses again without a barrier in between. A value may be
  held by several warps, so the second access may come first;
- stores of several elements to one address.
"""

import contextlib
import random
import sys
from collections import Counter
from collections.abc import Iterator
from typing import NamedTuple
from unittest import mock

import numpy as np
import torch
from triton.runtime import interpreter

MOST_REPORTED = 5  # addresses of a launch, by kind


class Access(NamedTuple):
    """One load, store or atomic of one program."""

    addresses: np.ndarray
    program: int
    is_last: bool  # after the last ticket was drawn
    interval: int  # barriers before it
    writes: bool
    atomic: bool
    place: str


def _place() -> str:
    """Function and line of the kernel that accesses memory."""
    frame = sys._getframe(2)
    while frame.f_globals.get("__name__", "").split(".")[0] in ("triton", "shadow_memory") or not frame.f_lineno:
        frame = frame.f_back
    return f"{frame.f_code.co_name}:{frame.f_lineno}"


class ShadowMemory:
    """What launches did to memory.

    Args:
        seed: of the order of programs.
        barriers: False ignores them, to see that they are needed.

    Attributes:
        findings: description -> how often.
        launches: kernel's name -> how many.
        programs: kernel's name -> most programs of a launch.
    """

    def __init__(self, seed: int = 0, barriers: bool = True) -> None:
        self.findings: Counter[str] = Counter()
        self.launches: Counter[str] = Counter()
        self.programs: Counter[str] = Counter()
        self._barriers, self._random = barriers, random.Random(seed)
        self._accesses: list[Access] | None = None  # None between launches

    @contextlib.contextmanager
    def watch(self) -> Iterator["ShadowMemory"]:
        """Every launch within is watched."""
        builder, executor, shadow = interpreter.InterpreterBuilder, interpreter.GridExecutor, self
        load, store, atomic = builder.create_masked_load, builder.create_masked_store, builder.create_atomic_rmw
        barrier, set_dim, set_index = builder.create_barrier, builder.set_grid_dim, builder.set_grid_idx
        run, new_empty, empty_like = executor.__call__, torch.Tensor.new_empty, torch.empty_like

        def shadowed_load(self, pointers, mask, *others):
            shadow._note(pointers, mask, writes=False)
            return load(self, pointers, mask, *others)

        def shadowed_store(self, pointers, value, mask, *others):
            shadow._note(pointers, mask, writes=True)
            return store(self, pointers, value, mask, *others)

        def shadowed_atomic(self, operation, pointers, value, mask, order, scope):
            shadow._note(pointers, mask, writes=True, atomic=True)
            result = atomic(self, operation, pointers, value, mask, order, scope)
            if "ACQ" in str(order).upper() and result.data.size == 1:
                shadow._is_last |= result.data.item() == len(shadow._order) - 1
            return result

        def shadowed_barrier(self, *arguments):
            shadow._interval += shadow._barriers
            return barrier(self, *arguments)

        def shadowed_dim(self, *dim):
            shadow._order = list(np.ndindex(dim))
            shadow._random.shuffle(shadow._order)
            shadow._program = -1
            return set_dim(self, *dim)

        def shadowed_index(self, *index):
            shadow._program += 1
            shadow._interval, shadow._is_last = 0, False
            return set_index(self, *shadow._order[shadow._program])

        def shadowed_run(self, *arguments, **options):
            shadow._begin(self.fn.__name__, [*arguments, *options.values()])
            try:
                run(self, *arguments, **options)
                shadow._judge()
            finally:
                shadow._accesses = None

        def poisoned_new_empty(self, *size, **options):
            return _poison(new_empty(self, *size, **options))

        def poisoned_empty_like(tensor, **options):
            return _poison(empty_like(tensor, **options))

        with (
            mock.patch.object(builder, "create_masked_load", shadowed_load),
            mock.patch.object(builder, "create_masked_store", shadowed_store),
            mock.patch.object(builder, "create_atomic_rmw", shadowed_atomic),
            mock.patch.object(builder, "create_barrier", shadowed_barrier),
            mock.patch.object(builder, "set_grid_dim", shadowed_dim),
            mock.patch.object(builder, "set_grid_idx", shadowed_index),
            mock.patch.object(executor, "__call__", shadowed_run),
            mock.patch.object(torch.Tensor, "new_empty", poisoned_new_empty),
            mock.patch.object(torch, "empty_like", poisoned_empty_like),
        ):
            yield self

    def _begin(self, kernel: str, arguments: list) -> None:
        """Remembers where the launch's tensors lie."""
        ranges = []
        for tensor in arguments:
            if isinstance(tensor, torch.Tensor) and tensor.numel():
                last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride()))
                ranges.append((tensor.data_ptr(), tensor.data_ptr() + (last + 1) * tensor.element_size()))
        merged: list[list[int]] = []
        for start, end in sorted(ranges):  # views of one tensor overlap
            if merged and start < merged[-1][1]:
                merged[-1][1] = max(end, merged[-1][1])
            else:
                merged.append([start, end])
        self._ranges = np.array(merged, dtype=np.int64).reshape(-1, 2)
        self._kernel, self._accesses = kernel, []
        self.launches[kernel] += 1

    def _note(self, pointers, mask, *, writes: bool, atomic: bool = False) -> None:
        if self._accesses is None:
            return
        kept = np.broadcast_to(mask.data, pointers.data.shape).astype(bool)
        addresses = pointers.data[kept].astype(np.int64)
        if not len(addresses):
            return
        size = np.dtype(interpreter._get_np_dtype(pointers.get_element_ty())).itemsize
        place, unique = _place(), np.unique(addresses)
        found = np.searchsorted(self._ranges[:, 0], unique, side="right") - 1
        if ((found < 0) | (unique + size > self._ranges[np.maximum(found, 0), 1])).any():
            self.findings[f"{self._kernel}: out of bounds at {place}"] += 1
        if writes and not atomic and len(unique) != len(addresses):
            self.findings[f"{self._kernel}: several elements stored to one address at {place}"] += 1
        state = self._program, self._is_last, self._interval
        self._accesses.append(Access(unique, *state, writes, atomic, place))

    def _judge(self) -> None:
        """Races and missing barriers of a launch."""
        accesses = self._accesses
        self.programs[self._kernel] = max(self.programs[self._kernel], len(self._order))
        if not accesses:
            return
        address = np.concatenate([access.addresses for access in accesses])
        number = np.repeat(np.arange(len(accesses)), [len(access.addresses) for access in accesses])
        program, last, interval, writes, atomic = (
            np.array([getattr(access, name) for access in accesses])[number]
            for name in ("program", "is_last", "interval", "writes", "atomic")
        )
        self._conflicts("race", (address, last), program, number, writes, atomic)
        self._conflicts("no barrier", (address, last, program, interval), number, number, writes, atomic)

    def _conflicts(self, kind, keys, by, number, writes, atomic) -> None:
        """Elements of equal keys, of several ``by``, one a write, conflict unless all are atomic."""
        order = np.lexsort(keys[::-1])
        changed = np.any([np.diff(key[order]) != 0 for key in keys], axis=0)
        starts = np.concatenate([[0], np.flatnonzero(changed) + 1])
        several = np.minimum.reduceat(by[order], starts) != np.maximum.reduceat(by[order], starts)
        written = np.logical_or.reduceat(writes[order], starts)
        plain = ~np.logical_and.reduceat(atomic[order], starts)
        ends = np.append(starts[1:], len(order))
        for group in np.flatnonzero(several & written & plain)[:MOST_REPORTED]:
            involved = sorted({self._accesses[n].place for n in number[order][starts[group] : ends[group]]})
            self.findings[f"{self._kernel}: {kind} between {', '.join(involved)}"] += 1


def _poison(tensor: torch.Tensor) -> torch.Tensor:
    if tensor.is_floating_point():
        return tensor.fill_(torch.nan)
    return tensor if tensor.dtype == torch.bool else tensor.fill_(min(torch.iinfo(tensor.dtype).max, 77_777))
