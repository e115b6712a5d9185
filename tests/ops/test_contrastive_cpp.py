"""The contrastive family in C++ against autograd of a plain loop over rows, and against the reference."""

import shutil
import subprocess
from pathlib import Path

import pytest
import torch

import bacon_fast.ops  # noqa: F401  registers torch.ops.bacon_fast
from bacon_fast import reference

native = torch.ops.bacon_fast
CSRC = Path(__file__).parents[2] / "csrc"
FORMS = ("mean", "sum", "prod")
TENSORS = (
    "rows",
    "columns",
    "own",
    "row_code",
    "column_code",
    "self_column",
    "positive_scale",
    "own_scale",
    "negative_scale",
    "negative_bias",
    "negative_offset",
    "group",
)


def loop_loss(rows, columns, own, row_code, column_code, self_column, positive_scale, own_scale, negative_scale,
              negative_bias, negative_offset, group, num_groups, *, form, match, floor, eps):  # fmt: skip
    """The definition, a row at a time, in sums of probabilities."""

    def unit(vector):
        return vector / vector.norm().clamp_min(eps)

    negatives, positives = [], []
    for r in range(rows.shape[0]):
        u = unit(rows[r])
        negative, positive = [], []
        if own is not None:
            for m in range(own.shape[1]):
                if not own_scale[r, m].isnan():
                    positive.append(own_scale[r, m] * (u @ unit(own[r, m])))
        for j in range(columns.shape[0]):
            if j == self_column[r]:
                continue
            similarity = u @ unit(columns[j])
            if row_code[r] not in column_code[j]:
                negative.append(negative_scale[r] * similarity + negative_bias[r])
            elif match == "positive":
                positive.append(positive_scale[r] * similarity)
        negatives.append(torch.stack(negative).exp().sum() if negative else None)
        positives.append(positive)
    losses = []
    for r in range(rows.shape[0]):
        members = [r] if group is None else [i for i in range(rows.shape[0]) if group[i] == group[r]]
        present = [negatives[i] for i in members if negatives[i] is not None]
        total = torch.stack(present).sum() * negative_offset[r].exp() if present else rows.new_zeros(())
        total = total + floor
        if not positives[r]:
            losses.append(rows.new_zeros(()))
            continue
        x = torch.stack(positives[r])
        if form == "mean":
            losses.append((x.exp().sum() + total).log() - x.mean())
        elif form == "sum":
            losses.append((1 + total / x.exp().sum()).log())
        else:
            losses.append((1 + total * (-x).exp().sum()).log())
    return torch.stack(losses) if losses else rows.new_zeros(0)


def make_problem(num_rows, num_columns, dim, *, num_own=1, num_codes=1, grouped=False, form="sum", match="positive",
                 num_classes=4, scale=6.0, floor=0.0, seed=0, dtype=torch.float64,
                 shared=False):  # fmt: skip
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape):
        return torch.randn(*shape, generator=generator, dtype=dtype)

    def rand(*shape):
        return torch.rand(*shape, generator=generator, dtype=dtype)

    def integers(low, high, *shape):
        return torch.randint(low, high, shape, generator=generator, dtype=torch.int32)

    columns = randn(num_columns, dim)
    own_scale = scale * rand(num_rows, num_own)
    if num_own > 1:
        own_scale[:, 1] = 0  # of weight 0: logit 0, still a positive
        own_scale[::2, -1] = float("nan")  # absent
    problem = {
        "rows": columns if shared else randn(num_rows, dim) * 2,
        "columns": columns,
        "own": randn(num_rows, num_own, dim) if num_own else None,
        "row_code": integers(0, num_classes, num_rows),
        "column_code": integers(-1, num_classes, num_columns, num_codes),
        "self_column": integers(-1, max(num_columns, 1), num_rows),
        "positive_scale": scale * (0.5 + rand(num_rows)),
        "own_scale": own_scale if num_own else None,
        "negative_scale": scale * (0.5 + rand(num_rows)),
        "negative_bias": randn(num_rows),
        "negative_offset": randn(num_rows),
        "group": integers(0, 3, num_rows) if grouped else None,
    }
    options = {"form": form, "match": match, "floor": floor, "eps": 1e-8}
    return problem, 3 if grouped else num_rows, options


