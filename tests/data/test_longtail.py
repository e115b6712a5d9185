"""Class counts against the lists of methods.md A.1, and splits: selection, errors, files, hashes."""

import dataclasses
import itertools
import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bacon_fast.data.datasets import DATASETS, ImageDataset
from bacon_fast.data.longtail import (
    PROTOCOLS,
    Protocol,
    Split,
    class_counts,
    make_split,
    pool_line,
    validation_counts,
)
from bacon_fast.files import read_record, write_record

# (head, gamma, list), as documented in methods.md A.1.
DOCUMENTED = [
    (1000, 100, [1000, 599, 359, 215, 129, 77, 46, 27, 16, 10]),
    (4000, 100, [4000, 2397, 1437, 861, 516, 309, 185, 111, 66, 40]),
    (1000, 150, [1000, 573, 328, 188, 107, 61, 35, 20, 11, 6]),
    (4000, 150, [4000, 2292, 1313, 752, 431, 247, 141, 81, 46, 26]),
    (150, 10, [150, 116, 89, 69, 53, 41, 32, 25, 19, 15]),
    (150, 20, [150, 107, 77, 55, 39, 28, 20, 14, 10, 7]),
    (450, 10, [450, 348, 269, 208, 161, 125, 96, 75, 58, 45]),
    (1500, 100, [1500, 899, 539, 323, 193, 116, 69, 41, 25, 15]),
    (3000, 100, [3000, 1798, 1078, 646, 387, 232, 139, 83, 50, 30]),
    (500, 100, [500, 299, 179, 107, 64, 38, 23, 13, 8, 5]),
]
# name: (sum of labeled counts, sum of unlabeled counts), same source; lb_in_ulb adds the labeled images.
DOCUMENTED_SUMS = {
    "bacon-cifar10-100": (2478, 9922),
    "bacon-cifar10-150": (2329, 9329),
    "bacon-cifar10-100-inverse": (2478, 9922),
    "bacon-cifar10-150-inverse": (2329, 9329),
    "bacon-cifar100-20": (6333, 9527),
    "bacon-svhn-100": (2478, 9922),
    "usb-cifar10-1500-100": (3720, 7443),
    "usb-cifar10-500-100": (1236, 9922),
    "abc-cifar100-20": (6333, 9527 + 6333),
    "cossl-cifar10-100": (3720, 7443 + 3720),
    "bacon-stl10-10": (609, None),
    "bacon-stl10-20": (507, None),
    "bacon-stl10-450-10": (1835, None),
    "balanced-cifar10-40": (40, None),
    "balanced-cifar10-250": (250, None),
    "balanced-cifar10-4000": (4000, None),
}


@pytest.mark.parametrize(("head", "gamma", "expected"), DOCUMENTED)
def test_documented_lists(head, gamma, expected):
    assert class_counts(head, gamma, 10) == expected
    assert class_counts(head, -gamma, 10) == expected[::-1]


def test_documented_cifar100_lists():
    labeled, unlabeled = class_counts(200, 20, 100), class_counts(300, 20, 100)
    assert labeled[:6] == [200, 194, 188, 182, 177, 171] and labeled[-5:] == [11, 10, 10, 10, 10]
    assert unlabeled[:6] == [300, 291, 282, 273, 265, 257] and unlabeled[-3:] == [15, 15, 15]
    assert (sum(labeled), sum(unlabeled)) == (6333, 9527)


def test_uniform_counts():
    assert class_counts(7, 1, 4) == [7, 7, 7, 7]


@given(head=st.integers(1, 10_000), gamma=st.floats(1, 500), k=st.integers(2, 200))
def test_counts_fall_from_head_to_tail(head, gamma, k):
    counts = class_counts(head, gamma, k)
    assert len(counts) == k and counts[0] == head and counts[-1] == math.trunc(head / gamma)
    assert all(a >= b for a, b in itertools.pairwise(counts))


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        ((0, 10, 10), "head"),
        ((10, 0.5, 10), "gamma"),
        ((10, math.nan, 10), "gamma"),
        ((10, 2, 1), "num_classes"),
    ],
)
def test_bad_counts(arguments, name):
    with pytest.raises(ValueError, match=f"{name}: expected"):
        class_counts(*arguments)


