"""`functional.batch_norm_act`, every backend usable here, against the definition in float64 and autograd through it."""

import os

import pytest
import torch

from bacon_fast.functional import batch_norm_act
from bacon_fast.models import wrn
from bacon_fast.models.batchnorm import BatchNormAct2d
from bacon_fast.ops import backends
from bacon_fast.ops.batch_norm import default_backend

BACKENDS = [n for n, b in backends.BACKENDS["batch_norm_act"].items() if b.why_not(torch.empty(1, 1, 1, 1)) is None]
FUSED = [name for name in BACKENDS if name != "reference"]
interpreted = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1", reason="Triton's interpreter is off; tests/gpu runs the compiled kernels"
)
MOMENTUM, EPS, SLOPE = 0.3, 1e-3, 0.1
SHAPES = [
    (2, 16, 7, 9),
    (4, 32, 5, 5),
    (2, 128, 2, 2),
    (1, 640, 2, 2),
    (3, 5, 7, 9),
    (2, 1, 1, 1),
    (1, 3, 1, 2),
    (8, 20, 9, 7),
]


@interpreted
def test_all_backends_are_tested():
    assert set(BACKENDS) >= {"reference", "triton"}


def problem(shape, dtype=torch.float64, residual=True, seed=0, mean=2.0):
    """Arguments of a call; channels differ in mean and spread."""
    g = torch.Generator().manual_seed(seed)
    channels, wide = shape[1], torch.promote_types(dtype, torch.float32)

    def normal(*size):
        return torch.randn(size, generator=g, dtype=torch.float64)

    spread, center = normal(channels).exp()[None, :, None, None], mean * normal(channels)[None, :, None, None]
    return {
        "x": (center + spread * normal(*shape)).to(dtype),
        "residual": (spread * normal(*shape)).to(dtype) if residual else None,
        "weight": normal(channels).to(wide),
        "bias": normal(channels).to(wide),
        "running_mean": normal(channels).to(wide),
        "running_var": normal(channels).exp().to(wide),
        "num_batches_tracked": torch.tensor(6),
        "upstream": normal(*shape).to(dtype),
        "upstream_sum": normal(*shape).to(dtype),
    }


def definition(x, residual, weight, bias, mean, var, dtype):
    """The activated values and the sum; mean and var None: of the batch. The sum is rounded to ``dtype``."""
    total = x if residual is None else x + residual
    total = total + (total.detach().to(dtype).to(total.dtype) - total.detach())
    rows = total.movedim(1, -1).reshape(-1, x.shape[1])
    if mean is None:
        mean = rows.sum(0) / len(rows)
        var = ((rows - mean) ** 2).sum(0) / len(rows)
    z = (rows - mean) / (var + EPS).sqrt() * weight + bias
    activated = torch.where(z > 0, z, SLOPE * z)
    return activated.reshape(total.movedim(1, -1).shape).movedim(-1, 1), total


LEAVES = ("x", "residual", "weight", "bias")


def expected_of(arguments, training=True, sum_used=True):
    """Outputs, gradients and running statistics by the definition in float64."""
    dtype = arguments["x"].dtype
    wide = {k: None if v is None else v.to(torch.float64, copy=True) for k, v in arguments.items()}
    leaves = {name: wide[name].requires_grad_() for name in LEAVES if wide[name] is not None}
    mean, var = (None, None) if training else (wide["running_mean"], wide["running_var"])
    activated, total = definition(*(wide[name] for name in LEAVES), mean, var, dtype)
    loss = (activated * wide["upstream"]).sum()
    if sum_used:
        loss = loss + (total * wide["upstream_sum"]).sum()
    gradients = torch.autograd.grad(loss, leaves.values())
    values = {"activated": activated, "sum": total} | {f"grad_{k}": g for k, g in zip(leaves, gradients)}
    rows = total.detach().movedim(1, -1).reshape(-1, total.shape[1])
    if training:
        values["running_mean"] = (1 - MOMENTUM) * wide["running_mean"] + MOMENTUM * rows.mean(0)
        values["running_var"] = (1 - MOMENTUM) * wide["running_var"] + MOMENTUM * rows.var(0, unbiased=True)
    else:
        values |= {name: wide[name] for name in ("running_mean", "running_var")}
    values["num_batches_tracked"] = arguments["num_batches_tracked"] + training
    return {name: value.detach() for name, value in values.items()}


