"""The first cases of every public function, and that a wrong answer is seen; `python -m tests.fuzz` runs more."""

import pytest
import torch

from bacon_fast import functional
from tests.fuzz import judge
from tests.fuzz.__main__ import CASES, run

COUNTS = {"batch_norm_act": 15}


@pytest.mark.parametrize("name", CASES)
def test_hostile_arguments(name):
    assert sum(run(name, seed) for seed in range(COUNTS.get(name, 30))) > 0


def test_every_public_function_has_a_case():
    called = {name for names in CASES for name in names.split(", ")}
    assert called == set(functional.__all__) - {"FixMatchABCOutput"}


@pytest.mark.parametrize(
    ("found", "exact"), [(0.0, torch.nan), (torch.inf, 2.0), (1.001, 1.0), (torch.nan, 1.0), (1e-3, 0.0)]
)
def test_a_wrong_value_is_seen(found, exact):
    judge.check_value("loss", torch.tensor(1.0), torch.tensor(1.0), 1e-5)
    with pytest.raises(judge.Wrong):
        judge.check_value("loss", torch.tensor(found), torch.tensor(exact), 1e-5)
    with pytest.raises(judge.Wrong):
        judge.check_gradient("gradient", torch.tensor([[0.0, 2e-12]]), torch.tensor([[0.0, 1e-12]]), 1e-3)
