"""Long-tailed splits: the named protocols of the literature, and the split as an object with a hash.

Counts and protocols follow methods.md A.1. Source tags: [BC] official BaCon code, [US] USB, [AB] ABC, [CO] CoSSL.
"""

import dataclasses
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from bacon_fast.data.datasets import ImageDataset
from bacon_fast.data.philox import Stream, philox
from bacon_fast.files import digest, read_record, write_record
from bacon_fast.ops.checks import check_seed


def class_counts(head: int, gamma: float, num_classes: int) -> list[int]:
    """Exponentially decaying images per class (methods.md A.1; [US], [AB], [CO] agree).

    n_c = trunc(head * m^c) with m = (1 / |gamma|)^(1 / (K - 1)); the last class is trunc(head / |gamma|), so that it is
    exact. Computed in float64.

    Args:
        head: images of the largest class, at least 1.
        gamma: imbalance ratio: head over tail, |gamma| >= 1; 1 gives every class `head` images; negative reverses the
            list, so that the last class is the largest.
        num_classes: K, at least 2.

    Returns:
        K counts, in class order; tail classes are empty (0) when |gamma| exceeds `head`.
    """
    if num_classes < 2:
        raise ValueError(f"num_classes: expected at least 2, found {num_classes}")
    if head < 1:
        raise ValueError(f"head: expected at least 1, found {head}")
    if not abs(gamma) >= 1:
        raise ValueError(f"gamma: expected |gamma| >= 1 (negative for a reversed list), found {gamma}")
    decay = (1 / abs(gamma)) ** (1 / (num_classes - 1))
    counts = [int(head * decay**c) for c in range(num_classes - 1)]
    counts.append(int(head / abs(gamma)))
    return counts if gamma > 0 else counts[::-1]


@dataclass(frozen=True)
class Protocol:
    """How a long-tailed split is drawn from a dataset.

    Attributes:
        name, source: what tables call it, and where it comes from.
        dataset: name of the dataset it was defined for; other data can be split by it as well.
        labeled_head, gamma_l: N_1 and the imbalance ratio of the labeled set; N_1 None labels every train image, or
            the share labeled_fraction of them.
        unlabeled_head, gamma_u: M_1 and the imbalance ratio of the unlabeled set; gamma_u None is unknown.
        lb_in_ulb: the labeled images are in the unlabeled set too.
        unlabeled_all: the unlabeled set is the dataset's own unlabeled images plus all train images (STL-10).
        labeled_fraction: share of each class's train images that is labeled, rounded, at least one image; in 0..1.
    """

    name: str
    dataset: str
    labeled_head: int | None
    unlabeled_head: int | None
    gamma_l: float
    gamma_u: float | None
    lb_in_ulb: bool = False
    unlabeled_all: bool = False
    source: str = ""
    labeled_fraction: float | None = None

    def __post_init__(self) -> None:
        if self.labeled_fraction is not None and not (self.labeled_head is None and 0 < self.labeled_fraction <= 1):
            raise ValueError(
                f"protocol {self.name!r}: expected labeled_head=None beside labeled_fraction in 0..1, found "
                f"labeled_head={self.labeled_head}, labeled_fraction={self.labeled_fraction}"
            )
        unknown = self.unlabeled_head is None
        if self.unlabeled_all != unknown or unknown != (self.gamma_u is None):
            raise ValueError(
                f"protocol {self.name!r}: expected either unlabeled_head and gamma_u, or unlabeled_all; found "
                f"unlabeled_head={self.unlabeled_head}, gamma_u={self.gamma_u}, unlabeled_all={self.unlabeled_all}"
            )
        if self.lb_in_ulb and self.unlabeled_all:
            raise ValueError(f"protocol {self.name!r}: unlabeled_all holds the labeled images already; drop lb_in_ulb")
        if self.labeled_head is None and not self.unlabeled_all:
            raise ValueError(
                f"protocol {self.name!r}: labeled_head=None leaves no image over, so it needs unlabeled_all"
            )


