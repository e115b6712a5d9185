"""`ring_rows`, every backend usable here against a loop."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bacon_fast.ops.backends import BACKENDS
from bacon_fast.ops.ring_rows import ring_rows

NAMES = [name for name, b in BACKENDS["ring_rows"].items() if b.why_not(torch.empty(0)) is None]


@pytest.mark.parametrize("backend", NAMES)
@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(1, 3),
    length=st.integers(1, 20),
    step=st.integers(0, 2**40),
    stride=st.integers(1, 50),
    first=st.integers(0, 9),
    count=st.integers(0, 30),
)
def test_against_a_loop(backend, rows, length, step, stride, first, count):
    ring = torch.arange(rows * length).view(rows, length)
    found = ring_rows(ring, torch.tensor(step), stride=stride, first=first, count=count, backend=backend)
    expected = [[r * length + (step * stride + first + i) % length for i in range(count)] for r in range(rows)]
    assert found.dtype == torch.int64 and found.shape == (rows, count) and found.tolist() == expected


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"ring": torch.zeros(3).long()}, ValueError, r"ring: expected shape \[R, L\]"),
        ({"ring": torch.zeros(2, 3)}, TypeError, "ring: expected dtype int64"),
        ({"ring": torch.zeros(2, 0).long()}, ValueError, "ring: expected a contiguous tensor"),
        ({"ring": torch.zeros(3, 2).long().T}, ValueError, "ring: expected a contiguous tensor"),
        ({"step": torch.zeros(1).long()}, ValueError, "step: expected a 0-d int64 tensor"),
        ({"stride": 0}, ValueError, "stride: expected a positive integer"),
        ({"first": -1}, ValueError, "first: expected an integer >= 0"),
        ({"count": 1.0}, ValueError, "count: expected an integer >= 0"),
    ],
)
def test_bad_arguments(changed, error, message):
    good = {"ring": torch.zeros(2, 3).long(), "step": torch.tensor(0), "stride": 1, "first": 0, "count": 2}
    with pytest.raises(error, match=message):
        ring_rows(**good | changed)


def test_the_op_keeps_the_rules_of_torch():
    torch.library.opcheck(torch.ops.bacon_fast.ring_rows, (torch.arange(6).view(2, 3), torch.tensor(5), 2, 1, 4))
