"""The cases of benchmarks/loss.py: what is compared in which numbers, and the table of times that comes out."""

from dataclasses import replace

import pytest
import torch

from bacon_fast.ops.contrastive_times import fastest, read_times
from benchmarks import loss
from benchmarks.common import append_csv


@pytest.mark.parametrize("numbers", loss.DTYPES)
def test_arms_pass_the_gate_of_their_numbers_and_a_wrong_one_does_not(numbers):
    cases = [*loss.bacon_cases(48, 10, 8, "cpu", numbers), loss.info_nce_case(20, 70, 16, "cpu", numbers)]
    cases += [loss.sup_con_case(40, 16, 5, "cpu", numbers)]
    for case in cases:
        truth = case.truth()
        kept = {name: case.arms[name] for name in ("eager", "bacon_fast cpp") if name in case.arms}
        for build in kept.values():
            assert loss.wrong(build()(), truth, case.numbers) is None
        value, *others = next(iter(kept.values()))()()
        assert loss.wrong((value * 1.2, *others), truth, case.numbers) is not None
    assert [case.shape.endswith(f" {numbers}") for case in cases] == [numbers != "float32"] * len(cases)


def test_tf32_is_allowed_where_it_is_asked_for_and_afterwards_as_before():
    before = torch.get_float32_matmul_precision()
    with loss.products_of("tf32"):
        assert torch.get_float32_matmul_precision() == "high"
    assert torch.get_float32_matmul_precision() == before


def test_times_become_a_table_that_chooses(tmp_path):
    case = replace(loss.info_nce_case(1024, 4096, 128, "cpu"), numbers="bf16")
    rows = [{"arm": "bacon_fast triton", "median_us": 30.0}, {"arm": "bacon_fast chunks", "median_us": 20.0}]
    path = tmp_path / "times.csv"
    append_csv(path, loss.times_of(case, [*rows, {"arm": "eager", "median_us": 9.0}], "Some GPU"))
    times = read_times(path)
    assert len(times) == 2 and {time.source for time in times} == {"measured"}
    assert fastest(times, "Some GPU", "half", 1000, 5000, 100) == "chunks"
    assert fastest(times, "Another GPU", "half", 1000, 5000, 100) is None  # what was measured holds for its card
    assert fastest([*read_times(), *times], "Another GPU", "half", 1000, 5000, 100) == "triton"  # as predicted
