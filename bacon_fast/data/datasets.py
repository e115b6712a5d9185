"""Image datasets as uint8 tensors in memory: `load_dataset` by name, and the `ImageDataset` it returns."""

import dataclasses
import hashlib
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from bacon_fast.data import image_cache, sources

DATASETS = ("digits", "cifar10", "cifar100", "svhn", "stl10", "folder", "arrays")
"""Names that `load_dataset` knows."""

MAX_IMAGE_SIZE = 4096
"""Pixels of a side: an image of 4096 x 4096 takes 48 MiB, and a number above it is a mistake or damage."""


@dataclass(frozen=True, eq=False)
class ImageDataset:
    """Images and labels, whole, on the CPU.

    Attributes:
        name: the name it was loaded by.
        train_images, test_images: uint8 [N, H, W, 3], RGB.
        train_labels, test_labels: int64 [N], values in 0..K-1.
        unlabeled_images: uint8 [M, H, W, 3] without labels, or None.
        class_names: K names; class 0 is the head of the long-tailed protocols.
        mean, std: per channel, of pixel values in 0..1, for normalization.
        fingerprint_file: keeps the fingerprint of images that are too many to be read for it at every start, or None.

    Raises:
        ValueError: shapes, dtypes or labels are not as described.
    """

    name: str
    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor
    unlabeled_images: Tensor | None
    class_names: tuple[str, ...]
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    fingerprint_file: Path | None = None

    def __post_init__(self) -> None:
        for name in ("train_images", "test_images", "unlabeled_images"):
            images = getattr(self, name)
            if images is None and name == "unlabeled_images":
                continue
            if images.dtype != torch.uint8 or images.dim() != 4 or images.shape[3] != 3:
                raise ValueError(f"{name}: expected uint8 [N, H, W, 3], found {images.dtype} {list(images.shape)}")
            if not images.numel():
                raise ValueError(f"{name}: expected at least one image, found {list(images.shape)}")
            if images.shape[1:] != self.train_images.shape[1:]:
                raise ValueError(
                    f"{name}: expected the size of train_images, {list(self.train_images.shape[1:])}, found "
                    f"{list(images.shape[1:])}; pass an image size to resize all of them"
                )
        check_image_size(*self.train_images.shape[1:3])
        for name, images in (("train_labels", self.train_images), ("test_labels", self.test_images)):
            labels = getattr(self, name)
            if labels.dtype != torch.int64 or labels.shape != images.shape[:1]:
                raise ValueError(f"{name}: expected int64 [{len(images)}], found {labels.dtype} {list(labels.shape)}")
            low, high = labels.min().item(), labels.max().item()
            if low < 0 or high >= self.num_classes:
                raise ValueError(f"{name}: expected values in 0..{self.num_classes - 1}, found {low}..{high}")
        if self.num_classes < 2:
            raise ValueError(f"class_names: expected at least 2 classes, found {self.num_classes}")

    @property
    def num_classes(self) -> int:
        """K."""
        return len(self.class_names)

    @property
    def pool_size(self) -> int:
        """Number of images in `pool()`."""
        return len(self.train_images) + (0 if self.unlabeled_images is None else len(self.unlabeled_images))

    def pool(self) -> Tensor:
        """Train images, then the unlabeled ones: uint8 [N + M, H, W, 3], the index space of splits."""
        train, unlabeled = self.train_images, self.unlabeled_images
        if unlabeled is None:
            return train
        if _follows(train, unlabeled):
            return train.as_strided((self.pool_size, *train.shape[1:]), train.stride(), train.storage_offset())
        return torch.cat([train, unlabeled])

    @cached_property
    def fingerprint(self) -> str:
        """sha256 (hex) of images, labels and class names."""
        file = self.fingerprint_file
        if file is None:
            return self._fingerprint()
        if (known := image_cache.recall(file)) is not None:
            return known
        if file.exists():
            warnings.warn(f"{file}: damaged, computing the fingerprint again", stacklevel=2)
        computed = self._fingerprint()
        with image_cache.only_writer(file.parent):
            image_cache.remember(file, computed)
        return computed

    def _fingerprint(self) -> str:
        digest = hashlib.sha256(repr(self.class_names).encode())
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, Tensor):
                digest.update(f"{field.name} {tuple(value.shape)}".encode())
                digest.update(value.contiguous().numpy().data)
        return digest.hexdigest()