def _protocols() -> dict[str, Protocol]:
    # Name, dataset, N_1, M_1, gamma_l, gamma_u, source.
    disjoint = [
        ("digits", "digits", 40, 60, 10, 10, "bacon_fast; the smallest class of the train part has 104 images"),
        # BaCon's own settings; CIFAR-10 at 100 is ABC's too. beta is N_1 / (N_1 + M_1).
        ("bacon-cifar10-100", "cifar10", 1000, 4000, 100, 100, "[BC], [AB]; beta 20 %"),
        ("bacon-cifar10-150", "cifar10", 1000, 4000, 150, 150, "[BC]; beta 20 %"),
        ("bacon-cifar10-100-inverse", "cifar10", 1000, 4000, 100, -100, "[BC]; gamma_u = 1/100"),
        ("bacon-cifar10-150-inverse", "cifar10", 1000, 4000, 150, -150, "[BC]; gamma_u = 1/150"),
        ("bacon-cifar10-100-uniform", "cifar10", 1000, 4000, 100, 1, "the same with a uniform unlabeled set"),
        ("bacon-cifar100-20", "cifar100", 200, 300, 20, 20, "[BC]; beta 40 %"),
        ("bacon-svhn-100", "svhn", 1000, 4000, 100, 100, "[BC]; pool train + extra (train alone has too few zeros)"),
        # USB's long-tailed settings (config/classic_cv_imb). DASO (500), CDMAD and DARP (1500) have them too.
        ("usb-cifar10-1500-100", "cifar10", 1500, 3000, 100, 100, "[US]"),
        ("usb-cifar10-1500-150", "cifar10", 1500, 3000, 150, 150, "[US]"),
        ("usb-cifar10-1500-100-inverse", "cifar10", 1500, 3000, 100, -100, "[US]"),
        ("usb-cifar10-500-100", "cifar10", 500, 4000, 100, 100, "[US]"),
        ("usb-cifar10-500-150", "cifar10", 500, 4000, 150, 150, "[US]"),
        ("usb-cifar10-500-100-inverse", "cifar10", 500, 4000, 100, -100, "[US]"),
        ("usb-cifar100-10", "cifar100", 150, 300, 10, 10, "[US]"),
        ("usb-cifar100-15", "cifar100", 150, 300, 15, 15, "[US]"),
        ("usb-cifar100-10-inverse", "cifar100", 150, 300, 10, -10, "[US]"),
    ]
    # These peers keep the labeled images in the unlabeled set.
    inclusive = [("abc-cifar100-20", "cifar100", 200, 300, 20, 20, "[AB] fix_cifar100")]
    inclusive += [(f"cossl-cifar10-{g}", "cifar10", 1500, 3000, g, g, "[CO]") for g in (50, 100, 150)]
    inclusive += [(f"cossl-cifar100-{g}", "cifar100", 150, 300, g, g, "[CO]") for g in (20, 50, 100)]
    # Here the unlabeled set holds all images.
    unknown = [
        ("bacon-stl10-10", "stl10", 150, None, 10, None, "[BC], [US]"),
        ("bacon-stl10-20", "stl10", 150, None, 20, None, "[US]"),
        ("bacon-stl10-450-10", "stl10", 450, None, 10, None, "methods.md A.1"),
        ("as-is", "folder", None, None, 1, None, "all train images labeled, all images unlabeled"),
    ]
    # The balanced settings of the semi-supervised literature: the name has the number of labels, and every train image
    # is unlabeled too.
    balanced = [("cifar10", 10, n, "FixMatch, SsCL, SSC") for n in (4, 25, 400)]
    balanced += [("cifar100", 100, n, "FixMatch, SSC") for n in (4, 25)]
    balanced += [(name, 10, n, "[US], SSC") for name in ("stl10", "svhn") for n in (4, 25)]
    unknown += [
        (f"balanced-{name}-{k * n}", name, n, None, 1, None, f"{n} labels a class; {source}")
        for name, k, n, source in balanced
    ]
    protocols = [Protocol(*row[:6], source=row[6]) for row in disjoint]
    protocols += [Protocol(*row[:6], source=row[6], lb_in_ulb=True) for row in inclusive]
    protocols += [Protocol(*row[:6], source=row[6], unlabeled_all=True) for row in unknown]
    share = Protocol("", "folder", None, None, 1, None, unlabeled_all=True)
    for percent in (1, 10):
        source = f"SsCL; {percent} % of each class, drawn by the seed (published lists hold other images)"
        name, fraction = f"imagenet-{percent}pct", percent / 100
        protocols.append(dataclasses.replace(share, name=name, source=source, labeled_fraction=fraction))
    return {protocol.name: protocol for protocol in protocols}


