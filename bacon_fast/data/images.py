"""Decoding and resizing of images on the host, with one thread per usable core (Pillow releases the GIL)."""

import contextlib
import os
import stat
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Literal, get_args

import numpy as np
import torch
from PIL import ExifTags, Image, UnidentifiedImageError
from torch import Tensor
from tqdm import tqdm

from bacon_fast.data.deep_gray import gray_of_16_bits, is_deep_gray
from bacon_fast.data.names import printable, shown
from bacon_fast.data.transparency import in_front_of_white
from bacon_fast.system import usable_cores

SUFFIXES = frozenset(
    {".jpg", ".jpeg", ".jfif", ".png", ".bmp", ".gif", ".ppm", ".pgm", ".tif", ".tiff", ".webp", ".avif"}
)
FORMATS = ("JPEG", "PNG", "BMP", "GIF", "PPM", "TIFF", "WEBP", "AVIF")
"""Formats of the suffixes, in Pillow's words. One of its other decoders starts a program: Ghostscript."""
Interpolation = Literal["bilinear", "bicubic"]
"""How images are resized: Pillow's filters of these names, which look at the whole area that a pixel stands for."""
_MAX_NAMED = 100
_MANY = 5000  # files that take long enough to decode for a line in a log
_DRAFT = 2  # a reduced JPEG keeps at least this many times the sides asked for
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


def resize(images: np.ndarray, size: int | None, interpolation: Interpolation = "bilinear") -> Tensor:
    """uint8 [N, H, W, 3] at size x size (Pillow); `size` None or equal to H and W leaves the images alone."""
    if size is None or images.shape[1:3] == (size, size):
        return torch.from_numpy(np.ascontiguousarray(images))
    resized = np.empty((len(images), size, size, 3), dtype=np.uint8)

    def one(i: int) -> None:
        resized[i] = Image.fromarray(images[i]).resize((size, size), resampling(interpolation))

    in_threads(one, range(len(images)))
    return torch.from_numpy(resized)


def resampling(interpolation: str) -> Image.Resampling:
    """Pillow's filter. Raises ValueError for another word than bilinear and bicubic."""
    if interpolation not in get_args(Interpolation):
        raise ValueError(f"interpolation: expected {' or '.join(get_args(Interpolation))}, found {interpolation!r}")
    return Image.Resampling[interpolation.upper()]


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


def read_files(
    files: Sequence[Path], size: int | tuple[int, int] | None, interpolation: Interpolation = "bilinear"
) -> Tensor:
    """Decodes files as RGB: uint8 [N, H, W, 3], resized to size x size or (H, W) when `size` is given.

    A file may have any of `FORMATS`, whatever its suffix. Images are read as a viewer shows them: turned by their EXIF
    orientation, transparent parts in front of white, gray of 16 bits scaled to 8, and only the first picture of an
    animation.

    Raises:
        UnreadableImagesError: files that cannot be decoded. ValueError: without `size`, files of different sizes.
    """
    images, failed = read_readable(files, size, interpolation)
    require_readable(failed)
    return images


def read_readable(
    files: Sequence[Path], size: int | tuple[int, int] | None, interpolation: Interpolation = "bilinear"
) -> tuple[Tensor, dict[int, str]]:
    """As `read_files`, without the files that cannot be decoded: the images of the others, and name and reason of each
    failed one by its index. One array holds all images from the start."""
    size = (size, size) if isinstance(size, int) else size
    shape = size or _first_size(files) or (1, 1)
    rows = np.empty((len(files), *shape, 3), dtype=np.uint8)
    with decoding(len(files)) as done:
        failed = decode(files, rows, interpolation, resized=size is not None, done=done)
    if failed:  # the others move up, one by one: a copy would need the memory twice
        readable = (i for i in range(len(files)) if i not in failed)
        for row, i in enumerate(readable):
            if row != i:
                rows[row] = rows[i]
    return torch.from_numpy(rows[: len(files) - len(failed)]), failed


