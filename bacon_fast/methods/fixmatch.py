"""FixMatch (methods.md B; Sohn et al., NeurIPS 2020)."""

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bacon_fast.methods.abc import ABC
from bacon_fast.methods.bacon import BaCon
from bacon_fast.methods.balancers.base import Balancer, Targets
from bacon_fast.methods.composed import ComposedMethod
from bacon_fast.methods.fixmatch_abc import FixMatchABC
from bacon_fast.methods.outputs import Batch, Outputs, weighted
from bacon_fast.methods.part import PartOptions, Setup
from bacon_fast.models.network import Network


@dataclass(frozen=True)
class FixMatchOptions(PartOptions):
    """FixMatch (methods.md B)."""

    part: ClassVar[str] = "fixmatch"
    runs_on_length: ClassVar[bool] = False

    lambda_u: float = 1.0
    """Weight of the unlabeled loss."""

    def check(self) -> None:
        self.require_weights("lambda_u")


class FixMatch(nn.Module):
    """Cross entropy on labels, and on the strong views against confident hard pseudo-labels of the weak views.

    Args:
        threshold: confidence from which a pseudo-label counts.
        lambda_u: weight of the unlabeled loss.
    """

    unlabeled_views = ("weak", "strong")

    def __init__(self, *, threshold: float, lambda_u: float) -> None:
        super().__init__()
        self.threshold, self.lambda_u = threshold, lambda_u

    def forward(
        self, out: Outputs, batch: Batch, step: Tensor, targets: Targets | None = None
    ) -> tuple[dict[str, Tensor], dict[str, Tensor], Tensor]:
        """Losses `supervised` and `unsupervised`, 0-d float32; statistics; pseudo-labels int64 [U], -1 for none.

        `targets` is a balancer's answer; None: the softmax of the weak views.
        """
        if targets is None:
            targets = Targets(out.weak_logits.detach().float().softmax(1))
        confidence, pseudo_labels = targets.probabilities.max(1)
        mask = (confidence if targets.confidence is None else targets.confidence) >= self.threshold
        strong_logits = out.strong_logits.float()
        if targets.strong_bias is not None:
            strong_logits = strong_logits + targets.strong_bias
        # Means over the rows: not divided by weights, nor by the number of confident rows (none gives exactly 0).
        labeled = F.cross_entropy(
            out.labeled_logits.float(), batch.labels, weight=targets.labeled_weights, reduction="none"
        )
        unlabeled = F.cross_entropy(strong_logits, pseudo_labels, weight=targets.unlabeled_weights, reduction="none")
        losses = {"supervised": labeled.mean(), "unsupervised": weighted(self.lambda_u, (unlabeled * mask).mean())}
        stats = pseudo_label_stats(mask, pseudo_labels, batch.true_labels)
        return losses, stats, torch.where(mask, pseudo_labels, -1)


def pseudo_label_stats(mask: Tensor, pseudo_labels: Tensor, true_labels: Tensor) -> dict[str, Tensor]:
    """Rate of confident rows; how many of them have a known true label, and how many of those are right."""
    known = mask & (true_labels >= 0)
    return {
        "pseudo_rate": mask.float().mean(),
        "pseudo_known": known.sum().float(),
        "pseudo_correct": (known & (pseudo_labels == true_labels)).sum().float(),
    }


def build(
    options: FixMatchOptions,
    setup: Setup,
    network: Network,
    balancer: Balancer | ABC | None = None,
    regularizer: BaCon | None = None,
) -> ComposedMethod:
    if isinstance(balancer, ABC):
        return ComposedMethod(network, FixMatchABC(balancer, lambda_u=options.lambda_u), regularizer)
    base = FixMatch(threshold=setup.shared.threshold, lambda_u=options.lambda_u)
    return ComposedMethod(network, base, regularizer, balancer)
