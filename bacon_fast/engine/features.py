"""Features of a frozen backbone, computed once and kept in a file: the steps of a run then train its heads alone.

Of every image of the pool they are those of its center crop, of V weak and of V strong views: V+V fixed
augmentations, not fresh ones, but of the image itself and not noise on its features.
"""

import hashlib
import json
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from bacon_fast.data.augment import Augment
from bacon_fast.data.datasets import ImageDataset
from bacon_fast.data.image_cache import FOLDER, digest_of, only_writer, remove_left_behind
from bacon_fast.data.longtail import Split
from bacon_fast.data.philox import Stream, philox, to_range
from bacon_fast.engine.batches import Batches
from bacon_fast.engine.config import Config
from bacon_fast.engine.evaluation import Part
from bacon_fast.files import write_atomically
from bacon_fast.models.backbone import Backbone
from bacon_fast.ops.augment import ViewRequest

FORMAT = 1
"""Version of how features are made: a file of another version is not used."""
CHUNK = 32
"""Images of one pass through the backbone."""
SEED = 0
"""Of the cached views: runs of several seeds share one file."""
_DIGEST = hashlib.sha256().digest_size


@dataclass(frozen=True)
class Features:
    """What a frozen backbone gives for the images of a run.

    Attributes:
        pool: float16 [M, 1 + 2V, F]: of each image of the pool its center crop, V weak views, V strong views.
        test, val: float16 [N, F], center crops of the dataset's test and validation images, or None.
        file: where they are kept.
    """

    pool: Tensor
    test: Tensor | None
    val: Tensor | None
    file: Path

    def part(self, part: Part, split: Split) -> Part:
        """A part of the data with features [N, F] in the place of its images."""
        if part.name == "test":
            return part._replace(images=self.test)
        if self.val is not None:
            return part._replace(images=self.val)
        return part._replace(images=self.pool[torch.as_tensor(split.validation), 0])


class FeatureBatches(Batches):
    """`Batches` of cached features: each row of a batch is one of the V weak or strong views of its image.

    Which one is drawn by Philox from the run's seed, step, stream and slot. `pool` holds the features of the center
    crops, float16 [M, F], and `Batch.images` are features [n, F], which a frozen `Backbone` passes on.

    Args:
        features: of the dataset's images.
        config, split, dataset, device, views: of `Batches`.
    """

    def __init__(
        self, features: Features, config: Config, split: Split, dataset: ImageDataset, device: torch.device, *views
    ) -> None:
        self._features = _resident(features.pool, device)
        super().__init__(config, split, dataset, device, *views)

    def _open_pool(self, dataset: ImageDataset) -> Tensor:
        return self._features[:, 0]

    def _views(self, pool: Tensor, requests: Sequence[ViewRequest], step: Tensor) -> Tensor:
        count, rows = self.config.views.cached_views, []
        for request in requests:
            slots = request.first_slot + torch.arange(len(request.indices), device=self.device)
            drawn = to_range(philox(self.config.seed, step, int(request.stream), slots, 1)[:, 0], count)
            rows.append(self._features[request.indices, drawn + (1 + count if request.strong else 1)])
        return torch.cat(rows).to(self.dtype)


def _resident(features: Tensor, device: torch.device) -> Tensor:
    if device.type == "cuda" and features.nbytes > (free := torch.cuda.mem_get_info(device)[0]):
        sizes = f"{features.nbytes / 1e9:.1f} GB of features do not fit into the {free / 1e9:.1f} GB free on {device}"
        raise ValueError(f"cached_views: {sizes}; keep fewer views, or leave it at 0")
    return features.to(device)


