"""Resized crops: draws against torchvision's RandomResizedCrop, pixels against Pillow, and sizes from 1 to 4096."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torchvision.transforms.transforms as torchvision_transforms
from PIL import Image
from pillow_oracle import pillow_ops, pillow_resized
from scipy.stats import kstest

from bacon_fast.data.augment import Augment
from bacon_fast.data.philox import Stream, philox
from bacon_fast.ops.augment import ViewRequest, apply_ops
from bacon_fast.ops.backends import native_error
from bacon_fast.reference.augment import OPS
from bacon_fast.reference.resized_crop import crop_resized

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
BACKENDS = ["reference", *([] if native_error else ["cpp"])]
SIZES = [
    ((256, 256), (224, 224)),
    ((64, 64), (64, 64)),
    ((17, 31), (8, 9)),
    ((31, 17), (31, 2)),
    ((300, 40), (3, 40)),
    ((40, 300), (40, 3)),
    ((5, 3), (1, 1)),
    ((1, 1), (1, 1)),
]


def noise(n: int, height: int, width: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(n)
    images = torch.randint(0, 256, (n, height, width, 3), dtype=torch.uint8, generator=generator)
    images[0], images[1 % n, :, ::2] = 255, 0
    return images


def crop_alone(size, source) -> Augment:
    return Augment(size, source_size=source, mean=MEAN, std=STD, num_ops=0, cutout=False, resized_crop=True)


class Words:
    """torch as `RandomResizedCrop.get_params` uses it, with our words of one view for random numbers."""

    tensor, log, exp = staticmethod(torch.tensor), staticmethod(torch.log), staticmethod(torch.exp)

    def __init__(self, words: list[int]) -> None:
        self.pairs, self.position = iter(words[6:]), iter(words[:2])

    def empty(self, count: int) -> SimpleNamespace:
        def uniform_(low, high):
            low, high = (torch.as_tensor(side, dtype=torch.float64) for side in (low, high))
            return low + (high - low) * (next(self.pairs) / 2**32)

        return SimpleNamespace(uniform_=uniform_)

    def randint(self, low: int, high: int, size: tuple[int]) -> torch.Tensor:
        return torch.tensor([low + next(self.position) * (high - low) // 2**32])


@pytest.mark.parametrize(("source", "size"), [*SIZES, ((100, 30), (9, 9)), ((30, 90), (9, 9)), ((2, 3), (1, 1))])
def test_parts_are_those_of_torchvision(source, size, monkeypatch):
    draws = crop_alone(size, source).draw_strong(300, 3, 4, Stream.STRONG_0)
    words = philox(3, 4, Stream.STRONG_0, torch.arange(300), 26).tolist()
    image = Image.new("RGB", source[::-1])
    for i in range(300):
        monkeypatch.setattr(torchvision_transforms, "torch", Words(words[i]))
        expected = torchvision_transforms.RandomResizedCrop.get_params(image, (0.08, 1.0), (3 / 4, 4 / 3))
        assert [side[i].item() for side in (draws.top, draws.left, draws.height, draws.width)] == list(expected)


def test_areas_of_small_parts_are_uniform():
    """Those up to half of the image, of which nearly every ratio fits."""
    draws = crop_alone(224, 256).draw_strong(20_000, 0, 0, Stream.STRONG_0)
    areas = (draws.height * draws.width / 256**2).numpy()
    assert areas.min() > 0.075 and areas.max() <= 1
    assert kstest(areas[(areas > 0.1) & (areas < 0.5)], "uniform", (0.1, 0.4)).pvalue > 1e-4


@pytest.mark.parametrize(("source", "size"), SIZES)
def test_any_part_is_resized_as_pillow_does_it(source, size):
    """Also parts of one pixel, of one row or column, and larger in one direction only."""
    rng, images = np.random.default_rng(0), noise(6, *source)
    height, width = (rng.integers(1, side + 1, 60) for side in source)
    height[:4], width[:4] = [1, 1, source[0], source[0]], [1, source[1], 1, source[1]]
    top, left = (rng.integers(0, side - part + 1) for side, part in zip(source, (height, width)))
    parts, indices = np.stack([top, left, height, width]), torch.arange(60) % 6
    result = crop_resized(images, indices, *torch.from_numpy(parts), size)
    for i, part in enumerate(parts.T.tolist()):
        expected = pillow_resized(Image.fromarray(images[i % 6].numpy()), part, size)
        assert np.array_equal(result[i].numpy(), expected), part


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("source", "size"), [*SIZES, ((20, 90), (20, 7)), ((90, 20), (7, 20)), ((48, 48), (40, 44))])
def test_drawn_views_are_those_of_pillow(source, size, backend):
    module, images = crop_alone(size, source), noise(60, *source)
    draws = module.draw_strong(60, 7, 8, Stream.STRONG_1)
    parts = torch.stack([draws.top, draws.left, draws.height, draws.width], 1).tolist()
    expected = [pillow_resized(Image.fromarray(image.numpy()), part, size) for image, part in zip(images, parts)]
    expected = torch.from_numpy(np.stack([np.asarray(view) for view in expected]))
    expected = torch.where(draws.flip[:, None, None, None], expected.flip(2), expected)
    views = module.views(images, [ViewRequest(torch.arange(60), Stream.STRONG_1, True)], 7, 8, backend=backend)
    assert views.equal(module.normalize(expected))


native = pytest.mark.skipif(native_error is not None, reason=str(native_error))


@native
def test_one_thread_and_two_make_the_same_views():
    module, pool = Augment(56, source_size=64, mean=MEAN, std=STD, resized_crop=True), noise(50, 64, 64)
    wanted, threads = [ViewRequest(torch.arange(50), 0, False), ViewRequest(torch.arange(50), 2, True)], []
    before = torch.get_num_threads()
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            threads.append(module.views(pool, wanted, 1, 2, backend="cpp"))
    finally:
        torch.set_num_threads(before)
    assert threads[0].equal(threads[1])
    assert threads[0].equal(module.views(pool, wanted, 1, 2, backend="reference"))


@native
def test_random_sizes_are_the_references():
    rng = np.random.default_rng(1)
    for _ in range(40):
        source = rng.integers(1, 40, 2).tolist()
        size = [int(rng.integers(1, side + 1)) for side in source]
        module = Augment(size, source_size=source, mean=MEAN, std=STD, resized_crop=bool(rng.integers(2)))
        pool, rows = noise(7, *source), torch.arange(7)
        wanted = [ViewRequest(rows, 0, False), ViewRequest(rows, 2, True)]
        both = [module.views(pool, wanted, 1, 2, backend=backend) for backend in BACKENDS]
        assert both[0].equal(both[1]), (source, size)


@native
@pytest.mark.parametrize(
    ("source", "size"), [((4096, 4096), (3, 5)), ((4096, 1), (4096, 1)), ((1, 4096), (1, 1)), ((4096, 2), (1, 2))]
)
def test_the_largest_images(source, size):
    module, image = crop_alone(size, source), noise(1, *source)
    image[:, ::3] //= 2
    draws = module.draw_strong(3, 0, 0, 2)
    parts = torch.stack([draws.top, draws.left, draws.height, draws.width], 1).tolist()
    views = module.views(image, [ViewRequest(torch.zeros(3, dtype=torch.int64), 2, True)], 0, 0)
    for view, part, flip in zip(views, parts, draws.flip):
        expected = torch.from_numpy(np.array(pillow_resized(Image.fromarray(image[0].numpy()), part, size)))
        assert view.equal(module.normalize((expected.flip(1) if flip else expected)[None])[0])


@native
def test_the_gray_of_the_largest_white_image():
    """The sum of 2^24 grays of 255 needs all of 32 bits."""
    image = torch.full((1, 4096, 4096, 3), 255, dtype=torch.uint8)
    image[0, 0, 0] = 0
    ops, factor = torch.tensor([[OPS.index("contrast")]]), torch.tensor([[0.5]], dtype=torch.float64)
    assert apply_ops(image, ops, factor, backend="cpp").equal(pillow_ops(image, ops, factor))
