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
from bacon_fast.methods.outputs import Batch, Outputs, weighted, wide
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
    """Cross entropy on labels, and on the strong views against confident pseudo-labels of the weak views: hard ones,
    unless a balancer says otherwise.

    Args:
        threshold: confidence from which a pseudo-label counts.
        lambda_u: weight of the unlabeled loss.
        strong_views: V, strong views of each unlabeled image.
    """

    def __init__(self, *, threshold: float, lambda_u: float, strong_views: int = 1) -> None:
        super().__init__()
        self.threshold, self.lambda_u, self.strong_views = threshold, lambda_u, strong_views
        self.unlabeled_views = ("weak", *["strong"] * strong_views)

    def forward(
        self, out: Outputs, batch: Batch, step: Tensor, targets: Targets | None = None
    ) -> tuple[dict[str, Tensor], dict[str, Tensor], Tensor]:
        """Losses `supervised` and `unsupervised`, 0-d float32; statistics; pseudo-labels int64 [U], -1 for none.

        `targets` is a balancer's answer; None: the softmax of the weak views.
        """
        if targets is None:
            targets = Targets(wide(out.weak_logits.detach()).softmax(1))
        confidence, pseudo_labels = targets.probabilities.max(1)
        mask = (confidence if targets.confidence is None else targets.confidence) >= self.threshold
        labeled_logits, labels, strong_logits = wide(out.labeled_logits), batch.labels, wide(out.strong_logits)
        if out.labeled_strong_logits is not None:
            labeled_logits, labels = torch.cat([labeled_logits, wide(out.labeled_strong_logits)]), labels.repeat(2)
        if targets.labeled_bias is not None:
            labeled_logits = labeled_logits + targets.labeled_bias
        if targets.strong_bias is not None:
            strong_logits = strong_logits + targets.strong_bias
        # Means over the rows: not divided by weights, nor by the number of confident rows (none gives exactly 0).
        labeled = F.cross_entropy(labeled_logits, labels, weight=targets.labeled_weights, reduction="none")
        aims = self._by_view(targets.probabilities if targets.soft else pseudo_labels)
        unlabeled = F.cross_entropy(strong_logits, aims, weight=targets.unlabeled_weights, reduction="none")
        unsupervised = (unlabeled * self._by_view(mask)).mean()
        losses = {"supervised": labeled.mean(), "unsupervised": weighted(self.lambda_u, unsupervised)}
        stats = pseudo_label_stats(mask, pseudo_labels, batch.true_labels)
        return losses, stats, torch.where(mask, pseudo_labels, -1)

    def _by_view(self, rows: Tensor) -> Tensor:
        """Rows [U, ...] once for each strong view: [VU, ...]."""
        return rows if self.strong_views == 1 else torch.cat([rows] * self.strong_views)


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
    threshold, strong_views = setup.shared.threshold, 1
    if balancer is not None:
        threshold = threshold if balancer.threshold is None else balancer.threshold
        strong_views = balancer.strong_views
    base = FixMatch(threshold=threshold, lambda_u=options.lambda_u, strong_views=strong_views)
    return ComposedMethod(network, base, regularizer, balancer)
