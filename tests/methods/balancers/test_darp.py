"""DARP's solver against a generic convex optimizer, and against the authors' iteration with SciPy's root finder."""

import math

import numpy as np
import pytest
import torch
from balancer_cases import B, F, K, U, batch, random_labels, rows
from scipy import optimize

from bacon_fast.methods.balancers.darp import DARP, denoise, refine
from bacon_fast.methods.fixmatch import FixMatch
from bacon_fast.methods.outputs import Outputs


def predictions(num_rows: int, num_classes: int, scale: float = 2.0, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (scale * torch.randn(num_rows, num_classes, generator=generator, dtype=torch.float64)).softmax(1)


def convex_optimum(y: np.ndarray, mass: np.ndarray) -> np.ndarray:
    """min sum_m w_m KL(X_m || y_m) under both marginals, by SciPy's SLSQP over all entries of X."""
    weights = 1 / -(y * np.log(y)).sum(1, keepdims=True)

    def objective(x):
        x = np.maximum(x.reshape(y.shape), 1e-300)
        return (weights * x * np.log(x / y)).sum(), (weights * (np.log(x / y) + 1)).ravel()

    constraints = [
        {"type": "eq", "fun": lambda x: x.reshape(y.shape).sum(1) - 1},
        {"type": "eq", "fun": lambda x: (x.reshape(y.shape).sum(0) - mass)[:-1]},  # the last follows from the others
    ]
    result = optimize.minimize(
        objective, y.ravel(), jac=True, method="SLSQP", bounds=[(0, 1)] * y.size, constraints=constraints,
        options={"maxiter": 1000, "ftol": 1e-14},
    )  # fmt: skip
    # 8: the line search finds nothing better at this tolerance, as happens on some processors. The caller compares.
    assert result.success or result.status == 8, result.message
    return result.x.reshape(y.shape)


@pytest.mark.parametrize(("num_rows", "mass"), [(7, [4.0, 2.0, 1.0]), (6, [5.5, 0.5]), (10, [4.0, 3.0, 2.0, 1.0])])
def test_solver_finds_the_optimum_of_a_generic_convex_optimizer(num_rows, mass):
    y = predictions(num_rows, len(mass))
    x = refine(y, torch.tensor(mass, dtype=torch.float64), sweeps=300)
    np.testing.assert_allclose(x, convex_optimum(y.numpy(), np.array(mass)), atol=2e-5)


def authors_iteration(y: np.ndarray, mass: np.ndarray, sweeps: int) -> np.ndarray:
    """Closed form for alpha, a root finder for each nu_k, from the equations of methods.md H."""
    num_rows, num_classes = y.shape
    weights = [1 / -sum(v * math.log(v) for v in row) for row in y]
    nu = [0.0] * num_classes

    def solve_alpha():
        return [
            1 / sum(y[m, k] / math.e * math.exp(-nu[k] / weights[m]) for k in range(num_classes))
            for m in range(num_rows)
        ]

    for _ in range(sweeps):
        alpha = solve_alpha()
        for k in range(num_classes):

            def surplus(v, k=k, alpha=alpha):
                terms = (y[m, k] / math.e * alpha[m] * math.exp(-v / weights[m]) for m in range(num_rows))
                return sum(terms) - mass[k]

            nu[k] = optimize.brentq(surplus, -100, 100, xtol=1e-13)
    alpha = solve_alpha()
    return np.array(
        [
            [y[m, k] / math.e * alpha[m] * math.exp(-nu[k] / weights[m]) for k in range(num_classes)]
            for m in range(num_rows)
        ]
    )


def test_ten_sweeps_are_the_authors_iteration():
    y, mass = predictions(12, 4, scale=3.0, seed=1), np.array([7.0, 3.0, 1.5, 0.5])
    np.testing.assert_allclose(refine(y, torch.from_numpy(mass)), authors_iteration(y.numpy(), mass, 10), atol=1e-9)


@pytest.mark.parametrize("scale", [0.5, 4.0, 12.0])
def test_marginals_are_met(scale):
    y, mass = predictions(300, 10, scale), torch.logspace(0, -2, 10, dtype=torch.float64)
    mass = 300 * mass / mass.sum()
    y = denoise(y, mass)
    x = refine(y, mass)
    torch.testing.assert_close(x.sum(1), torch.ones(300, dtype=torch.float64), rtol=0, atol=1e-12)
    assert (x.sum(0) - mass).abs().sum() < (y.sum(0) - mass).abs().sum(), "closer after ten sweeps"
    torch.testing.assert_close(refine(y, mass, sweeps=200).sum(0), mass, rtol=1e-6, atol=0)


def test_predictions_that_have_the_mass_already_stay():
    y = predictions(20, 4)
    torch.testing.assert_close(refine(y, y.sum(0)), y, rtol=1e-9, atol=1e-12)


def test_certain_rows_keep_their_class_and_the_others_make_up_for_it():
    y = predictions(12, 3, scale=1.0)
    y[:4] = torch.tensor([1.0, 0.0, 0.0])
    mass = torch.tensor([5.0, 5.0, 2.0], dtype=torch.float64)
    x = refine(y, mass, sweeps=500)
    assert x.isfinite().all()
    torch.testing.assert_close(x[:4], y[:4], rtol=0, atol=1e-3)
    torch.testing.assert_close(x.sum(0), mass, rtol=1e-4, atol=0)


def test_a_class_of_mass_zero_gets_nothing():
    y = predictions(8, 3)
    y[0] = torch.tensor([0.0, 0.0, 1.0])  # certain of the class that must be empty
    mass = torch.tensor([5.0, 3.0, 0.0], dtype=torch.float64)
    for start in (y, denoise(y, mass)):
        x = refine(start, mass, sweeps=200)
        assert torch.equal(x[:, 2], torch.zeros(8, dtype=torch.float64)) and x.isfinite().all()
        torch.testing.assert_close(x.sum(0), mass, rtol=1e-6, atol=0)


def test_one_class():
    x = refine(torch.ones(5, 1), torch.tensor([5.0], dtype=torch.float64))
    torch.testing.assert_close(x, torch.ones(5, 1, dtype=torch.float64))


def test_denoising_against_a_loop():
    y, mass = predictions(9, 3, seed=4), [4.7, 2.6, 1.7]
    columns = []
    for k, m in enumerate(mass):
        largest = sorted(range(9), key=lambda i: -y[i, k].item())[: int(2 * m)]
        omega = (m + 1e-6) / (sum(y[i, k].item() for i in largest) + 1e-6)
        columns.append([y[i, k].item() * omega * (i in largest) + 1e-6 for i in range(9)])
    expected = torch.tensor([[v / sum(row) for v in row] for row in zip(*columns)], dtype=torch.float64)
    torch.testing.assert_close(denoise(y, torch.tensor(mass, dtype=torch.float64)), expected, rtol=1e-6, atol=1e-9)


def test_phases_store_and_reuse():
    counts = torch.tensor([40, 20, 10, 5])
    darp = DARP(counts, 30, start=2, interval=3)
    assert [darp.phase(t) for t in range(9)] == ["collect"] * 2 + ["refine", "reuse", "reuse"] * 2 + ["refine"]
    stored = torch.full((30, K), 1 / K)
    for t in range(6):
        slots = torch.randperm(30, generator=torch.Generator().manual_seed(t))[:U]
        slots[3] = slots[11]  # one image twice: the later row stays
        seen = rows(t, batch=batch(random_labels(), slots))
        targets = darp(seen, torch.tensor(t), darp.phase(t))
        predicted = seen.weak_logits.softmax(1)
        for row, slot in zip(predicted, slots.tolist()):
            stored[slot] = row
        assert torch.equal(darp.predictions, stored)
        if t in (2, 5):
            mass = 30 * counts.double() / 75
            refined = refine(denoise(stored, mass), mass).float()
        assert torch.equal(targets.probabilities, predicted if t < 2 else refined[slots])


def test_refined_confidence_and_class_are_what_fixmatch_takes():
    darp = DARP(torch.tensor([40, 20, 10, 5]), U, start=0)
    seen = rows()
    targets = darp(seen, torch.tensor(0), "refine")
    logits = torch.cat([torch.zeros(B, K), seen.weak_logits, torch.zeros(U, K)])
    out = Outputs(torch.zeros(B + 2 * U, F), logits, None, B, U)
    *_, pseudo_labels = FixMatch(threshold=0.8, lambda_u=1.0)(out, seen.batch, torch.tensor(0), targets)
    confidence, classes = darp.refined.max(1)
    assert torch.equal(pseudo_labels, torch.where(confidence >= 0.8, classes, -1))
    assert (classes != seen.weak_logits.argmax(1)).any()
