"""MixUp's and the rotation task's draws against SciPy's distributions, their images against NumPy."""

import itertools
from collections import Counter

import numpy as np
import pytest
import torch
from no_synchronization import NoSynchronization
from scipy import stats

from bacon_fast.data.philox import uniform
from bacon_fast.methods.mixup import MixUp, draw_quarter_turns, mix, rotate


@pytest.mark.parametrize("alpha", [0.5, 0.75, 1.0, 4.0])
def test_coefficients_have_a_beta_distribution(alpha):
    mixup = MixUp(alpha, seed=0)
    draws = mixup.quantile(uniform(5, 0, 0, torch.arange(100_000))).double()
    # At 100,000 draws the statistic exceeds 0.0062 with probability 0.001; the table's own error is below 0.00025.
    assert stats.kstest(draws.numpy(), stats.beta(alpha, alpha).cdf).statistic < 0.0062
    probability = torch.linspace(0, 1, 100_003, dtype=torch.float64)[:-1]
    recovered = stats.beta(alpha, alpha).cdf(mixup.double().quantile(probability).numpy())
    error = np.abs(recovered - probability.numpy())
    assert error.max() < 1 / 4096 + 1e-6
    assert error[5000:-5000].max() < 1e-5, "interpolated, not stepped"


def test_the_larger_side_is_taken():
    mixup = MixUp(0.75, seed=3)
    draws = torch.stack([mixup.draw(4, torch.tensor(step))[0] for step in range(1000)]).double().numpy()
    assert draws.min() >= 0.5 and draws.max() <= 1
    folded = lambda x: 2 * stats.beta(0.75, 0.75).cdf(x) - 1  # noqa: E731
    assert stats.kstest(draws, folded).pvalue > 0.001


def test_permutations_are_uniform():
    mixup = MixUp(0.75, seed=3)
    drawn = Counter(tuple(mixup.draw(4, torch.tensor(step))[1].tolist()) for step in range(2400))
    assert set(drawn) == set(itertools.permutations(range(4)))
    assert stats.chisquare(list(drawn.values())).pvalue > 0.001


def test_draws_are_functions_of_seed_and_step():
    coefficient, permutation = MixUp(0.75, seed=1).draw(256, torch.tensor(7))
    for seed, step in ((1, 8), (2, 7)):
        other, order = MixUp(0.75, seed).draw(256, torch.tensor(step))
        assert other != coefficient and not torch.equal(order, permutation)
    again, order = MixUp(0.75, seed=1).draw(256, torch.tensor(7))
    assert again == coefficient and torch.equal(order, permutation)
    assert permutation.sort().values.tolist() == list(range(256))


def test_mix_against_a_loop():
    values = torch.randn(5, 3, 2, dtype=torch.float64)
    permutation = torch.tensor([2, 0, 4, 3, 1])
    mixed = mix(values, torch.tensor(0.75), permutation)
    for row in range(5):
        torch.testing.assert_close(mixed[row], 0.75 * values[row] + 0.25 * values[int(permutation[row])])


def test_rotation_against_numpy():
    images = torch.randn(8, 3, 5, 5)
    turns = torch.tensor([0, 1, 2, 3, 3, 2, 1, 0])
    rotated = rotate(images, turns)
    for row, turn in enumerate(turns.tolist()):
        expected = np.rot90(images[row].numpy(), turn, axes=(1, 2))
        assert np.array_equal(rotated[row].numpy(), expected)
    with pytest.raises(ValueError, match="square images to rotate, found 4x5"):
        rotate(torch.zeros(1, 3, 4, 5), torch.zeros(1, dtype=torch.int64))


def test_quarter_turns_are_uniform_and_change_with_the_step():
    drawn = torch.stack([draw_quarter_turns(64, 9, torch.tensor(step)) for step in range(200)])
    assert stats.chisquare(drawn.flatten().bincount(minlength=4).numpy()).pvalue > 0.001
    assert not torch.equal(drawn[0], drawn[1])


def test_nothing_is_read_by_the_host():
    mixup, images, step = MixUp(0.75, seed=0), torch.randn(8, 3, 4, 4), torch.tensor(3)
    with NoSynchronization():
        mix(images, *mixup.draw(8, step))
        rotate(images, draw_quarter_turns(8, 0, step))
