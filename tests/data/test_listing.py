"""CSV files and lists of images: which files, which labels, and what contradicts itself."""

import os
import shutil

import numpy as np
import pytest
from PIL import ExifTags, Image

from bacon_fast.data.datasets import load_dataset
from bacon_fast.data.image_csv import read_csv
from bacon_fast.data.images import UnreadableImagesError

rng = np.random.default_rng(0)


def write_images(root, *names: str) -> dict[str, np.ndarray]:
    written = {}
    for name in names:
        written[name] = rng.integers(0, 256, (6, 6, 3), dtype=np.uint8)
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(written[name]).save(root / name)
    return written


def write_csv(path, *lines: str, encoding: str = "utf-8"):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes("\r\n".join(lines).encode(encoding))
    return path


def load(path, **options):
    return load_dataset("folder", data_dir=path, **options)


def paths(rows) -> list[str]:
    return [f"{path.name}:{label}" for path, label in rows]


# --- one file --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
def test_rows_are_files_beside_the_list_and_further_columns_are_not_read(tmp_path, encoding):
    names = ["a/é 1.png", "b, c.png", "d.png", "e.png"]
    written = write_images(tmp_path / "photos", *names)
    lines = [
        "note,image_path, label ,probability,error",
        "x,a/é 1.png,dog,0.9,",
        '"1,2","b, c.png", cat ,,',
        "",
        ",d.png,,0.4,",
        ",./e.png,dog,,",
    ]
    dataset = load(write_csv(tmp_path / "photos" / "list.CSV", *lines, encoding=encoding))
    assert dataset.class_names == ("cat", "dog") and dataset.train_labels.tolist() == [1, 0, 1]
    assert np.array_equal(dataset.pool().numpy(), np.stack([written[names[i]] for i in (0, 1, 3, 2)]))
    assert dataset.test_images is None and dataset.val_images is None
    assert len(dataset.unlabeled_images) == 1


def test_a_row_twice_is_one_image_and_one_label_is_enough(tmp_path):
    lines = ("image_path,label", "a.png,", "b.png,cat", "./a.png,dog", "a.png,dog", "x/../b.png,")
    rows = read_csv(write_csv(tmp_path / "l.csv", *lines))
    assert paths(rows) == ["a.png:dog", "b.png:cat"]
    assert paths(read_csv(tmp_path / "l.csv", label=False)) == ["a.png:", "b.png:"]


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["image_path,label", "a.png,cat", "b.png,dog", "./a.png,dog"],
         r"l\.csv, line 4: expected one label for \./a\.png, found dog, and cat in line 2$"),
        (["image_path;label", "a.png;cat"], r"l\.csv: expected one column image_path .* image_path;label$"),
        (["image_path,name"], r"expected one column label .* found the columns image_path, name$"),
        (["image_path,label,label"], "expected one column label"),
        ([""], "found the columns none$"),
        (["image_path,label", "a,b.png,cat"], "line 2: expected 2 values, as the first line has, found 3"),
        (["image_path,label", "a.png"], "line 2: expected 2 values, as the first line has, found 1"),
        (["image_path,label", " ,cat"], "line 2: expected an image file, found image_path ' '"),
        (["image_path,label", '"a.png,cat'], "expected comma-separated values"),
    ],
)  # fmt: skip
def test_what_is_no_list_is_named_with_its_line(tmp_path, lines, message):
    with pytest.raises(ValueError, match=message):
        read_csv(write_csv(tmp_path / "l.csv", *lines))


def test_other_encodings_and_missing_files_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"l\.csv: expected UTF-8 text"):
        read_csv(write_csv(tmp_path / "l.csv", "image_path,label", "é.png,cat", encoding="latin-1"))
    with pytest.raises(FileNotFoundError, match=r"no file .*/no\.csv"):
        load(tmp_path / "no.csv")
    with pytest.raises(ValueError, match="expected rows with a label, found none in 1"):
        load(write_csv(tmp_path / "l.csv", "image_path,label", "a.png,"))


def test_missing_labeled_images_are_refused_before_decoding_and_unlabeled_ones_left_out(tmp_path, monkeypatch):
    write_images(tmp_path, "a.png", "b.png")
    head = ("image_path,label", "a.png,cat", "b.png,dog")
    file = write_csv(tmp_path / "l.csv", *head, "gone.png,")
    for images in ("memory", "mapped", "mapped"):
        with pytest.warns(UserWarning, match=r"1 of 1 unlabeled images cannot be read .*gone\.png \(.*No such file"):
            assert load(file, images=images, image_size=6).unlabeled_images is None
    monkeypatch.setattr("bacon_fast.data.sources.read_readable", lambda *_: pytest.fail("decoded"))
    file = write_csv(tmp_path / "l.csv", *head, "gone.png,dog", "lost.png,cat")
    with pytest.raises(UnreadableImagesError, match=r"(?s)2 image files .*gone\.png .no such.*lost\.png"):
        load(file)


