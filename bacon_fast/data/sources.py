"""Readers of the supported datasets. Each returns the fields of an `ImageDataset` except its name."""

import warnings
import zipfile
import zlib
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torchvision
from torch import Tensor

from bacon_fast.data.image_cache import FINGERPRINT, mapped_files
from bacon_fast.data.images import Interpolation, as_rgb, read_readable, require_readable, resize
from bacon_fast.data.listing import list_images
from bacon_fast.data.names import require_names
from bacon_fast.data.philox import Stream, philox
from bacon_fast.system import physical_memory

# Normalization of USB (semilearn/datasets/cv_datasets), which the official BaCon code keeps; CIFAR-10 has ImageNet's.
_IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
_NORMALIZATION = {
    "cifar10": _IMAGENET,
    "cifar100": {
        "mean": (129.3 / 255, 124.1 / 255, 112.4 / 255),
        "std": (68.2 / 255, 65.4 / 255, 70.4 / 255),
    },
    "svhn": {"mean": (0.4380, 0.4440, 0.4730), "std": (0.1751, 0.1771, 0.1744)},
    "stl10": {
        "mean": (112.4 / 255, 109.1 / 255, 98.6 / 255),
        "std": (68.4 / 255, 66.6 / 255, 68.5 / 255),
    },
}
_STL10_CLASSES = ("airplane", "bird", "car", "cat", "deer", "dog", "horse", "monkey", "ship", "truck")
_DIGITS_TRAIN_SHARE = 0.6
_DIGITS_SEED = 0
_NAMED = 10  # unreadable files in a warning


def digits(image_size: int | None, interpolation: Interpolation) -> dict:
    """scikit-learn's handwritten digits (UCI optical recognition, 8x8, values 0..16), by default at 16x16.

    The train part is, per class, the first 60 % in the order of Philox keys of (seed 0, Stream.TRAIN_TEST, image); it
    does not depend on the run's seed.
    """
    from sklearn.datasets import load_digits

    source = load_digits()
    values = np.rint(source.images * (255 / 16)).astype(np.uint8)
    images = resize(as_rgb("digits", values), image_size or 16, interpolation)
    labels = torch.from_numpy(source.target.astype(np.int64))
    keys = philox(_DIGITS_SEED, 0, Stream.TRAIN_TEST, torch.arange(len(labels)), 1)[:, 0]
    train = torch.zeros(len(labels), dtype=torch.bool)
    for c in range(10):
        members = torch.nonzero(labels == c)[:, 0]
        members = members[torch.argsort(keys[members], stable=True)]
        train[members[: int(_DIGITS_TRAIN_SHARE * len(members))]] = True
    return {
        "train_images": images[train],
        "train_labels": labels[train],
        "test_images": images[~train],
        "test_labels": labels[~train],
        "unlabeled_images": None,
        "class_names": tuple("0123456789"),
        **_statistics(images[train]),
    }


