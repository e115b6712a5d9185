"""All 14 operations of every CPU backend, bit for bit against Pillow: sizes, magnitudes, ordinary and odd images."""

import pytest
import torch
from pillow_oracle import OPERATIONS, pillow_ops

from bacon_fast.ops.augment import apply_ops
from bacon_fast.ops.backends import native_error
from bacon_fast.reference.augment import MAGNITUDES, OPS, apply_grouped, apply_masked

backends = pytest.mark.parametrize(
    "backend",
    ["reference", pytest.param("cpp", marks=pytest.mark.skipif(native_error is not None, reason=str(native_error)))],
)
SIZES = [(16, 16), (32, 32), (33, 20), (64, 64), (2, 5), (1, 1)]
BLENDS = [0.0, 0.05, 0.5, 0.95, 1.0, 1.9]
EDGES = {
    "brightness": BLENDS,
    "color": BLENDS,
    "contrast": BLENDS,
    "sharpness": BLENDS,
    "posterize": [1, 4, 4.9, 7, 8],
    "shear_x": [-0.3, 0.0, 0.3, 1e-9, 0.5, -1.0],
    "shear_y": [-0.3, 0.0, 0.3, 1e-9, 0.5, -1.0],
    "solarize": [0.0, 0.5, 127.5, 128.0, 255.0, 256.0],
    "translate_x": [0.0, 0.5, -0.5, 1.0, -1.5, 0.4999999, -0.5000001, 1e3, -1e3],
    "translate_y": [0.0, 0.5, -0.5, 1.0, -1.5, 0.4999999, -0.5000001, 1e3, -1e3],
    "rotate": [0.0, -30.0, 30.0, 45.0, 90.0, 180.0, -90.0, 270.0, 360.0, 390.0, 1e-9, -1e-9],
}


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def images_of(kind: str, n: int, size: tuple[int, int], seed: int = 0) -> torch.Tensor:
    height, width = size
    noise = torch.rand((n, height, width, 3), generator=generator(seed))
    low = torch.rand((n, 1, 1, 3), generator=generator(seed + 1))
    high = torch.rand((n, 1, 1, 3), generator=generator(seed + 2))
    made = {
        "noise": noise,
        "narrow": low + 0.05 * noise,
        "constant": low.expand_as(noise),
        "two levels": torch.where(noise < 0.3, low, high),
        "one pixel differs": low + (high - low) * (torch.arange(height * width).view(1, height, width, 1) == 0),
        "smooth": torch.linspace(0, 1, height).view(1, -1, 1, 1) * low
        + torch.linspace(0, 1, width).view(1, 1, -1, 1) * high,
    }[kind]
    return (made * 255.999).clamp(0, 255).to(torch.uint8)


KINDS = ["noise", "narrow", "constant", "two levels", "one pixel differs", "smooth"]


def magnitudes_of(op: str, n: int, size: tuple[int, int], seed: int) -> torch.Tensor:
    low, span, unit = MAGNITUDES.get(op, (0, 0, "one"))
    r = torch.rand(n, generator=generator(seed), dtype=torch.float64)
    return (low + span * r) * {"one": 1, "height": size[0], "width": size[1]}[unit]


def assert_same(result, expected, ops, magnitudes):
    wrong = (result != expected).flatten(1).any(1).nonzero()[:, 0].tolist()
    assert not wrong, [(OPS[ops[i, 0]], magnitudes[i].tolist()) for i in wrong[:5]]


def test_operations_in_the_documented_order():
    assert OPS == (
        "autocontrast", "brightness", "color", "contrast", "equalize", "identity", "posterize",
        "sharpness", "shear_x", "shear_y", "solarize", "translate_x", "translate_y", "rotate",
    )  # fmt: skip
    assert set(OPERATIONS) == set(OPS)


@pytest.mark.parametrize("size", SIZES, ids="{0[0]}x{0[1]}".format)
@pytest.mark.parametrize("op", OPS)
@backends
def test_random_magnitudes(op, size, backend):
    images = torch.cat([images_of(kind, 40 if kind == "noise" else 8, size, seed=OPS.index(op)) for kind in KINDS])
    ops = torch.full((len(images), 1), OPS.index(op))
    magnitudes = magnitudes_of(op, len(images), size, 7)[:, None]
    result = apply_ops(images, ops, magnitudes, backend=backend)
    assert_same(result, pillow_ops(images, ops, magnitudes), ops, magnitudes)


@pytest.mark.parametrize("size", SIZES, ids="{0[0]}x{0[1]}".format)
@pytest.mark.parametrize("op", sorted(EDGES))
@backends
def test_edge_magnitudes(op, size, backend):
    edges = EDGES[op]
    extent = {"translate_x": size[1], "translate_y": size[0]}.get(op)
    if extent:
        edges = edges + [sign * share * extent for sign in (-1, 1) for share in (0.3, 0.5, 1.0)]
    images = torch.cat([images_of(kind, len(edges), size) for kind in KINDS])
    ops = torch.full((len(images), 1), OPS.index(op))
    magnitudes = torch.tensor(edges, dtype=torch.float64).repeat(len(KINDS))[:, None]
    result = apply_ops(images, ops, magnitudes, backend=backend)
    assert_same(result, pillow_ops(images, ops, magnitudes), ops, magnitudes)


