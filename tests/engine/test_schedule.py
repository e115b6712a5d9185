"""Learning rates against methods.md 0.3."""

import math

import pytest

from bacon_fast.engine.schedule import learning_rate


def test_constant_stays():
    assert [learning_rate("constant", 0.03, t, 10) for t in (0, 5, 9)] == [0.03] * 3


def test_cosine_is_seven_sixteenths_of_a_period():
    assert learning_rate("cosine", 0.03, 0, 1000) == 0.03
    assert learning_rate("cosine", 0.03, 1000, 1000) == pytest.approx(0.03 * math.cos(7 * math.pi / 16))
    assert learning_rate("cosine", 0.03, 500, 1000) == pytest.approx(0.03 * math.cos(7 * math.pi / 32))


def test_unknown_name_lists_the_allowed_ones():
    with pytest.raises(ValueError, match=r"constant.*cosine.*'step'"):
        learning_rate("step", 0.03, 0, 1)
