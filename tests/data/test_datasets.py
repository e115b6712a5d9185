"""Every dataset source, on tiny files in its own format, and the errors for files that are missing or wrong."""

import os
import pickle

import numpy as np
import pytest
import scipy.io
import sklearn.datasets
import torch
import torchvision
from PIL import Image

from bacon_fast.data.datasets import DATASETS, ImageDataset, load_dataset
from bacon_fast.data.images import read_files

rng = np.random.default_rng(0)


def pixels(*shape: int) -> np.ndarray:
    return rng.integers(0, 256, shape, dtype=np.uint8)


# --- digits ----------------------------------------------------------------------------------------------------------


def test_digits_are_the_resized_digits_of_scikit_learn():
    dataset = load_dataset("digits")
    assert dataset.train_images.shape[1:] == (16, 16, 3) and dataset.num_classes == 10
    source = sklearn.datasets.load_digits()
    resized = [
        np.asarray(Image.fromarray((image * 255 / 16).round().astype(np.uint8)).resize((16, 16), Image.BILINEAR))
        for image in source.images
    ]
    expected = sorted((label, image.tobytes()) for label, image in zip(source.target, resized))
    images = torch.cat([dataset.train_images, dataset.test_images]).numpy()
    labels = torch.cat([dataset.train_labels, dataset.test_labels]).tolist()
    assert sorted((label, image[..., 0].tobytes()) for label, image in zip(labels, images)) == expected
    assert (images[..., :1] == images).all()


def test_digits_division_is_stratified_and_fixed():
    dataset = load_dataset("digits")
    totals = np.bincount(sklearn.datasets.load_digits().target)
    assert torch.bincount(dataset.train_labels).tolist() == [int(0.6 * n) for n in totals]
    # Recorded runs depend on this division.
    assert dataset.fingerprint == "7e8719b60c9aac8fd5dafb7dcbc87980cadf270e540f98c1fd930b6555373340"


def test_digits_normalization_makes_zero_mean_and_unit_deviation():
    dataset = load_dataset("digits", image_size=8)
    assert dataset.train_images.shape[1:] == (8, 8, 3)
    values = (dataset.train_images / 255 - torch.tensor(dataset.mean)) / torch.tensor(dataset.std)
    assert values.mean().abs() < 1e-4 and (values.std() - 1).abs() < 1e-3


# --- torchvision -----------------------------------------------------------------------------------------------------


def write_cifar(root, name: str, per_file: int = 4) -> dict[str, np.ndarray]:
    cls = {"cifar10": torchvision.datasets.CIFAR10, "cifar100": torchvision.datasets.CIFAR100}[name]
    folder = root / cls.base_folder
    folder.mkdir(parents=True)
    written = {}
    key = "labels" if name == "cifar10" else "fine_labels"
    for file_name, _ in cls.train_list + cls.test_list:
        data = pixels(per_file, 3072)
        labels = rng.integers(0, 10, per_file).tolist()
        (folder / file_name).write_bytes(pickle.dumps({"data": data, key: labels}))
        written[file_name] = (data.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1), labels)
    names = [f"name{c}" for c in range(10 if name == "cifar10" else 100)]
    (folder / cls.meta["filename"]).write_bytes(pickle.dumps({cls.meta["key"]: names}))
    return written


@pytest.fixture
def any_checksum(monkeypatch):
    """Our tiny files are in the right format but have other checksums than the published ones."""
    for module in ("cifar", "svhn", "stl10"):
        monkeypatch.setattr(f"torchvision.datasets.{module}.check_integrity", lambda path, md5=None: True)


@pytest.mark.parametrize(("name", "batches"), [("cifar10", 5), ("cifar100", 1)])
def test_cifar(tmp_path, any_checksum, name, batches):
    written = write_cifar(tmp_path, name)
    dataset = load_dataset(name, data_dir=tmp_path)
    assert dataset.num_classes == (10 if name == "cifar10" else 100)
    assert dataset.train_images.shape == (4 * batches, 32, 32, 3) and dataset.test_images.shape == (4, 32, 32, 3)
    images, labels = next(iter(written.values()))
    assert np.array_equal(dataset.train_images[:4].numpy(), images)
    assert dataset.train_labels[:4].tolist() == labels
    assert dataset.pool().data_ptr() == dataset.train_images.data_ptr()
    resized = load_dataset(name, data_dir=tmp_path, image_size=16).train_images
    assert np.array_equal(resized[0].numpy(), np.asarray(Image.fromarray(images[0]).resize((16, 16), Image.BILINEAR)))


