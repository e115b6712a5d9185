"""The GPU's division of the fused step into blocks and threads, on a CPU."""

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
def test_a_block_of_threads_computes_what_one_thread_computes(tmp_path):
    source, binary = Path(__file__).with_name("sgd_ema_blocks.cpp"), tmp_path / "blocks"
    # Without contraction into fused multiply-adds, which the compiler chooses loop by loop.
    command = ["g++", "-std=c++20", "-O1", "-ffp-contract=off", f"-I{ROOT / 'csrc'}", str(source), "-o", str(binary)]
    built = subprocess.run(command, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    result = subprocess.run([str(binary)], capture_output=True, text=True)
    assert result.stdout.strip() == "equal" and result.returncode == 0, result.stdout
