"""BatchNorm in one launch on a GPU, run on a CPU: blocks, barriers and shared memory, against torch in float64."""

import ctypes
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

ROOT = Path(__file__).resolve().parents[2]
SOURCE = Path(__file__).with_name("batch_norm_blocks.cpp")
HEADERS = Path(torch.__file__).parent / "include"
BITS = {torch.float64: 64, torch.float32: 32, torch.bfloat16: 16, torch.float16: 15}
MOMENTUM, EPS, SLOPE = 0.3, 1e-3, 0.1
MACHINE = {"multiprocessors": 4, "shared_limit": 60_000, "resident_blocks": 4}
NOT_AT_ONCE = {"resident_blocks": 0}

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")


class Call(ctypes.Structure):
    _fields_ = [(name, ctypes.c_int64) for name in ("rows", "channels", *MACHINE)]
    _fields_ += [(name, ctypes.c_double) for name in ("momentum", "eps", "slope")]
    _fields_ += [
        (name, ctypes.c_void_p)
        for name in (
            "x", "residual", "sum", "activated", "weight", "bias", "mean", "inverse", "running_mean", "running_var",
            "num_batches_tracked", "gradient", "more", "result", "grad_weight", "grad_bias",
        )
    ]  # fmt: skip


class Plan(ctypes.Structure):
    _fields_ = [(name, ctypes.c_int64) for name in ("rows", "channels", "rows_per_split")]
    _fields_ += [(name, ctypes.c_int) for name in ("splits", "channel_blocks", "block_channels", "groups")]
    _fields_ += [("held", ctypes.c_int * 2), ("shared_bytes", ctypes.c_int64), ("is_one_launch", ctypes.c_bool)]


def build(target: Path, csrc: Path, *options: str) -> Path:
    command = ["g++", "-std=c++20", "-O1", "-g", "-pthread", "-Wno-subobject-linkage", f"-I{csrc}", f"-I{HEADERS}"]
    result = subprocess.run([*command, *options, str(SOURCE), "-o", str(target)], capture_output=True, text=True)
    if result.returncode and "libtsan" in result.stderr:
        pytest.skip("this compiler has no ThreadSanitizer")
    assert result.returncode == 0, result.stderr[-3000:]
    return target


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    return ctypes.CDLL(str(build(tmp_path_factory.mktemp("blocks") / "blocks.so", ROOT / "csrc", "-shared", "-fPIC")))


def problem(rows, channels, dtype, residual=True, more=True, mean=2.0):
    """Arguments of a call, its images as [rows, channels]; channels differ in mean and spread."""
    g = torch.Generator().manual_seed(rows + channels)

    def normal(*shape):
        return torch.randn(shape, generator=g, dtype=torch.float64)

    wide = torch.promote_types(dtype, torch.float32)
    spread, center = normal(channels).exp(), mean * normal(channels)
    given = {
        "x": (center + spread * normal(rows, channels)).to(dtype),
        "residual": (spread * normal(rows, channels)).to(dtype) if residual else None,
        "weight": normal(channels).to(wide),
        "bias": normal(channels).to(wide),
        "running_mean": normal(channels).to(wide),
        "running_var": normal(channels).exp().to(wide),
        "num_batches_tracked": torch.tensor(6),
        "gradient": normal(rows, channels).to(dtype),
        "more": normal(rows, channels).to(dtype) if more else None,
    }
    total = given["x"] if given["residual"] is None else given["x"] + given["residual"]
    z = F.batch_norm(total.double(), None, None, given["weight"].double(), given["bias"].double(), True, 0.0, EPS)
    given["gradient"].masked_fill_(z.abs() < 1e-2, 0)  # next to the kink rounding chooses the side
    return given


def expected_of(given):
    """By torch's BatchNorm, LeakyReLU and autograd in float64, of the sum as the dtype rounds it."""
    total = given["x"] if given["residual"] is None else given["x"] + given["residual"]
    leaves = [tensor.double().requires_grad_() for tensor in (total, given["weight"], given["bias"])]
    running = [given[name].double() for name in ("running_mean", "running_var")]
    activated = F.leaky_relu(F.batch_norm(leaves[0], *running, *leaves[1:], True, MOMENTUM, EPS), SLOPE)
    loss = (activated * given["gradient"].double()).sum()
    if given["more"] is not None:
        loss = loss + (leaves[0] * given["more"].double()).sum()
    gradients = torch.autograd.grad(loss, leaves)
    values = {"sum": total, "activated": activated, "running_mean": running[0], "running_var": running[1]}
    values |= dict(zip(("result", "grad_weight", "grad_bias"), gradients))
    return {name: value.detach().double() for name, value in values.items()}


