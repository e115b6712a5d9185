"""Long-tailed splits: the named protocols of the literature, and the split as an object with a hash.

Counts and protocols follow methods.md A.1 and newer_methods.md N. Source tags: [BC] official BaCon code, [US] USB, [AB]
ABC, [CO] CoSSL, [SP] SimPro, [CD] CDMAD, [CP] CPG.
"""

import dataclasses
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

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


Order = Literal["sorted", "middle", "head-tail", "random"]


def reordered(counts: list[int], order: Order, seed: int) -> list[int]:
    """Counts that fall with the class, in another order (newer_methods.md N).

    "sorted" leaves them, "middle" has its peak in the middle, "head-tail" at both ends ([SP]; [CP] has these two names
    the other way round), "random" shuffles them by Python's generator of this seed ([CP]).

    Example:
        >>> reordered([9, 7, 5, 3, 1], "middle", 0), reordered([9, 7, 5, 3, 1], "head-tail", 0)
        ([1, 5, 9, 7, 3], [7, 3, 1, 5, 9])
    """
    if order == "sorted":
        return counts
    if order == "random":
        shuffled = list(counts)
        random.Random(seed).shuffle(shuffled)
        return shuffled
    even, odd = counts[::2], counts[1::2]
    return even[::-1] + odd if order == "middle" else odd + even[::-1]


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
        unlabeled_order: which class has which of the unlabeled counts, see `reordered`.
        unlabeled_own: the unlabeled set is the dataset's own unlabeled images (STL-10's 100,000), and with lb_in_ulb
            the labeled ones.
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
    unlabeled_order: Order = "sorted"
    unlabeled_own: bool = False

    def __post_init__(self) -> None:
        if self.labeled_fraction is not None and not (self.labeled_head is None and 0 < self.labeled_fraction <= 1):
            raise ValueError(
                f"protocol {self.name!r}: expected labeled_head=None beside labeled_fraction in 0..1, found "
                f"labeled_head={self.labeled_head}, labeled_fraction={self.labeled_fraction}"
            )
        unknown = self.unlabeled_head is None
        whole = (self.unlabeled_all, self.unlabeled_own)
        if sum(whole) != unknown or unknown != (self.gamma_u is None):
            raise ValueError(
                f"protocol {self.name!r}: expected unlabeled_head and gamma_u, or unlabeled_all, or unlabeled_own; "
                f"found unlabeled_head={self.unlabeled_head}, gamma_u={self.gamma_u}, "
                f"unlabeled_all={self.unlabeled_all}, unlabeled_own={self.unlabeled_own}"
            )
        if self.unlabeled_order != "sorted" and (self.gamma_u is None or self.gamma_u < 0):
            raise ValueError(
                f"protocol {self.name!r}: expected gamma_u of at least 1 beside unlabeled_order "
                f"{self.unlabeled_order!r}, found {self.gamma_u}"
            )
        if self.lb_in_ulb and self.unlabeled_all:
            raise ValueError(f"protocol {self.name!r}: unlabeled_all holds the labeled images already; drop lb_in_ulb")
        if self.labeled_head is None and not self.unlabeled_all:
            raise ValueError(
                f"protocol {self.name!r}: labeled_head=None leaves no image over, so it needs unlabeled_all"
            )

    @property
    def has_same_imbalance(self) -> bool:
        """Whether the unlabeled set is known to have the imbalance of the labeled one, class by class."""
        return self.gamma_u == self.gamma_l and self.unlabeled_order == "sorted"


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
    protocols += [*_simpro_protocols(), *_cdmad_protocols(), *_cpg_protocols()]
    return {protocol.name: protocol for protocol in protocols}


def _simpro_protocols() -> list[Protocol]:
    """newer_methods.md N.1. [SP] takes the images of a class in the dataset's order; here the seed draws them."""
    rows = []
    for name, dataset, labeled, unlabeled, gamma in (
        ("simpro-cifar10-100", "cifar10", 500, 4000, 100),
        ("simpro-cifar10-150", "cifar10", 500, 4000, 150),
        ("simpro-cifar100-20", "cifar100", 50, 400, 20),
    ):
        consistent = Protocol(name, dataset, labeled, unlabeled, gamma, gamma, source="[SP]")
        rows.append(consistent)
        for word, changes in (
            ("uniform", {"gamma_u": 1}),
            ("reversed", {"gamma_u": -gamma}),
            ("middle", {"unlabeled_order": "middle"}),
            ("head-tail", {"unlabeled_order": "head-tail"}),
        ):
            source = f"[SP]; unlabeled set {word}"
            rows.append(dataclasses.replace(consistent, name=f"{name}-{word}", source=source, **changes))
    for gamma in (10, 20):
        source = "[SP]; the official unlabeled images alone"
        rows.append(
            Protocol(f"simpro-stl10-{gamma}", "stl10", 450, None, gamma, None, source=source, unlabeled_own=True)
        )
    return rows


