"""SimCLR's distortions of a whole batch against torchvision, one image at a time."""

import itertools
import math

import pytest
import torch
from torchvision.transforms.v2 import functional as tv

from bacon_fast.data.color_jitter import BRIGHTNESS, CONTRAST, HUE, SATURATION, color_jitter, grayscale, shift_hue
from bacon_fast.data.philox import Stream, philox, to_uniform
from bacon_fast.data.simclr import SimCLRDistortion, draw_boxes, gaussian_blur, resized_crop

ORDERS = torch.tensor(list(itertools.permutations(range(4))))
ADJUST = {
    BRIGHTNESS: tv.adjust_brightness,
    CONTRAST: tv.adjust_contrast,
    SATURATION: tv.adjust_saturation,
    HUE: tv.adjust_hue,
}
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def images(count: int, height: int = 17, width: int = 13) -> torch.Tensor:
    pixels = torch.rand(count, 3, height, width, generator=torch.Generator().manual_seed(0))
    pixels[0] = 0.5  # gray: the hue is undefined
    pixels[1] = torch.tensor([1.0, 0.0, 0.0])[:, None, None]
    pixels[2, :2] = 1.0  # two channels share the maximum
    return pixels


def factors(count: int) -> torch.Tensor:
    u = torch.rand(count, 4, generator=torch.Generator().manual_seed(1))
    return torch.cat([0.2 + 1.6 * u[:, :3], u[:, 3:] - 0.5], dim=1)