# --- classes ---------------------------------------------------------------------------------------------------------


def write_animals(root):
    """Two cats, a dog and a cow, in folders and in a list."""
    write_images(root, "train/cat/0.png", "train/cat/1.png", "train/dog/0.png", "train/cow/0.png", "test/cat/0.png")
    rows = ("train/cat/0.png,cat", "train/cat/1.png,cat", "train/dog/0.png,dog", "train/cow/0.png,cow")
    write_csv(root / "list.csv", "image_path,label", *rows)


@pytest.mark.parametrize("source", ["", "list.csv"])
def test_labels_outside_the_classes(tmp_path, source):
    write_animals(tmp_path)
    plain = load(tmp_path / source)
    assert plain.class_names == ("cat", "cow", "dog")
    chosen = ("dog", "cat")
    with pytest.raises(ValueError, match=r"cow" if source == "" else r"found 1 image of others: cow \(1\); "):
        load(tmp_path / source, classes=chosen)
    dropped = load(tmp_path / source, classes=chosen, other_labels="drop")
    assert dropped.class_names == chosen and sorted(dropped.train_labels.tolist()) == [0, 1, 1]
    assert dropped.unlabeled_images is None
    unlabeled = load(tmp_path / source, classes=chosen, other_labels="unlabeled")
    cow = plain.train_images[plain.train_labels == 1]
    assert np.array_equal(unlabeled.unlabeled_images.numpy(), cow.numpy()) and len(unlabeled.train_images) == 3
    with pytest.raises(ValueError, match=r"bird"):  # a class without images
        load(tmp_path / source, classes=("cat", "bird"), other_labels="drop")


def test_labels_of_test_rows_are_those_of_train(tmp_path):
    write_animals(tmp_path)
    rows = ["train/cow/0.png,cow", "test/cat/0.png,cat", "a.png,zebra", "b.png,zebra"]
    test = write_csv(tmp_path / "test.csv", "image_path,label", *rows[1:])
    with pytest.raises(
        ValueError, match=r"test\.csv: expected labels of the classes cat, cow, dog; found 2 images of "
    ):
        load(tmp_path / "list.csv", test=[test])


# --- several lists ---------------------------------------------------------------------------------------------------


def test_lists_and_folders_add_up(tmp_path):
    write_animals(tmp_path)
    shutil.rmtree(tmp_path / "test")
    written = write_images(tmp_path, "in/0.png", "in/x/1.png", "v/dog/0.png", "t/cat/7.png", "more/2.png", "more/3.png")
    more = write_csv(tmp_path / "more" / "m.csv", "image_path", "2.png", "../in/0.png", "../train/dog/0.png")
    val = write_csv(tmp_path / "val.csv", "image_path,label", "more/3.png,cow")
    dataset = load(
        tmp_path / "list.csv", unlabeled=[tmp_path / "in", more], val=[tmp_path / "v", val], test=[tmp_path / "t"]
    )
    expected = ["in/0.png", "in/x/1.png", "more/2.png"]  # the dog is labeled, and in/0.png is there once
    assert np.array_equal(dataset.unlabeled_images.numpy(), np.stack([written[name] for name in expected]))
    assert np.array_equal(dataset.val_images.numpy(), np.stack([written["v/dog/0.png"], written["more/3.png"]]))
    assert dataset.val_labels.tolist() == [2, 1] and dataset.test_labels.tolist() == [0]
    other = load(tmp_path / "list.csv", unlabeled=[tmp_path / "in", more], val=[val], test=[tmp_path / "t"])
    assert other.fingerprint != dataset.fingerprint


def test_a_further_folder_inside_the_data_folder_is_read_in_silence(tmp_path, recwarn):
    write_animals(tmp_path)
    written = write_images(tmp_path, "val/dog/0.png")
    dataset = load(tmp_path, val=[tmp_path / "val"])
    assert np.array_equal(dataset.val_images[0].numpy(), written["val/dog/0.png"]) and not recwarn.list


def test_one_image_cannot_be_trained_on_and_measured_on(tmp_path):
    write_animals(tmp_path)
    write_images(tmp_path, "in/0.png", "in/1.png", "in/2.png")
    train = tmp_path / "list.csv"
    twice = write_csv(tmp_path / "twice.csv", "image_path,label", "train/dog/0.png,cat")
    with pytest.raises(ValueError, match=r"1 image of the test images would also be among the labeled .*dog/0\.png"):
        load(train, test=[twice])
    val = write_csv(tmp_path / "val.csv", "image_path,label", "in/0.png,cat", "in/1.png,dog")
    with pytest.raises(ValueError, match=r"2 images of the validation images would also be among the test images"):
        load(train, test=[val], val=[val])
    other = write_csv(tmp_path / "other.csv", "image_path,label", "in/0.png,dog")
    with pytest.raises(ValueError, match=r"in/0\.png: expected one label, found cat and dog"):
        load(train, val=[val, other])
    with pytest.warns(UserWarning, match=r"2 unlabeled images left out, which are test or validation .*in/0\.png"):
        assert len(load(train, val=[val], unlabeled=[tmp_path / "in"]).unlabeled_images) == 1