def dataset_of(counts: list[int], unlabeled: int = 0) -> ImageDataset:
    """Images that say who they are: pixel values hold their position in the pool. Labels are interleaved."""
    labels = torch.cat([torch.full((n,), c) for c, n in enumerate(counts)])
    labels = labels[torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))]
    position = torch.arange(len(labels) + unlabeled)
    images = torch.stack([position % 256, position // 256, torch.zeros_like(position)], dim=1).to(torch.uint8)
    images = images[:, None, None, :]
    return ImageDataset(
        name="made",
        train_images=images[: len(labels)],
        train_labels=labels,
        test_images=images[:1],
        test_labels=torch.zeros(1, dtype=torch.int64),
        unlabeled_images=images[len(labels) :] if unlabeled else None,
        class_names=tuple(f"class{c}" for c in range(len(counts))),
        mean=(0.5, 0.5, 0.5),
        std=(0.5, 0.5, 0.5),
    )


def simple(labeled=8, unlabeled=12, gamma_l=4, gamma_u=4, **changes) -> Protocol:
    return Protocol("simple", "made", labeled, unlabeled, gamma_l, gamma_u, **changes)


@pytest.mark.parametrize("name", sorted(DOCUMENTED_SUMS))
def test_protocol_sums(name):
    protocol = PROTOCOLS[name]
    k = 100 if protocol.dataset == "cifar100" else 10
    labeled, unlabeled = DOCUMENTED_SUMS[name]
    split = make_split(dataset_of([5000] * k if k == 10 else [500] * k), protocol, 0)
    assert sum(split.labeled_counts) == len(split.labeled) == labeled
    assert (None if split.unlabeled_counts is None else sum(split.unlabeled_counts)) == unlabeled
    assert len(split.unlabeled) == (unlabeled or 5000 * k)


def test_every_protocol_is_named_sourced_and_for_a_dataset():
    for name, protocol in PROTOCOLS.items():
        assert protocol.name == name and protocol.source and protocol.dataset in DATASETS


def test_inverse_reverses_only_the_unlabeled_counts():
    split = make_split(dataset_of([30, 30, 30]), simple(gamma_u=-4), 0)
    assert split.labeled_counts == (8, 4, 2)
    assert split.unlabeled_counts == (3, 6, 12)


def test_selection_is_per_class_disjoint_and_random():
    dataset = dataset_of([30, 25, 21])
    split = make_split(dataset, simple(), 3)
    labels = dataset.train_labels.numpy()
    assert np.bincount(labels[split.labeled]).tolist() == list(split.labeled_counts) == [8, 4, 2]
    assert np.bincount(labels[split.unlabeled]).tolist() == list(split.unlabeled_counts) == [12, 6, 3]
    assert not set(split.labeled) & set(split.unlabeled)
    assert len(set(split.unlabeled)) == len(split.unlabeled)
    assert split.labeled.dtype == split.unlabeled.dtype == np.int64
    assert split.hash == make_split(dataset, simple(), 3).hash
    assert set(split.labeled) != set(make_split(dataset, simple(), 4).labeled)


def test_every_image_of_a_class_is_equally_likely():
    dataset = dataset_of([10, 10])
    protocol = simple(labeled=3, unlabeled=3, gamma_l=1, gamma_u=1)
    counts = sum(np.bincount(make_split(dataset, protocol, seed).labeled, minlength=20) for seed in range(600))
    # Binomial(600, 0.3): mean 180, deviation 11.2.
    assert counts.min() > 180 - 60 and counts.max() < 180 + 60


def test_labeled_in_unlabeled():
    dataset = dataset_of([30, 30, 30])
    split = make_split(dataset, simple(lb_in_ulb=True), 0)
    disjoint = make_split(dataset, simple(), 0)
    assert set(split.unlabeled) == set(disjoint.labeled) | set(disjoint.unlabeled)
    assert split.unlabeled_counts == (20, 10, 5)


def test_unknown_unlabeled_set_is_everything():
    dataset = dataset_of([9, 9, 9], unlabeled=40)
    split = make_split(dataset, simple(unlabeled=None, gamma_u=None, unlabeled_all=True), 0)
    assert split.unlabeled.tolist() == list(range(67))
    assert split.unlabeled_counts is None and split.labeled_counts == (8, 4, 2)


def test_a_line_says_what_the_pool_is():
    """A misspelled unlabeled/ shows as a pool of the labeled images alone."""
    everything = simple(unlabeled=None, gamma_u=None, unlabeled_all=True)
    for protocol, unlabeled, line in (
        (PROTOCOLS["as-is"], 0, "labeled 1,027, unlabeled 1,027, of which 1,027 are the labeled images"),
        (
            PROTOCOLS["as-is"],
            40,
            "labeled 1,027, unlabeled 1,067, of which 1,027 are the labeled images, 40 are images that come without "
            "a class",
        ),
        (simple(), 0, "labeled 14, unlabeled 21, of which 21 are other training images"),
        (
            simple(lb_in_ulb=True),
            9,
            "labeled 14, unlabeled 35, of which 14 are the labeled images, 21 are other training images; the "
            "protocol leaves out 9 images that come without a class",
        ),
        (
            everything,
            3,
            "labeled 14, unlabeled 1,030, of which 14 are the labeled images, 1,013 are other training images, "
            "3 are images that come without a class",
        ),
    ):
        dataset = dataset_of([1009, 9, 9] if protocol.unlabeled_all else [30, 30, 30], unlabeled)
        assert pool_line(make_split(dataset, protocol, 0), dataset) == line


def test_as_is_labels_every_train_image():
    split = make_split(dataset_of([5, 2], unlabeled=3), PROTOCOLS["as-is"], 0)
    assert sorted(split.labeled) == list(range(7)) and split.labeled_counts == (5, 2)
    assert split.unlabeled.tolist() == list(range(10))


def test_too_few_images_names_class_needed_and_found():
    with pytest.raises(ValueError, match=r"class 'class1': .* needs 4 labeled \+ 6 unlabeled = 10 .* found 9"):
        make_split(dataset_of([30, 9, 30]), simple(), 0)
    make_split(dataset_of([20, 10, 5]), simple(), 0)  # exactly enough


def test_a_class_without_labeled_images_is_refused():
    with pytest.raises(ValueError, match=r"class 'class2': .* without a labeled image"):
        make_split(dataset_of([30, 30, 30]), simple(labeled=3, gamma_l=6), 0)


@pytest.mark.parametrize(
    "changes",
    [
        {"unlabeled": None},
        {"gamma_u": None},
        {"unlabeled_all": True},
        {"unlabeled": None, "gamma_u": None, "unlabeled_all": True, "lb_in_ulb": True},
        {"labeled": None},
        {"unlabeled": None, "gamma_u": None, "unlabeled_all": True, "labeled_fraction": 0.1},
        {"labeled": None, "unlabeled": None, "gamma_u": None, "unlabeled_all": True, "labeled_fraction": 1.5},
    ],
)
def test_contradictory_protocols(changes):
    with pytest.raises(ValueError, match="protocol 'simple'"):
        simple(**changes)


def test_a_fraction_of_every_class_is_labeled_and_at_least_one_image():
    dataset = dataset_of([1300, 732, 40])
    split = make_split(dataset, PROTOCOLS["imagenet-1pct"], 0)
    assert split.labeled_counts == (13, 7, 1)
    assert np.bincount(dataset.train_labels.numpy()[split.labeled]).tolist() == [13, 7, 1]
    assert sorted(split.unlabeled) == list(range(1300 + 732 + 40)) and split.unlabeled_counts is None
    assert make_split(dataset, PROTOCOLS["imagenet-10pct"], 0).labeled_counts == (130, 73, 4)


def test_fractions_leave_the_files_and_hashes_of_other_splits_alone(tmp_path):
    make_split(dataset_of([9, 8]), simple(4, 4, 2, 2), 0).save(tmp_path / "split.json")
    assert "labeled_fraction" not in json.loads((tmp_path / "split.json").read_text())["protocol"]
    split = make_split(dataset_of([9, 8]), PROTOCOLS["imagenet-10pct"], 0)
    split.save(tmp_path / "fraction.json")
    assert Split.load(tmp_path / "fraction.json").protocol == split.protocol


def test_save_and_load(tmp_path):
    split = make_split(dataset_of([30, 30, 30]), simple(), 5)
    split.save(tmp_path / "split.json")
    loaded = Split.load(tmp_path / "split.json")
    assert loaded.hash == split.hash and len(split.hash) == 64
    assert loaded.protocol == split.protocol and loaded.labeled_counts == split.labeled_counts
    assert np.array_equal(loaded.labeled, split.labeled) and loaded.unlabeled.dtype == np.int64
    assert [p.name for p in tmp_path.iterdir()] == ["split.json"]


def test_load_refuses_a_changed_file(tmp_path):
    path = tmp_path / "split.json"
    make_split(dataset_of([30, 30, 30]), simple(), 5).save(path)
    content = json.loads(path.read_text())
    content["labeled"][0], content["labeled"][1] = content["labeled"][1], content["labeled"][0]
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"split\.json: its content does not have the digest in it"):
        Split.load(path)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"hash": "x", "protocol": {}}', "\x00\xff"])