def test_cifar10_is_normalized_as_imagenet(tmp_path, any_checksum):
    write_cifar(tmp_path, "cifar10")
    dataset = load_dataset("cifar10", data_dir=tmp_path)
    assert dataset.mean == (0.485, 0.456, 0.406) and dataset.std == (0.229, 0.224, 0.225)


def test_svhn_pools_train_and_extra(tmp_path, any_checksum):
    content = {
        part: (pixels(32, 32, 3, n), np.arange(n)[:, None] + 9) for part, n in (("train", 3), ("extra", 2), ("test", 2))
    }
    for part, (x, y) in content.items():
        y[y > 10] = 1
        scipy.io.savemat(tmp_path / f"{part}_32x32.mat", {"X": x, "y": y})
    dataset = load_dataset("svhn", data_dir=tmp_path)
    assert len(dataset.train_images) == 3 + 2
    assert np.array_equal(dataset.train_images[1].numpy(), content["train"][0][..., 1])
    assert dataset.train_labels[:2].tolist() == [9, 0]  # SVHN writes the digit 0 as 10
    assert np.array_equal(dataset.train_images[3].numpy(), content["extra"][0][..., 0])


def test_stl10_is_resized_and_has_unlabeled_images(tmp_path, any_checksum):
    folder = tmp_path / "stl10_binary"
    folder.mkdir()
    images = {part: pixels(n, 3, 96, 96) for part, n in (("train", 3), ("test", 2), ("unlabeled", 5))}
    for part, x in images.items():
        x.tofile(folder / f"{part}_X.bin")
    for part, labels in (("train", [1, 10, 3]), ("test", [2, 2])):
        np.array(labels, dtype=np.uint8).tofile(folder / f"{part}_y.bin")
    dataset = load_dataset("stl10", data_dir=tmp_path)
    assert dataset.train_labels.tolist() == [0, 9, 2]
    assert dataset.pool().shape == (8, 32, 32, 3) and dataset.pool_size == 8
    original = Image.fromarray(images["unlabeled"][4].transpose(2, 1, 0))  # STL-10 stores columns first
    expected = np.asarray(original.resize((32, 32), Image.BILINEAR))
    assert np.array_equal(dataset.pool()[7].numpy(), expected)
    assert load_dataset("stl10", data_dir=tmp_path, image_size=96).train_images.shape == (3, 96, 96, 3)


@pytest.mark.parametrize("name", ["cifar10", "cifar100", "svhn", "stl10"])
def test_missing_torchvision_files_name_the_place_and_the_way_out(tmp_path, name):
    with pytest.raises(FileNotFoundError, match=f"expected the files of {name} under {tmp_path}.*--download"):
        load_dataset(name, data_dir=tmp_path)


# --- folder ----------------------------------------------------------------------------------------------------------


def write_folder(root, classes=("cat", "ant"), sizes=((8, 8),), test_classes=None) -> dict[str, np.ndarray]:
    written = {}
    for part, names in (("train", classes), ("test", classes if test_classes is None else test_classes)):
        for c in names:
            (root / part / c).mkdir(parents=True)
            for i in range(3):
                height, width = sizes[i % len(sizes)]
                path = root / part / c / f"{i}.png"
                written[f"{part}/{c}/{i}"] = pixels(height, width, 3)
                Image.fromarray(written[f"{part}/{c}/{i}"]).save(path)
    return written


def test_folder_keeps_images_and_sorts_classes(tmp_path):
    written = write_folder(tmp_path)
    (tmp_path / "train" / "cat" / "notes.txt").write_text("not an image")
    (tmp_path / "train" / ".cache").mkdir()
    (tmp_path / "train" / "stray.png").write_bytes(b"in no class folder")
    with pytest.warns(UserWarning, match=rf"{tmp_path}/train: 2 ignored, .*: stray\.png, cat/notes\.txt$") as warned:
        dataset = load_dataset("folder", data_dir=tmp_path)
    assert len(warned) == 1
    assert dataset.class_names == ("ant", "cat") and dataset.unlabeled_images is None
    assert dataset.train_labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert np.array_equal(dataset.train_images[4].numpy(), written["train/cat/1"])
    assert np.array_equal(dataset.test_images[0].numpy(), written["test/ant/0"])


