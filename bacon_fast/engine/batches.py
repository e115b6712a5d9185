"""The views of a step, made on the device from the step counter alone."""

import copy

import torch
from torch import Tensor

from bacon_fast.data.augment import Augment, ViewRequest
from bacon_fast.data.datasets import ImageDataset
from bacon_fast.data.loader import ClassBalancedSampler, IndexSampler
from bacon_fast.data.longtail import Split
from bacon_fast.data.philox import Stream
from bacon_fast.data.pool import HostPool, Window, resident
from bacon_fast.engine.config import Config
from bacon_fast.engine.distributed import own_part
from bacon_fast.methods.outputs import Batch

_STRONG = (Stream.STRONG_0, Stream.STRONG_1)


class Batches:
    """The run's images, resident on the device or mapped from a file, and the batch of every step.

    A batch is a pure function of (seed, step): indices, crops, flips and operations are drawn from Philox counters.
    Each of several ranks makes its consecutive part of the labeled rows, and of each view of the unlabeled ones, with
    the pixels that these rows of the global batch would have in one process.

    Args:
        config, split, dataset, device: of the run.
        unlabeled_views: "weak" or "strong" for each view of the unlabeled rows; empty: labeled images only.
        balanced_view: also makes strong views of labeled images drawn class by class.
        labeled_strong_view: also makes strong views of the labeled images of the batch.
        dtype: of the images.

    Attributes:
        pool: uint8 [M, H, W, 3]: the training images, then the unlabeled ones; indexed by rows int64 [n], it gives
            images on the device.
        window: the images of the prepared step, if the pool is mapped.
        labeled, unlabeled: int64, rows of `pool` by slot. labels: int64, of the labeled slots.
        true_labels: int64, of the unlabeled slots, -1 where unknown and for the labeled images among them, which are
            trained on with their labels; for diagnostics only.
        augment: makes the views, and normalizes.
    """

    def __init__(
        self,
        config: Config,
        split: Split,
        dataset: ImageDataset,
        device: torch.device,
        unlabeled_views: tuple[str, ...],
        balanced_view: bool = False,
        labeled_strong_view: bool = False,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        if unlabeled_views and not len(split.unlabeled):
            raise ValueError(f"method: {config.method} needs unlabeled images, and the split holds none")
        self.config, self.device, self.unlabeled_views = config, device, unlabeled_views
        self.balanced_view, self.labeled_strong_view, self.dtype = balanced_view, labeled_strong_view, dtype
        mapped = dataset.mapped
        self.pool = HostPool(dataset.pool(), device) if mapped else resident(dataset.pool(), device)
        known = torch.full((len(self.pool),), -1, dtype=torch.int64)
        known[: len(dataset.train_labels)] = dataset.train_labels
        self.unlabeled = torch.as_tensor(split.unlabeled).to(device)
        hidden = known.index_fill(0, torch.as_tensor(split.labeled), -1)
        self.true_labels = hidden.to(device)[self.unlabeled]
        source = tuple(self.pool.shape[1:3])
        self.augment = Augment(
            image_size=source if config.views.stored_size is None else config.data.image_size,
            source_size=source,
            mean=dataset.mean,
            std=dataset.std,
            hflip=config.views.hflip,
            num_ops=config.views.randaugment_ops,
            cutout=config.views.cutout,
            resized_crop=config.views.strong_crop == "resized",
        ).to(device)
        labeled = torch.as_tensor(split.labeled)
        self.set_labeled(labeled.to(device), known[labeled].to(device))
        self.unlabeled_sampler = None
        if unlabeled_views:
            rows = config.views.unlabeled_ratio * config.views.batch_size
            columns = torch.stack([self.unlabeled, self.true_labels])
            sampler = IndexSampler(len(split.unlabeled), rows, config.seed, Stream.SAMPLER_UNLABELED, columns)
            self.unlabeled_sampler = sampler.to(device)
        self.window = Window(self.pool, len(self._rows_on_host(0))) if mapped else None

    def set_labeled(self, labeled: Tensor, labels: Tensor) -> None:
        """Trains on these rows of the pool, int64 [n], with these labels, int64 [n], from the next step on."""
        self.labeled, self.labels = labeled, labels
        rows, seed = self.config.views.batch_size, self.config.seed
        columns = torch.stack([labeled, labels])
        self.labeled_sampler = IndexSampler(len(labeled), rows, seed, Stream.SAMPLER_LABELED, columns).to(self.device)
        self.balanced_sampler = None
        if self.balanced_view:
            sampler = ClassBalancedSampler(labels, rows, seed, Stream.SAMPLER_BALANCED)
            self.balanced_sampler = sampler.to(self.device)
        self._host: list[tuple[Tensor, IndexSampler | ClassBalancedSampler]] | None = None

    def prepare(self, step: int) -> None:
        """The host's work before the batch of `step` can be made: none, unless an epoch begins or the images are in a
        file.
        """
        for sampler in (self.labeled_sampler, self.unlabeled_sampler):
            if sampler is not None:
                sampler.prepare(step)
        if self.window is not None:
            self.window.load(self._rows_on_host(step), step)

    def _rows_on_host(self, step: int) -> Tensor:
        """Rows of the pool in this rank's batch of `step`, labeled, unlabeled, class-balanced: int64 on the CPU."""
        if self._host is None:  # the host's own copies: it must not wait for the device to know the rows
            parts = (
                (self.labeled, self.labeled_sampler),
                (self.unlabeled, self.unlabeled_sampler),
                (self.labeled, self.balanced_sampler),
            )
            self._host = [(rows.cpu(), copy.deepcopy(sampler).cpu()) for rows, sampler in parts if sampler is not None]
        return torch.cat([rows[s.indices(step)[own_part(s.batch_size)]] for rows, s in self._host])

    def batch(self, step: Tensor) -> Batch:
        """The batch of `step`, 0-d int64 on the device, for which `prepare` was called (methods.md 0.3).

        Under several ranks: this rank's part of it.
        """
        part = own_part(self.labeled_sampler.batch_size)
        labeled_slots, labeled, labels = self.labeled_sampler.rows(step, part)
        pool = self.pool
        if self.window is not None:
            pool, labeled = self.window.images, torch.arange(len(labeled_slots), device=self.device)
        requests = [ViewRequest(labeled, Stream.LABELED_WEAK, strong=False, first_slot=part.start)]
        first_labeled = part.start
        unlabeled_slots = true_labels = labeled_slots[:0]
        if self.unlabeled_sampler is not None:
            part = own_part(self.unlabeled_sampler.batch_size)
            unlabeled_slots, unlabeled, true_labels = self.unlabeled_sampler.rows(step, part)
            strong_streams = iter(_STRONG)
            if self.window is not None:  # behind the labeled ones
                unlabeled = len(labeled) + torch.arange(len(unlabeled_slots), device=self.device)
            for view in self.unlabeled_views:
                strong = view == "strong"
                stream = next(strong_streams) if strong else Stream.UNLABELED_WEAK
                requests.append(ViewRequest(unlabeled, stream, strong, part.start))
        balanced_labels = None
        if self.balanced_sampler is not None:
            part = own_part(self.balanced_sampler.batch_size)
            balanced_slots = self.balanced_sampler.batch(step, part)
            balanced, balanced_labels = self.labeled[balanced_slots], self.labels[balanced_slots]
            if self.window is not None:  # behind the others
                first = len(labeled_slots) + len(unlabeled_slots)
                balanced = first + torch.arange(len(balanced_slots), device=self.device)
            requests.append(ViewRequest(balanced, Stream.LABELED_STRONG, strong=True, first_slot=part.start))
        if self.labeled_strong_view:
            requests.append(ViewRequest(labeled, Stream.LABELED_STRONG_VIEW, strong=True, first_slot=first_labeled))
        images = self.augment.views(
            pool, requests, self.config.seed, step, dtype=self.dtype, channels_last=self.config.engine.channels_last
        )
        # Behind the views of the step, in the order of their requests.
        balanced_images = labeled_strong_images = None
        if self.labeled_strong_view:
            images, labeled_strong_images = images.split([len(images) - len(labeled), len(labeled)])
        if balanced_labels is not None:
            images, balanced_images = images.split([len(images) - len(balanced_labels), len(balanced_labels)])
        return Batch(
            images,
            labels,
            labeled_slots,
            unlabeled_slots,
            true_labels,
            balanced_images,
            balanced_labels,
            labeled_strong_images,
        )