def test_load_refuses_other_files(tmp_path, text):
    path = tmp_path / "other.json"
    path.write_text(text, encoding="latin1")
    with pytest.raises(ValueError, match=r"other\.json: (expected a (JSON object|digest)|its content)"):
        Split.load(path)


FORGED = {
    "an index twice": {"labeled": [0, 0, 2]},
    "an index below 0": {"labeled": [0, -1, 2]},
    "indices of text": {"labeled": ["a", "b", "c"]},
    "indices beyond int64": {"unlabeled": [2**70]},
    "counts of another sum": {"labeled_counts": [5, 5, 5]},
    "a count that is no integer": {"labeled_counts": [1.0, 1, 1]},
    "counts of no list": {"labeled_counts": 3},
    "a protocol of other fields": {"protocol": {"name": "x"}},
    "a protocol of no object": {"protocol": 3},
    "a seed of text": {"seed": "0"},
    "another name": {"dataset_name": None},
    "one more entry": {"more": 1},
}


@pytest.mark.parametrize("values", FORGED.values(), ids=FORGED)
def test_load_refuses_what_no_split_holds_in_one_line(tmp_path, values):
    """With a right hash: written by a program, not by damage."""
    path = tmp_path / "split.json"
    make_split(dataset_of([30, 30, 30]), simple(), 5).save(path)
    write_record(path, read_record(path, key="hash") | values, key="hash")
    with pytest.raises(ValueError, match=r"split\.json: ") as refusal:
        Split.load(path)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"labeled": np.array([0, 1, 90])}, "labeled: expected indices below 90, found 90"),
        ({"labeled_counts": (2, 1, 0)}, r"labeled_counts: expected \[.*\], by the labels, found \[2, 1, 0\]"),
    ],
)
def test_verify_refuses_indices_and_counts_that_the_images_do_not_have(changes, expected):
    dataset = dataset_of([30, 30, 30])
    split = make_split(dataset, simple(1, 1, 1, 1), 5)
    with pytest.raises(ValueError, match=f"split: {expected}"):
        dataclasses.replace(split, **changes).verify(dataset)


