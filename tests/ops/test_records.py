"""What a step adds to the records, every backend usable here against plain loops."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bacon_fast.ops.backends import BACKENDS
from bacon_fast.ops.records import MAX_VALUES, add_values_, count_pairs_

NAMES = [name for name, b in BACKENDS["add_values_"].items() if b.why_not(torch.empty(0)) is None]
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int64, torch.bool]


@pytest.mark.parametrize("backend", NAMES)
def test_values_of_every_dtype_are_added(backend):
    numbers = [1.5, -0.1, 3.25, 0.7, 2**40 + 1, 1]
    values = [torch.tensor(number).to(dtype) for number, dtype in zip(numbers, DTYPES)]
    sums, finite = torch.zeros(7), torch.zeros(())
    for _ in range(3):
        add_values_(sums, finite, values, backend=backend)
    for value, found in zip(values, sums):
        expected = torch.zeros(())
        for _ in range(3):
            expected = expected + value.float()
        assert found.equal(expected)
    assert sums[-1] == 3 and finite == 3


@pytest.mark.parametrize("backend", NAMES)
@pytest.mark.parametrize("broken", [math.nan, math.inf, -math.inf])
def test_steps_count_until_the_first_sum_is_no_longer_finite(backend, broken):
    sums, finite = torch.zeros(3), torch.zeros(())
    for total in (1.0, 2.0, broken, 3.0, -broken):
        add_values_(sums, finite, [torch.tensor(total), torch.tensor(math.nan)], backend=backend)
    assert finite == 2 and sums[-1] == 5


@pytest.mark.parametrize("backend", NAMES)
def test_as_many_values_as_allowed_with_a_graph_and_in_other_memory(backend):
    values = list(torch.arange(2.0 * MAX_VALUES, requires_grad=True)[::2].unbind())
    sums, finite = torch.zeros(MAX_VALUES + 1), torch.zeros(())
    add_values_(sums, finite, values, backend=backend)
    assert sums.tolist() == [*range(0, 2 * MAX_VALUES, 2), 1] and not sums.requires_grad
    with pytest.raises(ValueError, match="values: expected 1 to 64, found 65"):
        add_values_(torch.zeros(66), finite, [*values, values[0]], backend=backend)


@pytest.mark.parametrize("backend", NAMES)
@settings(max_examples=30, deadline=None)
@given(data=st.data(), classes=st.integers(1, 5), rows=st.integers(0, 30))
def test_pairs_against_a_loop(backend, data, classes, rows):
    labels = st.lists(st.integers(-1, classes - 1), min_size=rows, max_size=rows)
    pseudo, true = data.draw(labels), data.draw(labels)
    table, unknown = [[0] * (classes + 1) for _ in range(classes)], 0
    for p, t in zip(pseudo, true):
        if t < 0:
            unknown += 1
        else:
            table[t][p] += 1  # -1: the last column
    pairs = torch.zeros(classes * (classes + 1) + 1, dtype=torch.int64)
    double = [torch.tensor(v, dtype=torch.int64).repeat_interleave(2)[::2] for v in (pseudo, true)]  # not contiguous
    count_pairs_(pairs, *double, classes, backend=backend)
    assert pairs.tolist() == [*(count for row in table for count in row), unknown]


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((torch.zeros(3), torch.zeros(()), [torch.zeros(())]), ValueError, r"sums: expected shape \[2\]"),
        ((torch.zeros(2), torch.zeros(1), [torch.zeros(())]), ValueError, r"finite: expected shape \[\]"),
        ((torch.zeros(2).double(), torch.zeros(()), [torch.zeros(())]), TypeError, "sums: expected dtype float32"),
        ((torch.zeros(2), torch.zeros(()), [torch.zeros(1)]), ValueError, r"values\[0\]: expected shape \[\]"),
        ((torch.zeros(1), torch.zeros(()), []), ValueError, "values: expected 1 to 64, found 0"),
    ],
)
def test_bad_values(arguments, error, message):
    with pytest.raises(error, match=message):
        add_values_(*arguments)


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"pairs": torch.zeros(6).long()}, ValueError, r"pairs: expected shape \[7\]"),
        ({"pairs": torch.zeros(7)}, TypeError, "pairs: expected dtype int64"),
        ({"true_labels": torch.zeros(2).long()}, ValueError, r"true_labels: expected shape \[3\]"),
        ({"pseudo_labels": torch.zeros(3)}, TypeError, "pseudo_labels: expected dtype int64"),
        ({"num_classes": 0}, ValueError, "num_classes: expected a positive integer"),
    ],
)
def test_bad_pairs(changed, error, message):
    labels = torch.zeros(3).long()
    good = {"pairs": torch.zeros(7).long(), "pseudo_labels": labels, "true_labels": labels, "num_classes": 2}
    with pytest.raises(error, match=message):
        count_pairs_(**good | changed)


def test_the_ops_keep_the_rules_of_torch():
    torch.library.opcheck(torch.ops.bacon_fast.add_values_, (torch.zeros(2), torch.zeros(()), [torch.ones(())]))
    labels = torch.zeros(3).long()
    torch.library.opcheck(torch.ops.bacon_fast.count_pairs_, (torch.zeros(7).long(), labels, labels, 2))
