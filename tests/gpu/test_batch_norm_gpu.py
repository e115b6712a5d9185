"""Fused BatchNorm on a GPU, compiled, against the reference in float64; in graphs, run after run, and in a network."""

import pytest
import torch

from bacon_fast.functional import batch_norm_act
from bacon_fast.models import wrn
from bacon_fast.models.batchnorm import BatchNormAct2d, frozen_statistics
from bacon_fast.ops import backends
from bacon_fast.ops.batch_norm import default_backend

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")

OPTIONS = {"momentum": 0.3, "eps": 1e-3, "negative_slope": 0.1}
LEAVES = ("x", "residual", "weight", "bias")
LAYERS = [(320, 16, 32), (320, 32, 32), (320, 64, 16), (320, 128, 8)]  # of WRN-28-2 at 64 + 128 + 128 images
ODD = [
    (2, 1, 1),
    (1, 5, 3),
    (3, 7, 9),
    (17, 130, 7),
    (4, 640, 8),
    (64, 2048, 2),
    (3, 8192, 2),  # more blocks of channels than multiprocessors: two launches
]


@pytest.fixture(params=["triton", "cuda"])
def backend(request):
    """Both designs; a test whose channels the second one does not take is skipped."""
    return request.param


def skip_if_not_served(backend, shape, dtype):
    x = torch.empty(shape, device="cuda", dtype=dtype)
    if reason := backends.BACKENDS["batch_norm_act"][backend].why_not(x):
        pytest.skip(reason)


def problem(images, channels, size, dtype, residual=True, mean=2.0, seed=0):
    g = torch.Generator("cuda").manual_seed(seed)

    def normal(*shape):
        return torch.randn(shape, generator=g, device="cuda", dtype=torch.float64)

    def image():
        return normal(images, channels, size, size + (size > 2)).to(memory_format=torch.channels_last)

    wide = torch.promote_types(dtype, torch.float32)
    spread, center = normal(channels).exp()[:, None, None], mean * normal(channels)[:, None, None]
    return {
        "x": (center + spread * image()).to(dtype),
        "residual": (spread * image()).to(dtype) if residual else None,
        "weight": normal(channels).to(wide),
        "bias": normal(channels).to(wide),
        "running_mean": normal(channels).to(wide),
        "running_var": normal(channels).exp().to(wide),
        "num_batches_tracked": torch.tensor(6, device="cuda"),
        "upstream": image().to(dtype),
        "upstream_sum": image().to(dtype),
    }


def run(arguments, backend="triton", function=batch_norm_act):
    """Outputs, gradients and updated statistics, by name."""
    leaves = {name: arguments[name].detach().requires_grad_() for name in LEAVES if arguments[name] is not None}
    buffers = {name: arguments[name].clone() for name in ("running_mean", "running_var", "num_batches_tracked")}
    activated, total = function(**leaves, **buffers, **OPTIONS, backend=backend)
    gradients = torch.autograd.grad(
        (activated, total), list(leaves.values()), (arguments["upstream"], arguments["upstream_sum"])
    )
    values = {"activated": activated, "sum": total} | {f"grad {k}": g for k, g in zip(leaves, gradients)} | buffers
    return {name: value.detach() for name, value in values.items()}


def truth(arguments):
    """The reference in float64, on the sum as the dtype rounds it; no upstream gradient next to the kink."""
    wide = {k: None if v is None else v.double() if v.is_floating_point() else v for k, v in arguments.items()}
    if arguments["residual"] is not None:
        wide["x"] = (arguments["x"] + arguments["residual"]).double()
        wide["residual"] = torch.zeros_like(wide["x"])
    with torch.no_grad():
        options = OPTIONS | {"negative_slope": 1.0}
        buffers = {name: wide[name].clone() for name in ("running_mean", "running_var")}
        z, _ = batch_norm_act(**{k: wide[k] for k in LEAVES}, **buffers, **options, backend="reference")
        near = z.abs() < 1e-3
        arguments["upstream"].masked_fill_(near, 0), wide["upstream"].masked_fill_(near, 0)
    return run(wide, "reference")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("far", [False, True])
@pytest.mark.parametrize("shape", LAYERS + ODD, ids=str)
def test_equals_the_reference(shape, far, residual, dtype, backend):
    skip_if_not_served(backend, (*shape, 1), dtype)
    arguments = problem(*shape, dtype, residual, mean=1e3 if far else 2.0)
    expected = truth(arguments)
    found, torchs = run(arguments, backend), run(arguments, "reference")
    unit = 1e-11 if dtype == torch.float64 else 16 * torch.finfo(torch.float32).eps
    for name, value in expected.items():
        assert found[name].dtype == torchs[name].dtype and found[name].shape == value.shape
        error, allowed = ((other[name].double() - value).abs().max().item() for other in (found, torchs))
        # Far from zero the rounding of the mean itself is most of the error.
        allowed = (4 if far else 1.1) * allowed + unit * value.abs().max().item()
        assert error <= allowed, f"{name}: {error:.2e}, allowed {allowed:.2e}"


@pytest.mark.parametrize("layout", ["contiguous", "strided"])
def test_other_memory_formats(layout):
    arguments = problem(3, 20, 9, torch.float32)
    expected = run(arguments)
    for name in ("x", "residual", "upstream", "upstream_sum"):
        image = arguments[name].contiguous()
        arguments[name] = image if layout == "contiguous" else torch.stack([image, image], dim=-1)[..., 0]
    assert arguments["x"].stride(1) != 1
    found = run(arguments)
    assert all(torch.equal(found[name], value) for name, value in expected.items())