def run(problem, num_groups, options, upstream=None, needs=(True, True, True)):
    arguments = [problem[name] for name in TENSORS]
    row_loss, stats = native.contrastive_cpp(*arguments, num_groups, **options)
    if upstream is None:
        return row_loss
    keywords = dict(zip(("needs_rows", "needs_columns", "needs_own"), needs))
    return row_loss, native.contrastive_backward_cpp(upstream, stats, *arguments, num_groups, **options, **keywords)


def oracle(function, problem, num_groups, options, upstream):
    """Losses and gradients of rows, columns and own by autograd in float64."""
    problem = {k: v.double() if v is not None and v.is_floating_point() else v for k, v in problem.items()}
    leaves = {
        name: problem[name].detach().clone().requires_grad_()
        for name in ("rows", "columns", "own")
        if problem[name] is not None
    }
    arguments = [leaves.get(name, problem[name]) for name in TENSORS]
    row_loss = function(*arguments, num_groups, **options)
    total = (row_loss * upstream.double()).sum() + sum(leaf.sum() for leaf in leaves.values()) * 0
    gradients = torch.autograd.grad(total, leaves.values())
    return row_loss.detach(), gradients


def upstream_of(problem):
    """Signed weights, some of them 0."""
    weights = torch.linspace(-1, 2, problem["rows"].shape[0], dtype=problem["rows"].dtype)
    weights[2::5] = 0
    return weights


def assert_matches(function, problem, num_groups, options, *, tolerance=1e-11):
    upstream = upstream_of(problem)
    expected, expected_gradients = oracle(function, problem, num_groups, options, upstream)
    row_loss, gradients = run(problem, num_groups, options, upstream)
    torch.testing.assert_close(row_loss.double(), expected, rtol=tolerance, atol=tolerance)
    for gradient, expected_gradient in zip(gradients, expected_gradients):
        scale = max(1.0, expected_gradient.abs().max().item()) if expected_gradient.numel() else 1.0
        torch.testing.assert_close(gradient.double(), expected_gradient, rtol=0, atol=tolerance * scale)


CASES = {
    "one": {"num_rows": 1, "num_columns": 1, "dim": 1},
    "odd": {"num_rows": 9, "num_columns": 33, "dim": 7, "num_codes": 3},
    "no own": {"num_rows": 17, "num_columns": 20, "dim": 5, "num_own": 0},
    "many own": {"num_rows": 8, "num_columns": 10, "dim": 16, "num_own": 4},
    "grouped": {"num_rows": 12, "num_columns": 12, "dim": 6, "grouped": True, "floor": 1e-3, "num_codes": 2},
    "one class": {"num_rows": 6, "num_columns": 6, "dim": 6, "num_classes": 1, "floor": 0.5},
    "no columns": {"num_rows": 5, "num_columns": 0, "dim": 6},
    "no rows": {"num_rows": 0, "num_columns": 7, "dim": 6},
    "far apart": {"num_rows": 10, "num_columns": 40, "dim": 3, "scale": 150.0, "grouped": True},
}


@pytest.mark.parametrize("match", ["positive", "ignore"])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_matches_a_loop(case, form, match):
    assert_matches(loop_loss, *make_problem(**case, form=form, match=match))


@pytest.mark.parametrize("dim", [32, 130])
@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize("match", ["positive", "ignore"])
@pytest.mark.parametrize("form", FORMS)
def test_several_tiles_match_the_reference(form, match, grouped, dim):
    problem = make_problem(
        150, 700, dim, num_own=2, num_codes=2, grouped=grouped, floor=1e-4, form=form, match=match, num_classes=9
    )
    assert_matches(reference.contrastive, *problem)


@pytest.mark.parametrize("scale", [6.0, 80.0])
def test_without_a_table_of_weights(scale):
    """Above 2^21 pairs rows and columns compute their similarities each for themselves."""
    problem = make_problem(700, 3100, 12, num_own=0, form="mean", scale=scale, num_classes=30)
    assert_matches(reference.contrastive, *problem)


