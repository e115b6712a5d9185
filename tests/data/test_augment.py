"""Views: draws against the specification and their frequencies, replay through Pillow, normalization, no host sync."""

import dataclasses

import pytest
import torch
import torchvision.transforms.functional as tvf
from pillow_oracle import pillow_replay
from scipy.stats import chi2_contingency, chisquare
from torch._subclasses.fake_tensor import FakeTensorMode

from bacon_fast.data.augment import Augment
from bacon_fast.data.philox import Stream, philox
from bacon_fast.ops.augment import ViewRequest, augment_views
from bacon_fast.ops.backends import native_error
from bacon_fast.reference.augment import OPS, Draws

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
P_VALUE = 1e-4  # the draws are fixed, so a passing test stays one


def augment(size=32, **changes) -> Augment:
    return Augment(size, mean=MEAN, std=STD, **changes)


def noise(n: int, height: int = 32, width: int = 32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(n)
    return torch.randint(0, 256, (n, height, width, 3), dtype=torch.uint8, generator=generator)


# --- draws -----------------------------------------------------------------------------------------------------------


def scalar_draw(words: list[int], height: int, width: int, padding: int, num_ops: int) -> dict:
    """augmentation.md, section 1, in scalar Python."""
    u = [w / 2**32 for w in words]
    side = 0.5 * width * u[3]
    x, y = width + (1 - width) * u[4], height + (1 - height) * u[5]
    x0, y0 = int(max(0, x - side / 2)), int(max(0, y - side / 2))
    chain = []
    for s in range(num_ops):
        op, r = OPS[int(14 * u[6 + 2 * s])], u[7 + 2 * s]
        magnitude = {
            "shear_x": -0.3 + 0.6 * r,
            "shear_y": -0.3 + 0.6 * r,
            "translate_x": (-0.3 + 0.6 * r) * width,
            "translate_y": (-0.3 + 0.6 * r) * height,
            "rotate": -30 + 60 * r,
            "solarize": 256 * r,
            "posterize": max(1, int(4 + 4 * r)),
            "autocontrast": 0.0,
            "equalize": 0.0,
            "identity": 0.0,
        }.get(op, 0.05 + 0.9 * r)
        chain.append((op, magnitude))
    return {
        "top": int((2 * padding + 1) * u[0]),
        "left": int((2 * padding + 1) * u[1]),
        "flip": u[2] >= 0.5,
        "chain": chain,
        "cutout": [x0, y0, min(width, x0 + side), min(height, y0 + side)],
    }


def as_scalars(draws: Draws, i: int) -> dict:
    names = [OPS[op] for op in draws.ops[i].tolist()]
    return {
        "top": draws.top[i].item(),
        "left": draws.left[i].item(),
        "flip": draws.flip[i].item(),
        "chain": list(zip(names, draws.magnitudes[i].tolist())),
        "cutout": draws.cutout[i].tolist(),
    }


@pytest.mark.parametrize(("height", "width"), [(32, 32), (33, 20), (16, 16)])
def test_strong_draws_are_the_specified_functions_of_the_random_words(height, width):
    module = augment((height, width))
    draws = module.draw_strong(400, 11, 5, Stream.STRONG_0)
    words = philox(11, 5, Stream.STRONG_0, torch.arange(400), 12).tolist()
    for i in range(400):
        assert as_scalars(draws, i) == scalar_draw(words[i], height, width, int(min(height, width) / 8), 3)


def test_weak_draws_share_the_geometry_of_the_words():
    module = augment()
    weak, strong = (draw(50, 1, 2, 3) for draw in (module.draw_weak, module.draw_strong))
    assert weak.top.equal(strong.top) and weak.left.equal(strong.left) and weak.flip.equal(strong.flip)
    assert weak.ops.shape == weak.magnitudes.shape == (50, 0)
    assert weak.cutout.equal(torch.tensor([0.0, 0.0, -1.0, -1.0]).double().expand(50, 4))


N = 60_000


@pytest.fixture(scope="module")
def many() -> tuple[Draws, Draws]:
    module = augment()
    return module.draw_weak(N, 0, 0, Stream.UNLABELED_WEAK), module.draw_strong(N, 0, 0, Stream.STRONG_0)


def assert_uniform(values: torch.Tensor, levels: int) -> None:
    assert chisquare(torch.bincount(values, minlength=levels).numpy()).pvalue > P_VALUE


def assert_independent(a: torch.Tensor, b: torch.Tensor) -> None:
    levels = int(b.max()) + 1
    table = torch.bincount(a * levels + b, minlength=(int(a.max()) + 1) * levels).view(-1, levels)
    assert chi2_contingency(table.numpy()).pvalue > P_VALUE


def test_frequencies(many):
    for draws in many:
        assert_uniform(draws.top, 9)
        assert_uniform(draws.left, 9)
        assert_uniform(draws.flip.long(), 2)
    for s in range(3):
        assert_uniform(many[1].ops[:, s], 14)


def test_independence(many):
    weak, strong = many
    assert_independent(weak.top, strong.top)
    assert_independent(weak.flip.long(), strong.flip.long())
    assert_independent(strong.top, strong.left)
    assert_independent(strong.ops[:, 0], strong.ops[:, 1])
    assert_independent(strong.ops[:, 1], strong.ops[:, 2])
    assert_independent(strong.ops[:, 0], strong.flip.long())


@pytest.mark.parametrize(
    ("op", "low", "high"),
    [
        ("brightness", 0.05, 0.95),
        ("shear_x", -0.3, 0.3),
        ("translate_y", -9.6, 9.6),
        ("rotate", -30, 30),
        ("solarize", 0, 256),
    ],
)
def test_magnitudes_are_uniform_in_their_range(many, op, low, high):
    magnitudes = many[1].magnitudes[many[1].ops == OPS.index(op)]
    share = (magnitudes - low) / (high - low)
    assert share.min() >= 0 and share.max() <= 1
    assert_uniform((share * 20).long().clamp(max=19), 20)


def test_posterize_keeps_four_to_seven_bits(many):
    bits = many[1].magnitudes[many[1].ops == OPS.index("posterize")]
    assert_uniform(bits.long() - 4, 4)


def test_cutout_sides_are_uniform(many):
    x0, y0, x1, y1 = many[1].cutout.unbind(1)
    unclipped = (x1 < 32) & (x0 > 8) & (x0 < 16)  # far enough from all borders that no side length is preferred
    assert_uniform(((x1 - x0)[unclipped] / 16 * 16).long(), 16)
    assert (x1 >= x0).all() and (y1 >= y0).all() and x0.min() == 0 and x1.max() == 32


def test_switches():
    module = augment(hflip=False, num_ops=0, cutout=False, padding=0)
    images = noise(20)
    assert module.strong(images, 0, 0, 2).equal(images)
    assert augment(num_ops=5).draw_strong(3, 0, 0, 2).ops.shape == (3, 5)
    assert augment(64).padding == 8 and augment((33, 20)).padding == 2


# --- pixels ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("height", "width"), [(16, 16), (32, 32), (33, 20), (64, 64)])
@pytest.mark.parametrize("strong", [False, True])
def test_replay_through_pillow(height, width, strong):
    module, images = augment((height, width)), noise(120, height, width)
    draws = (module.draw_strong if strong else module.draw_weak)(120, 3, 4, 5)
    views = (module.strong if strong else module.weak)(images, 3, 4, 5)
    assert views.equal(pillow_replay(images, draws, module.padding))


@pytest.mark.parametrize(("source", "size"), [((32, 32), (28, 28)), ((33, 20), (9, 20)), ((5, 3), (1, 1))])
@pytest.mark.parametrize("strong", [False, True])
@pytest.mark.parametrize("resized", [False, True])
def test_views_smaller_than_the_images_through_pillow(source, size, strong, resized):
    module, images = augment(size, source_size=source, resized_crop=resized), noise(120, *source)
    draws = (module.draw_strong if strong else module.draw_weak)(120, 3, 4, 5)
    views = (module.strong if strong else module.weak)(images, 3, 4, 5)
    assert module.padding == 0 and draws.resized == (strong and resized)
    assert views.shape == (120, *size, 3) and views.equal(pillow_replay(images, draws, 0, size))


def test_windows_lie_everywhere_in_the_image_and_its_border():
    photos, small = augment(224, source_size=256), augment(28, source_size=32, padding=3)
    for module, positions in ((photos, 33), (small, 11)):
        draws = module.draw_weak(20_000, 0, 0, Stream.UNLABELED_WEAK)
        assert_uniform(draws.top, positions)
        assert_uniform(draws.left, positions)


@pytest.mark.parametrize(("source", "size"), [((256, 256), (224, 224)), ((33, 20), (30, 17)), ((7, 8), (1, 1)), (9, 9)])
def test_center_is_torchvisions(source, size):
    module = augment(size, source_size=source)
    images = noise(2, *module.source_size)
    expected = tvf.center_crop(images.permute(0, 3, 1, 2), [module.height, module.width]).permute(0, 2, 3, 1)
    assert module.center(images).equal(expected)


def test_replay_of_the_largest_padding_and_extreme_boxes():
    module, images = augment((9, 7), padding=6), noise(6, 9, 7)
    boxes = [[0, 0, 0, 0], [6, 8, 7, 9], [0, 0, 7, 9], [3, 3, 3.99, 4.01], [0, 0, -1, -1], [6, 0, 6.5, 8.5]]
    draws = dataclasses.replace(
        module.draw_weak(6, 0, 0, 0),
        top=torch.tensor([0, 12, 0, 12, 6, 6]),
        left=torch.tensor([0, 12, 12, 0, 6, 6]),
        cutout=torch.tensor(boxes, dtype=torch.float64),
    )
    assert module.replay(images, draws).equal(pillow_replay(images, draws, 6))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("channels_last", [False, True])
def test_normalize_is_torchvisions(dtype, channels_last):
    module, images = augment(), noise(10)
    result = module.normalize(images, dtype, channels_last)
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    assert result.dtype == dtype and result.is_contiguous(memory_format=memory_format)
    plain = torch.stack([tvf.normalize(tvf.to_tensor(image.numpy()), MEAN, STD) for image in images])
    torch.testing.assert_close(result, plain.to(dtype))
    assert result.equal(module.normalize(images).to(dtype))


# --- views -----------------------------------------------------------------------------------------------------------


native = pytest.mark.skipif(native_error is not None, reason=str(native_error))
backends = pytest.mark.parametrize("backend", ["reference", pytest.param("cpp", marks=native)])


def requests() -> list[ViewRequest]:
    labeled, unlabeled = torch.tensor([5, 0, 5]), torch.tensor([7, 1, 2, 39])
    return [
        ViewRequest(labeled, Stream.LABELED_WEAK, strong=False),
        ViewRequest(unlabeled, Stream.UNLABELED_WEAK, strong=False),
        ViewRequest(unlabeled, Stream.STRONG_0, strong=True),
        ViewRequest(unlabeled[:0], Stream.STRONG_1, strong=True),
    ]


@backends
def test_views_are_the_parts_one_after_the_other(backend):
    module, pool = augment(), noise(40)
    views = module.views(pool, requests(), 7, 9, backend=backend)
    parts = [(module.strong if r.strong else module.weak)(pool[r.indices], 7, 9, r.stream) for r in requests()]
    assert views.shape == (11, 3, 32, 32) and views.equal(module.normalize(torch.cat(parts)))


@backends
def test_views_do_not_depend_on_how_a_batch_is_divided(backend):
    module, pool = augment(), noise(40)
    indices = torch.arange(13, 33)
    whole = module.views(pool, [ViewRequest(indices, Stream.STRONG_0, strong=True)], 7, 9, backend=backend)
    first = ViewRequest(indices[:8], Stream.STRONG_0, strong=True)
    second = ViewRequest(indices[8:], Stream.STRONG_0, strong=True, first_slot=8)
    assert whole.equal(torch.cat([module.views(pool, [r], 7, 9, backend=backend) for r in (first, second)]))


@backends
def test_step_may_be_a_tensor_and_changes_the_views(backend):
    module, pool = augment(), noise(40)

    def views(seed, step):
        return module.views(pool, requests(), seed, step, backend=backend)

    assert views(7, torch.tensor(9)).equal(views(7, 9))
    assert not views(7, 10).equal(views(7, 9))
    assert not views(8, 9).equal(views(7, 9))


@native
@pytest.mark.parametrize("size", [(16, 16), (32, 32), (33, 20), (64, 64), (96, 96), (5, 3)], ids="{0[0]}x{0[1]}".format)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("channels_last", [False, True])
def test_native_views_are_the_references_bit_for_bit(size, dtype, channels_last):
    module, pool = augment(size), noise(40, *size)
    indices = torch.arange(80) % 40
    wanted = [ViewRequest(indices[:9], 0, False), ViewRequest(indices, 2, True, first_slot=2**31)]
    reference, result = (
        module.views(pool, wanted, 2**64 - 3, 2**32 - 1, dtype=dtype, channels_last=channels_last, backend=backend)
        for backend in ("reference", "cpp")
    )
    assert result.dtype == dtype and result.stride() == reference.stride()
    assert result.equal(reference)


@native
@pytest.mark.parametrize(
    "changes",
    [
        {"hflip": False},
        {"cutout": False},
        {"num_ops": 0},
        {"num_ops": 7},
        {"padding": 0},
        {"padding": 15},
        {"source_size": (19, 23)},
        {"source_size": (19, 23), "padding": 4},
        {"resized_crop": True},
        {"resized_crop": True, "source_size": (40, 16), "num_ops": 2},
    ],
)
def test_native_views_follow_every_setting(changes):
    module = augment(16, **changes)
    pool = noise(60, *module.source_size)
    wanted = [ViewRequest(torch.arange(60), 1, False), ViewRequest(torch.arange(60), 2, True)]
    assert module.views(pool, wanted, 0, 1).equal(module.views(pool, wanted, 0, 1, backend="reference"))


@native
def test_native_ops_keep_the_contract_of_torch_library():
    module, pool = augment(16), noise(6, 16, 16)
    views = (pool, [torch.tensor([1, 5]), torch.tensor([2])], [1, 2], [0, 1], [0, 3], 7, torch.tensor(4))
    settings = (module.table, module.ranges, 2, True, 3, True, 11, 13, True, torch.bfloat16, True)
    torch.library.opcheck(torch.ops.bacon_fast.augment_views, views + settings)
    ops = torch.randint(14, (6, 2))
    torch.library.opcheck(torch.ops.bacon_fast.augment_ops, (pool, ops, torch.rand(6, 2, dtype=torch.float64)))


@backends
def test_what_is_outside_of_the_pool_or_of_the_counters_is_refused(backend):
    def views(*request):
        return augment().views(noise(40), [ViewRequest(*request)], 0, 0, backend=backend)

    for index in (-1, 40):
        with pytest.raises(IndexError, match=rf"indices: expected values in 0\.\.39, found {index}"):
            views(torch.tensor([3, index]), 0, False)
    for stream in (-1, 2**32):
        with pytest.raises(ValueError, match=rf"stream: expected an integer in \[0, 2\^32\), found {stream}"):
            views(torch.tensor([3]), stream, True)
        with pytest.raises(ValueError, match="stream: expected an integer"):
            augment().draw_strong(3, 0, 0, stream)
    with pytest.raises(TypeError, match="stream: expected an integer, found str"):
        views(torch.tensor([3]), "weak", True)
    with pytest.raises(ValueError, match="first_slot: expected an integer >= 0, found -1"):
        views(torch.tensor([3]), 0, True, -1)


def test_a_fallback_to_the_reference_is_said():
    module, pool = augment(), noise(40)
    strided = pool.transpose(1, 2)
    with pytest.warns(UserWarning, match="made by PyTorch instead of native code: .*contiguous"):
        views = module.views(strided, requests(), 7, 9)
    assert views.equal(module.views(strided.contiguous(), requests(), 7, 9))
    with pytest.raises(RuntimeError, match="backend 'cuda' cannot run augment_views here"):
        module.views(pool, requests(), 7, 9, backend="cuda")


@pytest.mark.parametrize("resized", [False, True])
def test_nothing_waits_for_the_device(resized):
    """Fake CUDA tensors have no values: reading one, or a shape that depends on one, would raise."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        module = augment(16, source_size=20, resized_crop=resized).to("cuda")
        pool = torch.empty((40, 20, 20, 3), dtype=torch.uint8, device="cuda")
        indices = torch.empty(8, dtype=torch.int64, device="cuda")
        step = torch.empty((), dtype=torch.int64, device="cuda")
        wanted = [ViewRequest(indices, 1, False), ViewRequest(indices, 2, True)]
        views = module.views(pool, wanted, 0, step, dtype=torch.bfloat16, channels_last=True, backend="reference")
    assert views.shape == (16, 3, 16, 16) and views.device.type == "cuda"


def test_buffers_are_derived_and_not_saved():
    assert not augment().state_dict()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image_size": 0}, "image_size: expected"),
        ({"image_size": (3, 4, 5)}, "image_size: expected"),
        ({"source_size": 31}, "image_size: expected at most"),
        ({"source_size": (40, 0)}, "source_size: expected"),
        ({"padding": 32}, "padding: expected"),
        ({"padding": -1}, "padding: expected"),
        ({"num_ops": -1}, "num_ops: expected"),
        ({"std": (0.1, 0.0, 0.1)}, "mean, std: expected"),
        ({"mean": (0.1, 0.1)}, "mean, std: expected"),
    ],
)
def test_bad_settings(changes, message):
    with pytest.raises(ValueError, match=message):
        Augment(**{"image_size": 32, "mean": MEAN, "std": STD} | changes)


def test_bad_views():
    module, pool = augment(), noise(4)
    with pytest.raises(ValueError, match="pool: expected size 32x32, found"):
        module.views(noise(4, 16, 32), requests(), 0, 0)
    with pytest.raises(ValueError, match="images: expected size 40x40, found"):
        augment(source_size=40).center(pool)
    settings = {"table": module.table, "ranges": module.ranges, "padding": 4, "hflip": True, "num_ops": 3}
    with pytest.raises(ValueError, match="width: expected 1 to 40, the padded image's, found 41"):
        augment_views(pool, requests(), 0, 0, **settings, cutout=True, size=(40, 41))
    with pytest.raises(ValueError, match="requests: expected at least one"):
        module.views(pool, [], 0, 0)
    with pytest.raises(TypeError, match="indices: expected int64"):
        module.views(pool, [ViewRequest(torch.zeros(2), 0, False)], 0, 0)
    with pytest.raises(TypeError, match="dtype: expected one of"):
        module.views(pool, requests(), 0, 0, dtype=torch.float64)
    with pytest.raises(ValueError, match="draws: expected one per view, 4, found 3"):
        module.replay(pool, module.draw_weak(3, 0, 0, 0))
