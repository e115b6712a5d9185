"""The contrastive family's backends: the same matrix for all of them, judged by the reference in float64."""

import math

import pytest
import torch
from contrastive_cases import CASES, Case, assert_as_accurate_as_torch, loss_and_gradients, problem, upstream
from hypothesis import given, settings
from hypothesis import strategies as st

from bacon_fast import reference
from bacon_fast.kernels import contrastive_backward, contrastive_forward
from bacon_fast.kernels.config import MAX_BLOCK, MAX_DIM, tile_config
from bacon_fast.ops import backends
from bacon_fast.ops.contrastive import contrastive

FORMS = ["mean", "sum", "prod"]


def available(name: str) -> str | None:
    return backends.BACKENDS["contrastive"][name].why_not(torch.empty(1, 1))


def needs(name: str):
    return pytest.mark.skipif(available(name) is not None, reason=str(available(name)))


BACKENDS = [pytest.param(name, marks=needs(name)) for name in ("cpp", "triton")]
ALL_BACKENDS = ["reference", *BACKENDS]


def run_on(backend: str):
    return backends.BACKENDS["contrastive"][backend].run


@pytest.fixture(autouse=True)
def poisoned_allocations():
    """Tensors allocated without a value hold NaN, in Python and in C++: nothing may be read before it is written."""
    torch.use_deterministic_algorithms(True)  # which is what makes torch fill them
    assert torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(False)


def test_allocations_are_poisoned():
    assert torch.empty(3).isnan().all() and torch.ones(2).new_empty(3).isnan().all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_as_accurate_as_torch_in_double(backend, case, form):
    assert_as_accurate_as_torch(run_on(backend), case, form, torch.float64)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("index", range(len(CASES)), ids=lambda index: CASES[index].name)
def test_as_accurate_as_torch(backend, index, dtype):
    # One form a case and dtype: the interpreter is slow, and the formulas do not depend on the dtype.
    form = FORMS[(index + dtype.itemsize + (dtype == torch.float16)) % 3]
    assert_as_accurate_as_torch(run_on(backend), CASES[index], form, dtype)


@needs("chunks")
@pytest.mark.parametrize("name", ["odd", "no-columns", "no-rows", "bacon", "ssc", "queue", "memory"])
def test_chunks_are_as_accurate_as_torch(name):
    """Several chunks of 64 columns; the kernels but two are those of "triton". A dtype for each case, all in turn."""
    index, case = next((index, case) for index, case in enumerate(CASES) if case.name == name)
    dtype = [torch.float32, torch.float64, torch.bfloat16, torch.float16][index % 4]
    assert_as_accurate_as_torch(run_on("chunks"), case, FORMS[index % 3], dtype)


@needs("triton")
@pytest.mark.parametrize("arch", [80, 90, 120])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tiles_of_real_cards(monkeypatch, arch, dtype):
    """The configurations that a GPU gets, which `CASES` does not show to the interpreter: tiles, slices and splits."""
    for module in (contrastive_forward, contrastive_backward):
        monkeypatch.setattr(module, "architecture", lambda tensor: arch)
    case = Case("two-tiles", 70, None, 33, own=1, codes=2, groups=3)
    assert_as_accurate_as_torch(run_on("triton"), case, "mean", dtype)
    case = Case("split-queue", 5, 530, 130, own=1, columns_need_gradient=False)
    assert_as_accurate_as_torch(run_on("triton"), case, "sum", dtype)


def probability_space_oracle(case_arguments, *, form, match, floor, eps):
    """Row losses by loops over rows and columns, and sums of probabilities; rows without a positive give 0."""
    rows, columns, own, row_code, column_code, self_column, positive_scale, own_scale = case_arguments[:8]
    negative_scale, bias, offset, group, _ = case_arguments[8:]
    columns = rows if columns is None else columns

    def cosine(a, b):
        return a @ b / (a.norm().clamp_min(eps) * b.norm().clamp_min(eps))

    positives, sums = [], []
    for r in range(len(rows)):
        x, total = [], rows.new_zeros(())
        for m in range(0 if own is None else own.shape[1]):
            if not math.isnan(own_scale[r, m]):
                x.append(own_scale[r, m] * cosine(rows[r], own[r, m]))
        for j in range(len(columns)):
            if self_column is not None and self_column[r] == j:
                continue
            s = cosine(rows[r], columns[j])
            if column_code is not None and row_code[r] in column_code[j]:
                if match == "positive":
                    x.append(positive_scale[r] * s)
            else:
                total = total + (negative_scale[r] * s + (0 if bias is None else bias[r])).exp()
        positives.append(x)
        sums.append(total)
    losses = []
    for r, x in enumerate(positives):
        members = [r] if group is None else [i for i in range(len(rows)) if group[i] == group[r]]
        negative = sum(sums[i] for i in members) * (1 if offset is None else offset[r].exp()) + floor
        if not x:
            losses.append(rows.new_zeros(()))
            continue
        x = torch.stack(x)
        if form == "mean":
            losses.append((x.exp().sum() + negative).log() - x.mean())
        elif form == "sum":
            losses.append((1 + negative / x.exp().sum()).log())
        else:
            losses.append((1 + negative * (-x).exp().sum()).log())
    return torch.stack(losses) + 0 * rows.sum()  # differentiable even where no row has a loss