def test_the_result_does_not_vary_over_100_runs(backend):
    arguments = problem(320, 32, 32, torch.bfloat16)
    skip_if_not_served(backend, arguments["x"].shape, torch.bfloat16)
    first = run(arguments, backend)
    for _ in range(100):
        again = run(arguments, backend)
        assert all(torch.equal(again[name], value) for name, value in first.items())


@pytest.fixture
def poisoned_memory():
    """PyTorch fills every new tensor with NaN."""
    torch.use_deterministic_algorithms(True)
    assert torch.empty(1000, device="cuda").isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("shape", LAYERS + ODD, ids=str)
def test_nothing_is_left_uninitialized(poisoned_memory, shape, backend):
    skip_if_not_served(backend, (*shape, 1), torch.float32)
    assert all(value.isfinite().all() for value in run(problem(*shape, torch.float32), backend).values())


def test_the_cuda_backend_takes_memory_that_is_not_aligned():
    arguments = problem(3, 16, 9, torch.bfloat16)
    skip_if_not_served("cuda", arguments["x"].shape, torch.bfloat16)
    expected = run(arguments, "cuda")
    for name in ("x", "residual", "upstream"):
        image = arguments[name]
        shifted = image.new_empty(image.numel() + 1)[1:].as_strided(image.shape, image.stride()).copy_(image)
        assert shifted.data_ptr() % 16
        arguments[name] = shifted
    found = run(arguments, "cuda")
    assert all(torch.equal(found[name], value) for name, value in expected.items())


def test_the_best_backend_is_triton_for_channels_last_and_it_never_waits():
    arguments = problem(64, 32, 16, torch.float32)
    x = arguments["x"]
    assert default_backend(x) is None
    assert default_backend(x.contiguous()) == "reference"
    best = backends.choose_backend("batch_norm_act", None, x)
    assert best is backends.BACKENDS["batch_norm_act"]["triton"].run
    run(arguments)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        run(arguments, None)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("name", [None, "triton", "cuda"])
def test_compiles_to_one_graph(name):
    arguments = problem(8, 32, 16, torch.float32)
    skip_if_not_served(name or "triton", arguments["x"].shape, torch.float32)
    expected = run(arguments)
    found = run(arguments, name, torch.compile(batch_norm_act, fullgraph=True))
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-4)


def fused_network(backend):
    torch.manual_seed(0)
    network = wrn(28, 2).cuda().to(memory_format=torch.channels_last)
    for module in network.modules():
        if isinstance(module, BatchNormAct2d):
            module.backend = backend
    return network


def test_a_network_equals_that_of_torchs_layers(backend):
    skip_if_not_served(backend, (1, 16, 1, 1), torch.float64)
    images = torch.randn(16, 3, 32, 32, device="cuda").to(memory_format=torch.channels_last)
    features, gradients = [], []
    for name in ("reference", backend):
        network = fused_network(name).double()
        out = network(images.double())
        (out * torch.linspace(-1, 1, out.numel(), device="cuda").view_as(out)).sum().backward()
        features.append(out.detach())
        gradients.append(torch.cat([p.grad.flatten() for p in network.parameters()]))
    torch.testing.assert_close(features[1], features[0], rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize("half", [False, True])
def test_a_captured_network_gives_the_bits_of_the_eager_one(half, backend):
    """Outputs, gradients and running statistics over several replays."""
    skip_if_not_served(backend, (1, 16, 1, 1), torch.bfloat16)
    images = torch.randn(3, 32, 3, 32, 32, device="cuda")

    def step(network, batch):
        with torch.autocast("cuda", dtype=torch.bfloat16, enabled=half):
            out = network(batch)
        network.zero_grad(set_to_none=False)
        out.float().square().mean().backward()
        return out

    torch.backends.cudnn.deterministic = True
    try:
        captured, eager = fused_network(backend), fused_network(backend)
        batch = images[0].to(memory_format=torch.channels_last)
        state = {k: v.clone() for k, v in captured.state_dict().items()}
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                step(captured, batch)
            step(eager, batch)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = step(captured, batch)
        captured.load_state_dict(state), eager.load_state_dict(state)
        for current in images:
            batch.copy_(current)
            graph.replay()
            assert torch.equal(out, step(eager, batch))
            for (name, a), b in zip(captured.named_parameters(), eager.parameters(), strict=True):
                assert torch.equal(a.grad, b.grad), name
            for (name, a), b in zip(captured.named_buffers(), eager.buffers(), strict=True):
                assert torch.equal(a, b), name
        assert captured.bn.num_batches_tracked == len(images)
    finally:
        torch.backends.cudnn.deterministic = False


def test_frozen_statistics_stay():
    network = fused_network(None)
    before = {name: buffer.clone() for name, buffer in network.named_buffers()}
    images = torch.randn(8, 3, 32, 32, device="cuda").to(memory_format=torch.channels_last)
    with frozen_statistics(network):
        network(images).sum().backward()
    assert all(torch.equal(buffer, before[name]) for name, buffer in network.named_buffers())
    network(images)
    assert all(not torch.equal(buffer, before[name]) for name, buffer in network.named_buffers())
