"""Image datasets as uint8 tensors in memory: `load_dataset` by name, and the `ImageDataset` it returns."""

import dataclasses
import hashlib
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from bacon_fast.data import image_cache, sources
from bacon_fast.data.images import Interpolation
from bacon_fast.data.listing import OtherLabels

DATASETS = ("digits", "cifar10", "cifar100", "svhn", "stl10", "folder", "arrays")
"""Names that `load_dataset` knows."""

MAX_IMAGE_SIZE = 4096
"""Pixels of a side: an image of 4096 x 4096 takes 48 MiB, and a number above it is a mistake or damage."""


@dataclass(frozen=True, eq=False)
class ImageDataset:
    """Images and labels, whole, on the CPU.

    Attributes:
        name: the name it was loaded by.
        train_images: uint8 [N, H, W, 3], RGB. test_images, val_images: likewise, or None: not all data have them.
        train_labels, test_labels, val_labels: int64 [N], values in 0..K-1, or None beside images that are None.
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
    test_images: Tensor | None
    test_labels: Tensor | None
    unlabeled_images: Tensor | None
    class_names: tuple[str, ...]
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    fingerprint_file: Path | None = None
    val_images: Tensor | None = None
    val_labels: Tensor | None = None

    def __post_init__(self) -> None:
        for name in ("train_images", "test_images", "val_images", "unlabeled_images"):
            images = getattr(self, name)
            if images is None and name != "train_images":
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
        for name in ("train_labels", "test_labels", "val_labels"):
            labels, images = getattr(self, name), getattr(self, name.replace("labels", "images"))
            if images is None and labels is None:
                continue
            if images is None or labels is None:
                raise ValueError(f"{name}: expected labels and images, or neither, found only one of them")
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
    def mapped(self) -> bool:
        """Whether the images lie in a file, because they are too many for memory."""
        return self.fingerprint_file is not None

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
    images: Literal["auto", "memory", "mapped"] = "memory",
    most_in_memory: int | None = None,
    follow_links: bool = False,
    unlabeled: Sequence[str | Path] = (),
    test: Sequence[str | Path] = (),
    val: Sequence[str | Path] = (),
    other_labels: OtherLabels = "error",
    unreadable: Literal["skip", "error"] = "skip",
    interpolation: Interpolation = "bilinear",
) -> ImageDataset:
    """Loads a dataset by name.

    - digits: scikit-learn's 1,797 handwritten digits, which come with that package; resized from 8x8 to 16x16 and
      divided once and for all into 60 % train and 40 % test of each class. A writer may be in both parts.
    - cifar10, cifar100, svhn, stl10: torchvision's, at 32x32 (STL-10 is resized from 96x96, and SVHN's train images
      include its extra part, as in USB and BaCon).
    - folder: image files in train/<class>/ and, if present, test/<class>/ and unlabeled/, at any depth; or the files
      that a CSV file lists (`image_csv.read_csv`), where those without a label are unlabeled; or an .npz file, as
      arrays. Warnings name what is not read. Images are read as a viewer shows them (`images.read_files`). The class
      order is `classes`, else the lines of classes.txt, else the alphabet. Normalized with ImageNet's mean and
      standard deviation.
    - arrays: an .npz file with train_images (uint8 [N, H, W, 3], [N, H, W, 1] or [N, H, W]), train_labels (integers
      [N]), and optionally test_images and test_labels, val_images and val_labels, unlabeled_images, and class_names
      (strings). Normalized, like digits, with mean and standard deviation of the train images.

    Args:
        data_dir: folder of the torchvision files, the image folder or CSV file, or the .npz file; digits needs none.
        download: let torchvision fetch missing files into `data_dir`.
        image_size: side in pixels that images are resized to (Pillow). Default: 16 for digits, 32 for STL-10, else the
            images' own size, which must then be the same for all.
        classes: class names in order (folder only).
        images: "mapped": decode image files once, into a file beside them that is then read as needed (`image_cache`),
            for images that do not fit into memory; needs `image_size`. "auto": so for more than `most_in_memory` bytes.
        follow_links: follow links in a class folder that lead to folders outside it, where images of other classes may
            lie (folder only). Links to single files, and class folders that are links, need no permission.
        unlabeled, test, val: further unlabeled and test images, and validation images, as folders or CSV files (folder
            only; see `listing.list_images`).
        other_labels: what becomes of images whose label is none of the classes (folder only).
        unreadable: leave out unlabeled files that cannot be decoded, with a warning, or refuse them. Labeled ones are
            always an error.
        interpolation: how images are resized.

    Raises:
        ValueError: a wrong argument, or data that is not as described; unreadable files are named.
        FileNotFoundError: data that is not there, with what was expected and how to get it.

    Example:
        >>> import numpy as np
        >>> from PIL import Image
        >>> for name in ("a", "b"):
        ...     Image.fromarray(np.full((8, 8, 3), 100, np.uint8)).save(f"{name}.png")
        >>> _ = open("photos.csv", "w").write("image_path,label\\na.png,cat\\nb.png,dog\\n")
        >>> load_dataset("folder", data_dir="photos.csv").class_names
        ('cat', 'dog')
    """
    if name not in DATASETS:
        raise ValueError(f"dataset: expected one of {', '.join(DATASETS)}, found {name!r}")
    if image_size is not None:
        check_image_size(image_size)
    is_arrays = name == "arrays" or (name == "folder" and data_dir is not None and Path(data_dir).suffix == ".npz")
    files = name == "folder" and not is_arrays
    if images == "mapped" and (not files or image_size is None):
        raise ValueError(
            f"images: expected dataset folder and an image size for mapped images, found dataset {name!r} and image "
            f"size {image_size}"
        )
    for option, given in (("classes", classes is not None), ("follow_links", follow_links)):
        if given and not files:
            raise ValueError(f"{option}: expected image files, of dataset folder, found {_what(name, is_arrays)}")
    for option, paths in (("unlabeled", unlabeled), ("test", test), ("val", val)):
        if paths and not files:
            raise ValueError(f"{option}: expected none beside {_what(name, is_arrays)}, found {len(paths)}")
    if name == "digits":
        return ImageDataset(name, **sources.digits(image_size, interpolation))
    if data_dir is None:
        what = {"folder": "an image folder or a CSV file", "arrays": "an .npz file"}.get(name, "where its files lie")
        raise ValueError(f"data_dir: expected {what} for dataset {name!r}, found None")
    root = Path(data_dir)
    if is_arrays:
        fields = sources.arrays(root, image_size, interpolation)
    elif name == "folder":
        fields = sources.folder(
            root,
            image_size,
            interpolation,
            images=images if image_size else "memory",
            most_in_memory=most_in_memory,
            unreadable=unreadable,
            unlabeled=[Path(path) for path in unlabeled],
            test=[Path(path) for path in test],
            val=[Path(path) for path in val],
            classes=classes,
            follow_links=follow_links,
            other_labels=other_labels,
        )
    else:
        fields = sources.torchvision_dataset(name, root, download, image_size, interpolation)
    dataset = ImageDataset(**({"test_images": None, "test_labels": None} | fields), name=name)
    if dataset.mapped:
        _ = dataset.fingerprint  # now, where under torchrun the other processes of the machine wait for its file
    return dataset


def _what(name: str, is_arrays: bool) -> str:
    return "an .npz file" if is_arrays else f"dataset {name!r}"