def load_features(
    config: Config, dataset: ImageDataset, augment: Augment, backbone: Backbone, device: torch.device
) -> Features:
    """The features of the dataset's images, from their file, or computed by the frozen backbone, and then written.

    The file lies in .bacon_fast beside the images, or in the run's directory where the dataset has no place. Its name
    stands for the weights, the network, sizes and views, and the fingerprint of the data; it ends with a digest. One
    that is damaged is made anew, with a warning. One process at a time writes.

    Args:
        augment: makes the views.
        backbone: frozen, on `device`.

    Raises:
        ValueError: a feature is not finite in float16.
        OSError: the file cannot be written.
    """
    views = config.views.cached_views
    numbers = {"pool": dataset.pool_size * (1 + 2 * views)}
    for name, images in (("test", dataset.test_images), ("val", dataset.val_images)):
        numbers[name] = 0 if images is None else len(images)
    shape = sum(numbers.values()), backbone.num_features
    path = _folder(config) / f"{_key(config, dataset, augment, backbone)}.features"
    remove_left_behind(path.parent)
    if not _is_whole(path, shape):
        path.parent.mkdir(parents=True, exist_ok=True)
        with only_writer(path.parent):
            if not _is_whole(path, shape):  # else another process wrote it while this one waited
                if path.exists():
                    warnings.warn(f"{path}: damaged, computing the features again", stacklevel=2)
                rows = _rows(dataset, augment, backbone, views, config.engine.channels_last, device)
                write_atomically(path, lambda temporary: _write(temporary, rows, shape[0]))
    kept = torch.from_numpy(np.fromfile(path, np.float16, shape[0] * shape[1])).view(shape)
    pool, test, val = kept.split(list(numbers.values()))
    pool = pool.view(dataset.pool_size, 1 + 2 * views, shape[1])
    return Features(pool, test if len(test) else None, val if len(val) else None, path)


def _folder(config: Config) -> Path:
    place = config.data.data_dir
    if place is None:
        return Path(config.run.run_dir) / FOLDER
    return (place.parent if place.is_file() else place) / FOLDER


def _key(config: Config, dataset: ImageDataset, augment: Augment, backbone: Backbone) -> str:
    """Names all that the features depend on."""
    digest = hashlib.sha256()
    for name, tensor in backbone.state_dict().items():
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    known = {
        "format": FORMAT,
        "backbone": config.model.backbone,
        "weights": digest.hexdigest(),
        "data": dataset.fingerprint,
        "sizes": [*augment.source_size, augment.height, augment.width],
        "normalization": [*dataset.mean, *dataset.std],
        "views": config.views.cached_views,
        "augmentation": [
            augment.padding, augment.hflip, augment.num_ops, augment.cutout, augment.resized_crop,
        ],
    }  # fmt: skip
    return hashlib.sha256(json.dumps(known).encode()).hexdigest()[:16]


def _is_whole(path: Path, shape: tuple[int, int]) -> bool:
    """Whether `path` holds float16 values of this shape, and their digest."""
    size = shape[0] * shape[1] * 2
    if not path.is_file() or path.stat().st_size != size + _DIGEST:
        return False
    with open(path, "rb") as file:
        file.seek(size)
        return file.read() == digest_of(path, size)


def _write(path: Path, rows: Iterator[Tensor], total: int) -> None:
    bar = tqdm(total=total, desc="computing features", unit="view", leave=False, delay=1, disable=None)
    with open(path, "wb") as output, bar:
        for chunk in rows:
            output.write(chunk.numpy().data)
            bar.update(len(chunk))
        output.flush()
        output.write(digest_of(path, output.tell()))


@torch.inference_mode()
def _rows(
    dataset: ImageDataset,
    augment: Augment,
    backbone: Backbone,
    views: int,
    channels_last: bool,
    device: torch.device,
) -> Iterator[Tensor]:
    """Features float16 [n, F] of one chunk of images after the other: of the pool all views, image by image."""

    def features(images: Tensor) -> Tensor:
        found = backbone(images).half()
        if not found.isfinite().all():
            raise ValueError("cached_views: expected features that are finite in float16, found some that are not")
        return found

    def center(images: Tensor) -> Tensor:
        return features(augment.normalize(augment.center(images).to(device), channels_last=channels_last))

    first = 0
    for chunk in dataset.pool().split(CHUNK):
        images, rows = chunk.to(device), torch.arange(len(chunk), device=device)
        found = [center(chunk)]
        for stream, strong in ((Stream.CACHED_WEAK, False), (Stream.CACHED_STRONG, True)):
            for view in range(views):
                request = ViewRequest(rows, stream, strong, first_slot=first)
                made = augment.views(images, [request], SEED, view, channels_last=channels_last)
                found.append(features(made))
        yield torch.stack(found, dim=1).flatten(0, 1).cpu()
        first += len(chunk)
    for images in (dataset.test_images, dataset.val_images):
        for chunk in () if images is None else images.split(CHUNK):
            yield center(chunk).cpu()