def test_verify_refuses_other_images():
    dataset = dataset_of([30, 30, 30])
    split = make_split(dataset, simple(), 5)
    split.verify(dataset)
    changed = dataset.train_images.clone()
    changed[3, 0, 0, 0] += 1
    with pytest.raises(ValueError, match="split: expected dataset 'made' with fingerprint"):
        split.verify(dataclasses.replace(dataset, train_images=changed))


def test_hash_covers_every_field():
    split = make_split(dataset_of([30, 30, 30]), simple(), 5)
    changes = {
        "protocol": dataclasses.replace(split.protocol, name="other"),
        "seed": 6,
        "dataset_name": "other",
        "dataset_fingerprint": "other",
        "labeled": split.labeled[::-1].copy(),
        "unlabeled": split.unlabeled[::-1].copy(),
        "labeled_counts": (1, 2, 3),
        "unlabeled_counts": None,
        "validation": split.labeled[:1],
    }
    assert set(changes) == {field.name for field in dataclasses.fields(split)}
    for name, value in changes.items():
        assert dataclasses.replace(split, **{name: value}).hash != split.hash, name


# ---- newer_methods.md N ----


@pytest.mark.parametrize(
    ("name", "same"),
    [
        ("usb-cifar10-1500-100", True),
        ("cossl-cifar100-20", True),
        ("bacon-cifar10-100-inverse", False),
        ("cdmad-cifar10-100-50", False),
        ("simpro-cifar10-100-middle", False),
        ("cdmad-stl10-10", False),
    ],
)
def test_where_both_sets_have_one_imbalance(name, same):
    assert PROTOCOLS[name].has_same_imbalance == same