class TestQueue:
    """Few rows against many columns without gradient: cut into chunks, and read where they are if they allow it."""

    def problem(self, **changes):
        problem, num_groups, options = make_problem(
            **{"num_rows": 40, "num_columns": 8200, "dim": 128, "form": "prod", "match": "ignore", "num_own": 2}
            | changes
        )
        return problem, num_groups, options

    def assert_matches(self, problem, num_groups, options):
        upstream = upstream_of(problem)
        expected, (expected_rows, _, expected_own) = oracle(
            reference.contrastive, problem, num_groups, options, upstream
        )
        row_loss, (rows, columns, own) = run(problem, num_groups, options, upstream, needs=(True, False, True))
        assert columns.numel() == 0
        torch.testing.assert_close(row_loss, expected, rtol=1e-11, atol=0)
        torch.testing.assert_close(rows, expected_rows, rtol=0, atol=1e-11)
        torch.testing.assert_close(own, expected_own, rtol=0, atol=1e-11)

    @pytest.mark.parametrize("scale", [6.0, 80.0])
    @pytest.mark.parametrize("match", ["positive", "ignore"])
    def test_read_where_they_are(self, match, scale):
        self.assert_matches(*self.problem(match=match, scale=scale))

    @pytest.mark.parametrize("scale", [6.0, 80.0])
    @pytest.mark.parametrize("shape", [{"dim": 130}, {"num_columns": 8203}], ids=str)
    def test_copied(self, shape, scale):
        self.assert_matches(*self.problem(**shape, scale=scale))

    def test_copied_because_of_a_column_that_is_not_finite(self):
        problem, num_groups, options = self.problem(num_classes=1)
        problem["column_code"][5000] = 0  # every row ignores it
        upstream = upstream_of(problem)
        needs = (True, False, True)
        expected, expected_gradients = run(problem, num_groups, options, upstream, needs)
        problem["columns"][5000, 7] = float("inf")
        row_loss, gradients = run(problem, num_groups, options, upstream, needs)
        torch.testing.assert_close(row_loss, expected, rtol=1e-12, atol=0)
        for gradient, expected_gradient in zip(gradients, expected_gradients):
            torch.testing.assert_close(gradient, expected_gradient, rtol=0, atol=1e-12)

    def test_result_does_not_depend_on_the_number_of_threads(self):
        problem, num_groups, options = self.problem(dtype=torch.float32)
        upstream = upstream_of(problem)
        threads = torch.get_num_threads()
        results = []
        try:
            for count in (1, 2, 3):
                torch.set_num_threads(count)
                row_loss, gradients = run(problem, num_groups, options, upstream, needs=(True, False, True))
                results.append((row_loss, *gradients))
        finally:
            torch.set_num_threads(threads)
        for result in results[1:]:
            assert all(torch.equal(a, b) for a, b in zip(result, results[0]))


@pytest.mark.parametrize("form", FORMS)
def test_float32_is_as_good_as_its_inputs(form):
    problem, num_groups, options = make_problem(70, 300, 48, form=form, dtype=torch.float32, num_own=2)
    row_loss, gradients = run(problem, num_groups, options, upstream_of(problem))
    assert all(t.dtype == torch.float32 for t in (row_loss, *gradients))
    assert_matches(reference.contrastive, problem, num_groups, options, tolerance=3e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(dtype):
    problem, num_groups, options = make_problem(20, 50, 24, num_own=2, dtype=torch.float32)
    for name in ("rows", "columns", "own"):
        problem[name] = problem[name].to(dtype)
    widened = problem | {name: problem[name].float() for name in ("rows", "columns", "own")}
    upstream = upstream_of(widened)
    row_loss, gradients = run(problem, num_groups, options, upstream)
    expected, expected_gradients = run(widened, num_groups, options, upstream)
    assert row_loss.dtype == torch.float32
    assert torch.equal(row_loss, expected)
    for gradient, expected_gradient in zip(gradients, expected_gradients):
        assert gradient.dtype == dtype
        assert torch.equal(gradient, expected_gradient.to(dtype))


def test_strides_do_not_matter():
    problem, num_groups, options = make_problem(11, 40, 9, num_own=3, num_codes=2, grouped=True)
    spread = {name: None if t is None else torch.stack([t, t + 1], dim=-1)[..., 0] for name, t in problem.items()}
    upstream = upstream_of(problem)
    row_loss, gradients = run(spread, num_groups, options, torch.stack([upstream, upstream], dim=1)[:, 0])
    expected, expected_gradients = run(problem, num_groups, options, upstream)
    assert torch.equal(row_loss, expected)
    assert all(torch.equal(a, b) for a, b in zip(gradients, expected_gradients))


def test_result_does_not_depend_on_the_number_of_threads():
    problem, num_groups, options = make_problem(
        900, 1300, 40, num_own=1, grouped=True, form="mean", dtype=torch.float32, floor=1e-3
    )
    upstream = upstream_of(problem)
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            row_loss, gradients = run(problem, num_groups, options, upstream)
            results.append((row_loss, *gradients))
    finally:
        torch.set_num_threads(threads)
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(result, results[0]))