def found_of(library, given, machine=None):
    """The same from the blocks, and the plans of the two ways."""
    rows, channels = given["x"].shape
    nothing = given["x"].new_full((rows, channels), float("nan"))
    empty = given["weight"].new_full((channels,), float("nan"))
    tensors = {name: None if tensor is None else tensor.clone() for name, tensor in given.items()}
    tensors |= {name: nothing.clone() for name in ("sum", "activated", "result")}
    tensors |= {name: empty.clone() for name in ("mean", "inverse", "grad_weight", "grad_bias")}
    call = Call(rows=rows, channels=channels, momentum=MOMENTUM, eps=EPS, slope=SLOPE, **(MACHINE | (machine or {})))
    for name, tensor in tensors.items():
        setattr(call, name, None if tensor is None else tensor.data_ptr())
    plans = (Plan * 2)()
    library.run(BITS[given["x"].dtype], ctypes.byref(call), plans)
    if given["residual"] is None:
        tensors["sum"] = tensors["x"]
    return tensors, plans


def assert_close(found, expected, dtype):
    unit = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}[dtype]
    for name, value in expected.items():
        # Images are rounded to their dtype; vectors are of float32 at least.
        allowed = unit if found[name].dtype == dtype else 2e-6
        error = (found[name].double() - value).abs().amax() / value.abs().amax().clamp(min=1)
        assert error <= allowed, f"{name}: {error:.1e}, allowed {allowed:.1e}"


SHAPES = {
    (2, 8): (1, 1),  # rows, channels: splits, blocks of channels
    (3, 4): (1, 1),
    (97, 32): (4, 1),
    (150, 24): (4, 1),
    (333, 16): (4, 1),
    (65, 40): (2, 2),
    (700, 64): (2, 2),
}


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_torch(library, shape, residual):
    given = problem(*shape, torch.float32, residual)
    found, plans = found_of(library, given)
    assert_close(found, expected_of(given), torch.float32)
    assert found["num_batches_tracked"] == 7
    for plan in plans:
        assert plan.is_one_launch and (plan.splits, plan.channel_blocks) == SHAPES[shape]


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("more", [False, True])
def test_other_dtypes(library, more, dtype):
    for shape in ((90, 16), (333, 48)):
        given = problem(*shape, dtype, more=more)
        found, plans = found_of(library, given)
        assert_close(found, expected_of(given), dtype)
        assert all(plan.is_one_launch for plan in plans)