def test_folder_class_order_from_file_and_argument(tmp_path):
    write_folder(tmp_path, classes=("a", "b", "c"))
    (tmp_path / "classes.txt").write_text("c\na\n\nb\n")
    assert load_dataset("folder", data_dir=tmp_path).class_names == ("c", "a", "b")
    dataset = load_dataset("folder", data_dir=tmp_path, classes=("b", "c", "a"))
    assert dataset.class_names == ("b", "c", "a")
    plain = load_dataset("folder", data_dir=tmp_path, classes=("a", "b", "c"))
    assert dataset.train_images[:3].equal(plain.train_images[3:6])
    assert dataset.fingerprint != plain.fingerprint


def test_folder_class_list_in_other_encodings(tmp_path):
    write_folder(tmp_path, classes=("é", "b"))
    (tmp_path / "classes.txt").write_bytes("é\r\nb\r\n".encode("utf-8-sig"))
    assert load_dataset("folder", data_dir=tmp_path).class_names == ("é", "b")
    (tmp_path / "classes.txt").write_bytes("é\nb\n".encode("latin-1"))
    with pytest.raises(ValueError, match=rf"{tmp_path}/classes\.txt: expected UTF-8 text"):
        load_dataset("folder", data_dir=tmp_path)


def test_folder_resizes_any_size_and_reads_unlabeled_and_gray(tmp_path):
    written = write_folder(tmp_path, sizes=((8, 8), (5, 9)))
    (tmp_path / "unlabeled" / "deep").mkdir(parents=True)
    gray = pixels(7, 3)
    Image.fromarray(gray).save(tmp_path / "unlabeled" / "deep" / "g.png")
    Image.fromarray(pixels(20, 20, 3)).save(tmp_path / "unlabeled" / "x.jpg")
    dataset = load_dataset("folder", data_dir=tmp_path, image_size=6)
    assert dataset.train_images.shape == (6, 6, 6, 3) and dataset.pool().shape == (8, 6, 6, 3)
    expected = Image.fromarray(written["train/ant/1"]).resize((6, 6), Image.BILINEAR)
    assert np.array_equal(dataset.train_images[1].numpy(), np.asarray(expected))
    expected = Image.fromarray(gray).convert("RGB").resize((6, 6), Image.BILINEAR)
    assert np.array_equal(dataset.unlabeled_images[0].numpy(), np.asarray(expected))


def test_folder_of_different_sizes_needs_an_image_size(tmp_path):
    write_folder(tmp_path, sizes=((8, 8), (5, 9)))
    with pytest.raises(ValueError, match=r"image_size: expected one.*0\.png is 8x8, .*1\.png is 9x5"):
        load_dataset("folder", data_dir=tmp_path)


def test_folder_names_unreadable_files(tmp_path):
    write_folder(tmp_path)
    whole = (tmp_path / "train/cat/0.png").read_bytes()
    (tmp_path / "train/cat/0.png").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "test/ant/2.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"2 image files cannot be read:(?s:.*)train/cat/0\.png(?s:.*)test/ant/2\.png"):
        load_dataset("folder", data_dir=tmp_path)


def test_folder_errors(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"expected an image folder with train/<class>/ .* no directory train/"):
        load_dataset("folder", data_dir=tmp_path)
    write_folder(tmp_path)
    with pytest.raises(ValueError, match=r"classes: expected the class folders of .*ant, cat; found ant, dog"):
        load_dataset("folder", data_dir=tmp_path, classes=("ant", "dog"))
    with pytest.raises(ValueError, match="classes: expected different names"):
        load_dataset("folder", data_dir=tmp_path, classes=("ant", "cat", "cat"))
    (tmp_path / "test" / "dog").mkdir()
    with pytest.raises(ValueError, match="expected only the classes of train/, found also dog"):
        load_dataset("folder", data_dir=tmp_path)
    (tmp_path / "train" / "dog").mkdir()
    with pytest.raises(ValueError, match="expected images of every class, found none of dog"):
        load_dataset("folder", data_dir=tmp_path)


def test_folder_without_test_images(tmp_path):
    write_folder(tmp_path, test_classes=())
    (tmp_path / "test").mkdir()
    (tmp_path / "test" / "0.png").write_bytes(b"no class folder")
    with (
        pytest.warns(UserWarning, match=r"test: 1 ignored, .*: 0\.png$"),
        pytest.raises(ValueError, match="test: expected image files in the class folders, found none"),
    ):
        load_dataset("folder", data_dir=tmp_path)


