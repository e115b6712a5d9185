"""Learning rates against methods.md 0.3."""

import math

import pytest
import torch

from bacon_fast.engine.schedule import learning_rate, set_learning_rate


def test_constant_stays():
    assert [learning_rate("constant", 0.03, t, 10) for t in (0, 5, 9)] == [0.03] * 3


def test_cosine_is_seven_sixteenths_of_a_period():
    assert learning_rate("cosine", 0.03, 0, 1000) == 0.03
    assert learning_rate("cosine", 0.03, 1000, 1000) == pytest.approx(0.03 * math.cos(7 * math.pi / 16))
    assert learning_rate("cosine", 0.03, 500, 1000) == pytest.approx(0.03 * math.cos(7 * math.pi / 32))


def test_cosine_to_zero_is_half_a_period():
    rates = [learning_rate("cosine_to_zero", 0.4, t, 1000) for t in (0, 250, 500, 1000, 1500)]
    assert rates == pytest.approx([0.4, 0.2 * (1 + math.sqrt(0.5)), 0.2, 0, 0])


def test_unknown_name_lists_the_allowed_ones():
    with pytest.raises(ValueError, match=r"constant.*cosine.*'step'"):
        learning_rate("step", 0.03, 0, 1)


def test_warm_up_rises_from_0_and_the_schedule_runs_over_the_rest():
    """USB's get_cosine_schedule_with_warmup: t/W, then 7/16 of a cosine over T - W."""
    rates = [learning_rate("cosine", 0.1, t, 1000, warmup=0.2) for t in (0, 50, 199, 200, 600, 1000)]
    expected = [0, 0.025, 0.1 * 199 / 200, 0.1, 0.1 * math.cos(7 * math.pi / 32), 0.1 * math.cos(7 * math.pi / 16)]
    assert rates == pytest.approx(expected)
    assert [learning_rate("constant", 0.1, t, 10, warmup=0.25) for t in (0, 1, 2, 9)] == [0, 0.05, 0.1, 0.1]


@pytest.mark.parametrize("warmup", [0.0, 0.025])
@pytest.mark.parametrize("name", ["constant", "cosine", "cosine_to_zero"])
def test_a_counter_on_the_device_gives_the_same_rate(name, warmup):
    steps = 300_000
    for t in (
        0,
        1,
        7,
        7_500,
        12_345,
        150_000,
        299_999,
        300_000,
        400_000,
    ):  # beyond 8/7 of the run the cosine is negative
        found = torch.tensor(0.03)
        set_learning_rate(found, name, 0.03, torch.tensor(t), steps, warmup)
        assert found.dtype == torch.float32 and found.dim() == 0
        assert found.item() == torch.tensor(learning_rate(name, 0.03, t, steps, warmup), dtype=torch.float32).item()
    with pytest.raises(ValueError, match="lr_schedule"):
        set_learning_rate(torch.zeros(()), "step", 0.03, torch.tensor(0), steps)
