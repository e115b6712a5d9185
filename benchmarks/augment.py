"""Images a second of the augmentation: Pillow as peers use it, PyTorch, and the native code. One CSV row a measurement.

    python -m benchmarks.augment
    python -m benchmarks.augment --device cuda
    python -m benchmarks.augment --sizes 224

On a CPU: 256 weak and 256 strong views, on one thread, and torchvision's v2 transforms beside them. From 224 pixels on,
32 views of photos: windows of squares of 8/7 of the size, and strong views from resized crops. On a GPU: the views of a
step, 64 + 128 weak and 128 strong, eager and as a CUDA graph. Weak views are crop, flip and normalization; strong ones
add three operations and Cutout. The arms take turns, and a ratio is the median of the rounds' ratios.
"""

import argparse
import random
from collections.abc import Callable
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageEnhance, ImageOps
from torchvision import transforms
from torchvision.transforms import v2

from bacon_fast.data.augment import Augment
from bacon_fast.ops.augment import ViewRequest
from bacon_fast.reference.augment import CUTOUT_COLOR
from benchmarks.common import (
    RESULTS,
    append_csv,
    graphed,
    median_ratio,
    package_version,
    print_table,
    provenance,
    quantile,
    time_interleaved,
)

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
COUNT = 256  # images of a call on a CPU
PHOTO_COUNT = 32  # of photos
PHOTO_SIZE = 224  # from here on: what is smaller is padded and keeps its size

# --- the peer: one image at a time through Pillow and torchvision, as USB's loader workers do -------------------------


def _affine(image: Image.Image, *matrix: float) -> Image.Image:
    return image.transform(image.size, Image.Transform.AFFINE, matrix)


PILLOW_OPS = (
    lambda image, r: ImageOps.autocontrast(image),
    lambda image, r: ImageEnhance.Brightness(image).enhance(0.05 + 0.9 * r),
    lambda image, r: ImageEnhance.Color(image).enhance(0.05 + 0.9 * r),
    lambda image, r: ImageEnhance.Contrast(image).enhance(0.05 + 0.9 * r),
    lambda image, r: ImageOps.equalize(image),
    lambda image, r: image,
    lambda image, r: ImageOps.posterize(image, int(4 + 4 * r)),
    lambda image, r: ImageEnhance.Sharpness(image).enhance(0.05 + 0.9 * r),
    lambda image, r: _affine(image, 1, -0.3 + 0.6 * r, 0, 0, 1, 0),
    lambda image, r: _affine(image, 1, 0, 0, -0.3 + 0.6 * r, 1, 0),
    lambda image, r: ImageOps.solarize(image, 256 * r),
    lambda image, r: _affine(image, 1, 0, (-0.3 + 0.6 * r) * image.size[0], 0, 1, 0),
    lambda image, r: _affine(image, 1, 0, 0, 0, 1, (-0.3 + 0.6 * r) * image.size[1]),
    lambda image, r: image.rotate(-30 + 60 * r),
)


def rand_augment(image: Image.Image) -> Image.Image:
    """Three operations and one Cutout (augmentation.md, section 1)."""
    for op in random.choices(PILLOW_OPS, k=3):
        image = op(image, random.random())
    width, height = image.size
    side = 0.5 * width * random.random()
    x0 = int(max(0, random.uniform(1, width) - side / 2))
    y0 = int(max(0, random.uniform(1, height) - side / 2))
    image = image.copy()
    ImageDraw.Draw(image).rectangle((x0, y0, min(width, x0 + side), min(height, y0 + side)), CUTOUT_COLOR)
    return image


