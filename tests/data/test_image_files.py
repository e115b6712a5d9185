"""Which files of a folder are images, and how they are read."""

import os
import struct
import zlib

import numpy as np
import pytest
from PIL import AvifImagePlugin, ExifTags, Image, ImageOps, PngImagePlugin

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


def test_links_out_of_the_folder_can_be_refused(tmp_path):
    touch(tmp_path, "file.png", "root/a/0.png", "rootlike/0.png")
    root = tmp_path / "root"
    (root / "1.png").symlink_to(tmp_path / "file.png")  # a single file
    (root / "b").symlink_to("a")
    (root / "a" / "round").symlink_to("..")
    (tmp_path / "link").symlink_to(root)
    assert len(image_files(tmp_path / "link", follow_links=False)[0]) == 2
    (root / "up").symlink_to("..")
    (root / "a" / "side").symlink_to(tmp_path / "rootlike")
    with pytest.raises(ValueError, match=r"(?s)2 links lead out of .*/root, .*--follow-links .*a/side -> .*up -> "):
        image_files(root, follow_links=False)


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


TURNS = (np.asarray, np.fliplr, lambda a: np.rot90(a, 2), np.flipud)
TURNED = [*TURNS, *(lambda a, turn=turn: turn(a.swapaxes(0, 1)) for turn in TURNS)]
"""What makes an image of EXIF orientation 1 to 8 upright (TIFF 6.0, tag 274)."""


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("mode", ["L", "P", "RGB", "RGBA", "CMYK", "1"])
@pytest.mark.parametrize("compression", [None, "tiff_lzw"])
def test_tiffs_are_turned_upright(tmp_path, mode, compression, orientation):
    """Pillow maps a file of one raw strip that it knows by name, with the sides of the turned image."""
    image, exif = Image.fromarray(pixels(24, 16, 3)).convert(mode), Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    image.save(tmp_path / "plain.tif", compression=compression)
    image.save(tmp_path / "turned.tif", compression=compression, exif=exif)
    assert np.array_equal(read(tmp_path / "turned.tif"), TURNED[orientation - 1](read(tmp_path / "plain.tif")))


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


def write_png(path, samples: np.ndarray, bits: int, color_key: tuple[int, ...], interlaced: bool = False) -> None:
    """A PNG of gray [H, W] or RGB [H, W, 3] samples of `bits` bits with a transparent color, as the standard has it."""
    color_type, height, width = (0 if samples.ndim == 2 else 2), *samples.shape[:2]
    starts = [(0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2)]
    rows = b""
    for x, y, dx, dy in starts if interlaced else [(0, 0, 1, 1)]:
        for row in samples[y::dy, x::dx].reshape(len(samples[y::dy]), -1):
            packed = "".join(f"{value:0{bits}b}" for value in row)
            if packed:
                packed += "0" * (-len(packed) % 8)
                rows += b"\0" + int(packed, 2).to_bytes(len(packed) // 8, "big")

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", width, height, bits, color_type, 0, 0, interlaced)
    key = struct.pack(f">{len(color_key)}H", *color_key)
    chunks = chunk(b"IHDR", header) + chunk(b"tRNS", key) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunks)


