"""Readers of the supported datasets. Each returns the fields of an `ImageDataset` except its name."""

import os
import warnings
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torchvision
from torch import Tensor

from bacon_fast.data.image_cache import FINGERPRINT, mapped_files
from bacon_fast.data.images import as_rgb, image_files, is_inside, read_files, require_targets, resize
from bacon_fast.data.names import distinct, printable, require_names
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


def digits(image_size: int | None) -> dict:
    """scikit-learn's handwritten digits (UCI optical recognition, 8x8, values 0..16), by default at 16x16.

    The train part is, per class, the first 60 % in the order of Philox keys of (seed 0, Stream.TRAIN_TEST, image); it
    does not depend on the run's seed.
    """
    from sklearn.datasets import load_digits

    source = load_digits()
    values = np.rint(source.images * (255 / 16)).astype(np.uint8)
    images = resize(as_rgb("digits", values), image_size or 16)
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


def torchvision_dataset(name: str, root: Path, download: bool, image_size: int | None) -> dict:
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
                f"({error}); pass --download to fetch them"
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
        "train_images": resize(train_images, image_size),
        "train_labels": torch.as_tensor(np.asarray(train_labels, dtype=np.int64)),
        "test_images": resize(test_images, image_size),
        "test_labels": torch.as_tensor(np.asarray(test_labels, dtype=np.int64)),
        "unlabeled_images": None if unlabeled is None else resize(unlabeled, image_size),
        "class_names": class_names,
        **_NORMALIZATION[name],
    }


def folder(
    root: Path, image_size: int | None, classes: Sequence[str] | None, mapped: bool, follow_links: bool = False
) -> dict:
    """An image folder: train/<class>/, test/<class>/, optionally unlabeled/. Normalized with ImageNet's statistics.

    Args:
        mapped: decode into a file and map it, instead of into memory.
        follow_links: follow links that lead out of a class folder.

    Raises:
        FileNotFoundError: `root`, train/ or test/ is missing.
        ValueError: class folders that do not fit the class list or share images, a class without train images,
            unreadable files, links that lead elsewhere, more images than memory can hold.
    """
    for part in (root / "train", root / "test"):
        if not part.is_dir():
            raise FileNotFoundError(
                "data_dir: expected an image folder with train/<class>/ and test/<class>/ in "
                f"{printable(str(root.resolve()))}, found no directory {part.name}/"
            )
    _warn_of_unread_folders(root)
    found, beside = {}, {}
    for part in ("train", "test"):
        found[part], beside[part] = _subfolders(root / part)
    class_names = _class_order(root, found["train"], classes)
    if unknown := sorted(set(found["test"]) - set(class_names)):
        shown = ", ".join(distinct(*class_names, *unknown)[len(class_names) :])
        raise ValueError(f"{_shown(root / 'test')}: expected only the classes of train/, found also {shown}")
    if not follow_links:
        _require_apart([root / part / name for part in ("train", "test") for name in found[part]])
    files, labels = {}, {}
    for part in ("train", "test"):
        listed = [image_files(root / part / name, follow_links=follow_links) for name in class_names]
        _warn_of_ignored(root / part, beside[part] + [path for _, others in listed for path in others])
        per_class = [images for images, _ in listed]
        if not follow_links:
            _require_own_images(root, [(name, path) for name, paths in zip(class_names, per_class) for path in paths])
        if part == "train" and (empty := [name for name, paths in zip(class_names, per_class) if not paths]):
            raise ValueError(
                f"{_shown(root / part)}: expected images of every class, found none of {', '.join(distinct(*empty))}"
            )
        files[part] = [path for paths in per_class for path in paths]
        labels[part] = torch.repeat_interleave(
            torch.arange(len(class_names)), torch.tensor([len(p) for p in per_class])
        )
    if not files["test"]:
        raise ValueError(f"{_shown(root / 'test')}: expected image files in the class folders, found none")
    files["unlabeled"], others = image_files(root / "unlabeled")
    _warn_of_ignored(root / "unlabeled", others)
    if not files["unlabeled"] and (root / "unlabeled").is_dir():
        warnings.warn(f"{_shown(root / 'unlabeled')}: no image files in it", stacklevel=2)
    parts = [files[part] for part in ("train", "unlabeled", "test")]
    paths, file = [path for part in parts for path in part], None
    if mapped:
        images, file = mapped_files(root, paths, image_size)
    else:
        _require_memory(len(paths), image_size)
        images = read_files(paths, image_size)
    train, unlabeled, test = images.split([len(part) for part in parts])
    return {
        "train_images": train,
        "train_labels": labels["train"],
        "test_images": test,
        "test_labels": labels["test"],
        "unlabeled_images": unlabeled if len(unlabeled) else None,
        "class_names": class_names,
        "fingerprint_file": None if file is None else file.with_suffix(FINGERPRINT),
        **_IMAGENET,
    }


def _require_memory(count: int, size: int | None) -> None:
    """Raises ValueError when `count` images at size x size need more memory than there is."""
    needed = 2 * count * 3 * (size or 0) ** 2  # decoded one by one, then put together
    available = physical_memory()
    if available is not None and needed > available:
        raise ValueError(
            f"images: {count} images at {size}x{size} need {needed / 1e9:.0f} GB of memory to be decoded, and this "
            f"machine has {available / 1e9:.0f} GB; --images mapped keeps them in a file of half that size"
        )