def jitter_one(image: torch.Tensor, values: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    for operation in order.tolist():
        image = ADJUST[operation](image, float(values[operation]))
    return image


def test_every_order_of_the_four_is_torchvisions():
    pixels, values = images(len(ORDERS)), factors(len(ORDERS))
    result = color_jitter(pixels, values, ORDERS)
    for i, order in enumerate(ORDERS):
        torch.testing.assert_close(result[i], jitter_one(pixels[i], values[i], order), rtol=0, atol=2e-6)


def test_neutral_factors_leave_an_image_as_it_is():
    pixels = images(len(ORDERS))
    neutral = torch.tensor([1.0, 1.0, 1.0, 0.0]).expand(len(ORDERS), 4)
    assert torch.equal(color_jitter(pixels, neutral, ORDERS), pixels)


@pytest.mark.parametrize("shift", [-0.5, -0.07, 0.33, 0.5])
def test_hue_alone(shift):
    pixels = images(5)
    result = shift_hue(pixels, torch.full((5,), shift))
    for got, image in zip(result, pixels):
        torch.testing.assert_close(got, tv.adjust_hue(image, shift), rtol=0, atol=2e-6)


def test_gray():
    pixels = images(3)
    torch.testing.assert_close(grayscale(pixels), tv.rgb_to_grayscale(pixels))


def test_crops_are_torchvisions_and_inside():
    height, width = 40, 33
    u = torch.rand(200, 4, generator=torch.Generator().manual_seed(2))
    u[0], u[1] = 0.0, 1 - 2**-24
    boxes = draw_boxes(u, height, width)
    top, left, h, w = boxes.unbind(1)
    assert (top >= 0).all() and (left >= 0).all() and (top + h <= height).all() and (left + w <= width).all()
    share = (h * w) / (height * width)
    assert 0.18 < share.min() < 0.25 and 0.9 < share.max() <= 1
    assert (w / h).min() > 0.7 and (w / h).max() < 1.4
    pixels = images(12, height, width)
    result = resized_crop(pixels, boxes[:12])
    for got, image, box in zip(result, pixels, boxes.tolist()):
        torch.testing.assert_close(got, tv.resized_crop(image, *box, [height, width]), rtol=0, atol=2e-5)


def test_blur_is_torchvisions():
    pixels, sigma = images(4, 30, 24), torch.tensor([0.1, 0.7, 1.3, 2.0])
    result = gaussian_blur(pixels, sigma, 5)
    for got, image, s in zip(result, pixels, sigma.tolist()):
        torch.testing.assert_close(got, tv.gaussian_blur(image, [5, 5], [s, s]), rtol=0, atol=1e-6)


@pytest.mark.parametrize(("side", "largest_small"), [(32, 64), (80, 64), (32, 0)])
def test_the_distortion_replays_its_draws_through_torchvision(side, largest_small):
    """Documented words of the counters: 0 jitter, 1-4 factors, 5-8 order, 9 gray, 10-11 blur, 12-15 crop."""
    count, first, step = 24, 5, 3
    pixels = images(count, side, side)
    mean, std = (torch.tensor(v)[:, None, None] for v in (MEAN, STD))
    distortion = SimCLRDistortion(MEAN, STD, seed=7, largest_small=largest_small)
    normalized = ((pixels - mean) / std).contiguous(memory_format=torch.channels_last)
    result = distortion(normalized, torch.tensor(step), torch.arange(first, first + count))
    assert result.is_contiguous(memory_format=torch.channels_last)
    u = to_uniform(philox(7, step, Stream.SIMCLR, torch.arange(first, first + count), 16), torch.float32)
    seen = set()
    for i, draw in enumerate(u):
        image = pixels[i]
        if side > largest_small:
            image = tv.resized_crop(image, *draw_boxes(draw[None, 12:], side, side)[0].tolist(), [side, side])
        jittered, gray, blurred = draw[0] < 0.8, draw[9] < 0.2, draw[10] < 0.5 and side > largest_small
        if jittered:
            span = torch.tensor([0.4, 0.4, 0.4, 0.1])
            values = torch.tensor([1.0, 1.0, 1.0, 0.0]) + span * (2 * draw[1:5] - 1)
            image = jitter_one(image, values, draw[5:9].argsort())
        if gray:
            image = tv.rgb_to_grayscale(image, num_output_channels=3)
        if blurred:
            sigma = 0.1 + 1.9 * float(draw[11])
            image = tv.gaussian_blur(image, [side // 20 * 2 + 1] * 2, [sigma, sigma])
        seen.add((bool(jittered), bool(gray), bool(blurred)))
        # Bilinear weights differ in the last bits; a gray level is 4e-3.
        torch.testing.assert_close(result[i] * std + mean, image, rtol=0, atol=1e-4)
    assert len(seen) > 3


def test_autocast_does_not_blur_in_half_precision():
    pixels, slots, distortion = images(4, 70, 70), torch.arange(4), SimCLRDistortion(MEAN, STD, seed=7)
    with torch.autocast("cpu", torch.bfloat16):
        found = distortion(pixels, 0, slots)
    assert torch.equal(found, distortion(pixels, 0, slots))


def test_draws_belong_to_seed_step_and_slot():
    pixels = images(8)
    distortion = SimCLRDistortion(MEAN, STD, seed=0)
    slots = torch.arange(8)
    whole = distortion(pixels, 4, slots)
    assert torch.equal(whole[5:], distortion(pixels[5:], 4, slots[5:])), "a rank makes its part of the global batch"
    for other in (distortion(pixels, 5, slots), SimCLRDistortion(MEAN, STD, seed=1)(pixels, 4, slots)):
        assert not torch.equal(whole, other)
    assert distortion(pixels.bfloat16(), 4, slots).dtype == torch.bfloat16
    assert distortion(pixels[:0], 4, slots[:0]).shape == (0, 3, 17, 13)


def test_frequencies():
    """10,000 draws: rates of jitter and gray within 4 standard deviations."""
    count = 10_000
    pixel = torch.rand(1, 3, 1, 1, generator=torch.Generator().manual_seed(3)).expand(count, -1, -1, -1)
    result = SimCLRDistortion((0.0, 0.0, 0.0), (1.0, 1.0, 1.0), seed=2)(pixel, 0, torch.arange(count))[:, :, 0, 0]
    gray = (result.amax(1) - result.amin(1)) < 1e-6
    unchanged = (result - pixel[:, :, 0, 0]).abs().amax(1) < 1e-6
    for rate, expected in ((gray, 0.2), (unchanged, 0.2 * 0.8)):
        assert rate.float().mean().item() == pytest.approx(
            expected, abs=4 * math.sqrt(expected * (1 - expected) / count)
        )
