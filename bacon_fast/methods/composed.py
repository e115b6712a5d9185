"""Base learner, class balancer and contrastive regularizer on one forward of all views: the FixMatch family."""

from torch import Tensor, nn

from bacon_fast.losses.bacon import BaConLoss
from bacon_fast.methods.balancers.base import Balancer, Rows
from bacon_fast.methods.extended import ExtendedMethod, Phase
from bacon_fast.methods.gather import gather_batch, gather_views
from bacon_fast.methods.outputs import Batch, Outputs, StepOutput, step_output
from bacon_fast.methods.supervised import Supervised
from bacon_fast.models.network import Network


class ComposedMethod(ExtendedMethod):
    """One forward of all views together (`use_cat`: BatchNorm sees labeled, weak and strong rows), then the losses.

    Args:
        network: backbone and heads.
        base: Supervised, FixMatch, or FixMatchABC, which needs a network with a balanced head; called with
            (Outputs, Batch, step) it returns weighted losses, statistics and pseudo-labels.
        regularizer: BaConLoss, or None.
        balancer: what sets the targets of FixMatch, or None.
        steps: T, for BaCon's temperature schedule.
        lambda_con: weight of the regularizer's loss.
        contrast_start: fraction of T after which it is added.
    """

    def __init__(
        self,
        network: Network,
        base: nn.Module,
        regularizer: BaConLoss | None = None,
        balancer: Balancer | None = None,
        *,
        steps: int,
        lambda_con: float = 1.0,
        contrast_start: float = 0.5,
    ) -> None:
        super().__init__(
            network, balancer, regularizer, steps=steps, lambda_con=lambda_con, contrast_start=contrast_start
        )
        self.base = base
        if isinstance(base, Supervised):
            self.unlabeled_views = ()

    def forward(self, batch: Batch, step: Tensor, phase: Phase) -> StepOutput:
        sizes = batch.num_labeled, batch.num_unlabeled
        rows = [None if part is None else gather_views(part, *sizes) for part in self.network(batch.images)]
        averaged_features = self.averaged_features(batch, batch.view(0), batch.view(1), phase.balancer)
        batch = gather_batch(batch)
        out = Outputs(*rows, batch.num_labeled, batch.num_unlabeled)
        if self.balancer is None:
            losses, stats, pseudo_labels = self.base(out, batch, step)
        else:
            seen = Rows(
                out.weak_logits.detach().float(),
                out.weak(out.features).detach(),
                out.strong(out.features),
                averaged_features,
                batch,
            )
            targets = self.balancer(seen, step, phase.balancer)
            losses, stats, pseudo_labels = self.base(out, batch, step, targets)
            losses |= targets.losses
        if self.regularizer is not None:
            contrastive, more = self.regularizer(
                out.anchor_features,
                batch.labels,
                out.anchor_logits,
                batch.labeled_slots,
                batch.unlabeled_slots,
                progress=step / self.steps,
                active=phase.contrast,
            )
            losses["contrastive"] = self.lambda_con * contrastive
            stats |= more
        return step_output(losses, stats, pseudo_labels)
