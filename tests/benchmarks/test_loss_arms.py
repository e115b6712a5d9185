"""benchmarks/loss.py's arm of the fused step, in the interpreter: it passes the gate that every arm has to pass."""

import os

import pytest
import torch

from bacon_fast.kernels.bacon_step_design import DESIGNS
from benchmarks.loss import wrong
from benchmarks.loss_arms import bacon_batch, fused_step, our_step, vectorized_step


@pytest.fixture(scope="module")
def truth():
    return vectorized_step(bacon_batch(48, 10, 8, 300).to("cpu", torch.float64), compiled=False)()


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="needs TRITON_INTERPRET=1")
@pytest.mark.parametrize("design", DESIGNS)
def test_the_fused_step_is_right(truth, design):
    call = fused_step(bacon_batch(48, 10, 8, 300).to("cpu", torch.float32), design)
    assert wrong(call(), truth) is None
    call()
    assert wrong(call(), truth) is not None  # its centers have moved on


def test_the_composed_step_is_right(truth):
    assert wrong(our_step(bacon_batch(48, 10, 8, 300).to("cpu", torch.float32), "reference")(), truth) is None
