"""Transparent images in front of white, as most viewers show them."""

from typing import IO

import numpy as np
from PIL import Image


def in_front_of_white(image: Image.Image, file: IO[bytes]) -> Image.Image:
    """The opened `image` as RGB, in front of white where it is transparent. It was opened from `file`."""
    stored_as = image.tile[0][3] if image.format == "PNG" and image.tile else None
    image.load()
    color = image.info.get("transparency")
    if stored_as == "RGB;16B" and color is not None:
        high, low = np.asarray(image), _low_bytes(file)
        alike = (high == np.array(color) >> 8) & (low == np.array(color) & 255)
        return Image.fromarray(np.where(alike.all(axis=2, keepdims=True), np.uint8(255), high))
    if stored_as is not None and isinstance(color, (int, tuple)) and image.mode in ("L", "RGB"):
        image.info["transparency"] = _at_eight_bits(color, stored_as)
    if image.has_transparency_data:
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
    return image.convert("RGB")


def _at_eight_bits(color: int | tuple[int, ...], stored_as: str) -> int | tuple[int, ...]:
    """A PNG's transparent color, scaled as Pillow scales pixels. It has 16 bits; those of the image's depth count."""
    if isinstance(color, tuple):
        return tuple(value & 255 for value in color)
    bits = int(stored_as.partition(";")[2] or 8)
    return (color & (2**bits - 1)) * (255 // (2**bits - 1))


def _low_bytes(file: IO[bytes]) -> np.ndarray:
    """The second byte of each value of a 16-bit PNG, uint8 [H, W, 3]. Pillow decodes only the first."""
    file.seek(0)
    with Image.open(file, formats=["PNG"]) as image:
        image.tile = [(*image.tile[0][:3], "RGB;16L")]  # takes the second byte of two
        return np.asarray(image)