def torchvision_dataset(
    name: str, root: Path, download: bool, image_size: int | None, interpolation: Interpolation
) -> dict:
    """CIFAR-10, CIFAR-100, SVHN or STL-10 (by default resized to 32x32) through torchvision.

    Raises FileNotFoundError when the files are not under `root` and `download` is off.
    """
    datasets = torchvision.datasets

    def part(cls, **split):
        try:
            return cls(root, download=download, **split)
        except RuntimeError as error:  # torchvision's answer to missing and to corrupted files
            raise FileNotFoundError(
                f"data_dir: expected the files of {name} under {root.resolve()}, found them missing or damaged "
                f"({error}); `bacon-fast train` fetches them with --download, Python with "
                "load_dataset(..., download=True)"
            ) from error

    unlabeled = None
    if name in ("cifar10", "cifar100"):
        cls = datasets.CIFAR10 if name == "cifar10" else datasets.CIFAR100
        train, test = part(cls, train=True), part(cls, train=False)
        class_names = tuple(train.classes)
        (train_images, train_labels), (test_images, test_labels) = ((p.data, p.targets) for p in (train, test))
    else:
        cls = datasets.SVHN if name == "svhn" else datasets.STL10
        splits = ["train", "extra"] if name == "svhn" else ["train"]
        train, test = [part(cls, split=split) for split in splits], part(cls, split="test")
        class_names = tuple("0123456789") if name == "svhn" else _STL10_CLASSES
        train_images = np.concatenate([_channels_last(p.data) for p in train])
        train_labels = np.concatenate([p.labels for p in train])
        test_images, test_labels = _channels_last(test.data), test.labels
        if name == "stl10":
            unlabeled = _channels_last(part(cls, split="unlabeled").data)
    if name == "stl10":
        image_size = image_size or 32
    return {
        "train_images": resize(train_images, image_size, interpolation),
        "train_labels": torch.as_tensor(np.asarray(train_labels, dtype=np.int64)),
        "test_images": resize(test_images, image_size, interpolation),
        "test_labels": torch.as_tensor(np.asarray(test_labels, dtype=np.int64)),
        "unlabeled_images": None if unlabeled is None else resize(unlabeled, image_size, interpolation),
        "class_names": class_names,
        **_NORMALIZATION[name],
    }


def folder(
    source: Path,
    image_size: int | None,
    interpolation: Interpolation,
    *,
    images: Literal["auto", "memory", "mapped"] = "memory",
    most_in_memory: int | None = None,
    unreadable: Literal["skip", "error"] = "skip",
    **lists: object,
) -> dict:
    """An image folder or a CSV file of images, normalized with ImageNet's statistics.

    Args:
        image_size, interpolation: how images are resized, see `load_dataset`.
        images: decode into memory, or into a file that is then mapped; "auto": mapped above `most_in_memory` bytes.
        unreadable: what becomes of unlabeled files that cannot be decoded: left out with a warning, or an error.
        lists: see `list_images`.

    Raises:
        FileNotFoundError, ValueError: see `list_images`; also unreadable files, and more images than memory can hold.
    """
    listing = list_images(source, **lists)
    labeled = {part: [path for path, _ in getattr(listing, part)] for part in ("train", "test", "val")}
    # The unlabeled images right behind those of train: together they are the pool, which is not copied.
    files = {"train": labeled["train"], "unlabeled": listing.unlabeled, "test": labeled["test"], "val": labeled["val"]}
    paths, file = [path for part in files.values() for path in part], None
    first = len(files["train"])
    may_fail = range(first, first + len(files["unlabeled"])) if unreadable == "skip" else ()
    pixels = 3 * len(paths) * (image_size or 0) ** 2
    if images == "mapped" or (images == "auto" and most_in_memory is not None and pixels > most_in_memory):
        root = source.parent if source.is_file() else source
        found, failed, file = mapped_files(root, paths, image_size, may_fail, interpolation)
    else:
        _require_memory(len(paths), image_size)
        found, failed = read_readable(paths, image_size, interpolation)
        require_readable({i: reason for i, reason in failed.items() if i not in may_fail})
    if failed:
        names = list(failed.values())
        warnings.warn(
            f"{len(failed)} of {len(files['unlabeled']):,} unlabeled images cannot be read and are left out: "
            + "; ".join(names[:_NAMED])
            + ("; ..." if len(names) > _NAMED else ""),
            stacklevel=2,
        )
    sizes = [len(part) for part in files.values()]
    sizes[1] -= len(failed)
    pictures = {part: pixels if len(pixels) else None for part, pixels in zip(files, found.split(sizes), strict=True)}
    labels = {part: torch.tensor(listing.labels(part)) if labeled[part] else None for part in labeled}
    return {
        **{f"{part}_images": pixels for part, pixels in pictures.items()},
        **{f"{part}_labels": numbers for part, numbers in labels.items()},
        "class_names": listing.class_names,
        "fingerprint_file": None if file is None else file.with_suffix(FINGERPRINT),
        **_IMAGENET,
    }


