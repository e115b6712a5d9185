"""The problem that all arms of benchmarks/throughput train: one dataset, split, configuration and initial state.

The state is that of a training under way: half of the predictions are confident, and the memory bank is filled. In the
state of a first step a class loop, which skips absent classes, would have next to nothing to do.
"""

import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bacon_fast.data.augment import ViewRequest
from bacon_fast.data.datasets import ImageDataset, load_dataset
from bacon_fast.data.longtail import PROTOCOLS, class_counts
from bacon_fast.data.philox import Stream
from bacon_fast.engine.config import Config
from bacon_fast.engine.presets import PRESETS
from bacon_fast.engine.trainer import Trainer
from bacon_fast.methods.composed import ComposedMethod
from bacon_fast.methods.outputs import Batch

STEPS, EPOCHS = 262_144, 256  # USB's run
MIDDLE = STEPS // 2 + 1  # completed steps at which the peers' arms begin: ABC's masks have annealed half way
FILLED = 1000  # slots of either set that the memory bank of the first state holds
Named = dict[str, Tensor]


def make_config(images: Path, device: str, *, backbone: str, threads: int = 0) -> Config:
    """BaCon's CIFAR-10 recipe and protocol on an .npz file of images, its loss on from the second step."""
    return (
        PRESETS["bacon-cifar10"]
        .config()
        .replace(
            dataset="arrays",
            data_dir=images,
            image_size=32,
            backbone=backbone,
            steps=STEPS,
            epochs=EPOCHS,
            device=device,
            threads=threads,
            report=False,
            **{"bacon.contrast_start": 0.0},
        )
    )


def decode_folder(folder: Path, scratch: Path) -> Path:
    """An .npz file with the images of a folder, so that every trainer need not decode them again."""
    path = scratch / f"{folder.resolve().name}.npz"
    return _save(load_dataset("folder", data_dir=folder, image_size=32), slice(None), path)


def repeat_digits(scratch: Path) -> Path:
    """An .npz file with the built-in digits at 32x32, repeated until there are as many as CIFAR-10-LT takes."""
    dataset = load_dataset("digits", image_size=32)
    protocol = PROTOCOLS[PRESETS["bacon-cifar10"].config().data.protocol]
    labeled = class_counts(protocol.labeled_head, protocol.gamma_l, dataset.num_classes)
    unlabeled = class_counts(protocol.unlabeled_head, protocol.gamma_u, dataset.num_classes)
    rows = [
        np.resize(np.flatnonzero(dataset.train_labels.numpy() == c), count)
        for c, count in enumerate(np.add(labeled, unlabeled))
    ]
    return _save(dataset, np.concatenate(rows), scratch / "digits.npz")


def _save(dataset: ImageDataset, rows: slice | np.ndarray, path: Path) -> Path:
    np.savez(
        path,
        train_images=dataset.train_images.numpy()[rows],
        train_labels=dataset.train_labels.numpy()[rows],
        test_images=dataset.test_images.numpy(),
        test_labels=dataset.test_labels.numpy(),
        class_names=np.array(dataset.class_names),
    )
    return path


@dataclass(frozen=True)
class State:
    """Parameters and buffers to begin from, by name: network, averaged network, projection and memory bank."""

    network: Named
    averaged: Named
    projection: Named
    bank: Named

    @staticmethod
    def of(method: ComposedMethod, averaged: nn.Module) -> "State":
        """A copy of a method's and of its average's, on the CPU."""

        def copy(module: nn.Module) -> Named:
            return {name: value.detach().cpu().clone() for name, value in module.state_dict().items()}

        bacon = method.regularizer
        return State(copy(method.network), copy(averaged), copy(bacon.projection), copy(bacon.bank))

    def load(self, trainer: Trainer) -> None:
        """Puts it into a trainer, in place; the optimizer's momentum begins at zero."""
        bacon = trainer.method.regularizer
        trainer.method.network.load_state_dict(self.network)
        trainer.ema.network.load_state_dict(self.averaged)
        bacon.projection.load_state_dict(self.projection)
        bacon.bank.load_state_dict(self.bank)
        for state in trainer.optimizer.state.values():
            state["momentum_buffer"].zero_()