SIMPRO_100 = [4000, 2397, 1437, 861, 516, 309, 185, 111, 66, 40]
SIMPRO_150 = [4000, 2292, 1313, 752, 431, 247, 141, 81, 46, 26]
SIMPRO = {
    "simpro-cifar10-100": SIMPRO_100,
    "simpro-cifar10-100-uniform": [4000] * 10,
    "simpro-cifar10-100-reversed": [40, 66, 111, 185, 309, 516, 861, 1437, 2397, 4000],
    "simpro-cifar10-100-middle": [66, 185, 516, 1437, 4000, 2397, 861, 309, 111, 40],
    "simpro-cifar10-100-head-tail": [2397, 861, 309, 111, 40, 66, 185, 516, 1437, 4000],
    "simpro-cifar10-150": SIMPRO_150,
    "simpro-cifar10-150-uniform": [4000] * 10,
    "simpro-cifar10-150-reversed": SIMPRO_150[::-1],
    "simpro-cifar10-150-middle": [SIMPRO_150[c] for c in (8, 6, 4, 2, 0, 1, 3, 5, 7, 9)],
    "simpro-cifar10-150-head-tail": [SIMPRO_150[c] for c in (1, 3, 5, 7, 9, 8, 6, 4, 2, 0)],
}


@pytest.fixture(scope="module")
def cifar10() -> ImageDataset:
    return dataset_of([5000] * 10)


@pytest.mark.parametrize("name", SIMPRO)
def test_simpros_documented_lists(cifar10, name):
    split = make_split(cifar10, PROTOCOLS[name], 0)
    labeled = {100: [500, 299, 179, 107, 64, 38, 23, 13, 8, 5], 150: [500, 286, 164, 94, 53, 30, 17, 10, 5, 3]}
    assert list(split.labeled_counts) == labeled[PROTOCOLS[name].gamma_l]
    assert list(split.unlabeled_counts) == SIMPRO[name]
    assert np.bincount(cifar10.train_labels.numpy()[split.unlabeled]).tolist() == SIMPRO[name]
    assert not set(split.labeled) & set(split.unlabeled)


