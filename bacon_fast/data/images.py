"""Decoding and resizing of images on the host, with one thread per usable core (Pillow releases the GIL)."""

import os
import stat
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import ExifTags, Image, UnidentifiedImageError
from torch import Tensor

from bacon_fast.data.names import printable
from bacon_fast.data.transparency import in_front_of_white
from bacon_fast.system import usable_cores

SUFFIXES = frozenset(
    {".jpg", ".jpeg", ".jfif", ".png", ".bmp", ".gif", ".ppm", ".pgm", ".tif", ".tiff", ".webp", ".avif"}
)
FORMATS = ("JPEG", "PNG", "BMP", "GIF", "PPM", "TIFF", "WEBP", "AVIF")
"""Formats of the suffixes, in Pillow's words. One of its other decoders starts a program: Ghostscript."""
_MAX_NAMED = 100
_TURN = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""The operation that turns an image of each EXIF orientation upright."""


class UnreadableImagesError(ValueError):
    """Image files that cannot be decoded.

    Attributes:
        failed: name and reason of each. The message shows the first 100.
    """

    def __init__(self, failed: Sequence[str]) -> None:
        self.failed = failed
        super().__init__(f"{len(failed)} image files cannot be read:{_listed(failed)}")


def as_rgb(name: str, images: np.ndarray) -> np.ndarray:
    """uint8 [N, H, W, 3] from RGB or grayscale ([N, H, W] or [N, H, W, 1]) images; ValueError for anything else."""
    if images.dtype == np.uint8:
        if images.ndim == 3:
            images = images[..., None]
        if images.ndim == 4 and images.shape[3] == 1:
            images = np.repeat(images, 3, axis=3)
        if images.ndim == 4 and images.shape[3] == 3:
            return images
    raise ValueError(
        f"{name}: expected uint8 [N, H, W, 3], [N, H, W, 1] or [N, H, W], found {images.dtype} {list(images.shape)}"
    )


def resize(images: np.ndarray, size: int | None) -> Tensor:
    """uint8 [N, H, W, 3] at size x size (Pillow, bilinear); `size` None or equal to H and W leaves the images alone."""
    if size is None or images.shape[1:3] == (size, size):
        return torch.from_numpy(np.ascontiguousarray(images))
    resized = np.empty((len(images), size, size, 3), dtype=np.uint8)

    def one(i: int) -> None:
        resized[i] = Image.fromarray(images[i]).resize((size, size), Image.Resampling.BILINEAR)

    in_threads(one, range(len(images)))
    return torch.from_numpy(resized)


def image_files(folder: Path, *, follow_links: bool = True) -> tuple[list[Path], list[Path]]:
    """Image files anywhere below `folder`, by suffix, and the other files; both sorted, none if there is no folder.

    Links to folders are followed, and a folder that several lead to is read once. Hidden files and folders are passed
    over.

    Args:
        follow_links: False: refuse links to folders outside `folder`, which may be a link itself.

    Raises:
        ValueError: links that lead nowhere, or outside. OSError: a folder that cannot be read.
    """
    images, others, seen, outside = [], [], set(), []
    whole = os.path.realpath(folder)
    for parent, folders, names in os.walk(folder, followlinks=True, onerror=_raise) if os.path.lexists(folder) else ():
        if not follow_links and os.path.islink(parent) and not is_inside(os.path.realpath(parent), whole):
            outside.append(f"{printable(parent)} -> {printable(os.path.realpath(parent))}")
            folders.clear()
            continue
        status = os.stat(parent)
        if (status.st_dev, status.st_ino) in seen:
            folders.clear()
            continue
        seen.add((status.st_dev, status.st_ino))
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for path in (Path(parent, name) for name in names if not name.startswith(".")):
            (images if path.suffix.lower() in SUFFIXES and path.is_file() else others).append(path)
    if outside:
        raise ValueError(
            f"{len(outside)} links lead out of {printable(str(folder))}, maybe to images of other classes; "
            f"--follow-links follows them:{_listed(sorted(outside))}"
        )
    others.sort()
    require_targets(others)
    return sorted(images), others


def is_inside(path: str, folder: str) -> bool:
    """Whether the real path `path` is the real path `folder` or below it."""
    return Path(path).is_relative_to(folder)


def require_targets(paths: Iterable[Path]) -> None:
    """Raises ValueError for links among `paths` that lead nowhere."""
    if broken := [printable(str(path)) for path in paths if not path.exists()]:
        raise ValueError(f"{len(broken)} links lead nowhere:{_listed(broken)}")


def read_files(files: Sequence[Path], size: int | tuple[int, int] | None) -> Tensor:
    """Decodes files as RGB: uint8 [N, H, W, 3], resized to size x size or (H, W) when `size` is given.

    A file may have any of `FORMATS`, whatever its suffix. Images are read as a viewer shows them: turned by their EXIF
    orientation, transparent parts in front of white, and only the first picture of an animation.

    Raises:
        UnreadableImagesError: files that cannot be decoded. ValueError: without `size`, files of different sizes.
    """
    size = (size, size) if isinstance(size, int) else size
    if not files:
        return torch.empty((0, *(size or (1, 1)), 3), dtype=torch.uint8)

    def decode(path: Path) -> np.ndarray | Exception:
        try:
            rgb = _read(path)
            return np.asarray(rgb if size is None else rgb.resize(size[::-1], Image.Resampling.BILINEAR))
        except Exception as error:  # decoders raise many types for a damaged file
            return error

    decoded = in_threads(decode, files)
    failed = [
        f"{printable(str(path))} ({printable(str(image) or type(image).__name__)})"
        for path, image in zip(files, decoded)
        if isinstance(image, Exception)
    ]
    if failed:
        raise UnreadableImagesError(failed)
    for path, image in zip(files, decoded):
        if image.shape != decoded[0].shape:
            raise ValueError(
                "image_size: expected one, because the image files differ in size: "
                f"{printable(str(files[0]))} is {_size(decoded[0])}, {printable(str(path))} is {_size(image)}"
            )
    return torch.from_numpy(np.stack(decoded))


def _read(path: Path) -> Image.Image:
    if not stat.S_ISREG(path.stat().st_mode):
        raise ValueError("expected a file, found something else")  # opening a named pipe would wait for its writer
    with open(path, "rb") as file:  # given a path, Pillow maps some TIFFs with the sides of the turned image
        try:
            image = Image.open(file, formats=FORMATS)
        except UnidentifiedImageError:
            raise ValueError(f"expected an image, one of {', '.join(FORMATS)}") from None
        with image:
            if image.mode.startswith(("I", "F")):  # Pillow would clip these to 0..255: a white or a black image
                raise ValueError(f"expected 8 bits a channel, found mode {image.mode}")
            rgb = in_front_of_white(image, file)
            turn = _turn(image)
    return rgb if turn is None else rgb.transpose(turn)


def _turn(image: Image.Image) -> Image.Transpose | None:
    """How to turn a loaded image upright. A TIFF is upright already; some formats keep their EXIF behind the pixels."""
    try:
        return _TURN.get(image.getexif().get(ExifTags.Base.Orientation))
    except Exception:  # damaged EXIF beside sound pixels, which viewers show as they are
        return None


def _raise(error: OSError) -> None:
    raise error


def _listed(lines: Sequence[str]) -> str:
    more = [f"and {len(lines) - _MAX_NAMED} more"] if len(lines) > _MAX_NAMED else []
    return "".join(f"\n  {line}" for line in [*lines[:_MAX_NAMED], *more])


def _size(image: np.ndarray) -> str:
    return f"{image.shape[1]}x{image.shape[0]}"


def in_threads(function: Callable, items: Iterable) -> list:
    """The function's results in order, computed by one thread a usable core."""
    with ThreadPoolExecutor(usable_cores()) as pool:
        return list(pool.map(function, items))