PROTOCOLS: dict[str, Protocol] = _protocols()
"""Named protocols: every row of methods.md A.1 and the peers' variants of them."""


@dataclass(frozen=True, eq=False)
class Split:
    """Which images are labeled and which are unlabeled.

    Attributes:
        protocol, seed: how it was drawn.
        dataset_name, dataset_fingerprint: the images it was drawn from.
        labeled, unlabeled: int64 arrays of indices into `ImageDataset.pool()`.
        labeled_counts, unlabeled_counts: images per class; unlabeled_counts is None when unknown.
    """

    protocol: Protocol
    seed: int
    dataset_name: str
    dataset_fingerprint: str
    labeled: np.ndarray
    unlabeled: np.ndarray
    labeled_counts: tuple[int, ...]
    unlabeled_counts: tuple[int, ...] | None

    def _content(self) -> dict:
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        # Without a fraction as before there was one, so that the hashes of older splits stay.
        protocol = dataclasses.asdict(self.protocol)
        fields["protocol"] = {k: v for k, v in protocol.items() if k != "labeled_fraction" or v is not None}
        return fields | {"labeled": self.labeled.tolist(), "unlabeled": self.unlabeled.tolist()}

    @property
    def hash(self) -> str:
        """sha256 (hex) of the content."""
        return digest(self._content())

    def save(self, path: str | Path) -> None:
        """Writes the split and its hash as JSON, atomically."""
        write_record(Path(path), self._content(), key="hash", indent=None)

    @classmethod
    def load(cls, path: str | Path) -> "Split":
        """Reads a split written by `save`.

        Raises ValueError, which names the file, when it is none, was damaged or changed, or says what cannot be: an
        index twice, counts of another sum.
        """
        content = read_record(Path(path), key="hash")
        try:
            counts = content["unlabeled_counts"]
            split = cls(
                **content
                | {
                    "protocol": Protocol(**content["protocol"]),
                    "labeled": np.asarray(content["labeled"], dtype=np.int64),
                    "unlabeled": np.asarray(content["unlabeled"], dtype=np.int64),
                    "labeled_counts": tuple(content["labeled_counts"]),
                    "unlabeled_counts": None if counts is None else tuple(counts),
                }
            )
            split._check()
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            reason = f"no entry {error}" if isinstance(error, KeyError) else error
            raise ValueError(f"{path}: no split of ours: {reason}") from error
        return split

    def _check(self) -> None:
        """Raises ValueError for what no split holds, whatever its images."""
        texts = (self.dataset_name, self.dataset_fingerprint, self.protocol.name, self.protocol.source)
        if not all(isinstance(text, str) for text in texts) or type(self.seed) is not int:
            raise ValueError(f"expected names of protocol and dataset, and a seed, found {texts} and {self.seed!r}")
        for name in ("labeled", "unlabeled"):
            indices, counts = getattr(self, name), getattr(self, f"{name}_counts")
            if indices.ndim != 1 or (indices < 0).any() or len(np.unique(indices)) < indices.size:
                raise ValueError(f"{name}: expected different indices of at least 0")
            if counts is None and name == "unlabeled":
                continue
            if not all(type(count) is int and count >= 0 for count in counts) or sum(counts) != len(indices):
                raise ValueError(f"{name}_counts: expected a sum of {len(indices)}, found {counts}")

    def verify(self, dataset: ImageDataset) -> None:
        """Raises ValueError unless `dataset` holds the images this split was drawn from, with these counts."""
        if dataset.fingerprint != self.dataset_fingerprint:
            raise ValueError(
                f"split: expected dataset {self.dataset_name!r} with fingerprint {self.dataset_fingerprint}, found "
                f"{dataset.name!r} with fingerprint {dataset.fingerprint}"
            )
        train_labels = dataset.train_labels.numpy()
        sizes = {"labeled": (self.labeled, len(train_labels)), "unlabeled": (self.unlabeled, dataset.pool_size)}
        for name, (indices, size) in sizes.items():
            if indices.size and indices.max() >= size:
                raise ValueError(f"split: {name}: expected indices below {size}, found {indices.max()}")
        for name in ("labeled", "unlabeled"):
            counts = getattr(self, f"{name}_counts")
            if counts is None:
                continue
            found = np.bincount(train_labels[getattr(self, name)], minlength=dataset.num_classes).tolist()
            if list(counts) != found:
                raise ValueError(f"split: {name}_counts: expected {found}, by the labels, found {list(counts)}")