def _cdmad_protocols() -> list[Protocol]:
    """newer_methods.md N.2: what the sets of CoSSL and USB leave open."""
    rows = []
    for word, gamma_u in (("uniform", 1), ("50", 50), ("150", 150), ("reversed", -100)):
        source = f"[CD]; gamma_u = {gamma_u}" if gamma_u > 0 else "[CD]; gamma_u = 1/100"
        rows.append(
            Protocol(f"cdmad-cifar10-100-{word}", "cifar10", 1500, 3000, 100, gamma_u, lb_in_ulb=True, source=source)
        )
    own = {
        "unlabeled_own": True,
        "lb_in_ulb": True,
        "source": "[CD]; the official unlabeled images and the labeled ones",
    }
    rows += [Protocol(f"cdmad-stl10-{gamma}", "stl10", 450, None, gamma, None, **own) for gamma in (10, 20)]
    source = "[CD] with ReMixMatch, disjoint"
    rows.append(Protocol("cdmad-disjoint-cifar10-50", "cifar10", 1500, 3000, 50, 50, source=source))
    rows += [
        Protocol(f"cdmad-disjoint-cifar100-{gamma}", "cifar100", 150, 300, gamma, gamma, source=source)
        for gamma in (20, 50, 100)
    ]
    return rows


def _cpg_protocols() -> list[Protocol]:
    """newer_methods.md N.3; the order "random" is that of the split's seed."""
    rows = []
    for dataset, labeled, unlabeled, gammas in (
        ("cifar10", 400, 4600, (50, 100, 150, 200)),
        ("cifar100", 50, 450, (10, 15, 20)),
    ):
        for gamma in gammas:
            name = f"cpg-{dataset}-{gamma}"
            consistent = Protocol(name, dataset, labeled, unlabeled, gamma, gamma, source="[CP]")
            inverse, shuffled = f"[CP]; gamma_u = 1/{gamma}", "[CP]; unlabeled counts in a random order"
            rows += [
                consistent,
                dataclasses.replace(consistent, name=f"{name}-inverse", source=inverse, gamma_u=-gamma),
                dataclasses.replace(consistent, name=f"{name}-random", source=shuffled, unlabeled_order="random"),
            ]
    return rows


PROTOCOLS: dict[str, Protocol] = _protocols()
"""Named protocols: every row of methods.md A.1, the peers' variants of them, and those of newer_methods.md N, but for
Meta-Expert's other imbalances and Food-101."""

_LATER = {"labeled_fraction": None, "unlabeled_order": "sorted", "unlabeled_own": False}
"""Fields that older splits do not have, and the values with which they change nothing."""


@dataclass(frozen=True, eq=False)
class Split:
    """Which images are labeled and which are unlabeled.

    Attributes:
        protocol, seed: how it was drawn.
        dataset_name, dataset_fingerprint: the images it was drawn from.
        labeled, unlabeled: int64 arrays of indices into `ImageDataset.pool()`.
        labeled_counts, unlabeled_counts: images per class; unlabeled_counts is None when unknown.
        validation: int64 array of train images with a label that are held out: neither labeled nor unlabeled.
    """

    protocol: Protocol
    seed: int
    dataset_name: str
    dataset_fingerprint: str
    labeled: np.ndarray
    unlabeled: np.ndarray
    labeled_counts: tuple[int, ...]
    unlabeled_counts: tuple[int, ...] | None
    validation: np.ndarray = field(default_factory=lambda: np.empty(0, dtype=np.int64))

    def _content(self) -> dict:
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        # Without fields that change nothing, so that the hashes of older splits stay.
        protocol = dataclasses.asdict(self.protocol)
        fields["protocol"] = {k: v for k, v in protocol.items() if k not in _LATER or v != _LATER[k]}
        indices = {name: getattr(self, name).tolist() for name in ("labeled", "unlabeled", "validation")}
        if not indices["validation"]:
            del fields["validation"], indices["validation"]
        return fields | indices

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
                    "validation": np.asarray(content.get("validation", []), dtype=np.int64),
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
        for name in ("labeled", "unlabeled", "validation"):
            indices, counts = getattr(self, name), getattr(self, f"{name}_counts", None)
            if indices.ndim != 1 or (indices < 0).any() or len(np.unique(indices)) < indices.size:
                raise ValueError(f"{name}: expected different indices of at least 0")
            if counts is None and name != "labeled":
                continue
            if not all(type(count) is int and count >= 0 for count in counts) or sum(counts) != len(indices):
                raise ValueError(f"{name}_counts: expected a sum of {len(indices)}, found {counts}")
        if np.isin(self.validation, np.concatenate([self.labeled, self.unlabeled])).any():
            raise ValueError("validation: expected indices that are neither labeled nor unlabeled")

    def verify(self, dataset: ImageDataset) -> None:
        """Raises ValueError unless `dataset` holds the images this split was drawn from, with these counts."""
        if dataset.fingerprint != self.dataset_fingerprint:
            raise ValueError(
                f"split: expected dataset {self.dataset_name!r} with fingerprint {self.dataset_fingerprint}, found "
                f"{dataset.name!r} with fingerprint {dataset.fingerprint}; images count as others "
                "where they are resized otherwise, as a timm backbone may ask for"
            )
        train_labels = dataset.train_labels.numpy()
        labeled = len(train_labels)
        sizes = {"labeled": (self.labeled, labeled), "unlabeled": (self.unlabeled, dataset.pool_size)}
        sizes["validation"] = (self.validation, labeled)
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
    held_out = f", {len(split.validation):,} held out for validation" if len(split.validation) else ""
    line = f"labeled {labeled:,}{held_out}, unlabeled {unlabeled:,}"
    if parts:
        line += f", of which {', '.join(parts)}"
    if unused:
        line += f"; the protocol leaves out {unused:,} images that come without a class"
    return line


