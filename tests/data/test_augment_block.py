"""The GPU's thread block on a CPU: the same results as one thread, and no data race between barriers."""

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
HERE = Path(__file__).resolve().parent


def build(folder: Path, csrc: Path) -> Path:
    binary = folder / "simulation"
    command = ["g++", "-std=c++20", "-O1", "-g", "-fsanitize=thread", "-pthread", f"-I{csrc}"]
    result = subprocess.run(
        [*command, str(HERE / "block_simulation.cpp"), "-o", str(binary)], capture_output=True, text=True
    )
    if result.returncode and "libtsan" in result.stderr:
        pytest.skip("this compiler has no ThreadSanitizer")
    assert result.returncode == 0, result.stderr
    return binary


def run(binary: Path) -> subprocess.CompletedProcess:
    result = subprocess.run([str(binary)], capture_output=True, text=True, timeout=300)
    if "unexpected memory mapping" in result.stderr:
        pytest.skip("ThreadSanitizer cannot run in this address space")
    return result


pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")


def test_a_block_computes_what_a_thread_computes_without_races(tmp_path):
    result = run(build(tmp_path, ROOT / "csrc"))
    assert result.stdout.strip() == "equal" and "data race" not in result.stderr, result.stderr[:3000]


def test_a_missing_barrier_is_found(tmp_path):
    """The detector works: without the barrier after its first line, `find_levels` has a race."""
    csrc = tmp_path / "csrc"
    shutil.copytree(ROOT / "csrc", csrc)
    block = csrc / "augment" / "block.h"
    source = block.read_text()
    start = source.index("void find_levels")
    broken = source[:start] + source[start:].replace("__syncthreads();", "", 1)
    block.write_text(broken)
    assert "data race" in run(build(tmp_path, csrc)).stderr
