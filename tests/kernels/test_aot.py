"""Ahead-of-time compilation: every launch of the launchers compiles and fits, for GPUs that are not here."""

import os
import subprocess
import sys

import pytest
import torch

from bacon_fast.kernels import aot, config, launch


@pytest.mark.parametrize("arch", ["80", "90", "100", "120"])
def test_a_subset_compiles_and_fits(arch):
    """`make aot` compiles all. In a process of its own: the kernels of the interpreter, used here, do not compile."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    subject = {
        "80": "ssc-1060x64-float16",
        "90": "infonce-4096x65536x128-bfloat16",
        "100": "infonce-4096x65536x128-float32",  # whose one pass needs the most shared memory
        "120": "ssc-1060x64-float32",  # which spilled with four warps
    }[arch]
    command = [sys.executable, "-m", "bacon_fast.kernels.aot", "--arch", arch, "--only", subject]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    lines = result.stdout.splitlines()
    assert "all fit: nothing spills" in lines[-1]
    assert any(line.startswith("statistics_kernel") and f" {arch} " in line for line in lines)


def test_bacons_step_is_four_launches_that_fit():
    launches = aot.record(lambda: aot.step(90, 192, 32, 10, torch.float32, "tf32x3"))
    names = ["_rank_kernel", "_compare_kernel", "_groups_kernel", "_gradient_kernel"]
    assert [item.kernel.__name__ for item in launches] == names
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "bacon_fast.kernels.aot", "--arch", "90"]
    command += ["--only", "bacon-step-phases-192x32x10-bfloat16"]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    assert len(result.stdout.splitlines()) == 1 + 4 + 1


@pytest.mark.parametrize("subject", ["infonce-192x65536x128-float32-tf32", "bacon-1024x64-bfloat16"])
def test_large_products_are_those_of_warp_groups(subject):
    """Counted in the machine code of a Hopper GPU, of which the last two numbers of a line are HGMMA and HMMA."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "bacon_fast.kernels.aot", "--arch", "90", "--only", subject]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    lines = [line.split() for line in result.stdout.splitlines() if line.startswith(("statistics", "gradient"))]
    assert len(lines) == (1 if subject.startswith("infonce") else 2)  # a queue is passed once
    for line in lines:
        assert int(line[-3]) > 0 and line[-2] == "0"


def test_large_products_without_warp_groups_are_refused():
    statistics = next(
        item
        for item in aot.record(lambda: aot.contrastive(90, 1024, 64, torch.bfloat16, codes=1))
        if item.kernel.__name__ == "_statistics_kernel"
    )
    slow = aot.Usage(registers=128, local=0, shared=0, hgmma=0, hmma=64)
    assert aot.lacks_hgmma(["ssc-4096x128-bfloat16"], statistics, 90, slow)
    assert aot.lacks_hgmma(["supcon-1024x512-bfloat16", "bacon-3584x64-float32"], statistics, 90, slow)
    assert not aot.lacks_hgmma(["ssc-4096x128-bfloat16"], statistics, 90, slow._replace(hgmma=8))
    assert not aot.lacks_hgmma(["ssc-4096x128-bfloat16"], statistics, 80, slow)
    assert not aot.lacks_hgmma(["bacon-192x32-bfloat16", "supcon-1024x512-bfloat16"], statistics, 90, slow)


def test_what_does_not_fit_is_refused():
    assert aot.Usage(registers=255, local=0, shared=99 * 1024).fits(120)
    assert not aot.Usage(registers=255, local=8, shared=0).fits(90)
    assert not aot.Usage(registers=32, local=0, shared=100 * 1024).fits(120)
    assert aot.Usage(registers=32, local=0, shared=100 * 1024).fits(80)


def test_launches_are_recorded_and_not_run():
    """Every subject records its kernels with the launcher's own configuration; equal launches once."""
    launches = aot.record(lambda: aot.contrastive(90, 4096, 128, torch.float16, columns=65536, own=1, detached=True))
    names = [item.kernel.__name__ for item in launches]
    assert names.count("_statistics_kernel") == 1 and "_gradient_kernel" not in names  # one pass over the queue
    statistics = launches[names.index("_statistics_kernel")]
    tiles = config.tile_config("mean", 4096, 65536, 128, torch.float16, "tf32x3", 90)
    constants = dict(statistics.constants)
    assert (constants["BLOCK_R"], constants["BLOCK_C"]) == (tiles.block_resident, tiles.block_streamed)
    assert statistics.num_warps == tiles.num_warps
    assert dict(statistics.signature)["rows"] == "*fp16" and dict(statistics.signature)["partial"] == "*fp32"
    assert constants["column_code"] is None and constants["products"] is None
    assert launch.recorder is None


@pytest.mark.parametrize("name", aot.subjects())
def test_every_subject_has_launches(name):
    assert aot.record(lambda: aot.subjects()[name](90))
