"""Gray images of more than 8 bits, as microscopes, scanners and medical devices write them."""

import numpy as np
from PIL import Image

_BITS_PER_SAMPLE, _PHOTOMETRIC, _WHITE_IS_ZERO = 258, 262, 0  # TIFF 6.0


def is_deep_gray(image: Image.Image) -> bool:
    """Whether the opened image has gray of up to 16 bits. Raises ValueError for 32 bits, which have no known white."""
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM")):
        return True
    if image.mode.startswith(("I", "F")):  # Pillow would clip these to 0..255: a white or a black image
        raise ValueError(f"expected at most 16 bits a channel, found mode {image.mode}")
    return False


def gray_of_16_bits(image: Image.Image) -> Image.Image:
    """The opened image as RGB, white 255: round(255 * value / white), as libpng's png_set_scale_16 and viewers do.

    A PNG's transparent gray becomes white.
    """
    image.load()
    values, white = np.asarray(image).astype(np.int64), 65535
    if image.format == "TIFF":
        white = 2 ** image.tag_v2.get(_BITS_PER_SAMPLE, (16,))[0] - 1
        if image.tag_v2.get(_PHOTOMETRIC) == _WHITE_IS_ZERO:
            values = white - values
    gray = ((510 * values + white) // (2 * white)).clip(0, 255).astype(np.uint8)
    transparent = image.info.get("transparency") if image.format == "PNG" else None
    if isinstance(transparent, int):
        gray[values == transparent] = 255
    return Image.fromarray(gray).convert("RGB")