def test_a_last_block_of_one_row(library):
    given = problem(82, 32, torch.float32)
    found, plans = found_of(library, given, {"multiprocessors": 10, "resident_blocks": 10})
    assert plans[0].splits == 10 and plans[0].rows_per_split == 9  # nine times nine, and one
    assert_close(found, expected_of(given), torch.float32)


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_does_not_fit_is_read_again_with_the_same_result(library, dtype, residual):
    given = problem(513, 32, dtype, residual)
    whole, plans = found_of(library, given)
    own = -(-plans[0].rows_per_split // plans[0].groups)
    assert list(plans[0].held) == [own, 0] and list(plans[1].held) == [own, own]
    assert_close(whole, expected_of(given), dtype)
    room = plans[0].shared_bytes - 1024 * own
    limits = [{"shared_limit": room + 1024 * rows} for rows in (own + 2, 3, 0)]
    held = [(own, 0), (own, 2)], [(3, 0), (3, 0)], [(0, 0), (0, 0)], [(0, 0), (0, 0)]
    for limit, counts in zip((*limits, NOT_AT_ONCE), held):
        found, plans = found_of(library, given, limit)
        assert [tuple(plan.held) for plan in plans] == counts
        assert all(plan.is_one_launch for plan in plans) == (limit is not NOT_AT_ONCE)
        for name, tensor in whole.items():
            assert tensor is None or torch.equal(found[name], tensor), name


def test_more_blocks_of_channels_than_multiprocessors_are_two_launches(library):
    given = problem(40, 96, torch.float32)
    found, plans = found_of(library, given, {"multiprocessors": 2, "resident_blocks": 100})
    assert not plans[0].is_one_launch and (plans[0].splits, plans[0].channel_blocks) == (1, 3)
    assert_close(found, expected_of(given), torch.float32)


@pytest.mark.parametrize("at_once", [True, False])
def test_little_shared_memory_means_fewer_splits(library, at_once):
    """In float64 the partial sums of 40 splits are 20,480 bytes."""
    given = problem(2000, 48, torch.float64)
    many = {"multiprocessors": 80, "resident_blocks": 80 if at_once else 0}
    for limit, splits in ((60_000, 40), (20_000, 35), (12_000, 19)):
        found, plans = found_of(library, given, many | {"shared_limit": limit})
        assert_close(found, expected_of(given), torch.float64)
        for plan in plans:
            assert plan.is_one_launch == at_once and plan.splits == splits and plan.shared_bytes <= limit


def test_far_from_zero_with_an_outlier_in_row_0(library):
    """Deviations from that one value alone would lose the variance of the others to rounding."""
    given = problem(400, 8, torch.float32, residual=False, mean=1e3)
    given["x"][:, 0] = 1234.567
    given["x"][0, 1] = 3e4
    expected, (found, _) = expected_of(given), found_of(library, given)
    mean, deviation = given["x"].double().mean(0), given["x"].double().std(0)
    rounded = torch.finfo(torch.float32).eps * mean.abs() / (deviation**2 + EPS).sqrt()  # what rounding the mean costs
    allowed = 3e-6 + rounded * given["weight"].abs()
    assert ((found["activated"].double() - expected["activated"]).abs() <= allowed).all()
    allowed = 3e-6 + 3e-6 * deviation**2
    assert ((found["running_var"].double() - expected["running_var"]).abs() <= allowed).all()


def test_statistics_need_not_be_given(library):
    given = problem(97, 32, torch.float32) | dict.fromkeys(("running_mean", "running_var", "num_batches_tracked"))
    whole, _ = found_of(library, problem(97, 32, torch.float32))
    found, _ = found_of(library, given)
    assert torch.equal(found["activated"], whole["activated"]) and torch.equal(found["result"], whole["result"])


def test_not_a_number_stays_in_its_channel(library):
    given = problem(97, 8, torch.float32)
    expected = expected_of(given)
    given["x"][50, 2] = float("nan")
    found, _ = found_of(library, given)
    others = [0, 1, 3, 4, 5, 6, 7]
    for name in ("activated", "result"):
        assert found[name][:, 2].isnan().all()
        torch.testing.assert_close(found[name][:, others].double(), expected[name][:, others], rtol=1e-5, atol=1e-5)


H200 = {"threads": 512, "multiprocessors": 132, "shared_limit": 227 * 1024}


@pytest.mark.parametrize(
    "pixels, channels, held",
    [(32 * 32, 16, (10, 10)), (32 * 32, 32, (20, 3)), (16 * 16, 64, (10, 10)), (8 * 8, 128, (5, 5))],
)
def test_every_layer_of_wrn_28_2_fits_an_h200(library, pixels, channels, held):
    """320 images in bfloat16: what is normalized stays in shared memory, of the gradient what there is room for."""
    plans = {}
    for tensors in (1, 2):
        plan = plans[tensors] = Plan()
        library.plan_for(*map(ctypes.c_int64, (320 * pixels, channels, 2)), tensors, H200["threads"],
                         H200["multiprocessors"], ctypes.c_int64(H200["shared_limit"]), ctypes.byref(plan))  # fmt: skip
        assert plan.splits * plan.channel_blocks <= 132 < (plan.splits + 2) * plan.channel_blocks
        assert (plan.splits - 1) * plan.rows_per_split < 320 * pixels <= plan.splits * plan.rows_per_split
        assert plan.shared_bytes <= H200["shared_limit"]
        assert plan.held[0] * plan.groups >= plan.rows_per_split
    assert tuple(plans[2].held) == held


def test_no_thread_reads_what_another_still_writes(tmp_path):
    """Under ThreadSanitizer; and the detector works: without a barrier, of all blocks or of one, there is a race."""
    csrc = tmp_path / "csrc"
    shutil.copytree(ROOT / "csrc" / "batch_norm", csrc / "batch_norm")
    block = csrc / "batch_norm" / "block.h"
    source = block.read_text()
    for missing in (None, "if (phases == kBoth) block.grid_sync();", "    block_.sync();  // all have read"):
        if missing is not None:
            assert source.count(missing) >= 1
        block.write_text(source if missing is None else source.replace(missing, "    //"))
        binary = build(tmp_path / "blocks", csrc, "-fsanitize=thread")
        result = subprocess.run([str(binary)], capture_output=True, text=True, timeout=300)
        if "unexpected memory mapping" in result.stderr:
            pytest.skip("ThreadSanitizer cannot run in this address space")
        assert ("data race" in result.stderr) == (missing is not None), result.stderr[:3000]
        assert missing is not None or result.stdout.strip() == "done"


KERNELS = """
#include "batch_norm/kernels.cuh"
namespace bacon_fast::norm {
#define BOTH(S) \\
  template __global__ void forward_kernel<S>(const __grid_constant__ Plan, const __grid_constant__ Forward<S>, int); \\
  template __global__ void backward_kernel<S>(const __grid_constant__ Plan, const __grid_constant__ Backward<S>, int);
BOTH(float) BOTH(double) BOTH(c10::Half) BOTH(c10::BFloat16)
}
"""


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc")
@pytest.mark.parametrize("arch", [80, 90, 100, 120])
def test_a_block_of_a_multiprocessor_has_room_and_nothing_spills(tmp_path, arch):
    """512 threads of at most 128 registers are the 65,536 of a multiprocessor: one block is always resident."""
    (tmp_path / "kernels.cu").write_text(KERNELS)
    command = ["nvcc", "-std=c++20", "-O3", "--expt-relaxed-constexpr", f"-arch=sm_{arch}", "-cubin", "-Xptxas", "-v"]
    command += [f"-I{ROOT / 'csrc'}", f"-I{HEADERS}", "kernels.cu", "-o", "kernels.cubin"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    report = done.stdout + done.stderr
    memory = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", report)
    registers = [int(number) for number in re.findall(r"Used (\d+) registers", report)]
    assert memory == [("0", "0", "0")] * 8 and len(registers) == 8
    assert max(registers) * H200["threads"] <= 65_536
