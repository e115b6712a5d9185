"""The peers' data path: one image at a time through Pillow and torchvision, in the processes of two DataLoaders."""

import os
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler
from torchvision import transforms

from benchmarks.augment import rand_augment

from .problem import Problem

PREFETCH = 2  # batches that torch's loader keeps ready a worker

AS_SHIPPED = (1, 2)  # workers for labeled and unlabeled images, as USB's configurations have them


def ample_workers() -> tuple[int, int]:
    """Every core but two, and one labeled image in seven: an unlabeled one has two views, one of them strong."""
    cores = max(len(os.sched_getaffinity(0)) - 2, 2)
    labeled = max(1, round(cores / 7))
    return labeled, max(cores - labeled, 1)


class HostBatch(NamedTuple):
    """A step's batch on the host: slots and labels int64, views float32 [n,3,H,W]."""

    labeled_slots: Tensor
    labels: Tensor
    labeled: Tensor
    unlabeled_slots: Tensor
    weak: Tensor
    strong: Tensor


class LabeledViews(Dataset):
    """(slot, label, weak view) of every labeled image."""

    def __init__(self, images: np.ndarray, labels: np.ndarray, weak: Callable) -> None:
        self.images, self.labels, self.weak = images, labels, weak

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, slot: int) -> tuple[int, int, Tensor]:
        return slot, int(self.labels[slot]), self.weak(Image.fromarray(self.images[slot]))


class UnlabeledViews(Dataset):
    """(slot, weak view, strong view) of every unlabeled image."""

    def __init__(self, images: np.ndarray, weak: Callable, strong: Callable) -> None:
        self.images, self.weak, self.strong = images, weak, strong

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, slot: int) -> tuple[int, Tensor, Tensor]:
        picture = Image.fromarray(self.images[slot])
        return slot, self.weak(picture), self.strong(picture)


class Shuffled(Sampler):
    """One random order after another, without end."""

    def __init__(self, size: int) -> None:
        self.size, self.generator = size, np.random.default_rng(0)

    def __iter__(self) -> Iterator[int]:
        while True:
            yield from self.generator.permutation(self.size).tolist()


def pipeline(problem: Problem, strong: bool) -> Callable:
    """The transform of one image."""
    size = problem.config.data.image_size
    steps = [transforms.RandomCrop(size, padding=size // 8, padding_mode="reflect")]
    steps += [transforms.RandomHorizontalFlip()] if problem.config.views.hflip else []
    steps += [rand_augment] if strong else []
    return transforms.Compose([*steps, transforms.ToTensor(), transforms.Normalize(problem.mean, problem.std)])


class Loaders:
    """Endless batches from two DataLoaders.

    Args:
        workers: processes for the labeled and for the unlabeled images.
        pin_memory: batches come in page-locked memory.
    """

    def __init__(self, problem: Problem, workers: tuple[int, int], pin_memory: bool = False) -> None:
        weak, strong = pipeline(problem, strong=False), pipeline(problem, strong=True)
        labeled = LabeledViews(problem.images[problem.labeled], problem.labels, weak)
        unlabeled = UnlabeledViews(problem.images[problem.unlabeled], weak, strong)
        self.workers = workers
        self.loaders = [
            DataLoader(data, batch_size=size, sampler=Shuffled(len(data)), num_workers=count, pin_memory=pin_memory)
            for data, size, count in zip(
                (labeled, unlabeled), (problem.config.views.batch_size, problem.unlabeled_batch), workers
            )
        ]
        self.iterators: list[Iterator] = []

    @property
    def ready(self) -> int:
        """How many batches may lie ready that were made before the measurement."""
        return PREFETCH * max(self.workers) + 1

    def start(self) -> None:
        """Starts the processes."""
        self.iterators = [iter(loader) for loader in self.loaders]

    def next(self) -> HostBatch:
        (slots, labels, labeled), (unlabeled_slots, weak, strong) = (next(iterator) for iterator in self.iterators)
        return HostBatch(slots, labels, labeled, unlabeled_slots, weak, strong)

    def stop(self) -> None:
        """Ends the processes."""
        self.iterators.clear()


def on_device(batch: HostBatch, device: torch.device, non_blocking: bool = False) -> HostBatch:
    return HostBatch(*(tensor.to(device, non_blocking=non_blocking) for tensor in batch))
