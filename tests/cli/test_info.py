"""`python -m bacon_fast.info` on machines that are not this one."""

from types import SimpleNamespace

import pytest
import torch
from torch._subclasses import fake_tensor

from bacon_fast import info
from bacon_fast.ops import backends

_C = pytest.importorskip("bacon_fast._C", reason="the native extension is not built")


def test_a_cuda_device_is_described(monkeypatch):
    card = SimpleNamespace(name="Stand-in", major=9, minor=0, total_memory=2**37, shared_memory_per_block_optin=232448)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: card)
    monkeypatch.setattr(_C, "built_with_cuda", True)
    monkeypatch.setattr("bacon_fast.ops.batch_norm.has_native_code", lambda op, device: True)
    # Tensors on a device that is not there, which it does not look for.
    monkeypatch.setattr(fake_tensor, "init_gpu_context", lambda device: None)
    with fake_tensor.FakeTensorMode():
        lines = info.report().splitlines()
    assert any(line.split() == ["cuda:0", "Stand-in,", "sm_90,", "128", "GiB"] for line in lines)
    begin = lines.index("backends on cuda, the preferred one first")
    usable = {line.split()[0]: line.split()[1:] for line in lines[begin + 1 :] if not line.startswith("    ")}
    assert usable["augment_views"] == usable["bank_write_"] == ["cuda,", "reference"]
    assert usable["batch_norm_act"] == ["triton,", "reference,", "cuda"]
    assert usable["bacon_loss"] == ["triton,", "chunks,", "reference"]


def test_a_missing_extension_is_explained(monkeypatch):
    monkeypatch.setattr(info, "find_spec", lambda name: None)
    monkeypatch.setenv("CXX", "/nonexistent/c++")
    assert "C++ compiler '/nonexistent/c++' is not there" in info.native_extension()
    monkeypatch.setenv("CXX", "true")  # a program that is on every PATH
    assert info.native_extension().startswith("not built") and "to see why, run" in info.native_extension()


def test_an_extension_that_cannot_be_loaded_is_explained(monkeypatch):
    monkeypatch.setattr(backends, "native_error", "the native extension bacon_fast._C is not usable: undefined symbol")
    assert "undefined symbol; run `make setup`" in info.native_extension()


@pytest.mark.parametrize("openmp", [True, False])
def test_what_was_left_out_is_named(monkeypatch, openmp):
    monkeypatch.setattr(_C, "built_with_cuda", False)
    monkeypatch.setattr(_C, "built_with_openmp", openmp, raising=False)
    line = info.native_extension()
    assert line.startswith("built, without CUDA") and ("without OpenMP" in line) == (not openmp)
