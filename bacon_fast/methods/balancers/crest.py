"""CReST and CReST+ (methods.md H; Wei, Sohn, Mellina, Yuille, Yang, "CReST", CVPR 2021)."""

import math
from collections.abc import Hashable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from bacon_fast.methods.alignment import DistributionAlignment
from bacon_fast.methods.balancers.base import Balancer, Rows, Targets
from bacon_fast.methods.method import NewGeneration, RefreshContext
from bacon_fast.methods.part import PartOptions, Setup


@dataclass(frozen=True)
class CReSTOptions(PartOptions):
    """CReST (methods.md H)."""

    part: ClassVar[str] = "crest"

    generations: int = 6
    """G: each generation has steps/G steps from a fresh network (authors: 65,536 each)."""
    alpha: float = 3.0
    """The fraction of pseudo-labels taken from a class is a ratio of counts to the power 1/alpha."""

    def check(self) -> None:
        self.require_integers(1, "generations")
        self.require_positive("alpha")


@dataclass(frozen=True)
class PDAOptions(PartOptions):
    """Progressive distribution alignment, which makes CReST+ of CReST (methods.md H)."""

    part: ClassVar[str] = "pda"

    t_min: float = 0.5
    """Exponent of the aligned distribution in the last generation; 1 in the first."""

    def check(self) -> None:
        self.require_fractions("t_min")


class CReST(Balancer):
    """Self-training in generations: after each, pseudo-labeled images join the labeled ones, rare classes first.

    The run is `generations` runs of T/G steps. Each starts from a fresh network, optimizer and average and from the
    first step of the learning-rate schedule, as the authors train it. Between two, the averaged network predicts all
    unlabeled images, and of those predicted as class k the most confident fraction

        mu_k = (N_(K+1-r) / N_(1))^(1/alpha),   r = rank of k by labeled count, N_(1) >= ... >= N_(K)

    joins the *original* labeled set: the rarest class takes all, the commonest the least. The unlabeled set stays as it
    is. With PDA (CReST+) the predictions p of generation g are aligned,

        p' in proportion to p (q_g + 1e-6) / (p_bar + 1e-6),   q_g in proportion to (N_k / sum N)^t_g,
        t_g = 1 - (1 - t_min) g / (G - 1),

    with p_bar the moving average of `methods.alignment`, begun anew in every generation.

    Args:
        labeled_counts: N_c, int [K].
        steps, generations: T and G.
        alpha: 3 for FixMatch (authors).
        t_min: with PDA, the last generation's exponent; None: without.
        momentum: of p_bar.
        usb_compat: as USB and the authors' code have it, mu_k = gamma^(-(K-1-k) / ((K-1) alpha)), with k the class's
            index and gamma the largest over the smallest count: right only where classes are in descending order.

    Buffers:
        the alignment's. The run's checkpoint holds the labeled set and the number of the generation.
    """

    def __init__(
        self,
        labeled_counts: Tensor,
        *,
        steps: int,
        generations: int,
        alpha: float = 3.0,
        t_min: float | None = None,
        momentum: float = 0.999,
        usb_compat: bool = False,
    ) -> None:
        super().__init__()
        self.num_labeled = int(labeled_counts.sum())
        self.steps, self.generations, self.t_min = steps, generations, t_min
        fractions = selected_fractions_by_index if usb_compat else selected_fractions
        self.fractions = fractions(labeled_counts.tolist(), alpha)
        self.alignment, self.aligns = None, t_min is not None
        if self.aligns:
            self.alignment = DistributionAlignment(labeled_counts / labeled_counts.sum(), momentum)

    def forward(self, rows: Rows, step: Tensor, phase: Hashable) -> Targets:
        probabilities = rows.weak_logits.softmax(1)
        if self.alignment is not None:
            probabilities = self.alignment(probabilities, self._exponent(step))
        return Targets(probabilities)

    def _exponent(self, step: Tensor) -> Tensor:
        generation = torch.div(step * self.generations, self.steps, rounding_mode="floor")
        return 1 - (1 - self.t_min) * generation / max(self.generations - 1, 1)

    def schedule(self, step: int | Tensor, steps: int) -> tuple[int | Tensor, int]:
        return step * self.generations % steps, steps

    def refresh_due(self, step: int) -> bool:
        """Whether a generation begins, but the first."""
        return step > 0 and step * self.generations // self.steps > (step - 1) * self.generations // self.steps

    def refresh(self, context: RefreshContext) -> NewGeneration:
        if self.alignment is not None:
            self.alignment.restart()
        confidence, predicted = context.predict_rows(
            self.averaged, context.unlabeled, lambda _, logits: logits.softmax(1).max(1)
        )
        slots, classes = select(confidence, predicted, self.fractions)
        own = slice(self.num_labeled)  # the original labeled set comes first in that of every generation
        return NewGeneration(
            torch.cat([context.labeled[own], context.unlabeled[slots]]), torch.cat([context.labels[own], classes])
        )


def selected_fractions(labeled_counts: list[int], alpha: float) -> list[float]:
    """mu_k of each class, by the rank of its count; among equal counts the first class ranks higher."""
    order = sorted(range(len(labeled_counts)), key=lambda k: -labeled_counts[k])
    mirrored = dict(zip(order, reversed(order), strict=True))
    return [(labeled_counts[mirrored[k]] / max(labeled_counts)) ** (1 / alpha) for k in range(len(order))]


def selected_fractions_by_index(labeled_counts: list[int], alpha: float) -> list[float]:
    """USB's mu_k, by the class's index."""
    last, ratio = len(labeled_counts) - 1, min(labeled_counts) / max(labeled_counts)
    return [ratio ** ((last - k) / (max(last, 1) * alpha)) for k in range(last + 1)]


def select(confidence: Tensor, classes: Tensor, fractions: list[float]) -> tuple[Tensor, Tensor]:
    """The most confident rows of each predicted class, as many as its fraction, rounded down.

    Args:
        confidence: float [M].
        classes: predicted, int64 [M].
        fractions: of each class, 0..1.

    Returns:
        Rows in ascending order, int64 [n], and their predicted classes, int64 [n].
    """
    order = confidence.argsort(descending=True, stable=True)
    chosen = []
    for k, fraction in enumerate(fractions):
        of_class = order[classes[order] == k]
        chosen.append(of_class[: math.floor(fraction * len(of_class) + 1e-9)])  # 1e-9 makes up for rounding
    slots = torch.cat(chosen).sort().values
    return slots, classes[slots]


def build(options: CReSTOptions, setup: Setup) -> CReST:
    pda = setup.parts.get("pda")
    return CReST(
        setup.data.labeled_counts,
        steps=setup.steps,
        generations=options.generations,
        alpha=options.alpha,
        t_min=None if pda is None else pda.t_min,
        momentum=setup.shared.distribution_momentum,
        usb_compat=setup.shared.usb_compat,
    )