def test_folder_follows_links_and_names_broken_ones(tmp_path):
    write_folder(tmp_path / "real")
    root = tmp_path / "linked"
    root.mkdir()
    (root / "train").mkdir()
    for name in ("ant", "cat"):
        (root / "train" / name).symlink_to(tmp_path / "real" / "train" / name)
    (root / "test").symlink_to(tmp_path / "real" / "test")
    (root / "unlabeled").mkdir()
    (root / "unlabeled" / "part1").symlink_to(tmp_path / "real" / "test")
    (root / "unlabeled" / "notes").touch()
    with pytest.warns(UserWarning, match=r"unlabeled: 1 ignored, .*: notes$"):
        dataset = load_dataset("folder", data_dir=root)
    plain = load_dataset("folder", data_dir=tmp_path / "real")
    assert dataset.train_images.equal(plain.train_images) and dataset.unlabeled_images.equal(plain.test_images)
    (root / "train" / "dog").symlink_to(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"1 links lead nowhere:\n  .*train/dog"):
        load_dataset("folder", data_dir=root)


@pytest.mark.parametrize(
    ("link", "target", "message"),
    [
        ("train/ant/round", "..", r"1 links lead out of .*train/ant, .*--follow-links .*round -> .*/train$"),
        ("train/ant/top", "../..", r"1 links lead out of .*train/ant"),
        ("test/cat/more", "../ant", r"1 links lead out of .*test/cat"),
        ("train/ant/9.png", "../cat/0.png", r"ant/9\.png: expected an image of its class, found a link to .*cat/0"),
        ("train/all", ".", r"train/.*: expected a class folder of its own, found a link into the images of .*train/"),
        ("train/copy", "cat", r"train/(cat|copy): expected a class folder of its own"),
    ],
)
def test_no_link_makes_an_image_one_of_another_class(tmp_path, link, target, message):
    write_folder(tmp_path)
    (tmp_path / "train" / "cat-like").mkdir()  # sorts between cat and what is below it
    Image.fromarray(pixels(8, 8, 3)).save(tmp_path / "train" / "cat-like" / "0.png")
    (tmp_path / link).symlink_to(target)
    with pytest.raises(ValueError, match=f"(?s){message}"):
        load_dataset("folder", data_dir=tmp_path)
    assert len(load_dataset("folder", data_dir=tmp_path, follow_links=True).train_images) >= 7


def test_links_to_single_files_elsewhere_are_followed(tmp_path):
    """As git-annex and lists of links have them."""
    written = write_folder(tmp_path / "store")
    for part, name, i in ((part, name, i) for part in ("train", "test") for name in ("ant", "cat") for i in range(3)):
        link = tmp_path / "linked" / part / name / f"{i}.png"
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(tmp_path / "store" / part / name / f"{i}.png")
    dataset = load_dataset("folder", data_dir=tmp_path / "linked")
    assert np.array_equal(dataset.train_images[5].numpy(), written["train/cat/2"])


def test_a_folder_may_have_no_test_part(tmp_path):
    write_folder(tmp_path, test_classes=())
    dataset = load_dataset("folder", data_dir=tmp_path)
    assert dataset.test_images is None and dataset.test_labels is None and len(dataset.train_images) == 6


def test_only_folders_have_links_to_follow():
    with pytest.raises(ValueError, match="follow_links: expected image files, of dataset folder, found"):
        load_dataset("digits", follow_links=True)


def test_folders_that_nobody_reads_are_named(tmp_path):
    write_folder(tmp_path)
    for name in ("unlabelled", "val", ".git", "unlabeled"):
        (tmp_path / name).mkdir()
    with pytest.warns(UserWarning) as warned:
        load_dataset("folder", data_dir=tmp_path)
    assert [str(w.message) for w in warned] == [
        f"{tmp_path}: not read: unlabelled/, val/; only train/, test/ and unlabeled/ are",
        f"{tmp_path}/unlabeled: no image files in it",
    ]


def test_class_names_that_are_not_utf8_are_refused_before_decoding(tmp_path, monkeypatch):
    write_folder(tmp_path, classes=("ant", os.fsdecode(b"caf\xe9")))
    monkeypatch.setattr("bacon_fast.data.sources.read_readable", lambda *_: pytest.fail("decoded"))
    with pytest.raises(ValueError, match=r"/train: expected names in UTF-8, found 'caf\\udce9'"):
        load_dataset("folder", data_dir=tmp_path)


