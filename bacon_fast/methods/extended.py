"""A method with its additions: a class balancer, and a contrastive loss that starts late."""

from collections.abc import Hashable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from bacon_fast.methods.bacon import BaCon
from bacon_fast.methods.balancers.base import Balancer
from bacon_fast.methods.gather import gather_views
from bacon_fast.methods.method import Method, NewGeneration, RefreshContext
from bacon_fast.methods.outputs import Batch, wide
from bacon_fast.models.network import Network


class Phase(NamedTuple):
    """Program of a step: whether BaCon's loss is added yet, and the balancer's own phase.

    Before BaCon's loss is added, its projection has no gradient and is not decayed.
    """

    contrast: bool
    balancer: Hashable = None


class ExtendedMethod(Method):
    """Method with a balancer and a regularizer, either of which may be None. The balancer decides phase and refreshes.

    Args:
        network: backbone and heads.
        balancer: what sets the targets of the unlabeled rows.
        regularizer: BaCon's loss.
    """

    def __init__(self, network: Network, balancer: Balancer | None, regularizer: BaCon | None) -> None:
        super().__init__(network)
        self.balancer, self.regularizer = balancer, regularizer
        self.balanced_view = balancer is not None and balancer.balanced_view
        self.labeled_strong_view = balancer is not None and balancer.labeled_strong_view

    def bind(self, averaged: nn.Module) -> None:
        super().bind(averaged)
        if self.balancer is not None:
            self.balancer.bind(self.network, averaged)

    def check_images(self, height: int, width: int) -> None:
        if self.balancer is not None:
            self.balancer.check_images(height, width)

    def phase(self, step: int) -> Phase:
        contrast = self.regularizer is not None and self.regularizer.active(step)
        return Phase(contrast, None if self.balancer is None else self.balancer.phase(step))

    def schedule(self, step: int | Tensor, steps: int) -> tuple[int | Tensor, int]:
        return (step, steps) if self.balancer is None else self.balancer.schedule(step, steps)

    def refresh_due(self, step: int) -> bool:
        return self.balancer is not None and self.balancer.refresh_due(step)

    def refresh(self, context: RefreshContext) -> NewGeneration | None:
        return self.balancer.refresh(context)

    def own_pass(self, batch: Batch, phase: Phase) -> Tensor | None:
        """What the balancer needs of a pass of its own, before those of the step."""
        return None if self.balancer is None else self.balancer.own_pass(batch, phase.balancer)

    @torch.no_grad()
    def averaged_features(self, batch: Batch, weak: Tensor, strong: Tensor, phase: Hashable) -> Tensor | None:
        """Averaged features of the images that the balancer asks for, for the global batch."""
        images = None if self.balancer is None else self.balancer.averaged_images(batch, weak, strong, phase)
        if images is None:
            return None
        return gather_views(wide(self.averaged.backbone(images)), batch.num_labeled, batch.num_unlabeled)