def arrays(path: Path, image_size: int | None) -> dict:
    """An .npz file of arrays, normalized with mean and deviation of its train images.

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
    required = ("train_images", "train_labels", "test_images", "test_labels")
    if missing := [name for name in required if name not in content]:
        raise ValueError(f"{path}: expected arrays {', '.join(required)}, found no {', '.join(missing)}")
    for name in ("train_labels", "test_labels"):
        if content[name].dtype.kind not in "iu" or content[name].ndim != 1:
            raise ValueError(f"{name}: expected integers [N], found {content[name].dtype} {list(content[name].shape)}")
    train_images = resize(as_rgb("train_images", content["train_images"]), image_size)
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
    return {
        "train_images": train_images,
        "train_labels": torch.from_numpy(content["train_labels"].astype(np.int64)),
        "test_images": resize(as_rgb("test_images", content["test_images"]), image_size),
        "test_labels": torch.from_numpy(content["test_labels"].astype(np.int64)),
        "unlabeled_images": None if unlabeled is None else resize(as_rgb("unlabeled_images", unlabeled), image_size),
        "class_names": class_names,
        **_statistics(train_images),
    }


def _channels_last(images: np.ndarray) -> np.ndarray:
    return images.transpose(0, 2, 3, 1)


def _statistics(images: Tensor) -> dict[str, tuple[float, ...]]:
    """Mean and deviation per channel in 0..1; the deviation is at least one gray level, so it can divide."""
    counts = [torch.bincount(images[..., c].flatten(), minlength=256).double() for c in range(3)]
    levels = torch.arange(256, dtype=torch.float64) / 255
    mean = [float((h * levels).sum() / h.sum().clamp(min=1)) for h in counts]
    variance = [float((h * (levels - m) ** 2).sum() / h.sum().clamp(min=1)) for h, m in zip(counts, mean)]
    return {"mean": tuple(mean), "std": tuple(max(v**0.5, 1 / 255) for v in variance)}


def _subfolders(path: Path) -> tuple[list[str], list[Path]]:
    """Names of the folders in `path`, and of everything else there; hidden ones are passed over."""
    entries = sorted(p for p in path.iterdir() if not p.name.startswith("."))
    others = [p for p in entries if not p.is_dir()]
    require_targets(others)
    return [p.name for p in entries if p.is_dir()], others


def _require_apart(folders: list[Path]) -> None:
    """Raises ValueError if links make folders of different names one folder, or put one into another."""
    outer, first = "", Path()
    for inner, path in sorted(((os.path.realpath(p), p) for p in folders), key=lambda pair: Path(pair[0]).parts):
        if outer and is_inside(inner, outer):
            if path.name != first.name:
                raise ValueError(
                    f"{_shown(path)}: expected a class folder of its own, found a link into the images of "
                    f"{_shown(first)}; --follow-links allows it"
                )
        else:
            outer, first = inner, path


def _require_own_images(root: Path, images: list[tuple[str, Path]]) -> None:
    """Raises ValueError for links that stand in one class's folder and lead to images of another class."""
    parts = [os.path.realpath(root / part) for part in ("train", "test")]
    for name, path in images:
        if not path.is_symlink():
            continue
        target = os.path.realpath(path)
        own = [os.path.realpath(root / part / name) for part in ("train", "test")]
        if any(is_inside(target, part) for part in parts) and not any(is_inside(target, folder) for folder in own):
            raise ValueError(
                f"{_shown(path)}: expected an image of its class, found a link to {printable(target)}; --follow-links "
                "allows it"
            )


def _warn_of_unread_folders(root: Path) -> None:
    read = ("train", "test", "unlabeled")
    unread = sorted(p.name for p in root.iterdir() if p.is_dir() and not p.name.startswith(".") and p.name not in read)
    if unread:
        names = ", ".join(f"{name}/" for name in distinct(*unread))
        warnings.warn(f"{_shown(root)}: not read: {names}; only train/, test/ and unlabeled/ are", stacklevel=3)


def _shown(path: Path) -> str:
    return printable(str(path))


def _warn_of_ignored(part: Path, files: list[Path]) -> None:
    if files:
        examples = ", ".join(_shown(path.relative_to(part)) for path in files[:3])
        warnings.warn(
            f"{_shown(part)}: {len(files)} ignored, without an image's suffix or beside the class folders: {examples}"
            + (", ..." if len(files) > 3 else ""),
            stacklevel=2,
        )


def _class_order(root: Path, found: list[str], classes: Sequence[str] | None) -> tuple[str, ...]:
    listing, source = root / "classes.txt", "classes"
    if classes is None and listing.is_file():
        try:
            text = listing.read_text(encoding="utf-8-sig")  # with or without a byte order mark
        except UnicodeDecodeError as error:
            raise ValueError(f"{_shown(listing)}: expected UTF-8 text, found other bytes ({error})") from error
        classes, source = [line.strip() for line in text.splitlines() if line.strip()], str(listing)
    if classes is None:
        classes, source = found, str(root / "train")
    source = printable(source)
    require_names(source, classes)
    if set(classes) != set(found):
        shown = distinct(*found, *classes)
        raise ValueError(
            f"{source}: expected the class folders of {_shown(root / 'train')}, which are "
            f"{', '.join(shown[: len(found)]) or 'none'}; found {', '.join(shown[len(found) :]) or 'none'}"
        )
    return tuple(classes)
