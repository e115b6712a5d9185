"""The augmentation by Pillow, one image at a time: the oracle of the batched and of the native code."""

import numpy as np
import torch
import torchvision.transforms.functional as tvf
from PIL import Image, ImageDraw, ImageEnhance, ImageOps
from torch import Tensor

from bacon_fast.reference.augment import CUTOUT_COLOR, OPS, Draws


def _transform(*matrix):
    return lambda image, m: image.transform(image.size, Image.Transform.AFFINE, [m if v == "m" else v for v in matrix])


OPERATIONS = {
    "autocontrast": lambda image, m: ImageOps.autocontrast(image),
    "brightness": lambda image, m: ImageEnhance.Brightness(image).enhance(m),
    "color": lambda image, m: ImageEnhance.Color(image).enhance(m),
    "contrast": lambda image, m: ImageEnhance.Contrast(image).enhance(m),
    "equalize": lambda image, m: ImageOps.equalize(image),
    "identity": lambda image, m: image,
    "posterize": lambda image, m: ImageOps.posterize(image, int(m)),
    "sharpness": lambda image, m: ImageEnhance.Sharpness(image).enhance(m),
    "shear_x": _transform(1, "m", 0, 0, 1, 0),
    "shear_y": _transform(1, 0, 0, "m", 1, 0),
    "solarize": lambda image, m: ImageOps.solarize(image, m),
    "translate_x": _transform(1, 0, "m", 0, 1, 0),
    "translate_y": _transform(1, 0, 0, 0, 1, "m"),
    "rotate": lambda image, m: image.rotate(m),
}


def pillow_ops(images: Tensor, ops: Tensor, magnitudes: Tensor) -> Tensor:
    """`apply_ops`, by Pillow."""
    results = [np.empty((0, *images.shape[1:]), dtype=np.uint8)]
    for pixels, chain, values in zip(images.numpy(), ops.tolist(), magnitudes.tolist()):
        image = Image.fromarray(np.ascontiguousarray(pixels))
        for op, value in zip(chain, values):
            image = OPERATIONS[OPS[op]](image, value)
        results.append(np.asarray(image)[None])
    return torch.from_numpy(np.concatenate(results))


def pillow_resized(image: Image.Image, part: tuple[int, int, int, int], size: tuple[int, int]) -> Image.Image:
    """The part (top, left, height, width) of an image, resized to `size` (H, W)."""
    top, left, height, width = part
    return image.crop((left, top, left + width, top + height)).resize(size[::-1], Image.Resampling.BILINEAR)


def pillow_replay(images: Tensor, draws: Draws, padding: int, size: tuple[int, int] | None = None) -> Tensor:
    """`Augment.replay` to views of `size` (H, W), by default the images' own, by torchvision's padding and crop on
    Pillow images, Pillow's operations and ImageDraw.
    """
    height, width = images.shape[1:3] if size is None else size
    results = []
    for i, pixels in enumerate(images.numpy()):
        image = Image.fromarray(pixels)
        if draws.resized:
            part = [side[i].item() for side in (draws.top, draws.left, draws.height, draws.width)]
            image = pillow_resized(image, part, (height, width))
        else:
            image = tvf.pad(image, padding, padding_mode="reflect") if padding else image
            image = tvf.crop(image, draws.top[i].item(), draws.left[i].item(), height, width)
        if draws.flip[i]:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        for op, value in zip(draws.ops[i].tolist(), draws.magnitudes[i].tolist()):
            image = OPERATIONS[OPS[op]](image, value)
        x0, y0, x1, y1 = draws.cutout[i].tolist()
        if x1 >= 0:
            image = image.copy()
            ImageDraw.Draw(image).rectangle((x0, y0, x1, y1), CUTOUT_COLOR)
        results.append(np.asarray(image))
    return torch.from_numpy(np.stack(results))
