"""Logit adjustment (methods.md H; Menon et al., "Long-tail learning via logit adjustment", ICLR 2021)."""

from collections.abc import Hashable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from bacon_fast.methods.balancers.base import Balancer, Rows, Targets
from bacon_fast.methods.part import PartOptions, Setup


@dataclass(frozen=True)
class LAOptions(PartOptions):
    """Logit adjustment (methods.md H)."""

    part: ClassVar[str] = "la"
    runs_on_length: ClassVar[bool] = False

    tau: float = 1.0
    """Strength of the adjustment: 1 makes it consistent for the balanced error."""

    def check(self) -> None:
        self.require_weights("tau")


class LogitAdjustment(Balancer):
    """The prior of the labeled set is added to their logits within the loss: the logits themselves become balanced.

        loss of a labeled row (x, y): CE(a(h) + tau log pi, y),   pi_c = N_c / sum N

    This is the paper's equation 10. It knows labeled rows only. On FixMatch the unlabeled loss stays as it is: the
    pseudo-labels are the balanced logits', and the prior of the unlabeled rows is not known.

    Args:
        labeled_counts: N_c, int [K], all at least 1.
        tau: strength.

    Buffers:
        bias: tau log pi, float32 [K].

    Raises:
        ValueError: a class without labeled images, whose logit would be adjusted by minus infinity.
    """

    def __init__(self, labeled_counts: Tensor, *, tau: float) -> None:
        super().__init__()
        if (labeled_counts < 1).any():
            empty = torch.nonzero(labeled_counts < 1).flatten().tolist()
            raise ValueError(f"labeled_counts: expected at least one labeled image per class, found none for {empty}")
        prior = labeled_counts.double() / labeled_counts.sum()
        self.register_buffer("bias", (tau * prior.log()).float(), persistent=False)  # derived from the split

    @torch.no_grad()
    def forward(self, rows: Rows, step: Tensor, phase: Hashable) -> Targets:
        return Targets(rows.weak_logits.softmax(1), labeled_bias=self.bias)


def build(options: LAOptions, setup: Setup) -> LogitAdjustment:
    return LogitAdjustment(setup.data.labeled_counts, tau=options.tau)