def test_spellings_that_look_the_same_are_told_apart(tmp_path):
    composed, decomposed = "caf\u00e9", "cafe\u0301"
    write_folder(tmp_path, classes=("ant", composed))
    with pytest.raises(ValueError, match=r"which are ant, caf\\xe9; found ant, cafe\\u0301$"):
        load_dataset("folder", data_dir=tmp_path, classes=("ant", decomposed))
    (tmp_path / "test" / decomposed).mkdir()
    with pytest.raises(ValueError, match=r"found also cafe\\u0301$"):
        load_dataset("folder", data_dir=tmp_path)
    (tmp_path / "train" / decomposed).mkdir()
    with pytest.raises(ValueError, match=r"names that look different, found 'ant', 'cafe\\u0301', 'caf\\xe9'$"):
        load_dataset("folder", data_dir=tmp_path)


def test_control_characters_of_class_names_are_escaped(tmp_path):
    write_folder(tmp_path, classes=("ant", "\x1b[2J"))
    assert load_dataset("folder", data_dir=tmp_path).class_names == ("\x1b[2J", "ant")
    for image in (tmp_path / "train" / "\x1b[2J").iterdir():
        image.rename(f"{image}\x1b]0;x\x07")
    with (
        pytest.warns(UserWarning, match=r"3 ignored, .*: \\x1b\[2J/0\.png\\x1b\]0;x\\x07, "),
        pytest.raises(ValueError, match=r"none of \\x1b\[2J$"),
    ):
        load_dataset("folder", data_dir=tmp_path)


# --- arrays ----------------------------------------------------------------------------------------------------------


def arrays(**changes) -> dict[str, np.ndarray]:
    content = {
        "train_images": pixels(6, 5, 4, 3),
        "train_labels": np.array([0, 1, 2, 0, 1, 2], dtype=np.int16),
        "test_images": pixels(2, 5, 4, 3),
        "test_labels": np.array([2, 0], dtype=np.uint8),
    } | changes
    return {name: value for name, value in content.items() if value is not None}


def test_arrays(tmp_path):
    content = arrays(unlabeled_images=pixels(3, 5, 4, 3), class_names=np.array(["x", "y", "z"]))
    np.savez(tmp_path / "d.npz", **content)
    dataset = load_dataset("arrays", data_dir=tmp_path / "d.npz")
    assert dataset.class_names == ("x", "y", "z") and dataset.pool_size == 9
    assert np.array_equal(dataset.pool()[6:].numpy(), content["unlabeled_images"])
    assert dataset.test_labels.tolist() == [2, 0]
    mean = content["train_images"].reshape(-1, 3).mean(0) / 255
    deviation = content["train_images"].reshape(-1, 3).std(0) / 255
    assert np.allclose(dataset.mean, mean) and np.allclose(dataset.std, deviation)


def test_arrays_with_names_may_lack_images_of_a_class(tmp_path):
    np.savez(tmp_path / "d.npz", **arrays(train_labels=np.full(6, 7), class_names=np.arange(1, 9)))
    dataset = load_dataset("arrays", data_dir=tmp_path / "d.npz")
    assert dataset.class_names == tuple("12345678") and dataset.train_labels.tolist() == [7] * 6


