"""Base learner, class balancer and contrastive regularizer on one forward of all views: the FixMatch family."""

import torch
from torch import Tensor, nn

from bacon_fast.methods.bacon import BaCon
from bacon_fast.methods.balancers.base import Balancer, Rows
from bacon_fast.methods.extended import ExtendedMethod, Phase
from bacon_fast.methods.gather import gather_batch, gather_views
from bacon_fast.methods.outputs import Batch, Outputs, StepOutput, step_output, wide
from bacon_fast.models.network import Network


class ComposedMethod(ExtendedMethod):
    """One forward of all views together (`use_cat`: BatchNorm sees labeled, weak and strong rows), then the losses.

    Args:
        network: backbone and heads.
        base: Supervised, FixMatch, or FixMatchABC, which needs a network with a balanced head; called with
            (Outputs, Batch, step) it returns weighted losses, statistics and pseudo-labels. Its `unlabeled_views` are
            the method's.
        regularizer: BaCon's loss, or None.
        balancer: what sets the targets of FixMatch, or None.
    """

    mixes_images = False

    def __init__(
        self,
        network: Network,
        base: nn.Module,
        regularizer: BaCon | None = None,
        balancer: Balancer | None = None,
    ) -> None:
        super().__init__(network, balancer, regularizer)
        self.base = base
        self.unlabeled_views = base.unlabeled_views

    def forward(self, batch: Batch, step: Tensor, phase: Phase) -> StepOutput:
        sizes = batch.num_labeled, batch.num_unlabeled
        own = self.own_pass(batch, phase)
        images, labeled_strong = batch.images, None
        if batch.labeled_strong_images is not None:
            images = torch.cat([images, batch.labeled_strong_images])
        rows = self.network(images)
        if batch.labeled_strong_images is not None:
            labeled_strong = gather_views(rows[1][len(batch.images) :], batch.num_labeled, 0)
            rows = [None if part is None else part[: len(batch.images)] for part in rows]
        rows = [None if part is None else gather_views(part, *sizes) for part in rows]
        averaged_features = self.averaged_features(batch, batch.view(0), batch.view(1), phase.balancer)
        batch = gather_batch(batch)
        out = Outputs(*rows, batch.num_labeled, batch.num_unlabeled, labeled_strong)
        if self.balancer is None:
            losses, stats, pseudo_labels = self.base(out, batch, step)
        else:
            seen = Rows(
                wide(out.weak_logits.detach()),
                out.weak(out.features).detach(),
                out.strong(out.features),
                averaged_features,
                batch,
                own,
            )
            targets = self.balancer(seen, step, phase.balancer)
            losses, stats, pseudo_labels = self.base(out, batch, step, targets)
            losses |= targets.losses
        if self.regularizer is not None:
            contrastive, contrastive_stats = self.regularizer.contrast(out, batch, step, active=phase.contrast)
            losses, stats = losses | contrastive, stats | contrastive_stats
        return step_output(losses, stats, pseudo_labels)
