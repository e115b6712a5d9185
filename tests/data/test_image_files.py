"""Which files of a folder are images, and how they are read."""

import os
import struct
import sys
import time
import zlib

import numpy as np
import pytest
from PIL import AvifImagePlugin, ExifTags, Image, ImageOps, JpegImagePlugin, PngImagePlugin

from bacon_fast.data.images import UnreadableImagesError, decoding, image_files, read_files, read_readable

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
        for how in (Image.Resampling.BILINEAR, Image.Resampling.BICUBIC):
            resized = np.asarray(Image.open(path).convert("RGB").resize((4, 5), how))
            assert np.array_equal(read_files([path], (5, 4), how.name.lower())[0].numpy(), resized)
    assert np.array_equal(read_files([path], (5, 4)), read_files([path], (5, 4), "bilinear"))
    with pytest.raises(ValueError, match="interpolation: expected bilinear or bicubic, found 'lanczos'"):
        read_files([path], (5, 4), "lanczos")


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


def smooth(height: int, width: int) -> Image.Image:
    """A picture without the finest detail, as photographs are."""
    return Image.fromarray(pixels(3, 4, 3)).resize((width, height), Image.Resampling.BICUBIC)


@pytest.mark.parametrize("orientation", [1, 6])
@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_a_large_jpeg_is_decoded_reduced_to_at_least_twice_the_size(tmp_path, monkeypatch, mode, orientation):
    path, exif = tmp_path / "a.jpg", Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    smooth(300, 530).convert(mode).save(path, exif=exif, quality=95)
    loaded, load = [], JpegImagePlugin.JpegImageFile.load
    found, decoded = {}, []
    with monkeypatch.context() as patched:
        patched.setattr(JpegImagePlugin.JpegImageFile, "load", lambda self: (load(self), loaded.append(self.size))[0])
        for size in (150, 76, 75, 37, 16):
            found[size] = read_files([path], size)[0].numpy()
            decoded.append(loaded[-1])
    assert decoded == [(530, 300), (530, 300), (265, 150), (133, 75), (67, 38)]
    for size, image in found.items():
        upright = ImageOps.exif_transpose(Image.open(path)).convert("RGB")
        whole = np.asarray(upright.resize((size, size), Image.Resampling.BILINEAR)).astype(int)
        assert np.abs(image - whole).mean() < 3
        if size >= 76:
            assert np.array_equal(image, whole)


@pytest.mark.parametrize(("suffix", "compression"), [("png", None), ("tif", None), ("tif", "tiff_lzw"), ("pgm", None)])
def test_gray_of_16_bits_is_scaled_as_viewers_do(tmp_path, suffix, compression):
    """By the float formula: round(255 * value / 65535)."""
    values = rng.integers(0, 65536, (40, 50)).astype(np.uint16)
    values[0, :3] = 0, 65535, 128
    options = {} if compression is None else {"compression": compression}
    Image.fromarray(values).save(tmp_path / f"a.{suffix}", **options)
    expected = np.rint(values / 65535 * 255).astype(np.uint8)
    assert np.array_equal(read(tmp_path / f"a.{suffix}"), np.repeat(expected[..., None], 3, axis=2))
    resized = Image.fromarray(expected).resize((8, 8), Image.Resampling.BILINEAR)
    assert np.array_equal(read_files([tmp_path / f"a.{suffix}"], 8)[0, ..., 1].numpy(), np.asarray(resized))


def test_a_tiff_whose_white_is_zero_and_one_of_12_bits(tmp_path):
    values = rng.integers(0, 65536, (4, 6)).astype(np.uint16)
    Image.fromarray(values).save(tmp_path / "a.tif", tiffinfo={262: 0})
    assert np.array_equal(read(tmp_path / "a.tif")[..., 0], np.rint((65535 - values) / 257))
    values >>= 4  # two values in three bytes (TIFF 6.0, FillOrder 1)
    bits = "".join(f"{value:012b}" for value in values.ravel())
    packed = int(bits, 2).to_bytes(len(bits) // 8, "big")
    tags = [(256, 6), (257, 4), (258, 12), (259, 1), (262, 1), (273, 8), (277, 1), (278, 4), (279, len(packed))]
    directory = struct.pack("<H", len(tags)) + b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags)
    data = struct.pack("<2sHI", b"II", 42, 8 + len(packed)) + packed + directory + bytes(4)
    (tmp_path / "b.tif").write_bytes(data)
    assert np.array_equal(read(tmp_path / "b.tif")[..., 2], np.rint(values / 4095 * 255))


@pytest.mark.parametrize("interlaced", [False, True])
def test_a_transparent_gray_of_16_bits_becomes_white(tmp_path, interlaced):
    samples = rng.integers(0, 2**16, (9, 11))
    key = int(samples[3, 4])
    samples[0, 0] = key ^ 1  # near the key, and opaque
    write_png(tmp_path / "a.png", samples, 16, (key,), interlaced)
    expected = np.where(samples == key, 255, np.rint(samples / 257))
    assert np.array_equal(read(tmp_path / "a.png")[..., 0], expected)


def test_only_the_first_picture_of_an_animation_is_read(tmp_path):
    first, second = Image.fromarray(pixels(9, 7, 3)), Image.fromarray(pixels(9, 7, 3))
    for suffix in ("png", "webp", "tif"):
        options = {"lossless": True} if suffix == "webp" else {}
        first.save(tmp_path / f"a.{suffix}", save_all=True, append_images=[second], **options)
        assert Image.open(tmp_path / f"a.{suffix}").n_frames == 2
        assert np.array_equal(read(tmp_path / f"a.{suffix}"), np.asarray(first))


def test_the_others_are_read_into_one_array(tmp_path):
    files = [tmp_path / f"{i}é.png" for i in range(7)]
    images = [pixels(6, 6, 3) for _ in files]
    for file, image in zip(files, images):
        Image.fromarray(image).save(file)
    files[0].write_bytes(b"")
    files[3].write_bytes(files[3].read_bytes()[:60])
    for size in (6, None):
        found, failed = read_readable(files, size)
        assert np.array_equal(found.numpy(), np.stack([images[i] for i in (1, 2, 4, 5, 6)]))
        assert list(failed) == [0, 3] and "0é.png" in failed[0]
    assert read_readable(files[:1], None)[0].shape == (0, 1, 1, 3)


def test_decoding_shows_a_bar_on_a_terminal_and_a_line_in_a_log(monkeypatch, capsys):
    with decoding(5000) as done:
        done()
    assert capsys.readouterr() == ("", "")
    with decoding(5001) as done:
        done()
    assert capsys.readouterr() == ("", "decoding 5,001 images\n")
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    with decoding(2) as done:
        done()
        time.sleep(1.1)
        done()
    assert "2/2" in capsys.readouterr().err


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
