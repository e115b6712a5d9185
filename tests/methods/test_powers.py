"""Powers of probabilities against Python's integers and fractions, and bit for bit where nothing underflows."""

from fractions import Fraction

import pytest
import torch

from bacon_fast.methods.powers import powers


@pytest.mark.parametrize("exponent", [2, 50, 100, 1000, 100_000])
@pytest.mark.parametrize("num_classes", [2, 10, 1000])
def test_normalized_powers_against_fractions(exponent, num_classes):
    generator = torch.Generator().manual_seed(num_classes)
    rows = torch.stack(
        [
            torch.full((num_classes,), 1 / num_classes),
            torch.randn(num_classes, generator=generator).softmax(0),
            torch.nn.functional.one_hot(torch.tensor(1), num_classes).float(),
        ]
    )
    found = powers(rows, float(exponent))
    found = found / found.sum(1, keepdim=True)
    for row, values in zip(rows, found):
        largest = Fraction(row.max().item())
        exact = [float(Fraction(v) / largest) ** exponent for v in row.tolist()]
        expected = torch.tensor([v / sum(exact) for v in exact])
        torch.testing.assert_close(values, expected, rtol=2e-5 + 2e-7 * exponent, atol=1e-20)


@pytest.mark.parametrize("exponent", [0.5, 1.0, 2.0, 1 / 1.5, 1 / 0.3, 7.3])
def test_every_bit_is_kept_where_nothing_underflows(exponent):
    values = torch.randn(500, 10, generator=torch.Generator().manual_seed(0)).mul(3).softmax(1)
    assert torch.equal(powers(values, exponent), values**exponent)


def test_a_row_that_is_not_finite_stays_so():
    assert powers(torch.tensor([[torch.nan, 0.5], [0.5, 0.5]]), 100.0)[0].isnan().any()
