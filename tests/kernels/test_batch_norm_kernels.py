"""BatchNorm's kernels: how rows are divided, how many launches there are, and that they fit on GPUs not at hand."""

import itertools
import os
import subprocess
import sys

import pytest
import torch

from bacon_fast.kernels import aot
from bacon_fast.kernels.batch_norm import aot_subjects
from bacon_fast.kernels.config import INTERPRETER, batch_norm_config
from bacon_fast.kernels.interpreter import to_bfloat16

ARCHS = (80, 90, 100, 120, 75, INTERPRETER)  # 75: a card that nobody has measured


@pytest.mark.parametrize("arch", ARCHS)
def test_every_row_and_channel_is_treated_once(arch):
    sizes = itertools.product((2, 3, 127, 128, 129, 20_480, 327_680, 10**7 + 1), (1, 5, 16, 33, 640, 2048))
    for (rows, channels), dtype in itertools.product(sizes, (torch.float16, torch.float32, torch.float64)):
        config = batch_norm_config(rows, channels, dtype, arch)
        assert config.grid == (config.splits, config.channel_blocks)
        assert config.rows_per_split % config.block_rows == 0
        assert (config.splits - 1) * config.rows_per_split < rows <= config.splits * config.rows_per_split
        blocks = config.channel_blocks * config.block_channels
        assert blocks - config.block_channels < channels <= blocks
        for size in (config.block_rows, config.block_channels):
            assert size & (size - 1) == 0
        if arch != INTERPRETER:
            assert config.splits * config.channel_blocks <= max(170, config.channel_blocks)
            assert config.splits <= 256  # merged at once, in registers


@pytest.mark.parametrize(("layer", "residual"), [("16x32", False), ("32x32", True)])
def test_two_launches_each_way(layer, residual):
    launches = aot.record(lambda: aot_subjects()[f"batch-norm-320x{layer}-bfloat16"](90))
    names = [item.kernel.__name__ for item in launches]
    assert names == ["_moments_kernel", "_normalize_kernel", "_gradient_sums_kernel", "_input_gradient_kernel"]
    assert (dict(launches[0].constants).get("residual", "given") is None) != residual


def test_they_compile_and_fit_everywhere():
    """In a process of its own: the kernels of the interpreter, used here, do not compile."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "bacon_fast.kernels.aot", "--only", "batch-norm-320x32x32-bfloat16"]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    lines = result.stdout.splitlines()
    assert "all fit: nothing spills" in lines[-1]
    assert len(lines) == 2 + 4 * 4 and lines[1].startswith("moments_kernel")


def test_the_interpreter_rounds_to_bfloat16_as_torch():
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(10_000, generator=generator) * torch.logspace(-40, 38, 10_000)
    ties = torch.tensor([1 + 2**-8, 1 + 3 * 2**-8, -1 - 2**-8, 3.4e38, float("inf"), -float("inf"), 0.0, -0.0])
    nans = torch.tensor([0x7F800001, 0x7FFFFFFF, -1], dtype=torch.int32).view(torch.float32)
    values = torch.cat([values, ties, nans])
    found = torch.from_numpy(to_bfloat16(values.numpy())).view(torch.bfloat16)
    torch.testing.assert_close(found, values.bfloat16(), rtol=0, atol=0, equal_nan=True)