def test_gradients_that_are_not_needed_are_empty():
    problem, num_groups, options = make_problem(12, 20, 8, num_own=2)
    upstream = upstream_of(problem)
    _, every = run(problem, num_groups, options, upstream)
    for index in range(3):
        _, gradients = run(problem, num_groups, options, upstream, needs=[i == index for i in range(3)])
        assert torch.equal(gradients[index], every[index])
        assert all(gradient.numel() == 0 for i, gradient in enumerate(gradients) if i != index)


@pytest.mark.parametrize("scale", [6.0, 80.0])
@pytest.mark.parametrize("form", FORMS)
class TestNotFinite:
    def broken(self, problem, name, index, value):
        copy = problem[name].clone()
        copy[index] = value
        return problem | {name: copy}

    @pytest.mark.parametrize("value", [float("nan"), float("inf")])
    def test_column_that_every_row_ignores(self, form, scale, value):
        problem, num_groups, options = make_problem(12, 20, 8, form=form, match="ignore", scale=scale, num_classes=3)
        problem["column_code"] = torch.randint(0, 3, (20, 3), dtype=torch.int32)
        problem["column_code"][5] = torch.tensor([0, 1, 2])
        upstream = upstream_of(problem)
        expected, expected_gradients = run(problem, num_groups, options, upstream)
        row_loss, gradients = run(self.broken(problem, "columns", 5, value), num_groups, options, upstream)
        assert torch.equal(row_loss, expected)
        assert torch.equal(gradients[0], expected_gradients[0])
        assert torch.equal(gradients[1], expected_gradients[1])

    def test_row_without_upstream_gradient(self, form, scale):
        problem, num_groups, options = make_problem(12, 20, 8, form=form, scale=scale)
        upstream = upstream_of(problem)
        upstream[4] = 0
        expected, expected_gradients = run(problem, num_groups, options, upstream)
        row_loss, gradients = run(self.broken(problem, "rows", 4, float("nan")), num_groups, options, upstream)
        assert row_loss[4].isnan()
        row_loss[4] = expected[4]
        assert torch.equal(row_loss, expected)
        assert all(torch.equal(a, b) for a, b in zip(gradients, expected_gradients))

    @pytest.mark.parametrize("name", ["rows", "own"])
    def test_shows_in_its_group_only(self, form, scale, name):
        problem, num_groups, options = make_problem(12, 20, 8, form=form, scale=scale, grouped=True)
        upstream = upstream_of(problem).abs() + 0.5
        expected, _ = run(problem, num_groups, options, upstream)
        row_loss, gradients = run(self.broken(problem, name, 4, float("nan")), num_groups, options, upstream)
        members = problem["group"] == problem["group"][4]
        assert row_loss[members].isnan().all()
        assert torch.equal(row_loss[~members], expected[~members])
        assert gradients[0][members].isnan().all()
        assert gradients[0][~members].isfinite().all()
        assert gradients[1].isfinite().all()

    def test_absent_own_column(self, form, scale):
        problem, num_groups, options = make_problem(12, 20, 8, form=form, scale=scale, num_own=3)
        upstream = upstream_of(problem)
        expected, expected_gradients = run(problem, num_groups, options, upstream)
        assert problem["own_scale"][0, 2].isnan()
        row_loss, gradients = run(self.broken(problem, "own", (0, 2), float("nan")), num_groups, options, upstream)
        assert torch.equal(row_loss, expected)
        assert all(torch.equal(a, b) for a, b in zip(gradients, expected_gradients))