@dataclass(frozen=True)
class Problem:
    """Images, split and recipe, without a trainer."""

    config: Config
    dataset: ImageDataset
    images: np.ndarray  # uint8 [N,H,W,3], the pool
    labeled: np.ndarray  # rows of the pool
    unlabeled: np.ndarray
    labels: np.ndarray  # of the labeled rows
    labeled_counts: tuple[int, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    device: torch.device

    @staticmethod
    def of(config: Config, trainer: Trainer) -> "Problem":
        """That of a configuration, with the data of a trainer that was made from it."""
        dataset, split = trainer.dataset, trainer.split
        labeled, unlabeled = np.asarray(split.labeled), np.asarray(split.unlabeled)
        return Problem(
            config,
            dataset,
            dataset.pool().numpy(),
            labeled,
            unlabeled,
            dataset.train_labels.numpy()[labeled],
            tuple(split.labeled_counts),
            dataset.mean,
            dataset.std,
            trainer.device,
        )

    @property
    def num_classes(self) -> int:
        return len(self.labeled_counts)

    @property
    def num_slots(self) -> int:
        return len(self.labeled) + len(self.unlabeled)

    @property
    def unlabeled_batch(self) -> int:
        return self.config.views.unlabeled_ratio * self.config.views.batch_size

    @property
    def keep(self) -> Tensor:
        """N_min / N_c, float32 [K]."""
        counts = torch.tensor(self.labeled_counts, dtype=torch.float64)
        return (counts.min() / counts).float()

    def epoch_share(self, step: int) -> float:
        """e/E at a step."""
        return (step * self.config.shared.epochs // self.config.steps) / self.config.shared.epochs


def make_trainer(config: Config, scratch: Path, dataset: ImageDataset | None = None, **changes) -> Trainer:
    """A trainer in a run directory of its own, with its first step, which is before the contrastive loss, behind it."""
    run_dir = Path(tempfile.mkdtemp(dir=scratch)) / "run"
    trainer = Trainer(config.replace(run_dir=run_dir, **changes), dataset=dataset)
    trainer.train_step()
    return trainer


def random_batch(trainer: Trainer, seed: int, labeled_rows: int) -> Batch:
    """A batch whose slots are all different, so that no arm has to say which of two rows of a slot wins."""
    batches, config = trainer.batches, trainer.config
    generator = torch.Generator().manual_seed(seed)

    def slots(size: int, count: int) -> Tensor:
        return torch.randperm(size, generator=generator)[:count].to(trainer.device)

    labeled = slots(len(batches.labeled), labeled_rows)
    unlabeled = slots(len(batches.unlabeled), config.views.unlabeled_ratio * labeled_rows)
    rows = batches.unlabeled[unlabeled]
    requests = [
        ViewRequest(batches.labeled[labeled], Stream.LABELED_WEAK, strong=False),
        ViewRequest(rows, Stream.UNLABELED_WEAK, strong=False),
        ViewRequest(rows, Stream.STRONG_0, strong=True),
    ]
    images = batches.augment.views(batches.pool, requests, seed, 0, channels_last=config.engine.channels_last)
    return Batch(images, batches.labels[labeled], labeled, unlabeled, batches.true_labels[unlabeled])


def prime(trainer: Trainer, steps: int, confidence: float = 0.98) -> State:
    """Trains both heads on labels alone, sharpens them until half of the rows are confident, and fills the bank. The
    average lags behind, as averages do."""
    network, bacon, batches = trainer.method.network, trainer.method.regularizer, trainer.batches
    config = trainer.config
    optimizer = torch.optim.SGD(network.parameters(), config.optimizer.lr, momentum=0.9)
    for step in range(steps):
        batch = random_batch(trainer, step, config.views.batch_size)
        _, logits, balanced = network(batch.labeled_images)
        optimizer.zero_grad()
        (F.cross_entropy(logits, batch.labels) + F.cross_entropy(balanced, batch.labels)).backward()
        optimizer.step()
    with torch.no_grad():
        _, logits, balanced = network(random_batch(trainer, steps, config.views.batch_size).images)
        for head, answers in ((network.head, logits), (network.balanced_head, balanced)):
            factor = _sharpening(answers, confidence)
            head.weight.mul_(factor)
            head.bias.mul_(factor)
        generator = torch.Generator().manual_seed(0)
        for part, rows in (("labeled", batches.labeled), ("unlabeled", batches.unlabeled)):
            some = torch.randperm(len(rows), generator=generator)[:FILLED].to(rows.device)
            for slots in some.split(500):
                features, _, balanced = network(batches.augment.normalize(batches.pool[rows[slots]]))
                probability, label = balanced.softmax(dim=1).max(dim=1)
                counted = probability >= config.shared.threshold
                reliable = probability >= config.parts["bacon"].reliable_threshold
                if part == "labeled":  # by now every one of them has been reliable at some step
                    label, counted, reliable = batches.labels[slots], counted | True, reliable | True
                places = slots if part == "labeled" else slots + bacon.num_labeled
                bacon.bank.select_(places, label, counted)
                bacon.bank.write_(places, bacon.projection(features), reliable)
    trainer.ema.network.load_state_dict(network.state_dict())
    torch._foreach_mul_(list(trainer.ema.network.parameters()), 0.9)
    return State.of(trainer.method, trainer.ema.network)


def _sharpening(logits: Tensor, confidence: float) -> float:
    """The factor of the logits by which half of the rows' largest probabilities exceed ``confidence``."""
    low, high = 1e-3, 1e6
    for _ in range(60):
        middle = (low * high) ** 0.5
        if (logits * middle).softmax(dim=1).amax(dim=1).median() < confidence:
            low = middle
        else:
            high = middle
    return high
