"""Which image files a practitioner's dataset has, and their labels: class folders, CSV files, plain folders."""

import os
import warnings
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from bacon_fast.data.image_csv import read_csv
from bacon_fast.data.images import UnreadableImagesError, image_files, is_inside, require_targets
from bacon_fast.data.names import distinct, printable, require_names, shown

OtherLabels = Literal["error", "drop", "unlabeled"]
"""What becomes of images whose label is none of the classes."""

_NAMED, _MOST_LABELS = 3, 20
_PLURAL = {True: "s", False: ""}

Labeled = list[tuple[Path, str]]
"""Image files and their labels."""


@dataclass
class Listing:
    """Image files by part; the labels of `train`, `test` and `val` are class names.

    class_names: of K classes, in order.
    """

    class_names: tuple[str, ...]
    train: Labeled
    unlabeled: list[Path] = field(default_factory=list)
    test: Labeled = field(default_factory=list)
    val: Labeled = field(default_factory=list)

    def labels(self, part: str) -> list[int]:
        """Classes, 0..K-1, of the files of a part."""
        number = {name: c for c, name in enumerate(self.class_names)}
        return [number[label] for _, label in getattr(self, part)]


def list_images(
    source: Path,
    *,
    unlabeled: Sequence[Path] = (),
    test: Sequence[Path] = (),
    val: Sequence[Path] = (),
    classes: Sequence[str] | None = None,
    follow_links: bool = False,
    other_labels: OtherLabels = "error",
) -> Listing:
    """The files of the image folder or CSV file `source`, and of further folders and CSV files.

    Args:
        source: a folder with train/<class>/, and maybe test/<class>/ and unlabeled/; or a CSV file (`read_csv`), in
            which rows without a label are unlabeled images.
        unlabeled: further unlabeled images: folders, at any depth, and CSV files, whose labels are not read.
        test, val: further test images, and validation images: folders of class folders, and CSV files, all labeled.
        classes: the classes in order; default: the lines of classes.txt beside the images, else all labels, sorted.
        follow_links: follow links that lead out of a class folder.
        other_labels: images of other classes: an error, dropped, or (those of `source`) unlabeled.

    A file that is labeled is no unlabeled one, wherever it is listed again. An unlabeled one that is also in `test` or
    `val` is left out with a warning.

    Raises:
        FileNotFoundError: `source`, its train/, or a further folder or file is missing.
        ValueError: what contradicts itself or is no list of images; the message names files and counts.
    """
    further = (*unlabeled, *test, *val)
    if source.suffix.lower() == ".csv":
        listing = _of_csv(source, classes, other_labels)
    else:
        listing = _of_folder(source, classes, follow_links, other_labels, [*further])
    for path in unlabeled:
        listing.unlabeled += unlabeled_files(path)
    for part, paths in (("test", test), ("val", val)):
        for path in paths:
            found = _all_labeled(path, read_csv(path)) if _is_csv(path) else _class_folder(path, follow_links)
            found, _ = _of_classes(shown(path), found, listing.class_names, other_labels)
            require_files([file for file, _ in found])
            getattr(listing, part).extend(found)
    _require_one_place(listing)
    return listing


def unlabeled_files(source: Path) -> list[Path]:
    """Image files of a folder, at any depth, or of a CSV file, whose labels are not read.

    Raises FileNotFoundError and ValueError as `read_csv` and `image_files`.
    """
    return [file for file, _ in read_csv(source, label=False)] if _is_csv(source) else _plain(source)


# --- CSV files -------------------------------------------------------------------------------------------------------


def _is_csv(path: Path) -> bool:
    return path.suffix.lower() == ".csv"


def _of_csv(path: Path, classes: Sequence[str] | None, other_labels: OtherLabels) -> Listing:
    rows = read_csv(path)
    labeled, unlabeled = [row for row in rows if row[1]], [file for file, label in rows if not label]
    if not labeled:
        raise ValueError(f"{shown(path)}: expected rows with a label, found none in {len(rows)}")
    names, source = _asked_classes(path.parent, classes)
    if names is None:
        names, source = sorted({label for _, label in labeled}), shown(path)
    require_names(source, names)
    kept, others = _of_classes(shown(path), labeled, names, other_labels)
    _require_every_class(shown(path), names, kept)
    require_files([file for file, _ in kept])
    return Listing(tuple(names), kept, unlabeled + others)


def _all_labeled(path: Path, rows: Labeled) -> Labeled:
    without = [file for file, label in rows if not label]
    if without:
        raise ValueError(
            f"{shown(path)}: expected a label in every row, found {len(without)} without: {_examples(without)}"
        )
    return rows


def require_files(paths: Iterable[Path]) -> None:
    """Raises UnreadableImagesError for paths at which there is nothing."""
    if missing := [f"{shown(path)} (no such file)" for path in paths if not path.exists()]:
        raise UnreadableImagesError(missing)