def require_readable(failed: Mapping[int, str]) -> None:
    """Raises UnreadableImagesError if files failed."""
    if failed:
        raise UnreadableImagesError(list(failed.values()))


def decode(
    files: Sequence[Path],
    rows: np.ndarray,
    interpolation: Interpolation = "bilinear",
    *,
    resized: bool = True,
    done: Callable[[], object] = lambda: None,
) -> dict[int, str]:
    """Decodes file i into rows[i], uint8 [N, H, W, 3], as `read_files` says, in threads.

    Args:
        resized: resize to H x W; else the files must have this size.
        done: is called after each file.

    Returns:
        Name and reason of each file that cannot be decoded, by its index, in order; its row is undefined.

    Raises:
        ValueError: with resized=False, for files of another size.
    """
    height, width = rows.shape[1:3]
    resample = resampling(interpolation)

    def one(i: int) -> Exception | tuple[int, int] | None:
        try:
            rgb = _read(files[i], max(height, width) if resized else None)
            if resized:
                rgb = rgb.resize((width, height), resample)
            elif rgb.size != (width, height):
                return rgb.size
            rows[i] = np.asarray(rgb)
        except Exception as error:  # decoders raise many types for a damaged file
            return error
        return None

    results = in_threads(one, range(len(files)), done)
    failed = {i: error for i, error in enumerate(results) if isinstance(error, Exception)}
    if not failed:
        for path, found in zip(files, results):
            if found is not None:
                same = shown(files[results.index(None)])
                raise ValueError(
                    "image_size: expected one, because the image files differ in size: "
                    f"{same} is {width}x{height}, {shown(path)} is {found[0]}x{found[1]}"
                )
    return {i: f"{shown(files[i])} ({printable(_reason(error))})" for i, error in failed.items()}


def _reason(error: Exception) -> str:
    reason = error.strerror if isinstance(error, OSError) else None  # without the name, which stands before it
    return reason or str(error) or type(error).__name__


def _first_size(files: Sequence[Path]) -> tuple[int, int] | None:
    """Height and width of the first file that can be decoded."""
    for path in files:
        with contextlib.suppress(Exception):
            return _read(path).size[::-1]
    return None


def _read(path: Path, side: int | None = None) -> Image.Image:
    """The upright image as RGB. With `side`, a JPEG may come reduced, to at least twice this many pixels a side."""
    if not stat.S_ISREG(path.stat().st_mode):
        raise ValueError("expected a file, found something else")  # opening a named pipe would wait for its writer
    with open(path, "rb") as file:  # given a path, Pillow maps some TIFFs with the sides of the turned image
        try:
            image = Image.open(file, formats=FORMATS)
        except UnidentifiedImageError:
            raise ValueError(f"expected an image, one of {', '.join(FORMATS)}") from None
        with image:
            if side is not None:  # of the JPEG's frequencies only those that are needed are computed
                image.draft(None, (_DRAFT * side, _DRAFT * side))
            rgb = gray_of_16_bits(image) if is_deep_gray(image) else in_front_of_white(image, file)
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


def in_threads(function: Callable, items: Iterable, done: Callable[[], object] = lambda: None) -> list:
    """The function's results in order, computed by one thread a usable core; `done` is called after each."""
    results = []
    with ThreadPoolExecutor(usable_cores()) as pool:
        for result in pool.map(function, items):
            results.append(result)
            done()
    return results


@contextlib.contextmanager
def decoding(count: int) -> Iterator[Callable[[], object]]:
    """Shows on stderr that so many files are decoded: a bar on a terminal, else a line if they are many.

    Yields a function to be called after each file.
    """
    bar = tqdm(total=count, desc="decoding images", unit="image", leave=False, delay=1, disable=None)
    if bar.disable and count > _MANY:
        print(f"decoding {count:,} images", file=sys.stderr, flush=True)
    with bar:
        yield bar.update
