"""Base learner, class balancer and contrastive regularizer on one forward of all views: the FixMatch family."""

from collections.abc import Hashable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from bacon_fast.losses.bacon import BaConLoss
from bacon_fast.methods.balancer import Balancer, Rows
from bacon_fast.methods.gather import gather_batch, gather_views
from bacon_fast.methods.method import Method, NewGeneration, RefreshContext
from bacon_fast.methods.outputs import Batch, Outputs, StepOutput, step_output
from bacon_fast.methods.supervised import Supervised
from bacon_fast.models.network import Network


class Phase(NamedTuple):
    """Whether BaCon's loss is added yet (before, the projection has no gradient at all and is not decayed), and the
    balancer's own phase.
    """

    contrast: bool
    balancer: Hashable = None


class ComposedMethod(Method):
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
        super().__init__(network)
        self.base, self.regularizer, self.balancer = base, regularizer, balancer
        self.steps, self.lambda_con, self.contrast_start = steps, lambda_con, contrast_start
        self.balanced_view = balancer is not None and balancer.balanced_view
        if isinstance(base, Supervised):
            self.unlabeled_views = ()

    def bind(self, averaged: nn.Module) -> None:
        super().bind(averaged)
        if self.balancer is not None:
            self.balancer.bind(self.network, averaged)

    def phase(self, step: int) -> Phase:
        contrast = self.regularizer is not None and step > self.contrast_start * self.steps
        return Phase(contrast, None if self.balancer is None else self.balancer.phase(step))

    def schedule(self, step: int | Tensor, steps: int) -> tuple[int | Tensor, int]:
        return (step, steps) if self.balancer is None else self.balancer.schedule(step, steps)

    def refresh_due(self, step: int) -> bool:
        return self.balancer is not None and self.balancer.refresh_due(step)

    def refresh(self, context: RefreshContext) -> NewGeneration | None:
        return self.balancer.refresh(context)

    def forward(self, batch: Batch, step: Tensor, phase: Phase) -> StepOutput:
        sizes = batch.num_labeled, batch.num_unlabeled
        rows = [None if part is None else gather_views(part, *sizes) for part in self.network(batch.images)]
        averaged_features = self._averaged_features(batch, phase.balancer)
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

    @torch.no_grad()
    def _averaged_features(self, batch: Batch, phase: Hashable) -> Tensor | None:
        """Features by the averaged backbone of the images the balancer asks for: float32, of the global batch."""
        images = None if self.balancer is None else self.balancer.averaged_images(batch, phase)
        if images is None:
            return None
        return gather_views(self.averaged.backbone(images).float(), batch.num_labeled, batch.num_unlabeled)