# --- labels and places -----------------------------------------------------------------------------------------------


def _of_classes(
    source: str, labeled: Labeled, classes: Sequence[str], other_labels: OtherLabels
) -> tuple[Labeled, list[Path]]:
    """The files with a label of `classes`, and those with another one that are to be unlabeled."""
    known = set(classes)
    others = [(file, label) for file, label in labeled if label not in known]
    if others and other_labels == "error":
        counts = Counter(label for _, label in others).most_common()
        names = distinct(*(label for label, _ in counts[:_MOST_LABELS]))
        found = ", ".join(f"{name} ({n})" for name, (_, n) in zip(names, counts))
        more = f" and {len(counts) - _MOST_LABELS} more labels" if len(counts) > _MOST_LABELS else ""
        raise ValueError(
            f"{source}: expected labels of the classes {', '.join(map(printable, classes))}; found "
            f"{len(others)} image{_PLURAL[len(others) > 1]} of others: {found}{more}; "
            "--other-labels drop leaves them out, --other-labels unlabeled trains on them without labels"
        )
    kept = [row for row in labeled if row[1] in known]
    return kept, [file for file, _ in others] if other_labels == "unlabeled" else []


def _require_every_class(source: str, classes: Sequence[str], labeled: Labeled) -> None:
    found = {label for _, label in labeled}
    if empty := [name for name in classes if name not in found]:
        raise ValueError(f"{source}: expected images of every class, found none of {', '.join(distinct(*empty))}")


def _require_one_place(listing: Listing) -> None:
    """Raises ValueError for a file in two labeled parts, or with two labels in one; drops repeated files, and unlabeled
    ones that are labeled elsewhere."""
    place: dict[str, str] = {}
    words = {"train": "the labeled images", "test": "the test images", "val": "the validation images"}
    for part, name in words.items():
        labels: dict[str, tuple[Path, str]] = {}
        for file, label in getattr(listing, part):
            known = labels.setdefault(_identity(file), (file, label))[1]
            if known != label:
                raise ValueError(f"{shown(file)}: expected one label, found {' and '.join(distinct(known, label))}")
        setattr(listing, part, list(labels.values()))
        twice = [file for key, (file, _) in labels.items() if key in place]
        if twice:
            raise ValueError(
                f"{len(twice)} image{_PLURAL[len(twice) > 1]} of {name} would also be among "
                f"{place[_identity(twice[0])]}: {_examples(twice)}"
            )
        place |= dict.fromkeys(labels, name)
    measured = [file for file in listing.unlabeled if place.get(_identity(file), words["train"]) != words["train"]]
    if measured:
        warnings.warn(
            f"{len(measured)} unlabeled image{_PLURAL[len(measured) > 1]} left out, which are test or validation "
            f"images: {_examples(measured)}",
            stacklevel=3,
        )
    once = {_identity(file): file for file in listing.unlabeled}  # keeps their order
    listing.unlabeled = [file for key, file in once.items() if key not in place]


def _identity(file: Path) -> str:
    return os.path.abspath(file)


def _examples(files: Sequence[Path]) -> str:
    return ", ".join(map(shown, files[:_NAMED])) + (", ..." if len(files) > _NAMED else "")


# --- folders ---------------------------------------------------------------------------------------------------------


def _of_folder(
    root: Path, classes: Sequence[str] | None, follow_links: bool, other_labels: OtherLabels, further: list[Path]
) -> Listing:
    """The parts train/, test/ and unlabeled/ of an image folder."""
    if not (root / "train").is_dir():
        raise FileNotFoundError(
            "data_dir: expected an image folder with train/<class>/ in it, a CSV file or an .npz file at "
            f"{shown(root.resolve())}, found no directory train/"
        )
    _warn_of_unread_folders(root, further)
    parts = [part for part in ("train", "test") if (root / part).is_dir()]
    found, beside = {}, {}
    for part in parts:
        found[part], beside[part] = _subfolders(root / part)
    class_names = _class_order(root, found["train"], classes, other_labels)
    unknown = sorted(set(found.get("test", ())) - set(class_names))
    if unknown and other_labels == "error":
        names = ", ".join(distinct(*class_names, *unknown)[len(class_names) :])
        raise ValueError(f"{shown(root / 'test')}: expected only the classes of train/, found also {names}")
    if not follow_links:
        _require_apart([root / part / name for part in parts for name in found[part]])
    listing, others = Listing(class_names, []), []
    for part in parts:
        labeled, ignored = [], beside[part]
        names = [*class_names, *(name for name in found[part] if name not in class_names)]
        for name in names:
            images, rest = image_files(root / part / name, follow_links=follow_links)
            labeled += [(path, name) for path in images]
            ignored = ignored + rest
        _warn_of_ignored(root / part, ignored)
        if not follow_links:
            _require_own_images(root, labeled)
        kept, unlabeled = _of_classes(shown(root / part), labeled, class_names, other_labels)
        if part == "train":
            _require_every_class(shown(root / part), class_names, kept)
            others = unlabeled
        elif not kept:
            raise ValueError(f"{shown(root / part)}: expected image files in the class folders, found none")
        setattr(listing, part, kept)
    if (root / "unlabeled").is_dir():
        listing.unlabeled = _plain(root / "unlabeled")
    listing.unlabeled += others
    return listing