def test_simpros_documented_lists_of_100_classes():
    found = {
        word: make_split(dataset_of([450] * 100), PROTOCOLS[f"simpro-cifar100-20{word}"], 0)
        for word in ("", "-middle", "-head-tail")
    }
    labeled, consistent = found[""].labeled_counts, found[""].unlabeled_counts
    assert labeled[:6] == (50, 48, 47, 45, 44, 42) and labeled[-1] == 2 and sum(labeled) == 1545
    assert consistent[:4] == (400, 388, 376, 365) and consistent[-2:] == (20, 20) and sum(consistent) == 12719
    middle, head_tail = found["-middle"].unlabeled_counts, found["-head-tail"].unlabeled_counts
    assert middle[:4] == (20, 21, 23, 24) and middle.index(max(middle)) == 49
    assert head_tail[:3] == (388, 365, 343) and min(head_tail) == head_tail[49]
    assert sorted(middle) == sorted(head_tail) == sorted(consistent)


@pytest.mark.parametrize(
    ("seed", "counts"),
    [
        (0, [127, 76, 2757, 356, 991, 594, 1653, 4600, 46, 213]),
        (1, [213, 76, 46, 127, 356, 991, 4600, 594, 2757, 1653]),
        (2, [356, 46, 991, 594, 213, 127, 1653, 76, 2757, 4600]),
    ],
)
def test_cpgs_documented_random_orders(cifar10, seed, counts):
    split = make_split(cifar10, PROTOCOLS["cpg-cifar10-100-random"], seed)
    assert list(split.unlabeled_counts) == counts and sum(counts) == 11413
    assert split.labeled_counts == (400, 239, 143, 86, 51, 30, 18, 11, 6, 4)


@pytest.mark.parametrize("gamma", [10, 20])
def test_stl10s_official_unlabeled_images_alone_and_with_the_labeled_ones(gamma):
    dataset = dataset_of([500] * 10, unlabeled=300)
    labeled = {10: (1835, None), 20: (1528, [450, 322, 231, 165, 118, 85, 61, 43, 31, 22])}[gamma]
    alone, both = (make_split(dataset, PROTOCOLS[f"{name}-stl10-{gamma}"], 0) for name in ("simpro", "cdmad"))
    for split in (alone, both):
        assert len(split.labeled) == labeled[0] and labeled[1] in (None, list(split.labeled_counts))
        assert split.unlabeled_counts is None
    assert alone.unlabeled.tolist() == list(range(5000, 5300))
    assert set(both.unlabeled) == set(alone.unlabeled) | set(both.labeled) and len(both.unlabeled) == 300 + labeled[0]
    with pytest.raises(ValueError, match="expected a dataset with unlabeled images of its own, found none in made"):
        make_split(dataset_of([500] * 10), PROTOCOLS[f"simpro-stl10-{gamma}"], 0)


def test_every_newer_protocol_fits_its_dataset(cifar10):
    datasets = {"cifar10": cifar10, "cifar100": dataset_of([500] * 100), "stl10": dataset_of([500] * 10, unlabeled=5)}
    newer = [name for name in PROTOCOLS if name.startswith(("simpro-", "cdmad-", "cpg-"))]
    assert len(newer) == 17 + 10 + 21
    for name in newer:
        split = make_split(datasets[PROTOCOLS[name].dataset], PROTOCOLS[name], 1)
        assert PROTOCOLS[name].lb_in_ulb == bool(set(split.labeled) & set(split.unlabeled))


@pytest.mark.parametrize("order", ["middle", "head-tail", "random"])
def test_an_order_of_the_unlabeled_counts_leaves_the_draw_of_each_class_alone(order):
    dataset = dataset_of([30, 30, 30])
    plain, other = (make_split(dataset, simple(unlabeled_order=o), 3) for o in ("sorted", order))
    assert np.array_equal(plain.labeled, other.labeled)
    assert sorted(plain.unlabeled_counts) == sorted(other.unlabeled_counts)
    for count, again, images in zip(plain.unlabeled_counts, other.unlabeled_counts, range(3)):
        one, two = (s.unlabeled[dataset.train_labels.numpy()[s.unlabeled] == images] for s in (plain, other))
        assert set(one[: min(count, again)]) == set(two[: min(count, again)])