@pytest.mark.parametrize("option", ["unlabeled", "test", "val"])
def test_lists_that_are_not_there(tmp_path, option):
    write_animals(tmp_path)
    for name in ("nowhere", "nowhere.csv"):
        with pytest.raises(FileNotFoundError, match=rf"found (nothing at|no file) .*{name}"):
            load(tmp_path, **{option: [tmp_path / name]})
    with pytest.raises(ValueError, match=f"{option}: expected none beside dataset 'digits', found 1"):
        load_dataset("digits", **{option: ["x"]})


def test_measured_rows_need_labels(tmp_path):
    write_animals(tmp_path)
    val = write_csv(tmp_path / "val.csv", "image_path,label", "test/cat/0.png,")
    with pytest.raises(ValueError, match=r"val\.csv: expected a label in every row, found 1 without: .*cat/0\.png"):
        load(tmp_path / "list.csv", val=[val])


def test_an_npz_file_is_told_by_its_suffix(tmp_path):
    arrays = {"train_images": rng.integers(0, 256, (4, 5, 5, 3), dtype=np.uint8), "train_labels": np.arange(4) % 2}
    np.savez(tmp_path / "a.npz", **arrays, val_images=arrays["train_images"][:3], val_labels=np.array([0, 1, 1]))
    dataset = load(tmp_path / "a.npz")
    assert dataset.name == "folder" and dataset.test_images is None and dataset.val_labels.tolist() == [0, 1, 1]
    with pytest.raises(ValueError, match=r"val: expected none beside an \.npz file"):
        load(tmp_path / "a.npz", val=["x"])


# --- the usual dirt --------------------------------------------------------------------------------------------------


def test_a_list_of_the_usual_dirt(tmp_path):
    """What a folder of photos has, against Pillow, with one upright picture of each kind."""
    picture = Image.fromarray(rng.integers(0, 256, (6, 8, 3), dtype=np.uint8)).resize(
        (16, 12), Image.Resampling.BICUBIC
    )
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 3
    palette = picture.quantize(16)
    deep = np.asarray(picture.convert("L")).astype(np.uint16) * 257
    picture.convert("CMYK").save(tmp_path / "cmyk.jpg")
    Image.fromarray(deep).save(tmp_path / "deep.png")
    picture.save(tmp_path / "turned.png", exif=exif)
    palette.save(tmp_path / "palette.png", transparency=0)
    picture.save(tmp_path / "moving.webp", save_all=True, append_images=[Image.new("RGB", picture.size)], lossless=True)
    picture.save(tmp_path / "naïve 猫.png")
    picture.save(tmp_path / "in.png")
    (tmp_path / "inbox").mkdir()
    (tmp_path / "in.png").rename(tmp_path / "inbox" / "in.png")
    (tmp_path / "inbox" / "empty.jpg").touch()
    (tmp_path / "inbox" / "cut.jpg").write_bytes((tmp_path / "cmyk.jpg").read_bytes()[:200])
    (tmp_path / "inbox" / ".hidden.png").write_bytes(b"")
    (tmp_path / "inbox" / os.fsdecode(b"\xff.png")).write_bytes(b"no image")
    names = ["cmyk.jpg", "deep.png", "turned.png", "palette.png", "moving.webp", "naïve 猫.png"]
    rows = [f"{name},{'ab'[i % 2]}" for i, name in enumerate(names)]
    file = write_csv(tmp_path / "list.csv", "image_path,label", *rows)
    with pytest.warns(UserWarning, match=r"3 of 4 unlabeled .*cut\.jpg .*empty\.jpg .*udcff\.png") as warned:
        dataset = load(file, image_size=12, unlabeled=[tmp_path / "inbox"])
    assert len(warned) == 1

    seen = Image.composite(Image.new("RGB", picture.size, "white"), palette.convert("RGB"),
                           Image.fromarray(np.asarray(palette) == 0))  # fmt: skip
    expected = [Image.open(tmp_path / "cmyk.jpg").convert("RGB"), picture.convert("L").convert("RGB")]
    expected += [picture.rotate(180), seen, picture, picture]
    expected = [np.asarray(image.resize((12, 12), Image.Resampling.BILINEAR)) for image in expected]
    assert np.array_equal(dataset.train_images.numpy(), np.stack(expected))
    assert np.array_equal(dataset.unlabeled_images.numpy(), expected[-1][None])

    (tmp_path / "deep.png").write_bytes(b"")
    with pytest.raises(UnreadableImagesError, match=r"^1 image files cannot be read:\n  .*deep\.png "):
        load(file, image_size=12, unlabeled=[tmp_path / "inbox"])
