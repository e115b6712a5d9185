"""The latest key of every labeled image, and random draws of keys of a class."""

import torch
from torch import Tensor, nn

from bacon_fast.data.philox import Stream, philox, to_range
from bacon_fast.methods.last_rows import last_of_equal
from bacon_fast.ops.snapshot import snapshot


class LabeledKeyBank(nn.Module):
    """Keys of the labeled images, from which SsCL mines further positives (methods.md F.2).

    Empty until `fill_`; a draw from an empty bank finds nothing.

    Buffers:
        keys [n, D] float32: one a labeled slot.
        slots [n] int64: all slots ordered by class; start, count [K] int64: where a class begins in it, and its size.

    Args:
        num_slots: n, labeled images.
        num_classes: K.
        dim: D.
    """

    def __init__(self, num_slots: int, num_classes: int, dim: int) -> None:
        super().__init__()
        for name, value in (("num_slots", num_slots), ("num_classes", num_classes), ("dim", dim)):
            if value < 1:
                raise ValueError(f"{name}: expected a positive integer, found {value}")
        self.register_buffer("keys", torch.zeros(num_slots, dim))
        self.register_buffer("slots", torch.arange(num_slots))
        self.register_buffer("start", torch.zeros(num_classes, dtype=torch.int64))
        self.register_buffer("count", torch.zeros(num_classes, dtype=torch.int64))

    @torch.no_grad()
    def fill_(self, keys: Tensor, labels: Tensor) -> None:
        """Replaces all keys, float [n, D], and the slots' labels, int64 [n]."""
        self.keys.copy_(keys)
        slots, start, count = by_class(labels, len(self.count))
        self.slots.copy_(slots)
        self.start.copy_(start)
        self.count.copy_(count)

    @torch.no_grad()
    def write_(self, slots: Tensor, keys: Tensor) -> None:
        """Keys float [B, D] of slots int64 [B]; where a slot comes twice, its last key stays."""
        self.keys.index_copy_(0, slots, keys[last_of_equal(slots)].to(self.keys.dtype))

    def current(self, slots: Tensor) -> Tensor:
        """Current keys [..., D] of slots int64 [...]; a backward pass after the next `write_` is still right."""
        return snapshot(self.keys[slots])

    def draw(self, classes: Tensor, count: int, seed: int, step: int | Tensor) -> tuple[Tensor, Tensor]:
        """For each row `count` slots of its class, drawn uniformly without replacement; all of a class with fewer.

        Floyd's algorithm on the counters (seed, step, Stream.SSCL_KEYS, row).

        Args:
            classes: int64 [U].
            step: as in `philox`.

        Returns:
            Slots int64 [U, count], and bool [U, count], False where there is none (the slot is then any).
        """
        rows = torch.arange(len(classes), device=classes.device)
        words = philox(seed, step, Stream.SSCL_KEYS, rows, max(count, 1))
        size, start = self.count[classes], self.start[classes]
        drawn: list[Tensor] = []
        for i in range(count):
            # One of the members 0..top is drawn. If it was drawn before, `top`, which cannot have been, replaces it.
            top = (size - count).clamp(min=0) + i
            member = to_range(words[:, i], top + 1)
            taken = torch.zeros_like(size, dtype=torch.bool)
            for earlier in drawn:
                taken = taken | (earlier == member)
            drawn.append(torch.where(taken, top, member))
        if not drawn:
            return start.new_empty(len(classes), 0), torch.empty(len(classes), 0, dtype=torch.bool, device=start.device)
        members = torch.stack(drawn, dim=1)
        present = torch.arange(count, device=classes.device) < size[:, None]
        return self.slots[torch.where(present, start[:, None] + members, 0)], present


def by_class(labels: Tensor, num_classes: int) -> tuple[Tensor, Tensor, Tensor]:
    """Positions ordered by label [n], and for each class where it begins in that order and its size [K], all int64."""
    count = torch.bincount(labels, minlength=num_classes)
    return torch.argsort(labels, stable=True), count.cumsum(0) - count, count