def pool_line(split: Split, dataset: ImageDataset) -> str:
    """How many images are labeled and unlabeled, and what the unlabeled ones are, for a person to read."""
    labeled, unlabeled = len(split.labeled), len(split.unlabeled)
    again = int(np.isin(split.unlabeled, split.labeled).sum())
    own = int((split.unlabeled >= len(dataset.train_images)).sum())
    unused = dataset.pool_size - len(dataset.train_images) - own
    parts = [(again, "the labeled images"), (unlabeled - again - own, "other training images")]
    parts = [f"{count:,} are {kind}" for count, kind in (*parts, (own, "images that come without a class")) if count]
    line = f"labeled {labeled:,}, unlabeled {unlabeled:,}"
    if parts:
        line += f", of which {', '.join(parts)}"
    if unused:
        line += f"; the protocol leaves out {unused:,} images that come without a class"
    return line


def make_split(dataset: ImageDataset, protocol: Protocol, seed: int) -> Split:
    """Draws a split (methods.md A.1): per class, shuffle the train images, label the first N_c, put the next M_c into
    the unlabeled set.

    The shuffle sorts Philox keys of (seed, image), so the same seed gives the same split on every machine.

    Raises:
        ValueError: a class has fewer than N_c + M_c train images (class, needed and found are named), or N_c = 0.
    """
    check_seed(seed)
    num_classes, labels = dataset.num_classes, dataset.train_labels
    shuffled = _shuffled_by_class(labels, num_classes, seed)
    found = [len(indices) for indices in shuffled]
    if protocol.labeled_head is None:
        fraction = 1.0 if protocol.labeled_fraction is None else protocol.labeled_fraction
        # At least one image, unless the class has none.
        wanted_l = [min(n, max(1, round(fraction * n))) for n in found]
    else:
        wanted_l = class_counts(protocol.labeled_head, protocol.gamma_l, num_classes)
    for name, n in zip(dataset.class_names, wanted_l):
        if n < 1:
            raise ValueError(f"class {name!r}: protocol {protocol.name!r} leaves it without a labeled image")
    wanted_u = [0] * num_classes
    if not protocol.unlabeled_all:
        wanted_u = class_counts(protocol.unlabeled_head, protocol.gamma_u, num_classes)
    for name, n, m, available in zip(dataset.class_names, wanted_l, wanted_u, found):
        if n + m > available:
            raise ValueError(
                f"class {name!r}: protocol {protocol.name!r} needs {n} labeled + {m} unlabeled = {n + m} train images, "
                f"found {available} in {dataset.name}"
            )
    labeled = [indices[:n] for indices, n in zip(shuffled, wanted_l)]
    unlabeled_counts = None
    if protocol.unlabeled_all:
        unlabeled = np.arange(dataset.pool_size)
    else:
        start = [0 if protocol.lb_in_ulb else n for n in wanted_l]
        chosen = [indices[a : n + m] for indices, a, n, m in zip(shuffled, start, wanted_l, wanted_u)]
        unlabeled = np.concatenate(chosen)
        unlabeled_counts = tuple(len(indices) for indices in chosen)
    return Split(
        protocol=protocol,
        seed=seed,
        dataset_name=dataset.name,
        dataset_fingerprint=dataset.fingerprint,
        labeled=np.concatenate(labeled),
        unlabeled=unlabeled,
        labeled_counts=tuple(wanted_l),
        unlabeled_counts=unlabeled_counts,
    )


def _shuffled_by_class(labels: torch.Tensor, num_classes: int, seed: int) -> list[np.ndarray]:
    words = philox(seed, 0, Stream.SPLIT, torch.arange(len(labels)), 2).numpy()
    # Sorted by class, then by key; the stable sort leaves equal keys in dataset order.
    order = np.lexsort((words[:, 1], words[:, 0], labels.numpy()))
    return np.split(order, np.cumsum(np.bincount(labels.numpy(), minlength=num_classes))[:-1])