def found_of(arguments, backend, training=True, sum_used=True, function=batch_norm_act):
    """The same from a backend."""
    leaves = {name: arguments[name].detach().requires_grad_() for name in LEAVES if arguments[name] is not None}
    buffers = {name: arguments[name].clone() for name in ("running_mean", "running_var", "num_batches_tracked")}
    activated, total = function(
        **leaves, **buffers, training=training, momentum=MOMENTUM, eps=EPS, negative_slope=SLOPE, backend=backend
    )
    outputs, upstream = [activated], [arguments["upstream"]]
    if sum_used:
        outputs.append(total)
        upstream.append(arguments["upstream_sum"])
    gradients = torch.autograd.grad(outputs, list(leaves.values()), upstream)
    values = {"activated": activated, "sum": total} | {f"grad_{k}": g for k, g in zip(leaves, gradients)} | buffers
    return {name: value.detach() for name, value in values.items()}


def assert_close(found, expected, tolerance=1e-12):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        scale = max(value.abs().max().item(), 1.0)
        torch.testing.assert_close(
            found[name].double(), value.double(), rtol=0, atol=tolerance * scale, msg=lambda m, k=name: f"{k}: {m}"
        )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_the_definition(shape, residual, backend):
    arguments = problem(shape, residual=residual)
    assert_close(found_of(arguments, backend), expected_of(arguments))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("sum_used", [False, True])
def test_modes(training, sum_used, backend):
    arguments = problem((3, 5, 7, 9))
    assert_close(found_of(arguments, backend, training, sum_used), expected_of(arguments, training, sum_used))


