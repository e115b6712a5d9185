"""Means between log rows against means written out."""

import pytest
import torch

from bacon_fast.engine.meter import Meter


def values(**numbers) -> dict[str, torch.Tensor]:
    return {name: torch.tensor(number) for name, number in numbers.items()}


def test_means_over_the_steps_since_the_last_read():
    meter = Meter(torch.device("cpu"))
    for k in range(4):
        meter.add(None, values(a=float(k), b=2))
    assert meter.read() == {"a": 1.5, "b": 2.0}
    assert meter.read() == {}
    meter.add(None, values(a=5.0, b=1))
    assert meter.read() == {"a": 5.0, "b": 1.0}


def test_phases_share_a_window_and_may_have_values_of_their_own():
    meter = Meter(torch.device("cpu"))
    meter.add("first", values(a=1.0))
    meter.add("second", values(b=7.0, a=3.0))
    meter.add("second", values(b=9.0, a=5.0))
    assert meter.read() == {"a": 3.0, "b": 8.0}


def test_sums_stay_where_they_are_and_take_no_gradient():
    meter = Meter(torch.device("cpu"))
    meter.add(None, {"a": torch.ones((), requires_grad=True)})
    (_, sums, _), *_ = meter._sums.values()
    address = sums.data_ptr()
    meter.read()
    meter.add(None, values(a=1.0))
    assert meter._sums["None"][1].data_ptr() == address and not sums.requires_grad


def test_names_of_a_phase_are_fixed():
    meter = Meter(torch.device("cpu"))
    meter.add(None, values(a=1.0))
    with pytest.raises(ValueError, match=r"'a'.*'b'"):
        meter.add(None, values(b=1.0))