def _plain(folder: Path) -> list[Path]:
    """Image files of a folder without labels, at any depth."""
    if not folder.is_dir():
        raise FileNotFoundError(f"expected a folder or a CSV file of images, found nothing at {shown(folder)}")
    images, others = image_files(folder)
    _warn_of_ignored(folder, others)
    if not images:
        warnings.warn(f"{shown(folder)}: no image files in it", stacklevel=3)
    return images


def _class_folder(folder: Path, follow_links: bool) -> Labeled:
    """Image files of a folder of class folders."""
    if not folder.is_dir():
        raise FileNotFoundError(
            f"expected a folder of class folders or a CSV file of images, found nothing at {shown(folder)}"
        )
    names, ignored = _subfolders(folder)
    if not follow_links:
        _require_apart([folder / name for name in names])
    labeled = []
    for name in names:
        images, others = image_files(folder / name, follow_links=follow_links)
        labeled += [(path, name) for path in images]
        ignored = ignored + others
    _warn_of_ignored(folder, ignored)
    if not labeled:
        raise ValueError(f"{shown(folder)}: expected image files in class folders, found none")
    return labeled


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
                    f"{shown(path)}: expected a class folder of its own, found a link into the images of "
                    f"{shown(first)}; --follow-links allows it"
                )
        else:
            outer, first = inner, path


def _require_own_images(root: Path, images: Labeled) -> None:
    """Raises ValueError for links that stand in one class's folder and lead to images of another class."""
    parts = [os.path.realpath(root / part) for part in ("train", "test")]
    for path, name in images:
        if not path.is_symlink():
            continue
        target = os.path.realpath(path)
        own = [os.path.realpath(root / part / name) for part in ("train", "test")]
        if any(is_inside(target, part) for part in parts) and not any(is_inside(target, folder) for folder in own):
            raise ValueError(
                f"{shown(path)}: expected an image of its class, found a link to {printable(target)}; --follow-links "
                "allows it"
            )


def _warn_of_unread_folders(root: Path, further: Sequence[Path]) -> None:
    """Names the folders in `root` that are none of its parts, nor among the `further` ones."""
    read = {"train", "test", "unlabeled", *(path.name for path in further if _identity(path.parent) == _identity(root))}
    unread = sorted(p.name for p in root.iterdir() if p.is_dir() and not p.name.startswith(".") and p.name not in read)
    if unread:
        names = ", ".join(f"{name}/" for name in distinct(*unread))
        warnings.warn(f"{shown(root)}: not read: {names}; only train/, test/ and unlabeled/ are", stacklevel=3)


def _warn_of_ignored(part: Path, files: list[Path]) -> None:
    if files:
        examples = ", ".join(shown(path.relative_to(part)) for path in files[:3])
        warnings.warn(
            f"{shown(part)}: {len(files)} ignored, without an image's suffix or beside the class folders: {examples}"
            + (", ..." if len(files) > 3 else ""),
            stacklevel=2,
        )


def _class_order(
    root: Path, found: list[str], classes: Sequence[str] | None, other_labels: OtherLabels
) -> tuple[str, ...]:
    """The classes of an image folder, whose train/ has the folders `found`."""
    names, source = _asked_classes(root, classes)
    if names is None:
        names, source = found, shown(root / "train")
    require_names(source, names)
    missing, others = set(names) - set(found), set(found) - set(names)
    if missing or (others and other_labels == "error"):
        both = distinct(*found, *names)
        raise ValueError(
            f"{source}: expected the class folders of {shown(root / 'train')}, which are "
            f"{', '.join(both[: len(found)]) or 'none'}; found {', '.join(both[len(found) :]) or 'none'}"
            + ("" if missing else "; --other-labels drop or unlabeled allows further folders")
        )
    return tuple(names)


def _asked_classes(folder: Path, classes: Sequence[str] | None) -> tuple[list[str] | None, str]:
    """`classes`, else the lines of classes.txt in the folder, else None; and where they are from, to be shown."""
    listing = folder / "classes.txt"
    if classes is not None or not listing.is_file():
        return None if classes is None else list(classes), "classes"
    try:
        text = listing.read_text(encoding="utf-8-sig")  # with or without a byte order mark
    except UnicodeDecodeError as error:
        raise ValueError(f"{shown(listing)}: expected UTF-8 text, found other bytes ({error})") from error
    return [line.strip() for line in text.splitlines() if line.strip()], shown(listing)