def _follows(first: Tensor, second: Tensor) -> bool:
    """Whether the elements of `second` follow the elements of `first` in memory without a gap."""
    one_memory = first.untyped_storage().data_ptr() == second.untyped_storage().data_ptr()
    contiguous = first.is_contiguous() and second.is_contiguous()
    return one_memory and contiguous and second.storage_offset() == first.storage_offset() + first.numel()


def check_image_size(*sides: int) -> None:
    """Raises ValueError unless images of these sides, in pixels, can be."""
    for side in sides:
        if type(side) is not int or not 1 <= side <= MAX_IMAGE_SIZE:
            raise ValueError(f"image_size: expected 1 to {MAX_IMAGE_SIZE} pixels, found {side!r}")


def load_dataset(
    name: str,
    *,
    data_dir: str | Path | None = None,
    download: bool = False,
    image_size: int | None = None,
    classes: Sequence[str] | None = None,
    mapped: bool = False,
    follow_links: bool = False,
) -> ImageDataset:
    """Loads a dataset by name.

    - digits: scikit-learn's 1,797 handwritten digits, which come with that package; resized from 8x8 to 16x16 (Pillow,
      bilinear) and divided once and for all into 60 % train and 40 % test of each class. A writer may be in both parts.
    - cifar10, cifar100, svhn, stl10: torchvision's, at 32x32 (STL-10 is resized from 96x96, and SVHN's train images
      include its extra part, as in USB and BaCon).
    - folder: image files in train/<class>/, test/<class>/ and, if present, unlabeled/, at any depth; warnings name what
      is not read. Images are read as a viewer shows them (`images.read_files`). The class order is `classes`, else the
      lines of classes.txt, else the alphabet. Normalized with ImageNet's mean and deviation.
    - arrays: an .npz file with train_images and test_images (uint8 [N, H, W, 3], [N, H, W, 1] or [N, H, W]),
      train_labels and test_labels (integers [N]), and optionally unlabeled_images and class_names (strings).
      Normalized, like digits, with mean and deviation of the train images.

    Args:
        data_dir: folder of the torchvision files, root of the image folder, or the .npz file; digits needs none.
        download: let torchvision fetch missing files into `data_dir`.
        image_size: side in pixels that images are resized to (Pillow, bilinear). Default: 16 for digits, 32 for STL-10,
            else the images' own size, which must then be the same for all.
        classes: class names in order (folder only).
        mapped: decode an image folder once, into a file in it that is then read as needed (`image_cache`), for images
            that do not fit into memory; needs `image_size`.
        follow_links: follow links in a class folder that lead to folders outside it, where images of other classes may
            lie (folder only). Links to single files, and class folders that are links, need no permission.

    Raises:
        ValueError: a wrong argument, or data that is not as described; unreadable files are named.
        FileNotFoundError: data that is not there, with what was expected and how to get it.
    """
    if name not in DATASETS:
        raise ValueError(f"dataset: expected one of {', '.join(DATASETS)}, found {name!r}")
    if image_size is not None:
        check_image_size(image_size)
    if mapped and (name != "folder" or image_size is None):
        raise ValueError(
            f"mapped: expected dataset folder and an image size, found dataset {name!r} and image size {image_size}"
        )
    if classes is not None and name != "folder":
        raise ValueError(f"classes: the class order can be chosen for dataset folder only, not for {name!r}")
    if follow_links and name != "folder":
        raise ValueError(f"follow_links: there are links to follow in dataset folder only, not in {name!r}")
    if name == "digits":
        return ImageDataset(name, **sources.digits(image_size))
    if data_dir is None:
        what = {"folder": "the root of an image folder", "arrays": "an .npz file"}.get(name, "where its files lie")
        raise ValueError(f"data_dir: expected {what} for dataset {name!r}, found None")
    root = Path(data_dir)
    if name == "folder":
        fields = sources.folder(root, image_size, classes, mapped, follow_links)
    elif name == "arrays":
        fields = sources.arrays(root, image_size)
    else:
        fields = sources.torchvision_dataset(name, root, download, image_size)
    dataset = ImageDataset(name, **fields)
    if mapped:
        _ = dataset.fingerprint  # now, where under torchrun the other processes of the machine wait for its file
    return dataset
