"""Which samples a step sees: shuffled epochs, or class-balanced draws, as a pure function of (seed, step)."""

import torch
from torch import Tensor, nn

from bacon_fast.data.philox import philox, sort_keys, to_range
from bacon_fast.ops.checks import check_seed
from bacon_fast.ops.ring_rows import ring_rows


class IndexSampler(nn.Module):
    """Batches of positions 0..num_samples-1: consecutive slices of concatenated per-epoch random permutations.

    Every sample appears once per epoch; batches run across epoch borders, so none is short. The permutation of an epoch
    sorts 63-bit Philox keys of (seed, epoch, stream, sample), so a resumed run needs no sampler state. The permutations
    that a batch can touch lie in one buffer of fixed address, a ring of epochs, of which `prepare` rewrites a part when
    an epoch begins; `rows` takes its slice by a step counter that the host never reads, so a captured graph may contain
    it.

    Args:
        num_samples: size of the set, at least 1.
        batch_size: samples per step, at least 1; may exceed `num_samples`.
        seed: integer in [0, 2^64).
        stream: a `Stream`; samplers with different streams draw independently.
        columns: int64 [C, num_samples], what else of a sample `rows` returns, such as its label; None: nothing.
    """

    def __init__(
        self, num_samples: int, batch_size: int, seed: int, stream: int, columns: Tensor | None = None
    ) -> None:
        super().__init__()
        for name, value in (("num_samples", num_samples), ("batch_size", batch_size)):
            if value < 1:
                raise ValueError(f"{name}: expected at least 1, found {value}")
        check_seed(seed)
        if columns is None:
            columns = torch.empty(0, num_samples, dtype=torch.int64)
        if columns.dim() != 2 or columns.shape[1] != num_samples or columns.dtype != torch.int64:
            raise ValueError(f"columns: expected int64 [C, {num_samples}], found {columns.dtype} {list(columns.shape)}")
        self.num_samples, self.batch_size, self.seed, self.stream = num_samples, batch_size, seed, int(stream)
        # A batch that starts at the last sample of an epoch touches the most epochs.
        self.epochs_held = 1 + (num_samples + batch_size - 2) // num_samples
        self.held: dict[int, int] = {}  # which epoch is at each place of the ring
        self.register_buffer("columns", columns, persistent=False)
        order = torch.empty(1 + len(columns), self.epochs_held * num_samples, dtype=torch.int64)
        self.register_buffer("order", order, persistent=False)  # positions, then the columns in their order

    def indices(self, step: int) -> Tensor:
        """Positions of the batch of `step` (0-based): int64 [batch_size], on the sampler's device."""
        if step < 0:
            raise ValueError(f"step: expected at least 0, found {step}")
        self.prepare(step)
        return self.batch(torch.tensor(step, device=self.order.device))

    def prepare(self, step: int) -> None:
        """Fills the buffer with the permutations that the batch of `step` touches. Cheap unless an epoch begins."""
        first = step * self.batch_size // self.num_samples
        for epoch in range(first, first + self.epochs_held):
            place = epoch % self.epochs_held
            if self.held.get(place) != epoch:
                part, permutation = self.order.unflatten(1, (self.epochs_held, -1))[:, place], self.permutation(epoch)
                part[0], part[1:] = permutation, self.columns[:, permutation]
                self.held[place] = epoch

    def batch(self, step: Tensor, rows: slice = slice(None)) -> Tensor:
        """Positions of the prepared batch: int64 [batch_size], or its part `rows`.

        Args:
            step: 0-d int64 on the sampler's device, for which `prepare` was called.
        """
        return self.rows(step, rows)[0]

    def rows(self, step: Tensor, rows: slice = slice(None)) -> tuple[Tensor, ...]:
        """What `batch` returns, and of each of its samples the `columns`."""
        first, end, _ = rows.indices(self.batch_size)
        return ring_rows(self.order, step, stride=self.batch_size, first=first, count=end - first).unbind()

    def permutation(self, epoch: int) -> Tensor:
        """The order of one epoch: int64 [num_samples]."""
        step = torch.full((), epoch, dtype=torch.int64, device=self.order.device)
        return torch.argsort(sort_keys(self.seed, step, self.stream, self.num_samples), stable=True)

    def _apply(self, fn, recurse: bool = True):
        # Moving to another device may leave the buffer's content behind (to_empty): fill it again when it is needed.
        self.held = {}
        return super()._apply(fn, recurse)


class ClassBalancedSampler(nn.Module):
    """Batches of positions 0..n-1, with replacement: first a class, uniformly, then one of its samples, uniformly.

    A draw is a Philox counter of (seed, step, stream, row of the batch). Classes without a sample are not drawn.

    Args:
        labels: int64 [n], class of each sample, n at least 1.
        batch_size: samples per step, at least 1.
        seed: integer in [0, 2^64).
        stream: a `Stream`.
    """

    def __init__(self, labels: Tensor, batch_size: int, seed: int, stream: int) -> None:
        super().__init__()
        for name, value in (("labels", len(labels)), ("batch_size", batch_size)):
            if value < 1:
                raise ValueError(f"{name}: expected at least 1, found {value}")
        check_seed(seed)
        self.batch_size, self.seed, self.stream = batch_size, seed, int(stream)
        counts = labels.bincount()
        counts = counts[counts > 0]
        self.register_buffer("order", labels.argsort(stable=True), persistent=False)  # class after class
        self.register_buffer("counts", counts, persistent=False)
        self.register_buffer("starts", counts.cumsum(0) - counts, persistent=False)

    def indices(self, step: int) -> Tensor:
        """Positions of the batch of `step` (0-based): int64 [batch_size], on the sampler's device."""
        return self.batch(torch.tensor(step, device=self.order.device))

    def batch(self, step: Tensor, rows: slice = slice(None)) -> Tensor:
        """Positions of the batch of `step`, 0-d int64 on the sampler's device, or its part `rows`."""
        slots = torch.arange(self.batch_size, device=self.order.device)[rows]
        words = philox(self.seed, step, self.stream, slots, 2)
        classes = to_range(words[:, 0], len(self.counts))
        return self.order[self.starts[classes] + to_range(words[:, 1], self.counts[classes])]