def _require_memory(count: int, size: int | None) -> None:
    """Raises ValueError when `count` images at size x size need more memory than there is."""
    needed = count * 3 * (size or 0) ** 2
    available = physical_memory()
    if available is not None and needed > available:
        raise ValueError(
            f"images: {count} images at {size}x{size} need {needed / 1e9:.0f} GB of memory, and this machine has "
            f"{available / 1e9:.0f} GB; --images mapped keeps them in a file of that size"
        )


def arrays(path: Path, image_size: int | None, interpolation: Interpolation) -> dict:
    """An .npz file of arrays, normalized with mean and standard deviation of its train images.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not an .npz file, a missing array, or one of another shape or dtype than `load_dataset` documents.
    """
    if not path.is_file():
        raise FileNotFoundError(f"data_dir: expected an .npz file, found no file {path.resolve()}")
    if not zipfile.is_zipfile(path):
        raise ValueError(f"data_dir: expected an .npz file, {path} is not one")
    try:
        with np.load(path, allow_pickle=False) as stored:
            content = {name: stored[name] for name in stored.files}
    except (ValueError, OSError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(f"data_dir: cannot read the arrays in {path}: {error}") from error
    parts = ["train", *(part for part in ("test", "val") if {f"{part}_images", f"{part}_labels"} & set(content))]
    required = [f"{part}_{what}" for part in parts for what in ("images", "labels")]
    if missing := [name for name in required if name not in content]:
        raise ValueError(f"{path}: expected arrays {', '.join(required)}, found no {', '.join(missing)}")
    for name in (f"{part}_labels" for part in parts):
        if content[name].dtype.kind not in "iu" or content[name].ndim != 1:
            raise ValueError(f"{name}: expected integers [N], found {content[name].dtype} {list(content[name].shape)}")

    def resized(name: str, images: np.ndarray) -> Tensor:
        return resize(as_rgb(name, images), image_size, interpolation)

    train_images = resized("train_images", content["train_images"])
    unlabeled = content.get("unlabeled_images")
    highest, names = int(content["train_labels"].max(initial=0)), content.get("class_names")
    if names is not None:
        if names.dtype.kind not in "Uiu" or names.ndim != 1:
            raise ValueError(f"class_names: expected strings [K], found {names.dtype} {list(names.shape)}")
        class_names = tuple(str(name) for name in names)
        require_names("class_names", class_names)
    elif highest >= max(len(train_images), 1):
        raise ValueError(
            f"train_labels: expected values below the number of train images, {len(train_images)}, found {highest}; "
            "with class_names, classes may lack images"
        )
    else:
        class_names = tuple(str(c) for c in range(highest + 1))
    measured = {}
    for part in parts[1:]:
        images, labels = f"{part}_images", f"{part}_labels"
        measured[images] = resized(images, content[images])
        measured[labels] = torch.from_numpy(content[labels].astype(np.int64))
    return {
        "train_images": train_images,
        "train_labels": torch.from_numpy(content["train_labels"].astype(np.int64)),
        **measured,
        "unlabeled_images": None
        if unlabeled is None
        else resize(as_rgb("unlabeled_images", unlabeled), image_size, interpolation),
        "class_names": class_names,
        **_statistics(train_images),
    }


def _channels_last(images: np.ndarray) -> np.ndarray:
    return images.transpose(0, 2, 3, 1)


def _statistics(images: Tensor) -> dict[str, tuple[float, ...]]:
    """Mean and standard deviation per channel in 0..1; the latter is at least one gray level, so it can divide."""
    counts = [torch.bincount(images[..., c].flatten(), minlength=256).double() for c in range(3)]
    levels = torch.arange(256, dtype=torch.float64) / 255
    mean = [float((h * levels).sum() / h.sum().clamp(min=1)) for h in counts]
    variance = [float((h * (levels - m) ** 2).sum() / h.sum().clamp(min=1)) for h, m in zip(counts, mean)]
    return {"mean": tuple(mean), "std": tuple(max(v**0.5, 1 / 255) for v in variance)}