def pillow_pipeline(size: int, strong: bool) -> Callable:
    """The transform of one image, as torchvision composes it."""
    if size < PHOTO_SIZE:
        crop = transforms.RandomCrop(size, padding=size // 8, padding_mode="reflect")
    else:
        crop = transforms.RandomResizedCrop(size) if strong else transforms.RandomCrop(size)
    steps = [crop, transforms.RandomHorizontalFlip(), *([rand_augment] if strong else [])]
    return transforms.Compose([*steps, transforms.ToTensor(), transforms.Normalize(MEAN, STD)])


def v2_pipeline(size: int, strong: bool) -> Callable:
    """The same of one uint8 tensor [3, H, W] by torchvision's v2 transforms, which have other RandAugment and erasing:
    three of 14 operations at a middle magnitude, and one rectangle of up to a quarter of the area.
    """
    if size < PHOTO_SIZE:
        crop = v2.RandomCrop(size, padding=size // 8, padding_mode="reflect")
    else:
        crop = v2.RandomResizedCrop(size, antialias=True) if strong else v2.RandomCrop(size)
    steps = [crop, v2.RandomHorizontalFlip(), *([v2.RandAugment(3, 15)] if strong else [])]
    erase = [v2.RandomErasing(1.0, scale=(0.001, 0.25), ratio=(1.0, 1.0))] if strong else []
    return v2.Compose([*steps, v2.ToDtype(torch.float32, scale=True), v2.Normalize(MEAN, STD), *erase])


def our_views(size: int) -> Augment:
    photos = {"source_size": source_size(size), "resized_crop": True} if size >= PHOTO_SIZE else {}
    return Augment(size, mean=MEAN, std=STD, **photos)


def source_size(size: int) -> int:
    """Side of the images that views of a size are made of."""
    return size if size < PHOTO_SIZE else round(size / 0.875)


# --- the arms ---------------------------------------------------------------------------------------------------------


def make_pool(size: int, count: int = 1000) -> torch.Tensor:
    """Images that are smooth with some noise, as photographs are: uint8 [count, size, size, 3]."""
    generator = torch.Generator().manual_seed(0)
    smooth = torch.rand((count, 3, 6, 6), generator=generator)
    smooth = torch.nn.functional.interpolate(smooth, size=size, mode="bicubic", align_corners=False)
    noisy = smooth + 0.03 * torch.randn((count, 3, size, size), generator=generator)
    return (noisy.clamp(0, 1) * 255).to(torch.uint8).permute(0, 2, 3, 1).contiguous()


def views_of_a_call(size: int) -> int:
    return COUNT if size < PHOTO_SIZE else PHOTO_COUNT


def cpu_arms(size: int, strong: bool) -> dict[str, Callable[[], object]]:
    """Views of `views_of_a_call` images."""
    count = views_of_a_call(size)
    pool, step = make_pool(source_size(size), 4 * count), torch.tensor(0)
    pictures = [Image.fromarray(image.numpy()) for image in pool[:count]]
    tensors = list(pool[:count].permute(0, 3, 1, 2).contiguous())
    pipeline, tensor_pipeline, module = pillow_pipeline(size, strong), v2_pipeline(size, strong), our_views(size)
    requests = [ViewRequest(torch.arange(count), int(strong), strong)]

    def views(backend: str) -> Callable[[], object]:
        return lambda: module.views(pool, requests, 0, step, channels_last=True, backend=backend)

    return {
        "pillow": lambda: torch.stack([pipeline(picture) for picture in pictures]),
        "torchvision v2": lambda: torch.stack([tensor_pipeline(tensor) for tensor in tensors]),
        "reference": views("reference"),
        "cpp": views("cpp"),
    }


def gpu_arms(size: int, dtype: torch.dtype) -> dict[str, Callable[[], object]]:
    """All views of a step."""
    pool, module = make_pool(source_size(size)).cuda(), our_views(size).cuda()
    labeled, unlabeled = torch.arange(64, device="cuda"), torch.arange(64, 192, device="cuda")
    step = torch.zeros((), dtype=torch.int64, device="cuda")
    requests = [ViewRequest(labeled, 0, False), ViewRequest(unlabeled, 1, False), ViewRequest(unlabeled, 2, True)]

    def views(backend: str) -> Callable[[], object]:
        return lambda: module.views(pool, requests, 0, step, dtype=dtype, channels_last=True, backend=backend)

    return {
        "reference": views("reference"),
        "reference, graph": graphed(views("reference")),
        "cuda": views("cuda"),
        "cuda, graph": graphed(views("cuda")),
    }


# --- measuring --------------------------------------------------------------------------------------------------------


def measure(arms: dict, images: int, device: str, rounds: int, **what: str | int) -> list[dict]:
    """CSV rows of one comparison, printed as a table; the first arm is the baseline."""
    samples = time_interleaved(arms, device, rounds=rounds)
    baseline = next(iter(samples))
    rows = []
    for name, seconds in samples.items():
        low, median, high = (quantile(seconds, share) * 1e6 for share in (0.25, 0.5, 0.75))
        rows.append(
            provenance(device)
            | {"pillow": package_version("pillow"), "torchvision": package_version("torchvision")}
            | what
            | {"arm": name, "images": images, "rounds": rounds, "median_us": round(median, 2)}
            | {"q25_us": round(low, 2), "q75_us": round(high, 2), "images_per_s": round(images / median * 1e6)}
            | {"times_as_fast": round(median_ratio(samples[baseline], seconds), 2), "baseline": baseline}
        )
    columns = ("arm", "median_us", "q25_us", "q75_us", "images_per_s", "times_as_fast")
    title = ", ".join(f"{key} {value}" for key, value in what.items())
    print_table((title, *columns[1:]), [[str(row[column]) for column in columns] for row in rows])
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--sizes", type=int, nargs="+", default=[16, 32, 64, 96], help="image sides in pixels")
    parser.add_argument("--threads", type=int, default=1, help="of PyTorch and the native code; Pillow has one")
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--out", type=Path, help="CSV file to append to; default results/augment_DEVICE.csv")
    arguments = parser.parse_args()
    device = arguments.device
    if device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: this machine has no usable CUDA device")
    torch.set_num_threads(arguments.threads)
    random.seed(0)
    torch.manual_seed(0)
    rows = []
    for size in arguments.sizes:
        if device == "cuda":
            for dtype in (torch.bfloat16, torch.float32):
                what = {"views": "step", "size": size, "dtype": str(dtype).removeprefix("torch.")}
                rows += measure(gpu_arms(size, dtype), 320, device, arguments.rounds, **what)
        else:
            for views in ("weak", "strong"):
                what = {"views": views, "size": size, "dtype": "float32"}
                rows += measure(
                    cpu_arms(size, views == "strong"), views_of_a_call(size), device, arguments.rounds, **what
                )
    append_csv(arguments.out or RESULTS / f"augment_{device}.csv", rows)


if __name__ == "__main__":
    main()