@st.composite
def coded_problems(draw):
    """Small problems in which every combination of codes, masks and groups can come up."""
    num_rows, shared = draw(st.integers(1, 5)), draw(st.booleans())
    num_columns = num_rows if shared else draw(st.integers(0, 5))
    num_codes, num_own, dim = draw(st.integers(0, 3)), draw(st.integers(0, 2)), 3

    def drawn(shape, values):
        flat = draw(st.lists(values, min_size=math.prod(shape), max_size=math.prod(shape)))
        return torch.tensor(flat).reshape(shape)

    g = torch.Generator().manual_seed(draw(st.integers(0, 999)))

    def normal(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    own_scale = drawn((num_rows, num_own), st.sampled_from([math.nan, 0.0, 3.0])).double() if num_own else None
    grouped = draw(st.booleans())
    arguments = [
        normal(num_rows, dim),
        None if shared else normal(num_columns, dim),
        normal(num_rows, num_own, dim) if num_own else None,
        drawn((num_rows,), st.integers(0, 2)).long(),
        drawn((num_columns, num_codes), st.integers(-1, 2)).long() if num_codes else None,
        drawn((num_rows,), st.integers(-1, max(num_columns - 1, 0))).long() if draw(st.booleans()) else None,
        normal(num_rows).abs() * 3,
        own_scale,
        normal(num_rows).abs() * 3,
        normal(num_rows) if draw(st.booleans()) else None,
        normal(num_rows) if draw(st.booleans()) else None,
        drawn((num_rows,), st.integers(0, 2)).long() if grouped else None,
        3 if grouped else 0,
    ]
    options = {
        "form": draw(st.sampled_from(FORMS)),
        "match": draw(st.sampled_from(["positive", "ignore"])),
        "floor": draw(st.sampled_from([0.0, 0.5])),
        "eps": 1e-12,
    }
    return arguments, options, normal(num_rows) * drawn((num_rows,), st.sampled_from([0.0, 1.0]))


@pytest.mark.parametrize("backend", ALL_BACKENDS)
def test_codes_and_masks(backend):
    case = Case("drawn", 0, None, 0)

    @settings(max_examples=20 if backend == "triton" else 60, deadline=None)
    @given(coded_problems())
    def check(drawn):
        arguments, options, grad = drawn
        loss, gradients = loss_and_gradients(run_on(backend), case, arguments, grad, **options)
        expected, wanted = loss_and_gradients(
            lambda *a, **o: probability_space_oracle(a, **o), case, arguments, grad, **options
        )
        torch.testing.assert_close(loss, expected, rtol=1e-11, atol=1e-12)
        for found, gradient in zip(gradients, wanted):
            torch.testing.assert_close(found, gradient, rtol=1e-9, atol=1e-11)

    check()


@pytest.mark.parametrize("backend", ALL_BACKENDS)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("match", ["positive", "ignore"])
def test_gradcheck(backend, form, match):
    case = Case("gradcheck", 4, 6, 3, own=2, codes=1, match=match, groups=2, bias=True, floor=0.5)
    arguments, options = problem(case, torch.float64)
    leaves = [tensor.requires_grad_() for tensor in arguments[:3]]

    def loss(rows, columns, own):
        return run_on(backend)(rows, columns, own, *arguments[3:], **options, form=form)

    assert torch.autograd.gradcheck(loss, leaves, fast_mode=True)
    if backend == "reference" and form == "mean":
        assert torch.autograd.gradgradcheck(loss, leaves, fast_mode=True)


@pytest.mark.parametrize("backend", ALL_BACKENDS)
@pytest.mark.parametrize("form", FORMS)
def test_what_nobody_looks_at_may_be_nan(backend, form):
    """A NaN column that all rows ignore, a NaN own column that is absent, a NaN row without upstream gradient."""
    case = Case("nan", 6, 40, 5, own=2, codes=1, match="ignore", columns_need_gradient=True)
    arguments, options = problem(case, torch.float64)
    rows, columns, own, row_code, column_code = arguments[:5]
    row_code.zero_()
    column_code.fill_(1)
    column_code[[3, 35]] = 0  # nobody's
    arguments[7] = torch.full_like(arguments[7], 2.0)
    arguments[7][1, 1] = torch.nan  # absent
    grad = upstream(case, torch.float64)
    grad[4] = 0
    clean_loss, clean = loss_and_gradients(run_on(backend), case, arguments, grad, **options, form=form)
    columns[3], columns[35, 2], own[1, 1], rows[4, 0] = torch.nan, torch.inf, torch.nan, torch.nan
    loss, gradients = loss_and_gradients(run_on(backend), case, arguments, grad, **options, form=form)
    others = [0, 1, 2, 3, 5]
    assert loss[4].isnan()
    assert torch.equal(loss[others], clean_loss[others])
    assert torch.equal(gradients[0][others], clean[0][others])
    assert torch.equal(gradients[1], clean[1])
    assert torch.equal(gradients[2][others], clean[2][others])


@pytest.mark.parametrize("backend", [*ALL_BACKENDS, pytest.param("chunks", marks=needs("chunks"))])
def test_nan_that_matters_is_seen(backend):
    case = Case("nan", 4, 9, 5, own=1)
    arguments, options = problem(case, torch.float32)
    arguments[1][2, 0] = torch.nan
    loss, gradients = loss_and_gradients(run_on(backend), case, arguments, torch.ones(4), **options, form="sum")
    assert loss.isnan().all()
    assert gradients[0].isnan().any(dim=1).all()


@pytest.mark.parametrize("backend", ALL_BACKENDS)
def test_extreme_values_stay_finite(backend):
    """Zero vectors, norms that overflow or underflow, and logits far beyond the range of exp."""
    case = Case("extreme", 6, 8, 4, own=1, codes=1)
    arguments, options = problem(case, torch.float32)
    arguments[0][0], arguments[0][1] = 0, 1e-30
    arguments[1][0], arguments[1][1] = 0, 1e-25
    arguments[0][2] *= 1e15
    arguments[6], arguments[8] = torch.full((6,), 500.0), torch.full((6,), 500.0)
    arguments[7] = torch.full((6, 1), 500.0)
    for form in FORMS:
        loss, gradients = loss_and_gradients(run_on(backend), case, arguments, torch.ones(6), **options, form=form)
        assert loss.isfinite().all() and all(gradient.isfinite().all() for gradient in gradients)
        exact_arguments = [a.double() if torch.is_tensor(a) and a.is_floating_point() else a for a in arguments]
        expected = reference.contrastive(*exact_arguments, **options, form=form)
        torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize("backend", BACKENDS)
def test_repeats_bit_for_bit(backend):
    case = CASES[4]
    arguments, options = problem(case, torch.float32)
    grad = upstream(case, torch.float32)
    first = loss_and_gradients(run_on(backend), case, arguments, grad, **options, form="sum")
    second = loss_and_gradients(run_on(backend), case, arguments, grad, **options, form="sum")
    assert torch.equal(first[0], second[0])
    assert all(torch.equal(a, b) for a, b in zip(first[1], second[1]))


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradient_is_computed_only_where_it_is_needed(backend, monkeypatch):
    """Each input alone gives the gradient that it has together with the others."""
    case = Case("needs", 9, 20, 6, own=2, codes=1)
    arguments, options = problem(case, torch.float64)
    grad = upstream(case, torch.float64)
    together = loss_and_gradients(run_on(backend), case, arguments, grad, **options, form="mean")[1]
    for index in range(3):
        alone = list(arguments)
        alone[index] = alone[index].detach().requires_grad_()
        loss = run_on(backend)(*alone, **options, form="mean")
        (gradient,) = torch.autograd.grad(loss, alone[index], grad)
        torch.testing.assert_close(gradient, together[index], rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("backend", BACKENDS)
def test_upstream_gradient_of_stride_zero(backend):
    case = CASES[1]
    arguments, options = problem(case, torch.float64)
    arguments[0].requires_grad_()
    run = run_on(backend)
    (by_sum,) = torch.autograd.grad(run(*arguments, **options, form="sum").sum(), arguments[0])
    (by_ones,) = torch.autograd.grad(
        run(*arguments, **options, form="sum"), arguments[0], torch.ones(case.rows).double()
    )
    assert torch.equal(by_sum, by_ones)


@pytest.mark.parametrize("backend", BACKENDS)
def test_double_backward_says_that_there_is_none(backend):
    arguments, options = problem(CASES[1], torch.float64)
    arguments[0].requires_grad_()
    loss = run_on(backend)(*arguments, **options, form="sum")
    (gradient,) = torch.autograd.grad(loss.sum(), arguments[0], create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        gradient.sum().backward()


def op_arguments(case: Case, backend: str, dtype: torch.dtype = torch.float32):
    """The arguments that `ops.contrastive.contrastive` hands to the op."""
    arguments, options = problem(case, dtype)
    arguments = [a.int() if torch.is_tensor(a) and not a.is_floating_point() else a for a in arguments]
    return arguments, options | {"form": "mean", "backend": backend}


@pytest.mark.parametrize("backend", [*BACKENDS, pytest.param("chunks", marks=needs("chunks"))])
@pytest.mark.parametrize(
    "case",
    [
        Case("columns", 3, 4, 5, own=2, codes=2, bias=True, self_column=True, strided=True),
        Case("shared", 4, None, 3, own=1, codes=1, match="ignore", groups=2, floor=1e-3),
        Case("queue", 3, 5, 4, own=1, columns_need_gradient=False),
    ],
    ids=str,
)
def test_opcheck(backend, case):
    torch.use_deterministic_algorithms(False)  # opcheck compares outputs with what fakes allocate
    arguments, options = op_arguments(case, backend)
    keep_mean = backend == "triton" and not case.columns_need_gradient
    for index in [0, 2] if keep_mean else [0, 1, 2]:
        if arguments[index] is not None:
            arguments[index].requires_grad_()
    torch.library.opcheck(torch.ops.bacon_fast.contrastive, arguments, options | {"keep_mean": keep_mean})
    arguments = [a.detach() if torch.is_tensor(a) else a for a in arguments]
    saved = torch.ops.bacon_fast.contrastive(*arguments, **options, keep_mean=keep_mean)[1:]
    options |= {"needs_rows": True, "needs_columns": not keep_mean, "needs_own": True}
    grad = upstream(case, torch.float32)
    torch.library.opcheck(torch.ops.bacon_fast.contrastive_backward, (grad, *saved, *arguments), options)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_to_one_graph(backend, dynamic):
    torch.use_deterministic_algorithms(False)
    case = Case("compiled", 12, None, 6, own=1, codes=1, self_column=True)
    arguments, options = problem(case, torch.float32)
    linear = torch.nn.Linear(case.dim, case.dim)

    def step(rows):
        return run_on(backend)(linear(rows), *arguments[1:], **options, form="mean").mean()

    step(arguments[0]).backward()
    expected = linear.weight.grad.clone()
    linear.zero_grad()
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    loss = compiled(arguments[0])
    loss.backward()
    torch.testing.assert_close(loss, step(arguments[0]))
    torch.testing.assert_close(linear.weight.grad, expected)


@needs("triton")
def test_one_pass_where_the_columns_need_no_gradient():
    """The forward keeps the mean of the negatives if and only if that serves the backward."""
    case = Case("queue", 5, 40, 6, own=1, codes=1, match="ignore")
    arguments, options = problem(case, torch.float32)

    def kept(arguments, **options):
        loss = contrastive(*arguments, **options, form="sum", backend="triton")
        if loss.grad_fn is None:
            return None
        return loss.grad_fn.saved_tensors[5].shape[0] if hasattr(loss.grad_fn, "saved_tensors") else loss.grad_fn

    arguments[0].requires_grad_()
    assert kept(arguments, **options) == 5
    assert kept(arguments, **(options | {"match": "positive"})) == 0
    assert kept([arguments[0], None, *arguments[2:4], None, *arguments[5:]], **options) == 0
    arguments[1].requires_grad_()
    assert kept(arguments, **options) == 0


def mutated(monkeypatch, kernel: str, **changes) -> None:
    """Changes arguments of one kernel's launches: a name to another argument's name, or to a function of the value."""
    for module in (contrastive_forward, contrastive_backward):
        launch = module.launch

        def changed(launched, grid, *arguments, launch=launch, **constants):
            if launched.__name__ == kernel:
                named = dict(zip(launched.arg_names, arguments)) | constants
                for name, change in changes.items():
                    value = named[change] if isinstance(change, str) else change(named[name])
                    if name in constants:
                        constants[name] = value
                    else:
                        index = launched.arg_names.index(name)
                        arguments = (*arguments[:index], value, *arguments[index + 1 :])
            launch(launched, grid, *arguments, **constants)

        monkeypatch.setattr(module, "launch", changed)


@needs("triton")
@pytest.mark.parametrize(
    "kernel, changes, message",
    [
        ("_statistics_kernel", {"num_columns": lambda n: n - 32}, "loss: error"),  # a block of columns is dropped
        ("_statistics_kernel", {"positive_scale": "negative_scale"}, "loss: error"),  # the wrong temperature
        ("_gradient_kernel", {"positive_scale": "negative_scale"}, "gradient: error"),
        ("_gradient_kernel", {"num_y": lambda n: n - 32}, "gradient: error"),
        ("_gradient_kernel", {"AS_COLUMN": lambda _: False}, "gradient: error"),  # the transposed sum is missing
        ("_finish_kernel", {"num_own": lambda n: n - 1}, "gradient: error"),  # an own column is dropped
    ],
)
def test_the_matrix_would_notice(monkeypatch, kernel, changes, message):
    case = Case("mutated", 70, None, 12, own=1, codes=1, self_column=True)
    assert_as_accurate_as_torch(run_on("triton"), case, "mean", torch.float32)
    mutated(monkeypatch, kernel, **changes)
    with pytest.raises(AssertionError, match=message):
        assert_as_accurate_as_torch(run_on("triton"), case, "mean", torch.float32)


@pytest.mark.parametrize("backend", BACKENDS)
def test_columns_of_another_dtype_are_refused(backend):
    arguments, options = problem(CASES[1], torch.float32)
    arguments[1] = arguments[1].half()
    with pytest.raises(TypeError, match=r"columns: expected dtype torch\.float32, that of rows, found torch\.float16"):
        run_on(backend)(*arguments, **options, form="sum")


@pytest.mark.parametrize("backend", BACKENDS)
def test_own_columns_of_another_dtype(backend):
    """Float32 centers beside half-precision rows, each with the gradient in its own dtype."""
    arguments, options = problem(CASES[1], torch.bfloat16)
    arguments[2] = problem(CASES[1], torch.float32)[0][2]
    grad = upstream(CASES[1], torch.bfloat16)
    loss, gradients = loss_and_gradients(run_on(backend), CASES[1], arguments, grad, **options, form="sum")
    expected, wanted = loss_and_gradients(reference.contrastive, CASES[1], arguments, grad, **options, form="sum")
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)
    assert gradients[0].dtype == torch.bfloat16 and gradients[2].dtype == torch.float32
    torch.testing.assert_close(gradients[2], wanted[2], rtol=1e-4, atol=1e-5)


@needs("triton")
def test_too_many_dimensions_for_triton_are_refused():
    reason = backends.BACKENDS["contrastive"]["triton"].why_not(torch.empty(1, MAX_DIM + 1))
    assert reason == f"it serves vectors of up to {MAX_DIM} elements, and these have {MAX_DIM + 1}"


@pytest.mark.parametrize("kernel", ["statistics", "mean", "gradient"])
@pytest.mark.parametrize("arch", [0, 80, 89, 90, 100, 120])
@pytest.mark.parametrize(
    "precision, dtype", [("tf32x3", torch.float32), ("tf32", torch.float32), ("tf32", torch.float16)]
)
def test_tile_configurations_are_pure_and_cover_the_problem(kernel, arch, precision, dtype):
    for dim in (1, 16, 17, 64, 100, 128, 129, 256, 300, MAX_DIM):
        for resident, streamed in ((1, 1), (0, 5), (192, 192), (192, 65536), (7168, 7168), (100_000, 3)):
            config = tile_config(kernel, resident, streamed, dim, dtype, precision, arch)
            assert max(config.block_resident, config.block_streamed) <= MAX_BLOCK  # what vectors are padded to
            assert config == tile_config(kernel, resident, streamed, dim, dtype, precision, arch)
            assert hash(config) is not None
            assert config.block_dim >= max(dim, 16) and config.block_dim % config.block_slice == 0
            for size in (config.block_resident, config.block_streamed, config.block_slice, config.block_dim):
                assert size >= 16 and size & (size - 1) == 0
            assert 1 <= config.splits <= max(1, -(-streamed // config.block_streamed))
