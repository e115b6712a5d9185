"""When `make setup` installs again, with a stand-in for the environment's Python that writes down how it is called."""

import os
import shutil
import subprocess
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PYTHON = '#!/bin/sh\ncase "$*" in *-e*) echo "cuda=$BACON_FAST_CUDA" >>installs;; esac\n'


@pytest.fixture
def make(tmp_path):
    """Runs make and returns BACON_FAST_CUDA of each installation so far."""
    for name in ("Makefile", "pyproject.toml", "setup.py", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path)
    (tmp_path / "csrc").mkdir()
    (tmp_path / "csrc/ops.cpp").touch()
    python = tmp_path / ".venv/bin/python"
    python.parent.mkdir(parents=True)
    python.write_text(PYTHON)
    python.chmod(0o755)

    def run(*words: str) -> list[str]:
        environment = {k: v for k, v in os.environ.items() if k not in ("BACON_FAST_CUDA", "MAKEFLAGS", "MAKELEVEL")}
        environment |= dict(word.split("=") for word in words if "=" in word)
        targets = [word for word in words if "=" not in word]
        done = subprocess.run(["make", *targets], cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return (tmp_path / "installs").read_text().split()

    return run


def test_forcing_cuda_installs_again_and_serves_everything(make, tmp_path):
    assert make("setup") == make("setup") == ["cuda="]
    assert make("setup", "BACON_FAST_CUDA=1") == ["cuda=", "cuda=1"]
    assert make("setup") == make("setup", "BACON_FAST_CUDA=1") == make("aot") == ["cuda=", "cuda=1"]
    time.sleep(0.02)
    (tmp_path / "csrc/ops.cpp").touch()
    assert make("setup")[2:] == ["cuda="]
    assert make("aot")[2:] == ["cuda=", "cuda=1"]