@pytest.mark.parametrize("interlaced", [False, True])
@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_a_transparent_gray_of_any_depth_becomes_white(tmp_path, bits, interlaced):
    samples = rng.integers(0, 2**bits, (9, 11))
    key = int(samples[3, 4])
    write_png(tmp_path / "a.png", samples, bits, (key,), interlaced)
    expected = np.where(samples == key, 255, samples * 255 // (2**bits - 1))
    assert (read(tmp_path / "a.png") == expected[..., None]).all()


@pytest.mark.parametrize("interlaced", [False, True])
@pytest.mark.parametrize("bits", [8, 16])
def test_a_transparent_rgb_of_any_depth_becomes_white(tmp_path, bits, interlaced):
    samples = rng.integers(0, 2**bits, (9, 11, 3))
    key = samples[3, 4].copy()
    samples[5, 6] = key
    samples[0, 0], samples[0, 1] = key ^ [0, 1, 0], key ^ [2 ** (bits - 1), 0, 0]  # near the key, and opaque
    write_png(tmp_path / "a.png", samples, bits, tuple(key), interlaced)
    transparent = (samples == key).all(axis=2, keepdims=True)
    assert transparent.sum() == 2
    assert np.array_equal(read(tmp_path / "a.png"), np.where(transparent, 255, samples >> (bits - 8)))


# --- what is not read ------------------------------------------------------------------------------------------------


def test_no_program_is_started(tmp_path, monkeypatch):
    """PostScript in a .png: Pillow would start Ghostscript, which is found by the path."""
    marker, program = tmp_path / "started", tmp_path / "gs"
    program.write_text(f"#!/bin/sh\ntouch {marker}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setattr("PIL.EpsImagePlugin.gs_binary", None)
    text = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n%%EOF\n"
    (tmp_path / "cat.png").write_bytes(text)
    with pytest.raises(UnreadableImagesError, match=r"cat\.png \(expected an image, one of JPEG, PNG, .*AVIF\)"):
        read(tmp_path / "cat.png")
    assert not marker.exists()


def test_a_suffix_may_stand_for_another_of_the_formats(tmp_path):
    image = Image.fromarray(pixels(9, 7, 3))
    image.save(tmp_path / "a.png")
    (tmp_path / "a.png").rename(tmp_path / "a.jpg")
    assert np.array_equal(read(tmp_path / "a.jpg"), np.asarray(image))


@pytest.mark.parametrize("error", [RuntimeError, NotImplementedError, KeyError, AssertionError, IndexError])
def test_whatever_a_decoder_raises_is_an_unreadable_file(tmp_path, monkeypatch, error):
    def fail(self):
        raise error("in the decoder")

    for name in ("a.avif", "b.avif"):
        Image.fromarray(pixels(9, 7, 3)).save(tmp_path / name)
    monkeypatch.setattr(AvifImagePlugin.AvifImageFile, "load", fail)
    with pytest.raises(UnreadableImagesError, match=r"(?s)2 image files .*a\.avif \(.*in the decoder.*b\.avif"):
        read_files([tmp_path / "a.avif", tmp_path / "b.avif"], 8)


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
def test_damaged_files_of_every_format_are_named_or_read(tmp_path):
    source = Image.fromarray(pixels(16, 16, 3))
    for suffix in ("jpg", "png", "bmp", "gif", "ppm", "tif", "webp", "avif"):
        path = tmp_path / f"a.{suffix}"
        source.save(path)
        whole = path.read_bytes()
        for _ in range(40):
            data = bytearray(whole[: rng.integers(1, len(whole) + 1)])
            for place in rng.integers(0, len(data), 3):
                data[place] ^= 1 << rng.integers(8)
            path.write_bytes(data)
            try:
                assert read_files([path], 8).shape == (1, 8, 8, 3)
            except UnreadableImagesError as raised:
                assert len(raised.failed) == 1 and str(path) in raised.failed[0]


def test_what_is_no_file_is_unreadable_and_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "a.png")
    (tmp_path / "b.png").mkdir()
    with pytest.raises(UnreadableImagesError, match=r"(?s)3 image.*a\.png \(expected a file.*b\.png.*c\.png .*No such"):
        read_files([tmp_path / name for name in ("a.png", "b.png", "c.png")], 8)


def test_control_characters_of_names_are_escaped(tmp_path):
    names = ["\x1b[31mred.png", "a\nb.png", os.fsdecode(b"\xff.png"), "\u202egnp.png"]
    for name in names:
        (tmp_path / name).write_bytes(b"no image")
    with pytest.raises(UnreadableImagesError) as raised:
        read_files([tmp_path / name for name in names], 8)
    lines = str(raised.value).splitlines()
    assert len(lines) == 5 and all(line.isprintable() for line in lines)
    for line, escaped in zip(lines[1:], (r"\x1b[31mred.png", r"a\nb.png", r"\udcff.png", r"\u202egnp.png")):
        assert f"/{escaped} (" in line


def test_many_unreadable_files_are_counted_and_the_first_named(tmp_path):
    files = [tmp_path / f"{i:03}.png" for i in range(103)]
    for path in files:
        path.write_bytes(b"")
    message = r"(?s)103 image files.*/000\.png.*/099\.png.*and 3 more$"
    with pytest.raises(UnreadableImagesError, match=message) as raised:
        read_files(files, 8)
    assert len(raised.value.failed) == 103 and "100.png" not in str(raised.value)
