"""Tests share a process and torch's settings: each begins without tf32, and restores the settings at the end."""

import pytest
import torch


@pytest.fixture(autouse=True)
def flags_of_torch():
    cudnn = torch.backends.cudnn
    names = ("allow_tf32", "benchmark", "deterministic")
    before = {name: getattr(cudnn, name) for name in names}
    precision = torch.get_float32_matmul_precision()
    cudnn.allow_tf32 = False
    torch.set_float32_matmul_precision("highest")
    yield
    for name, value in before.items():
        setattr(cudnn, name, value)
    torch.set_float32_matmul_precision(precision)
