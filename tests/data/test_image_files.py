"""Which files of a folder are images, and what is read from them."""

import os

import numpy as np
import pytest
from PIL import ExifTags, Image, ImageOps, PngImagePlugin

from bacon_fast.data.images import UnreadableImagesError, image_files, read_files

rng = np.random.default_rng(0)


def pixels(*shape: int) -> np.ndarray:
    return rng.integers(0, 256, shape, dtype=np.uint8)


def read(path) -> np.ndarray:
    (image,) = read_files([path], None).numpy()
    return image


# --- which files -----------------------------------------------------------------------------------------------------


def touch(root, *names: str) -> list:
    paths = [root / name for name in names]
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    return paths


def test_images_are_told_by_suffix(tmp_path):
    images = touch(tmp_path, "a/b/c.PNG", "a/x.jfif", "b.avif", "z.jpeg")
    others = touch(tmp_path, "a/x", "notes.txt")
    (tmp_path / "folder.png").mkdir()
    assert image_files(tmp_path) == (images, others)
    assert image_files(tmp_path / "nothing") == ([], [])


def test_hidden_files_and_folders_are_passed_over(tmp_path):
    images = touch(tmp_path / ".cache" / "data", "a/0.png")
    touch(tmp_path / ".cache" / "data", "a/.ipynb_checkpoints/0-checkpoint.png", "a/._0.png", ".DS_Store")
    (tmp_path / ".cache" / "data" / ".broken.png").symlink_to("nowhere")
    assert image_files(tmp_path / ".cache" / "data") == (images, [])


def test_links_are_followed_once(tmp_path):
    touch(tmp_path, "elsewhere/deep/1.png", "elsewhere/0.png", "file.png")
    root = tmp_path / "root"
    root.mkdir()
    (root / "0.png").symlink_to(tmp_path / "file.png")
    (root / "part1").symlink_to(tmp_path / "elsewhere")
    (root / "part2").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "back").symlink_to(root)
    (tmp_path / "elsewhere" / "deep" / "here").symlink_to(".")
    assert image_files(root) == ([root / "0.png", root / "part1/0.png", root / "part1/deep/1.png"], [])
    (tmp_path / "unlabeled").symlink_to(root)
    assert len(image_files(tmp_path / "unlabeled")[0]) == 3


def test_links_that_lead_nowhere_are_named(tmp_path):
    touch(tmp_path, "0.png")
    for name in ("1.png", "part1", "round"):
        (tmp_path / name).symlink_to("round" if name == "round" else "nowhere")
    with pytest.raises(ValueError, match=r"(?s)3 links lead nowhere:.*1\.png.*part1.*round"):
        image_files(tmp_path)
    with pytest.raises(FileNotFoundError, match="part1"):
        image_files(tmp_path / "part1")


def test_a_folder_that_cannot_be_read_is_named(tmp_path, monkeypatch):
    touch(tmp_path, "a/0.png", "b/0.png")
    scandir = os.scandir

    def refuse(path):  # permissions do not stop the superuser, as whom tests may run
        if os.fspath(path).endswith("b"):
            raise PermissionError(13, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(PermissionError, match="b'"):
        image_files(tmp_path)


# --- what is read ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("suffix", "modes"),
    [
        ("jpg", ("RGB", "L", "CMYK")),
        ("png", ("RGB", "L", "1", "P")),
        ("gif", ("RGB", "L", "1", "P")),
        ("tif", ("RGB", "L", "1", "P", "CMYK")),
        ("bmp", ("RGB", "L", "1", "P")),
        ("webp", ("RGB",)),
        ("ppm", ("RGB", "L", "1")),
    ],
)
def test_plain_images_are_what_pillow_converts(tmp_path, suffix, modes):
    for mode in modes:
        path = tmp_path / f"{mode}.{suffix}"
        Image.fromarray(pixels(9, 7, 3)).convert(mode).save(path)
        assert np.array_equal(read(path), np.asarray(Image.open(path).convert("RGB")))
        resized = Image.open(path).convert("RGB").resize((4, 5), Image.Resampling.BILINEAR)
        assert np.array_equal(read_files([path], (5, 4))[0].numpy(), np.asarray(resized))


