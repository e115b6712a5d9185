"""The augmentation on a GPU, bit for bit against the reference on the CPU (which tests/data holds against Pillow)."""

import pytest
import torch

from bacon_fast.data.augment import Augment
from bacon_fast.data.loader import IndexSampler
from bacon_fast.ops.augment import ViewRequest, apply_ops, why_not
from bacon_fast.reference.augment import OPS

reason = (
    why_not(torch.zeros((1, 2, 2, 3), dtype=torch.uint8, device="cuda"))
    if torch.cuda.is_available()
    else "no CUDA device"
)
pytestmark = pytest.mark.skipif(reason is not None, reason=str(reason))

SIZES = [(16, 16), (32, 32), (33, 20), (64, 64), (96, 96), (5, 3), (1, 1)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def augment(size, **changes) -> Augment:
    return Augment(size, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225), **changes)


def noise(n, height, width):
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (n, height, width, 3), dtype=torch.uint8, generator=generator)
    images[: n // 4] //= 16  # few levels
    images[: n // 16] = 77
    return images


def requests(n: int, device: str) -> list[ViewRequest]:
    labeled, unlabeled = torch.arange(n // 3, device=device), torch.arange(n, device=device).flip(0)
    return [
        ViewRequest(labeled, 0, strong=False),
        ViewRequest(unlabeled, 1, strong=False, first_slot=5),
        ViewRequest(unlabeled[:0], 3, strong=True),
        ViewRequest(unlabeled, 2, strong=True, first_slot=2**31),
    ]


@pytest.mark.parametrize("size", SIZES, ids="{0[0]}x{0[1]}".format)
@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("backend", ["cuda", "reference"])
def test_operations(op, size, backend):
    images = noise(200, *size)
    low, span, unit = augment(size).ranges[:, OPS.index(op)].tolist()
    r = torch.rand(200, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    magnitudes = (low + span * r) * unit
    ops = torch.full((200, 2), OPS.index(op))
    expected = apply_ops(images, ops, magnitudes, backend="reference")
    result = apply_ops(images.cuda(), ops.cuda(), magnitudes.cuda(), backend=backend)
    assert result.cpu().equal(expected)


@pytest.mark.parametrize("size", SIZES, ids="{0[0]}x{0[1]}".format)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("channels_last", [False, True])
def test_views(size, dtype, channels_last):
    module, pool = augment(size), noise(300, *size)
    options = {"dtype": dtype, "channels_last": channels_last}
    expected = module.views(pool, requests(300, "cpu"), 2**64 - 3, 123_456_789, backend="reference", **options)
    module, pool = module.cuda(), pool.cuda()
    step = torch.tensor(123_456_789, device="cuda")
    for backend in ("cuda", "reference", None):
        result = module.views(pool, requests(300, "cuda"), 2**64 - 3, step, backend=backend, **options)
        assert result.stride() == expected.stride() and result.cpu().equal(expected), backend


def test_more_requests_than_one_launch_takes():
    module, pool = augment(16), noise(40, 16, 16)
    many = [ViewRequest(torch.arange(k), k, strong=k % 2 == 0) for k in range(40)]
    expected = module.views(pool, many, 0, 0, backend="reference")
    on_device = [ViewRequest(r.indices.cuda(), r.stream, r.strong) for r in many]
    assert module.cuda().views(pool.cuda(), on_device, 0, 0).cpu().equal(expected)


def test_nothing_waits_for_the_device():
    module, pool, wanted = augment(32).cuda(), noise(64, 32, 32).cuda(), requests(64, "cuda")
    step = torch.tensor(3, device="cuda")
    for backend in ("cuda", "reference"):
        module.views(pool, wanted, 0, step, backend=backend)
        torch.cuda.set_sync_debug_mode("error")
        try:
            module.views(pool, wanted, 0, step, backend=backend, dtype=torch.bfloat16, channels_last=True)
        finally:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("backend", ["cuda", "reference"])
def test_a_captured_step_follows_its_counter(backend):
    module, pool, wanted = augment(32).cuda(), noise(64, 32, 32).cuda(), requests(64, "cuda")
    step = torch.zeros((), dtype=torch.int64, device="cuda")
    module.views(pool, wanted, 0, step, backend=backend)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        views = module.views(pool, wanted, 0, step, backend=backend)
        step += 1
    step.zero_()
    for t in range(4):
        graph.replay()
        assert views.equal(module.views(pool, wanted, 0, t, backend=backend)), t


@pytest.mark.parametrize(
    ("source", "size"),
    [((20, 40), (20, 40)), ((256, 256), (224, 224)), ((300, 40), (3, 40)), ((90, 20), (7, 20)), ((5, 3), (1, 1))],
)
@pytest.mark.parametrize("dtype", DTYPES)
def test_resized_crops_in_shared_and_in_global_memory(source, size, dtype):
    module, pool = augment(size, source_size=source, resized_crop=True), noise(48, *source)
    expected = module.views(pool, requests(48, "cpu"), 7, 8, dtype=dtype, backend="reference")
    module, pool = module.cuda(), pool.cuda()
    for backend in ("cuda", "reference"):
        result = module.views(pool, requests(48, "cuda"), 7, 8, dtype=dtype, backend=backend)
        assert result.cpu().equal(expected), backend


def test_more_rows_than_blocks_in_global_memory():
    """Each block makes several views, in the same memory."""
    module = augment(200, source_size=210)
    pool, rows = noise(16, 210, 210), torch.arange(3000) % 16
    expected = module.views(pool, [ViewRequest(rows, 2, strong=True)], 0, 0)
    wanted = [ViewRequest(rows.cuda(), 2, strong=True)]
    assert module.cuda().views(pool.cuda(), wanted, 0, 0, backend="cuda").cpu().equal(expected)


@pytest.mark.parametrize("resized", [False, True])
def test_the_largest_images(resized):
    module, pool = augment(4096, resized_crop=resized), noise(1, 4096, 4096)
    rows = torch.zeros(2, dtype=torch.int64)
    expected = module.views(pool, [ViewRequest(rows, 2, strong=True)], 0, 0)
    wanted = [ViewRequest(rows.cuda(), 2, strong=True)]
    assert module.cuda().views(pool.cuda(), wanted, 0, 0, backend="cuda").cpu().equal(expected)


def test_operations_on_images_too_large_for_shared_memory():
    images, ops = noise(42, 201, 190), (torch.arange(84) % 14).view(42, 2)
    magnitudes = torch.full((42, 2), 0.3, dtype=torch.float64)
    expected = apply_ops(images, ops, magnitudes)
    assert apply_ops(images.cuda(), ops.cuda(), magnitudes.cuda(), backend="cuda").cpu().equal(expected)


def test_the_largest_image_that_fits_shared_memory():
    available = torch.cuda.get_device_properties(0).shared_memory_per_block_optin
    side = int(((available - 4096) / 8) ** 0.5)
    module, pool = augment(side), noise(3, side, side)
    expected = module.views(pool, [ViewRequest(torch.arange(3), 2, strong=True)], 0, 0)
    wanted = [ViewRequest(torch.arange(3).cuda(), 2, strong=True)]
    assert module.cuda().views(pool.cuda(), wanted, 0, 0, backend="cuda").cpu().equal(expected)


def test_sampler_shuffles_the_same_on_both_devices():
    on_host, on_device = (IndexSampler(1003, 64, 5, 9).to(device) for device in ("cpu", "cuda"))
    for step in (0, 15, 16, 200):
        assert on_device.indices(step).cpu().equal(on_host.indices(step))
