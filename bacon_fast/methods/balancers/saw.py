"""SAW, smoothed adaptive weighting (methods.md H; Lai, Wang, Gunawan, Cheung, Chuah, ICML 2022)."""

from collections.abc import Hashable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from bacon_fast.methods.balancers.base import Balancer, Rows, Targets
from bacon_fast.methods.method import RefreshContext
from bacon_fast.methods.part import PartOptions, Setup


@dataclass(frozen=True)
class SAWOptions(PartOptions):
    """SAW has no options of its own; --epochs sets how often it counts."""

    part: ClassVar[str] = "saw"


class SAW(Balancer):
    """Weights rows by the effective number of samples of their class, labeled ones and pseudo-labeled ones.

        L_s = mean_b w_y CE;   L_u = mean_j w_yhat m_j CE

    The labeled weights come from the labeled counts. The unlabeled ones come from how many unlabeled images the
    averaged network predicts as each class, at least 1, counted at the start of each epoch but the first, which is
    uniform. USB does the same.

    Args:
        labeled_counts: N_c, int [K].
        steps, epochs: T and E; an epoch is T/E steps.

    Buffers:
        unlabeled_weights: float32 [K].
    """

    def __init__(self, labeled_counts: Tensor, *, steps: int, epochs: int) -> None:
        super().__init__()
        self.steps, self.epochs = steps, epochs
        self.register_buffer("labeled_weights", effective_number_weights(labeled_counts), persistent=False)
        self.register_buffer("unlabeled_weights", torch.ones(len(labeled_counts)))

    def forward(self, rows: Rows, step: Tensor, phase: Hashable) -> Targets:
        return Targets(
            rows.weak_logits.softmax(1),
            labeled_weights=self.labeled_weights,
            unlabeled_weights=self.unlabeled_weights,
        )

    def refresh_due(self, step: int) -> bool:
        return step > 0 and step * self.epochs // self.steps > (step - 1) * self.epochs // self.steps

    def refresh(self, context: RefreshContext) -> None:
        (classes,) = context.predict_rows(self.averaged, context.unlabeled, lambda _, logits: (logits.argmax(1),))
        counts = classes.bincount(minlength=len(self.unlabeled_weights))
        self.unlabeled_weights.copy_(effective_number_weights(counts))


def effective_number_weights(counts: Tensor) -> Tensor:
    """Class weights w_c in proportion to (1 - beta) / (1 - beta^n_c), beta = 1 - 1/mean n, with sum K: float32 [K].

    Counts int [K] below 1 are taken as 1 (Cui et al., "Class-balanced loss based on effective number of samples", CVPR
    2019, with the mean count in the place of the hyper-parameter N).
    """
    counts = counts.clamp_min(1).double()
    beta = 1 - 1 / counts.mean()
    weights = (1 - beta) / (1 - beta**counts)
    return (weights * len(counts) / weights.sum()).float()


def build(options: SAWOptions, setup: Setup) -> SAW:
    return SAW(setup.data.labeled_counts, steps=setup.steps, epochs=setup.shared.epochs)