def test_arrays_gray_resized_and_constant(tmp_path):
    np.savez(tmp_path / "d.npz", **arrays(train_images=np.full((6, 5, 4), 7, np.uint8), test_images=pixels(2, 5, 4, 1)))
    dataset = load_dataset("arrays", data_dir=tmp_path / "d.npz", image_size=3)
    assert dataset.train_images.shape == (6, 3, 3, 3) and dataset.class_names == ("0", "1", "2")
    assert min(dataset.std) == pytest.approx(1 / 255)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"test_images": None}, "expected arrays .* found no test_images"),
        ({"val_labels": np.zeros(2, np.int64)}, "expected arrays .* found no val_images"),
        ({"train_images": np.zeros((6, 5, 4, 3), np.float32)}, "train_images: expected uint8"),
        ({"train_images": np.zeros((6, 3, 5, 4), np.uint8)}, "train_images: expected uint8"),
        ({"train_labels": np.zeros(6)}, "train_labels: expected integers"),
        ({"train_labels": np.zeros(5, np.int64)}, r"train_labels: expected int64 \[6\]"),
        ({"test_labels": np.array([0, 3])}, r"test_labels: expected values in 0\.\.2, found 0\.\.3"),
        ({"train_labels": np.array([0, 1, 2, 0, 1, -1])}, r"train_labels: expected values in 0\.\.2, found -1\.\.2"),
        ({"test_images": pixels(2, 5, 5, 3)}, "test_images: expected the size of train_images"),
        ({"test_images": pixels(0, 5, 4, 3), "test_labels": np.zeros(0, np.int64)}, "expected at least one image"),
        ({"train_labels": np.zeros(6, np.int64), "test_labels": np.zeros(2, np.int64)}, "at least 2 classes"),
        ({"class_names": np.array(["only"])}, "train_labels: expected values"),
        ({"class_names": np.array("abc")}, r"class_names: expected strings \[K\], found <U3 \[\]"),
        ({"class_names": np.array([["a", "b", "c"]])}, r"class_names: expected strings \[K\], found <U1 \[1, 3\]"),
        ({"class_names": np.array([b"a", b"b", b"c"])}, r"class_names: expected strings \[K\], found \|S1 \[3\]"),
        ({"class_names": np.array(["a", "b", "a"])}, "class_names: expected different names, .* found 'a', 'b', 'a'"),
        ({"class_names": np.array(["a", "b", ""])}, "class_names: expected .* none of them empty, found 'a', 'b', ''"),
        (
            {"train_labels": np.array([0, 1, 2, 0, 1, 10**9])},
            "train_labels: .* number of train images, 6, found 10{9}",
        ),
    ],
)
def test_wrong_arrays(tmp_path, changes, message):
    np.savez(tmp_path / "d.npz", **arrays(**changes))
    with pytest.raises(ValueError, match=message):
        load_dataset("arrays", data_dir=tmp_path / "d.npz")


def test_arrays_that_are_no_npz(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"expected an \.npz file, found no file"):
        load_dataset("arrays", data_dir=tmp_path)
    (tmp_path / "d.npz").write_bytes(b"no archive")
    with pytest.raises(ValueError, match=r"expected an \.npz file, .*d\.npz is not one"):
        load_dataset("arrays", data_dir=tmp_path / "d.npz")
    np.savez(tmp_path / "d.npz", train_images=np.array([object()]))
    with pytest.raises(ValueError, match=r"cannot read the arrays in .*d\.npz"):
        load_dataset("arrays", data_dir=tmp_path / "d.npz")


# --- all -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "mnist"}, f"dataset: expected one of {', '.join(DATASETS)}, found 'mnist'"),
        ({"name": "cifar10"}, "data_dir: expected where its files lie for dataset 'cifar10', found None"),
        ({"name": "digits", "image_size": 0}, "image_size: expected 1 to 4096 pixels, found 0"),
        (
            {"name": "digits", "classes": ("a", "b")},
            "classes: expected image files, of dataset folder",
        ),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        load_dataset(**arguments)


def test_image_dataset_checks_its_tensors():
    images, labels = torch.zeros((2, 4, 4, 3), dtype=torch.uint8), torch.tensor([0, 1])
    good = dict(
        name="x", train_images=images, train_labels=labels, test_images=images, test_labels=labels,
        unlabeled_images=None, class_names=("a", "b"), mean=(0.5,) * 3, std=(0.5,) * 3,
    )  # fmt: skip
    ImageDataset(**good)
    with pytest.raises(ValueError, match="train_images: expected uint8"):
        ImageDataset(**good | {"train_images": images.permute(0, 3, 1, 2)})
    with pytest.raises(ValueError, match="unlabeled_images: expected the size of train_images"):
        ImageDataset(**good | {"unlabeled_images": images[:, :3]})
    with pytest.raises(ValueError, match="test_labels: expected int64"):
        ImageDataset(**good | {"test_labels": labels.int()})


@pytest.mark.parametrize(("mode", "dtype"), [("I", np.int32), ("F", np.float32)])
def test_images_without_a_known_white_are_refused_rather_than_clipped(tmp_path, mode, dtype):
    pixels = np.full((8, 8), 40_000, dtype=dtype)
    path = tmp_path / "deep.tif"
    Image.fromarray(pixels).save(path)
    with pytest.raises(ValueError, match=rf"deep\.tif.*at most 16 bits a channel, found mode {mode}"):
        read_files([path], 8)
