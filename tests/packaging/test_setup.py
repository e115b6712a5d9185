"""What setup.py would compile, on machines with and without GPU, toolkit and OpenMP."""

import os
import runpy
import shutil
from pathlib import Path
from unittest import mock

import pytest
import setuptools
import torch
from torch.utils import cpp_extension

ROOT = Path(__file__).resolve().parents[2]
ALL = "8.0;9.0;10.0;12.0+PTX"


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """A folder for programs, the only one on PATH beside a C++ compiler, and a CUDA toolkit."""
    if torch.version.cuda is None:
        pytest.skip("PyTorch is built without CUDA")
    compiler = shutil.which("c++")
    if compiler is None:
        pytest.skip("needs a C++ compiler")
    home = tmp_path / "cuda"
    for path in (home / "bin/nvcc", home / "include/cuda_runtime.h"):
        path.parent.mkdir(parents=True)
        path.touch()
    monkeypatch.setattr(cpp_extension, "CUDA_HOME", str(home))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    tools = tmp_path / "tools"
    tools.mkdir()
    monkeypatch.setenv("PATH", f"{tools}:{Path(compiler).parent}")
    monkeypatch.setenv("CUDA_HOME", str(home))
    for name in ("BACON_FAST_CUDA", "TORCH_CUDA_ARCH_LIST", "CXX"):
        monkeypatch.delenv(name, raising=False)
    return tools


def program(tools: Path, name: str, text: str) -> None:
    (tools / name).write_text(f"#!/bin/sh\n{text}\n")
    (tools / name).chmod(0o755)


def extension(**environment: str) -> tuple[setuptools.Extension, str | None]:
    """What setup.py hands to setuptools, and the architectures that it chooses."""
    found = {}
    with mock.patch.dict(os.environ, environment), mock.patch.object(setuptools, "setup", lambda **k: found.update(k)):
        runpy.run_path(str(ROOT / "setup.py"))
        return found["ext_modules"][0], os.environ.get("TORCH_CUDA_ARCH_LIST")


def has_cuda(ext: setuptools.Extension) -> bool:
    return any(source.endswith(".cu") for source in ext.sources)


def test_without_a_gpu_cuda_is_left_out_unless_forced(machine):
    ext, architectures = extension()
    assert not has_cuda(ext) and architectures is None and ext.optional
    ext, architectures = extension(BACON_FAST_CUDA="1")
    assert has_cuda(ext) and architectures == ALL and not ext.optional
    assert extension(BACON_FAST_CUDA="1", TORCH_CUDA_ARCH_LIST="9.0")[1] == "9.0"


def test_with_gpus_it_is_compiled_for_them(machine):
    program(machine, "nvidia-smi", "printf '9.0\\n8.0\\n9.0\\n'")
    ext, architectures = extension()
    assert has_cuda(ext) and architectures == "8.0;9.0" and ext.optional
    assert not has_cuda(extension(BACON_FAST_CUDA="0")[0])
    assert extension(BACON_FAST_CUDA="1")[1] == ALL


@pytest.mark.parametrize("answer", ["echo '[N/A]'", "echo no driver; exit 9"])
def test_an_answer_that_is_no_architecture_is_no_gpu(machine, answer):
    program(machine, "nvidia-smi", answer)
    assert not has_cuda(extension()[0])


def test_a_compiler_that_refuses_openmp_does_without(machine):
    assert "-fopenmp" in extension()[0].extra_compile_args["cxx"]
    program(machine, "c++", 'case "$*" in *-fopenmp*) exit 1;; esac\nexec g++ "$@"')
    ext, _ = extension()
    assert "-fopenmp" not in ext.extra_compile_args["cxx"] + ext.extra_link_args
