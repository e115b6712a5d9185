"""Which files of a folder are images, and what is read from them."""

import numpy as np
import pytest
from PIL import ExifTags, Image, ImageOps, PngImagePlugin

from bacon_fast.data.images import UnreadableImagesError, read_files

rng = np.random.default_rng(0)


def pixels(*shape: int) -> np.ndarray:
    return rng.integers(0, 256, shape, dtype=np.uint8)


def read(path) -> np.ndarray:
    (image,) = read_files([path], None).numpy()
    return image


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
    with pytest.raises(UnreadableImagesError, match=r"(?s)103 image files.*/000\.png.*/099\.png.*and 3 more$") as raised:
        read_files(files, 8)
    assert len(raised.value.failed) == 103 and "100.png" not in str(raised.value)