def test_zero_vectors_have_finite_gradients():
    problem, num_groups, options = make_problem(6, 9, 8, num_own=2)
    problem["rows"][1] = 0
    problem["columns"][2] = 0
    problem["own"][3, 0] = 0
    assert_matches(loop_loss, problem, num_groups, options | {"eps": 0.5})
    _, gradients = run(problem, num_groups, options, upstream_of(problem))
    assert all(gradient.isfinite().all() for gradient in gradients)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"columns": torch.zeros(20, 9)}, r"columns: expected shape \[C, 8\], found \[20, 9\]"),
        ({"own": torch.zeros(12, 2, 9)}, r"own: expected shape \[12, M, 8\]"),
        ({"own_scale": torch.zeros(12, 3)}, r"own_scale: expected shape \[12, 2\]"),
        ({"column_code": torch.zeros(19, 1)}, r"column_code: expected shape \[20, T\], found \[19, 1\]"),
        ({"negative_bias": torch.zeros(5)}, r"negative_bias: expected shape \[12\], found \[5\]"),
        ({"group": torch.full((12,), 12)}, r"group: expected values in 0\.\.11, found 12 in row 0"),
        ({"form": "max"}, 'form: expected "mean", "sum" or "prod", found "max"'),
        ({"match": "all"}, 'match: expected "positive" or "ignore", found "all"'),
    ],
)
def test_bad_arguments_are_refused(changes, message):
    problem, num_groups, options = make_problem(12, 20, 8, num_own=2)
    for name, value in changes.items():
        (problem if name in problem else options)[name] = value
    with pytest.raises(ValueError, match=message):
        run(problem, num_groups, options)


EXPONENTIAL = r"""
#include <cmath>
#include <cstdio>
#include <cstdint>
#include <cstring>
#include <initializer_list>
#include <limits>
#include <new>
%s
#include "contrastive/simd.h"
using namespace bacon_fast::contrastive;
int main() {
  constexpr int lanes = kLanes<float>;
  float x[lanes], y[lanes];
  double worst = 0;
  for (std::uint64_t first = 0; first < (1ull << 32); first += 61 * lanes) {
    for (int i = 0; i < lanes; ++i) {
      const std::uint32_t bits = std::uint32_t(first + i);
      std::memcpy(x + i, &bits, 4);
    }
    if (!(x[0] > -87.33f && x[0] < 88)) continue;
    store(y, exponential(load<Vector<float>>(x)));
    for (int i = 0; i < lanes; ++i) {
      const double exact = std::exp(double(x[i]));
      const double ulp = double(std::nextafter(float(exact), INFINITY)) - float(exact);
      const double error = std::abs(y[i] - exact) / ulp;
      if (!(error <= worst)) worst = error;
    }
  }
  std::printf("%%g", worst);
  for (float special : {-88.0f, -1e30f, -INFINITY, 0.0f, NAN}) {
    for (float& value : x) value = special;
    store(y, exponential(load<Vector<float>>(x)));
    std::printf(" %%g", y[0]);
  }
}
"""
AVX2 = '#pragma GCC target("avx2,fma")\n#define BACON_FAST_VECTOR_BYTES 32'
BASE = "#define BACON_FAST_VECTOR_BYTES 16"


@pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler")
@pytest.mark.parametrize("target", [BASE, AVX2], ids=["base", "avx2"])
def test_exponential_is_within_two_units_in_the_last_place(target, tmp_path):
    """One in sixty-one of all floats from -87.3 to 88, and some outside."""
    if target is AVX2 and torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"):
        pytest.skip("this CPU has no AVX2")
    source, program = tmp_path / "exponential.cpp", tmp_path / "exponential"
    source.write_text(EXPONENTIAL % target)
    command = ["c++", "-O2", "-std=c++20", f"-I{CSRC}", "-o", str(program), str(source)]
    subprocess.run(command, check=True, capture_output=True)
    worst, *special = subprocess.run([program], check=True, capture_output=True, text=True).stdout.split()
    assert 0.5 <= float(worst) <= 2
    assert special == ["0", "0", "0", "1", "nan"]
