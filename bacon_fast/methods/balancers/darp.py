"""DARP, distribution aligning refinery of pseudo-labels (methods.md H; Kim et al., NeurIPS 2020)."""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from bacon_fast.methods.balancers.base import Balancer, Rows, Targets
from bacon_fast.methods.last_rows import last_of_equal
from bacon_fast.methods.part import PartOptions, Setup

_SMALLEST_ENTROPY = 1e-6  # a certain row has entropy 0, an infinite weight in the objective
_DENOISING_EPSILON = 1e-6


@dataclass(frozen=True)
class DARPOptions(PartOptions):
    """DARP (methods.md H)."""

    part: ClassVar[str] = "darp"

    start: float = 0.4
    """Fraction of the run after which pseudo-labels are refined (authors: 200 of 500 epochs)."""

    def check(self) -> None:
        self.require_starts("start")


class DARP(Balancer):
    """Refines the predictions of all unlabeled images together until each class has its mass of them.

    Keeps the latest prediction of every unlabeled image, 1/K before the first. From `start` on, every `interval` steps,
    they are denoised and refined (`denoise`, `refine`) towards the mass M_k = M N_k / sum N of each class, and the
    refined rows take the place of the predictions, for the confidence too, until the next time. The authors' FixMatch
    adds the labeled images to the mass, because there the unlabeled set holds them as well; in such a split they are
    part of M here. USB takes the confidence of the unrefined prediction.

    Args:
        labeled_counts: N_c, int [K].
        num_unlabeled: M.
        start: completed steps before the first refinement.
        interval: steps between refinements.

    Buffers:
        predictions, refined: float32 [M,K], by slot.
    """

    on_targets = True

    def __init__(self, labeled_counts: Tensor, num_unlabeled: int, *, start: int, interval: int = 10) -> None:
        super().__init__()
        self.start, self.interval = start, interval
        num_classes = len(labeled_counts)
        mass = num_unlabeled * labeled_counts.double() / labeled_counts.sum()
        self.register_buffer("target_mass", mass, persistent=False)  # derived from the split
        uniform = torch.full((num_unlabeled, num_classes), 1 / num_classes)
        self.register_buffer("predictions", uniform)
        self.register_buffer("refined", uniform.clone())

    def phase(self, step: int) -> Literal["collect", "refine", "reuse"]:
        if step < self.start:
            return "collect"
        return "refine" if (step - self.start) % self.interval == 0 else "reuse"

    @torch.no_grad()
    def forward(self, rows: Rows, step: Tensor, phase: Literal["collect", "refine", "reuse"]) -> Targets:
        predicted, slots = rows.weak_logits.softmax(1), rows.batch.unlabeled_slots
        self.predictions.index_copy_(0, slots, predicted[last_of_equal(slots)])
        if phase == "collect":
            return Targets(predicted)
        if phase == "refine":
            self.refined.copy_(refine(denoise(self.predictions, self.target_mass), self.target_mass))
        return Targets(self.refined[slots])


def denoise(predictions: Tensor, target_mass: Tensor, *, keep: float = 2.0) -> Tensor:
    """Keeps the floor(keep M_k) largest predictions of each class k, and scales them to the mass M_k.

    With t_mk = 1 for what is kept, and omega_k = (M_k + 1e-6) / (sum_m t_mk y_mk + 1e-6), the result is
    y_mk t_mk omega_k + 1e-6, with rows scaled to sum 1.

    Args:
        predictions: y, float [M,K], rows of sum 1.
        target_mass: M_k, float64 [K].

    Returns:
        float64 [M,K].
    """
    values = predictions.double()
    order = values.argsort(dim=0, descending=True, stable=True)
    rank = order.argsort(dim=0)  # the inverse permutation
    kept = torch.where(rank < (keep * target_mass).floor(), values, 0)
    scale = (target_mass + _DENOISING_EPSILON) / (kept.sum(0) + _DENOISING_EPSILON)
    scaled = kept * scale + _DENOISING_EPSILON
    return scaled / scaled.sum(1, keepdim=True)


def refine(predictions: Tensor, target_mass: Tensor, *, sweeps: int = 10, newton_steps: int = 5) -> Tensor:
    """The distributions closest to the predictions among those that give each class its mass.

        min_X sum_m w_m KL(X_m || y_m)   subject to   sum_k X_mk = 1,   sum_m X_mk = M_k;     w_m = 1 / H(y_m)

    The solution has the form X_mk = y_mk / e · alpha_m · exp(-nu_k / w_m). Each sweep solves for alpha given nu, in
    closed form, and for nu given alpha, by Newton's method from the last nu; a last alpha makes the rows sum to 1. The
    authors iterate on sum_m X_mk - M_k = 0 until nu moves by less than 0.1, in at most 30 steps, class after class.
    Here it is log sum_m X_mk - log M_k = 0, which is convex in nu with a slope between the entropies, for all classes
    at once and with a fixed number of steps, so that the host decides nothing. All in logarithms and float64.

    Args:
        predictions: y, float [M,K], rows of sum 1. Entropies below 1e-6 count as 1e-6: such rows hardly move.
        target_mass: M_k, float64 [K], of sum M. A class of mass 0 gets exactly 0 from every row.

    Returns:
        X, float64 [M,K].
    """
    values = predictions.double().clamp_min(torch.finfo(torch.float64).tiny)
    entropy = (-values * values.log()).sum(1, keepdim=True).clamp_min(_SMALLEST_ENTROPY)
    alive = target_mass > 0
    base = torch.where(alive, values.log() - 1, -torch.inf)
    log_mass = torch.where(alive, target_mass, 1).log()
    nu = torch.zeros_like(target_mass)

    def scaled_to_rows(nu: Tensor) -> Tensor:
        return (base - nu * entropy).log_softmax(1)

    for _ in range(sweeps):
        start, fixed = nu, scaled_to_rows(nu)  # log X at the start of the sweep; alpha is now fixed
        for _ in range(newton_steps):
            column = torch.where(alive, fixed - (nu - start) * entropy, 0)
            surplus = column.logsumexp(0) - log_mass
            slope = (column.softmax(0) * entropy).sum(0)
            nu = torch.where(alive, nu + surplus / slope, 0)
    return scaled_to_rows(nu).exp()


def build(options: DARPOptions, setup: Setup) -> DARP:
    return DARP(setup.data.labeled_counts, setup.data.num_unlabeled, start=round(options.start * setup.steps))