@pytest.mark.parametrize("backend", FUSED)
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("far", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_no_rougher_than_torch_in_the_same_dtype(dtype, far, residual, backend):
    arguments = problem((8, 20, 9, 7), dtype, residual, mean=1e3 if far else 2.0)
    expected = expected_of(arguments)
    torchs, found = found_of(arguments, "reference"), found_of(arguments, backend)
    for name, value in expected.items():
        assert found[name].dtype == torchs[name].dtype
        error, allowed = ((other[name].double() - value).abs().max().item() for other in (found, torchs))
        # Far from zero the rounding of the mean itself, to half a unit in the last place at best, is most of the error.
        allowed = (2 if far else 1) * allowed + 16 * torch.finfo(torch.float32).eps * value.abs().max().item()
        assert error <= allowed, f"{name}: {error:.2e}, allowed {allowed:.2e}"


@pytest.mark.parametrize("backend", FUSED)
def test_constant_channels_and_a_first_value_that_is_far_off(backend):
    """Deviations from that one value alone would lose the variance of the others to rounding."""
    arguments = problem((8, 3, 9, 7), torch.float32, residual=False)
    arguments["x"][:, 0] = 1234.567
    arguments["x"][0, 1, 0, 0] = 3e4
    expected, found = expected_of(arguments), found_of(arguments, backend)
    mean, deviation = arguments["x"].double().mean((0, 2, 3)), arguments["x"].double().std((0, 2, 3))
    rounded = torch.finfo(torch.float32).eps * mean.abs() / (deviation**2 + EPS).sqrt()  # what rounding the mean costs
    tolerances = {
        "activated": 3e-6 + (rounded * arguments["weight"].abs())[None, :, None, None],
        "running_mean": 1e-6 * deviation + 1e-7 * mean.abs(),
        "running_var": 3e-6 + 3e-6 * deviation**2,
    }
    for name, tolerance in tolerances.items():
        error = (found[name].double() - expected[name]).abs()
        assert (error <= tolerance).all(), f"{name}: {error.amax()}"


def strange(tensor):
    """The same values, laid out so that no two dimensions are dense."""
    n, c, h, w = tensor.shape
    return torch.empty(w, 2 * n, h, c + 1, dtype=tensor.dtype)[:, ::2, :, :c].permute(1, 3, 2, 0).copy_(tensor)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("layout", ["channels_last", "strange", "mixed"])
def test_memory_formats(layout, backend):
    arguments = problem((3, 20, 7, 9))
    expected = expected_of(arguments)
    last = {"memory_format": torch.channels_last}
    for name in ("x", "residual", "upstream", "upstream_sum"):
        if layout == "strange" or (layout == "mixed" and name in ("residual", "upstream")):
            arguments[name] = strange(arguments[name])
        elif layout == "channels_last":
            arguments[name] = arguments[name].contiguous(**last)
    found = found_of(arguments, backend)
    assert_close(found, expected)
    if backend in FUSED:
        assert all(found[name].is_contiguous(**last) for name in ("activated", "sum", "grad_x", "grad_residual"))


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_expanded_upstream_gradient(backend):
    """That of a spatial mean: strides of zero."""
    arguments = problem((3, 5, 7, 9), residual=False)
    arguments["upstream"] = arguments["upstream"][:, :, :1, :1].expand(3, 5, 7, 9)
    assert_close(found_of(arguments, backend, sum_used=False), expected_of(arguments, sum_used=False))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("wanted", [("x",), ("residual",), ("weight", "residual"), ("bias",)], ids=str)
def test_gradients_of_some_inputs_only(wanted, backend):
    arguments = problem((3, 5, 4, 4))
    expected = expected_of(arguments)
    inputs = {name: arguments[name].clone().requires_grad_(name in wanted) for name in LEAVES}
    activated, total = batch_norm_act(
        **inputs, running_mean=None, running_var=None, eps=EPS, negative_slope=SLOPE, backend=backend
    )
    ((activated * arguments["upstream"]).sum() + (total * arguments["upstream_sum"]).sum()).backward()
    for name, tensor in inputs.items():
        assert (tensor.grad is not None) == (name in wanted)
        if name in wanted:
            torch.testing.assert_close(tensor.grad, expected[f"grad_{name}"], rtol=1e-12, atol=1e-11)


@pytest.mark.parametrize("backend", BACKENDS)
def test_only_the_sum_is_used(backend):
    arguments = problem((3, 5, 4, 4))
    leaves = {name: arguments[name].clone().requires_grad_() for name in LEAVES}
    _, total = batch_norm_act(**leaves, running_mean=None, running_var=None, backend=backend)
    total.backward(arguments["upstream_sum"])
    assert torch.equal(leaves["x"].grad, arguments["upstream_sum"])
    assert torch.equal(leaves["residual"].grad, arguments["upstream_sum"])
    assert leaves["weight"].grad is None or not leaves["weight"].grad.any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_statistics_that_are_not_given_are_not_needed(backend):
    arguments = problem((3, 5, 4, 4))
    options = {"residual": arguments["residual"], "eps": EPS, "negative_slope": SLOPE, "backend": backend}
    inputs = [arguments[name] for name in ("x", "weight", "bias")]
    expected = expected_of(arguments)["activated"]
    with torch.no_grad():
        for buffers in ((None, None), (arguments["running_mean"].clone(), arguments["running_var"].clone())):
            activated, _ = batch_norm_act(*inputs, *buffers, **options)
            torch.testing.assert_close(activated, expected, rtol=1e-12, atol=1e-12)
        counter = torch.tensor(3)
        batch_norm_act(*inputs, None, None, counter, **options)
    assert counter == 4


@pytest.mark.parametrize("backend", BACKENDS)
def test_without_residual_the_sum_is_the_input_itself(backend):
    arguments = problem((3, 5, 4, 4), residual=False)
    x = arguments["x"]
    for training in (False, True):
        _, total = batch_norm_act(
            x, arguments["weight"], arguments["bias"], arguments["running_mean"], arguments["running_var"],
            training=training, backend=backend,
        )  # fmt: skip
        assert total is x


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradcheck(backend):
    arguments = problem((2, 3, 2, 2))
    leaves = [arguments[name].requires_grad_() for name in LEAVES]

    def function(x, residual, weight, bias):
        return batch_norm_act(
            x, weight, bias, None, None, residual=residual, eps=EPS, negative_slope=SLOPE, backend=backend
        )

    assert torch.autograd.gradcheck(function, leaves, fast_mode=backend == "triton")  # slow in the interpreter


@pytest.fixture
def poisoned_memory():
    """PyTorch fills every new tensor with NaN."""
    torch.use_deterministic_algorithms(True)
    assert torch.empty(1000).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("backend", FUSED)
@pytest.mark.parametrize("residual", [False, True])
def test_nothing_is_left_uninitialized(poisoned_memory, residual, backend):
    arguments = problem((3, 17, 7, 9), residual=residual)
    assert_close(found_of(arguments, backend), expected_of(arguments))


@pytest.mark.parametrize("backend", FUSED)
def test_not_a_number_stays_in_its_channel(backend):
    arguments = problem((3, 5, 7, 9))
    expected = expected_of(arguments)
    arguments["x"][1, 2, 3, 4] = float("nan")
    found = found_of(arguments, backend)
    others = [0, 1, 3, 4]
    for name in ("activated", "grad_x"):
        assert found[name][:, 2].isnan().all()
        torch.testing.assert_close(found[name][:, others], expected[name][:, others], rtol=1e-11, atol=1e-11)
    assert found["running_mean"].isnan().tolist() == [False, False, True, False, False]


@pytest.mark.parametrize("backend", FUSED)
def test_a_second_derivative_is_refused(backend):
    arguments = problem((2, 3, 2, 2))
    x = arguments["x"].requires_grad_()
    activated, _ = batch_norm_act(x, arguments["weight"], arguments["bias"], None, None, backend=backend)
    (gradient,) = torch.autograd.grad(activated.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="cannot be differentiated twice; backend='reference' can"):
        gradient.sum().backward()


# --- torch.library, torch.compile, autocast --------------------------------------------------------------------------


@interpreted
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("residual", [False, True])
def test_opcheck(residual, dtype):
    a = problem((3, 5, 4, 4), dtype, residual)
    vectors = [a[name] for name in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")]
    numbers = (MOMENTUM, EPS, SLOPE)
    forward = torch.ops.bacon_fast.batch_norm_act_triton
    torch.library.opcheck(forward.default, (a["x"], a["residual"], *vectors, *numbers))
    torch.library.opcheck(forward.default, (a["x"], a["residual"], *vectors[:2], None, None, None, *numbers))
    _, total, mean, inverse = forward(a["x"], a["residual"], *vectors, *numbers)
    normalized = total if residual else a["x"]
    for upstream_sum in (None, a["upstream_sum"]):
        torch.library.opcheck(
            torch.ops.bacon_fast.batch_norm_act_backward_triton.default,
            (strange(a["upstream"]), upstream_sum, normalized, *vectors[:2], mean, inverse, SLOPE),
        )


@pytest.mark.parametrize("backend", [None, *BACKENDS])
@pytest.mark.parametrize("residual", [False, True])
def test_compiles_to_one_graph(residual, backend):
    arguments = problem((3, 5, 4, 4), torch.float32, residual)
    compiled = torch.compile(batch_norm_act, fullgraph=True, backend="aot_eager")
    assert_close(found_of(arguments, backend, function=compiled), found_of(arguments, backend), tolerance=1e-5)
    torch.compiler.reset()


def test_which_backend_serves_by_default():
    image = torch.empty(2, 3, 4, 4)
    assert default_backend(image) == "reference"
    image = image.to(memory_format=torch.channels_last)
    assert default_backend(image) is None
    assert torch.compile(default_backend, backend="eager")(image) == "reference"
    torch.compiler.reset()


def test_one_launch_is_for_those_who_name_it_and_takes_16_bytes_of_channels(monkeypatch):
    """Until a GPU has measured it: everything else is preferred."""
    assert list(backends.BACKENDS["batch_norm_act"]) == ["cpp", "triton", "reference", "cuda"]
    monkeypatch.setattr("bacon_fast.ops.batch_norm.why_not_cuda", lambda tensor: None)
    why_not = backends.BACKENDS["batch_norm_act"]["cuda"].why_not
    monkeypatch.setattr("bacon_fast.ops.batch_norm.has_native_code", lambda op, device: False)
    assert "built before it had this code" in why_not(torch.empty(2, 8, 1, 1))
    monkeypatch.setattr("bacon_fast.ops.batch_norm.has_native_code", lambda op, device: True)
    for dtype, channels in ((torch.bfloat16, 8), (torch.float32, 4), (torch.float64, 2)):
        assert why_not(torch.empty(2, 3 * channels, 1, 1, dtype=dtype)) is None
        reason = why_not(torch.empty(2, 3 * channels + channels // 2, 1, 1, dtype=dtype))
        assert f"do not divide {3 * channels + channels // 2} channels of {dtype}" in reason


@pytest.mark.parametrize("backend", BACKENDS)
def test_under_autocast_half_precision_stays(backend):
    arguments = problem((3, 5, 4, 4), torch.bfloat16)
    expected = found_of(arguments, backend)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = found_of(arguments, backend)
    assert all(found[name].dtype == value.dtype and torch.equal(found[name], value) for name, value in expected.items())


# --- a whole network -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", FUSED)
def test_a_network_of_fused_layers(backend):
    torch.manual_seed(0)
    network, images = wrn(10, 1).double(), torch.randn(2, 3, 8, 8, dtype=torch.float64)
    results = []
    for name in ("reference", backend):
        copy = wrn(10, 1).double()
        copy.load_state_dict(network.state_dict())
        for module in copy.modules():
            if isinstance(module, BatchNormAct2d):
                module.backend = name
        features = copy(images)
        (features * torch.linspace(-1, 1, features.numel()).view_as(features)).sum().backward()
        state = {"features": features.detach()} | {f"grad {n}": p.grad for n, p in copy.named_parameters()}
        results.append(state | dict(copy.named_buffers()))
        assert copy.bn.num_batches_tracked == 1
    assert_close(results[1], results[0], tolerance=1e-10)


# --- refused arguments -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"x": torch.zeros(3, 4)}, ValueError, r"x: expected shape \[N, C, H, W\], found \[3, 4\]"),
        ({"x": torch.zeros(2, 5, 4, 4, dtype=torch.int32)}, TypeError, "x: expected dtype float"),
        ({"weight": torch.zeros(4)}, ValueError, r"weight: expected shape \[5\]"),
        ({"bias": None}, TypeError, "bias: expected a tensor, found NoneType"),
        ({"running_mean": torch.zeros(5, dtype=torch.int64)}, TypeError, "running_mean: expected dtype float"),
        ({"running_mean": torch.zeros(10)[::2]}, ValueError, "running_mean: expected a contiguous tensor"),
        ({"running_var": None}, ValueError, "running_var: expected both running_mean and running_var, or neither"),
        ({"num_batches_tracked": torch.zeros(1)}, ValueError, r"num_batches_tracked: expected shape \[\]"),
        ({"num_batches_tracked": torch.zeros(())}, TypeError, "num_batches_tracked: expected dtype int64"),
        ({"residual": torch.zeros(2, 5, 4, 1)}, ValueError, r"residual: expected shape \[2, 5, 4, 4\]"),
        ({"residual": torch.zeros(2, 5, 4, 4).half()}, TypeError, "residual: expected dtype torch.float32, that of x"),
        ({"weight": torch.zeros(5, device="meta")}, ValueError, "weight: expected device cpu, that of x, found meta"),
        ({"running_mean": None, "running_var": None, "training": False}, ValueError, "running_mean: expected a tensor"),
        ({"x": torch.zeros(1, 5, 1, 1)}, ValueError, "x: expected more than one value per channel when training"),
        ({"momentum": None}, TypeError, "momentum: expected a number, found NoneType"),
        ({"eps": 0.0}, ValueError, "eps: expected a number > 0"),
        ({"negative_slope": -0.1}, ValueError, "negative_slope: expected a number >= 0"),
        ({"backend": "fused"}, ValueError, "backend: expected None or one of"),
        ({"backend": "chunks"}, RuntimeError, "backend 'chunks' does not implement batch_norm_act"),
        ({"backend": "cuda"}, RuntimeError, "cannot run batch_norm_act here: it serves cuda tensors"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_wrong_arguments_are_named(change, error, message):
    vectors = {name: torch.ones(5) for name in ("weight", "bias", "running_mean", "running_var")}
    with pytest.raises(error, match=message):
        batch_norm_act(**({"x": torch.zeros(2, 5, 4, 4)} | vectors | change))