def random_chains(n: int, length: int, size: tuple[int, int]):
    ops = torch.randint(len(OPS), (n, length), generator=generator(11))
    columns = torch.stack([magnitudes_of(op, n * length, size, 3).view(n, length) for op in OPS])
    return ops, columns.gather(0, ops[None])[0]


@backends
def test_each_image_has_its_own_chain(backend):
    images = images_of("smooth", 150, (32, 32))
    ops, magnitudes = random_chains(150, 3, (32, 32))
    result = apply_ops(images, ops, magnitudes, backend=backend)
    assert_same(result, pillow_ops(images, ops, magnitudes), ops, magnitudes)


def test_device_path_equals_host_path():
    """On a GPU all operations run on all images, also with magnitudes that are meant for others."""
    images = images_of("noise", 200, (17, 12))
    ops, magnitudes = random_chains(200, 1, (17, 12))
    ops, magnitudes = ops[:, 0], magnitudes[:, 0]
    magnitudes[:3] = torch.tensor([1e300, -1e300, 0.0], dtype=torch.float64)
    ops[:3] = OPS.index("identity")
    assert apply_masked(images, ops, magnitudes).equal(apply_grouped(images, ops, magnitudes))


@backends
def test_autocontrast_of_every_level(backend):
    """All 256 levels between 3,000 of the 32,640 pairs of extremes: float64 arithmetic decides each of these bits."""
    low, high = torch.triu_indices(256, 256, offset=1)
    chosen = torch.randperm(len(low), generator=generator(0))[:3000]
    low, high = low[chosen, None], high[chosen, None]
    levels = torch.arange(256).clamp(low, high)
    images = levels[:, None, :, None].expand(-1, -1, -1, 3).to(torch.uint8)
    ops = torch.zeros((len(images), 1), dtype=torch.int64)
    magnitudes = torch.zeros((len(images), 1), dtype=torch.float64)
    assert apply_ops(images, ops, magnitudes, backend=backend).equal(pillow_ops(images, ops, magnitudes))


@backends
def test_inputs_are_left_alone_and_may_be_strided(backend):
    whole = images_of("noise", 40, (20, 24))
    copy = whole.clone()
    strided = whole[::2, 2:18, 1::2].transpose(1, 2)
    ops, magnitudes = random_chains(20, 3, strided.shape[1:3])
    assert not strided.is_contiguous()
    transposed = ops.T.contiguous().T, magnitudes.T.contiguous().T
    expected = pillow_ops(strided, ops, magnitudes)
    assert apply_ops(strided, *transposed, backend=backend).equal(expected)
    assert whole.equal(copy)


@backends
def test_empty_batches_and_empty_chains(backend):
    images = images_of("noise", 3, (8, 8))
    none = torch.zeros((3, 0), dtype=torch.int64)
    assert apply_ops(images, none, none.double(), backend=backend).equal(images)
    two = torch.zeros((0, 2), dtype=torch.int64)
    assert apply_ops(images[:0], two, two.double(), backend=backend).shape == (0, 8, 8, 3)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"images": torch.zeros((2, 4, 4, 3))}, TypeError, "images: expected torch.uint8"),
        ({"images": torch.zeros((2, 3, 4, 4), dtype=torch.uint8)}, ValueError, r"images: expected \[N, H, W, 3\]"),
        ({"ops": torch.zeros((2, 1), dtype=torch.int32)}, TypeError, "ops: expected torch.int64"),
        ({"ops": torch.zeros(2, dtype=torch.int64)}, ValueError, "ops: expected"),
        ({"ops": torch.full((2, 1), 14)}, ValueError, r"ops: expected values in 0\.\.13, found 14\.\.14"),
        ({"ops": torch.full((2, 1), -1)}, ValueError, r"ops: expected values in 0\.\.13, found -1\.\.-1"),
        ({"magnitudes": torch.zeros((2, 1))}, TypeError, "magnitudes: expected torch.float64"),
        ({"magnitudes": torch.zeros((2, 2), dtype=torch.float64)}, ValueError, "magnitudes: expected"),
        ({"magnitudes": torch.zeros((3, 1), dtype=torch.float64)}, ValueError, "magnitudes: expected"),
    ],
)
def test_bad_arguments(changes, error, message):
    good = {
        "images": torch.zeros((2, 4, 4, 3), dtype=torch.uint8),
        "ops": torch.zeros((2, 1), dtype=torch.int64),
        "magnitudes": torch.zeros((2, 1), dtype=torch.float64),
    }
    with pytest.raises(error, match=message):
        apply_ops(**good | changes)


def test_backends_that_cannot_serve_say_why():
    arguments = (
        torch.zeros((2, 4, 4, 3), dtype=torch.uint8),
        torch.zeros((2, 1), dtype=torch.int64),
        torch.zeros(2, 1).double(),
    )
    with pytest.raises(RuntimeError, match="backend 'cuda' cannot run apply_ops here: it serves cuda tensors"):
        apply_ops(*arguments, backend="cuda")
    with pytest.raises(ValueError, match="backend: expected None or one of"):
        apply_ops(*arguments, backend="pillow")