def make_split(dataset: ImageDataset, protocol: Protocol, seed: int, validation: float = 0.0) -> Split:
    """Draws a split (methods.md A.1): per class, shuffle the train images, label the first N_c, put the next M_c into
    the unlabeled set.

    The shuffle sorts Philox keys of (seed, image), so the same seed gives the same split on every machine.

    Args:
        validation: share of the labeled images of each class that is held out, see `validation_counts`.

    Raises:
        ValueError: a class has fewer than N_c + M_c train images (class, needed and found are named), or N_c = 0, or
            the protocol takes the dataset's own unlabeled images, of which there are none.
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
    if protocol.unlabeled_head is not None:
        falling = class_counts(protocol.unlabeled_head, protocol.gamma_u, num_classes)
        wanted_u = reordered(falling, protocol.unlabeled_order, seed)
    for name, n, m, available in zip(dataset.class_names, wanted_l, wanted_u, found):
        if n + m > available:
            raise ValueError(
                f"class {name!r}: protocol {protocol.name!r} needs {n} labeled + {m} unlabeled = {n + m} train images, "
                f"found {available} in {dataset.name}"
            )
    labeled = [indices[:n] for indices, n in zip(shuffled, wanted_l)]
    counts, held_out = wanted_l, np.empty(0, dtype=np.int64)
    if validation:
        labeled, held_out = _held_out(labeled, validation, seed)
        counts = [len(indices) for indices in labeled]
    unlabeled_counts = None
    if protocol.unlabeled_all:
        unlabeled = np.arange(dataset.pool_size)
    elif protocol.unlabeled_own:
        unlabeled = np.arange(len(labels), dataset.pool_size)
        if not len(unlabeled):
            raise ValueError(
                f"protocol {protocol.name!r}: expected a dataset with unlabeled images of its own, found none in "
                f"{dataset.name}"
            )
        if protocol.lb_in_ulb:
            unlabeled = np.concatenate([*labeled, unlabeled])
    else:
        start = [0 if protocol.lb_in_ulb else n for n in wanted_l]
        chosen = [indices[a : n + m] for indices, a, n, m in zip(shuffled, start, wanted_l, wanted_u)]
        chosen = [indices[~np.isin(indices, held_out)] for indices in chosen]
        unlabeled = np.concatenate(chosen)
        unlabeled_counts = tuple(len(indices) for indices in chosen)
    return Split(
        protocol=protocol,
        seed=seed,
        dataset_name=dataset.name,
        dataset_fingerprint=dataset.fingerprint,
        labeled=np.concatenate(labeled),
        unlabeled=unlabeled[~np.isin(unlabeled, held_out)],
        labeled_counts=tuple(counts),
        unlabeled_counts=unlabeled_counts,
        validation=held_out,
    )


def validation_counts(labeled_counts: Sequence[int], share: float) -> list[int]:
    """Images of each class to hold out: round(share * n), but at least 1 and at most n-1; 0 of fewer than 2.

    Example:
        >>> validation_counts([40, 29, 22, 16, 12, 9, 7, 5, 4], 0.2)
        [8, 6, 4, 3, 2, 2, 1, 1, 1]
    """
    return [max(0, min(n - 1, max(1, round(share * n)))) for n in labeled_counts]


def _held_out(labeled: list[np.ndarray], share: float, seed: int) -> tuple[list[np.ndarray], np.ndarray]:
    """The labeled images of each class without those held out, and these, by the order of Philox keys of (seed, image).

    Raises ValueError if none can be held out.
    """
    kept, held_out = [], []
    for indices, n in zip(labeled, validation_counts([len(indices) for indices in labeled], share)):
        words = philox(seed, 0, Stream.VALIDATION, torch.from_numpy(indices), 2).numpy()
        chosen = indices[np.lexsort((words[:, 1], words[:, 0]))[:n]]
        held_out.append(chosen)
        kept.append(indices[~np.isin(indices, chosen)])
    if not any(map(len, held_out)):
        raise ValueError("validation: expected a class with at least 2 labeled images, found none")
    return kept, np.concatenate(held_out)


def _shuffled_by_class(labels: torch.Tensor, num_classes: int, seed: int) -> list[np.ndarray]:
    words = philox(seed, 0, Stream.SPLIT, torch.arange(len(labels)), 2).numpy()
    # Sorted by class, then by key; the stable sort leaves equal keys in dataset order.
    order = np.lexsort((words[:, 1], words[:, 0], labels.numpy()))
    return np.split(order, np.cumsum(np.bincount(labels.numpy(), minlength=num_classes))[:-1])