@pytest.mark.parametrize("orientation", range(10))  # 0 and 9 mean nothing
@pytest.mark.parametrize("suffix", ["jpg", "png", "tif", "webp"])
def test_images_are_turned_upright(tmp_path, suffix, orientation):
    path, exif = tmp_path / f"a.{suffix}", Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    Image.fromarray(pixels(24, 16, 3)).save(path, exif=exif)
    expected = np.asarray(ImageOps.exif_transpose(Image.open(path)))
    assert expected.shape == ((16, 24, 3) if 5 <= orientation <= 8 else (24, 16, 3))
    assert np.array_equal(read(path), expected)


def test_the_orientation_of_phones(tmp_path):
    """6: the camera was held upright, its sensor's top is the right-hand side of the picture."""
    image, exif = np.zeros((16, 16, 3), np.uint8), Image.Exif()
    image[:8], exif[ExifTags.Base.Orientation] = 255, 6
    Image.fromarray(image).save(tmp_path / "a.png", exif=exif)
    assert (read(tmp_path / "a.png")[:, 8:] == 255).all() and (read(tmp_path / "a.png")[:, :8] == 0).all()


@pytest.mark.parametrize("damage", ["header", "cut", "no hex"])
def test_damaged_exif_is_passed_over(tmp_path, damage):
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    data, image = exif.tobytes(), Image.fromarray(pixels(5, 4, 3))
    data = b"Exif\0\0XX" + data[8:] if damage == "header" else data[:13]
    if damage == "no hex":
        text = PngImagePlugin.PngInfo()
        text.add_text("Raw profile type exif", "\nexif\n       4\nnothing")
        image.save(tmp_path / "a.png", pnginfo=text)
    else:
        image.save(tmp_path / "a.png", exif=data)
    with pytest.raises(Exception, match=r"TIFF|unpack|hex"):
        Image.open(tmp_path / "a.png").getexif()
    assert np.array_equal(read(tmp_path / "a.png"), np.asarray(image))


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_transparency_lets_white_through(tmp_path, mode):
    stored = pixels(9, 7, 4 if mode == "RGBA" else 2)
    stored[:2, ..., -1], stored[2:4, ..., -1] = 0, 255
    Image.fromarray(stored, mode).save(tmp_path / "a.png")
    alpha = stored[..., -1:] / 255
    expected = alpha * stored[..., :-1] + (1 - alpha) * 255
    found = read(tmp_path / "a.png")
    assert np.abs(found - expected).max() <= 1
    assert (found[:2] == 255).all() and (found[2:4] == stored[2:4, :, :-1]).all()


@pytest.mark.parametrize(("mode", "suffix"), [("P", "gif"), ("P", "png"), ("RGB", "png"), ("L", "png")])
def test_a_transparent_color_becomes_white(tmp_path, mode, suffix):
    stored = np.zeros((6, 6, 3), np.uint8)
    stored[2:4, 2:4] = 102  # a color of the web palette
    image = Image.fromarray(stored).convert(mode)
    color = image.getpixel((0, 0))
    image.save(tmp_path / f"a.{suffix}", transparency=color)
    expected = np.where(stored == 102, 102, 255)
    assert np.array_equal(read(tmp_path / f"a.{suffix}"), expected)


def test_many_unreadable_files_are_counted_and_the_first_named(tmp_path):
    files = [tmp_path / f"{i:03}.png" for i in range(103)]
    for path in files:
        path.write_bytes(b"")
    message = r"(?s)103 image files.*/000\.png.*/099\.png.*and 3 more$"
    with pytest.raises(UnreadableImagesError, match=message) as raised:
        read_files(files, 8)
    assert len(raised.value.failed) == 103 and "100.png" not in str(raised.value)
