"""Which samples a step sees: shuffled epochs, or class-balanced draws, as a pure function of (seed, step)."""

import torch
from torch import Tensor, nn

from bacon_fast.data.philox import check_seed, philox, to_range


class IndexSampler(nn.Module):
    """Batches of positions 0..num_samples-1: consecutive slices of concatenated per-epoch random permutations.

    Every sample appears once per epoch; batches run across epoch borders, so none is short. The permutation of an epoch
    sorts 63-bit Philox keys of (seed, epoch, stream, sample), so a resumed run needs no sampler state. The permutations
    that a batch can touch lie in one buffer of fixed address, which `prepare` rewrites when an epoch begins; `batch`
    takes its slice by a step counter that the host never reads, so a captured graph may contain it.

    Args:
        num_samples: size of the set, at least 1.
        batch_size: samples per step, at least 1; may exceed `num_samples`.
        seed: integer in [0, 2^64).
        stream: a `Stream`; samplers with different streams draw independently.
    """

    def __init__(self, num_samples: int, batch_size: int, seed: int, stream: int) -> None:
        super().__init__()
        for name, value in (("num_samples", num_samples), ("batch_size", batch_size)):
            if value < 1:
                raise ValueError(f"{name}: expected at least 1, found {value}")
        check_seed(seed)
        self.num_samples, self.batch_size, self.seed, self.stream = num_samples, batch_size, seed, int(stream)
        # A batch that starts at the last sample of an epoch touches the most epochs.
        self.epochs_held = 1 + (num_samples + batch_size - 2) // num_samples
        self.first_epoch: int | None = None
        self.register_buffer("order", torch.empty(self.epochs_held * num_samples, dtype=torch.int64), persistent=False)

    def indices(self, step: int) -> Tensor:
        """Positions of the batch of `step` (0-based): int64 [batch_size], on the sampler's device."""
        if step < 0:
            raise ValueError(f"step: expected at least 0, found {step}")
        self.prepare(step)
        return self.batch(torch.tensor(step, device=self.order.device))

    def prepare(self, step: int) -> None:
        """Fills the buffer with the permutations that the batch of `step` touches. Cheap unless an epoch begins."""
        epoch = step * self.batch_size // self.num_samples
        if epoch == self.first_epoch:
            return
        for k, permutation in enumerate(self.order.view(self.epochs_held, self.num_samples)):
            permutation.copy_(self.permutation(epoch + k))
        self.first_epoch = epoch

    def batch(self, step: Tensor, rows: slice = slice(None)) -> Tensor:
        """Positions of the prepared batch: int64 [batch_size], or its part `rows`.

        Args:
            step: 0-d int64 on the sampler's device, for which `prepare` was called.
        """
        start = (step * self.batch_size).remainder(self.num_samples)
        return self.order[start + torch.arange(self.batch_size, device=self.order.device)[rows]]

    def permutation(self, epoch: int) -> Tensor:
        """The order of one epoch: int64 [num_samples]."""
        words = philox(self.seed, epoch, self.stream, torch.arange(self.num_samples, device=self.order.device), 2)
        return torch.argsort((words[:, 0] << 31) | (words[:, 1] >> 1), stable=True)

    def _apply(self, fn, recurse: bool = True):
        # Moving to another device may leave the buffer's content behind (to_empty): fill it again when it is needed.
        self.first_epoch = None
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