@pytest.mark.parametrize(
    "changes",
    [
        {"gamma_u": -4, "unlabeled_order": "middle"},
        {"unlabeled_own": True},
        {"unlabeled": None, "gamma_u": None, "unlabeled_own": True, "unlabeled_all": True},
        {"unlabeled": None, "gamma_u": None, "unlabeled_own": True, "unlabeled_order": "random"},
    ],
)
def test_contradictory_newer_protocols(changes):
    with pytest.raises(ValueError, match="protocol 'simple'"):
        simple(**changes)


def test_newer_fields_leave_the_hashes_of_older_splits_alone(tmp_path):
    plain = make_split(dataset_of([30, 30, 30]), simple(), 0)
    plain.save(tmp_path / "split.json")
    saved = json.loads((tmp_path / "split.json").read_text())
    assert not {"unlabeled_order", "unlabeled_own"} & set(saved["protocol"])
    other = make_split(dataset_of([30, 30, 30]), simple(unlabeled_order="middle"), 0)
    other.save(tmp_path / "other.json")
    assert Split.load(tmp_path / "other.json").hash == other.hash != plain.hash


def test_validation_holds_out_a_share_of_each_class_and_never_the_last_image():
    counts = [40, 29, 22, 16, 12, 9, 7, 5, 4, 2, 1, 0]
    assert validation_counts(counts, 0.2) == [8, 6, 4, 3, 2, 2, 1, 1, 1, 1, 0, 0]
    assert validation_counts(counts, 0.99) == [39, 28, 21, 15, 11, 8, 6, 4, 3, 1, 0, 0]
    assert validation_counts(counts, 0.001) == [1] * 10 + [0, 0]


@pytest.mark.parametrize("name", ["digits", "as-is", "abc-cifar100-20", "imagenet-10pct"])
def test_validation_images_are_labeled_ones_that_are_trained_on_nowhere(name, tmp_path):
    dataset, protocol = dataset_of([120, 110, 105], unlabeled=7), PROTOCOLS[name]
    if protocol.labeled_head is not None:
        protocol = dataclasses.replace(protocol, labeled_head=40, unlabeled_head=60, gamma_l=10, gamma_u=10)
    whole, split = make_split(dataset, protocol, 3), make_split(dataset, protocol, 3, validation=0.2)
    assert "validation" not in whole._content() and not len(whole.validation)
    assert set(split.labeled) | set(split.validation) == set(whole.labeled)
    assert set(split.unlabeled) == set(whole.unlabeled) - set(split.validation)
    assert not set(split.validation) & (set(split.labeled) | set(split.unlabeled))
    held_out = np.bincount(dataset.train_labels.numpy()[split.validation], minlength=3)
    assert held_out.tolist() == [max(1, round(0.2 * n)) for n in whole.labeled_counts]
    assert [n + m for n, m in zip(split.labeled_counts, held_out)] == list(whole.labeled_counts)
    split.verify(dataset)
    split.save(tmp_path / "split.json")
    again = Split.load(tmp_path / "split.json")
    assert again.hash == split.hash != whole.hash and np.array_equal(again.validation, split.validation)
    assert set(make_split(dataset, protocol, 4, validation=0.2).validation) != set(split.validation)
    assert f", {len(split.validation)} held out for validation, " in pool_line(split, dataset)
    with pytest.raises(ValueError, match="validation: expected indices that are neither labeled nor unlabeled"):
        dataclasses.replace(split, validation=split.labeled[:1])._check()
    with pytest.raises(ValueError, match="validation: expected indices below 335"):
        dataclasses.replace(split, validation=np.array([999])).verify(dataset)


def test_one_image_a_class_leaves_nothing_to_hold_out():
    protocol = dataclasses.replace(PROTOCOLS["digits"], labeled_head=1, unlabeled_head=2, gamma_l=1, gamma_u=1)
    with pytest.raises(ValueError, match="validation: expected a class with at least 2 labeled images"):
        make_split(dataset_of([9, 9]), protocol, 0, validation=0.5)
