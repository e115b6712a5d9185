"""ReMixMatch as a base (methods.md D; Berthelot et al., ICLR 2020, arXiv 1911.09785), alone or with its additions.

The passes are as in the code of USB and of BaCon's authors. Each view and each mixed block goes through the network
alone, in training mode, with its own BatchNorm statistics; only the first mixed block updates the running ones.
"""

from collections.abc import Hashable, Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from bacon_fast.methods.abc import ABC
from bacon_fast.methods.alignment import DistributionAlignment
from bacon_fast.methods.bacon import BaCon
from bacon_fast.methods.balancers.base import Balancer, Rows
from bacon_fast.methods.extended import ExtendedMethod, Phase
from bacon_fast.methods.gather import gather_batch, gather_views, own_views
from bacon_fast.methods.method import NewGeneration, RefreshContext
from bacon_fast.methods.mixup import MixUp, draw_quarter_turns, mix, rotate
from bacon_fast.methods.outputs import Batch, Outputs, StepOutput, step_output, wide
from bacon_fast.methods.part import PartOptions, Setup
from bacon_fast.methods.powers import powers
from bacon_fast.models.batchnorm import frozen_statistics
from bacon_fast.models.heads import main_head
from bacon_fast.models.network import Network


@dataclass(frozen=True)
class ReMixMatchOptions(PartOptions):
    """ReMixMatch (methods.md D)."""

    part: ClassVar[str] = "remixmatch"
    unlabeled_ratio: ClassVar[int] = 1  # it mixes blocks of B rows with each other
    changes: ClassVar[Mapping[str, Mapping[str, object]]] = {
        "bacon": {"contrast_start": 1 / 30},
        "cdmad": {"start": 50_500 / 150_000},
    }

    lambda_u: float = 1.5
    """Weight of the unlabeled loss."""
    lambda_kl: float = 0.5
    """Weight of the first strong view's loss against the weak view's targets."""
    lambda_rot: float = 0.5
    """Weight of the rotation task."""
    rampup: float = 1 / 64
    """Fraction of the run in which lambda_u and lambda_kl rise from 0."""
    sharpening: float = 0.5
    """Temperature of the targets."""
    mixup_alpha: float = 0.75
    """MixUp's coefficient is drawn from Beta(alpha, alpha)."""

    def check(self) -> None:
        self.require_weights("lambda_u", "lambda_kl", "lambda_rot")
        self.require_positive("rampup", "sharpening", "mixup_alpha")

    def idle_on_frozen_features(self) -> str:
        reason = "whose rotation task would train its own head alone (--remixmatch.lambda-rot 0 leaves it out)"
        return reason if self.lambda_rot else ""


class ReMixMatch(ExtendedMethod):
    """MixUp of all views towards aligned, sharpened predictions, and a rotation task.

    Args:
        network: backbone and heads.
        labeled_counts: N_c, int [K]; their frequencies are what predictions are aligned to.
        steps: T.
        seed: of MixUp and rotations.
        lambda_u, lambda_kl, lambda_rot: weights of the mixed unlabeled rows, the first strong view, the rotations.
        rampup: share of T in which the first two of these rise from 0.
        sharpening: temperature of the targets.
        mixup_alpha: of Beta(alpha, alpha).
        alignment_momentum: of the average prediction.
        abc: ABC on the network's balanced head, or None.
        regularizer: BaCon's loss, or None.
        balancer: CDMAD, CoSSL, CReST, DARP or DASO, or None. Of its `Targets` only probabilities and losses are used.
    """

    # MixUp's order, after the labeled rows.
    unlabeled_views = ("strong", "strong", "weak")

    def __init__(
        self,
        network: Network,
        labeled_counts: Tensor,
        *,
        steps: int,
        seed: int,
        lambda_u: float,
        lambda_kl: float,
        lambda_rot: float,
        rampup: float,
        sharpening: float,
        mixup_alpha: float,
        alignment_momentum: float,
        abc: ABC | None = None,
        regularizer: BaCon | None = None,
        balancer: Balancer | None = None,
    ) -> None:
        super().__init__(network, balancer, regularizer)
        self.abc, self.steps = abc, steps
        self.rotation_head = main_head(network.backbone.num_features, 4)
        self.alignment = DistributionAlignment(labeled_counts / labeled_counts.sum(), alignment_momentum)
        self.mixup = MixUp(mixup_alpha, seed)
        self.seed, self.rampup, self.sharpening = seed, rampup, sharpening
        self.lambda_u, self.lambda_kl, self.lambda_rot = lambda_u, lambda_kl, lambda_rot

    def refresh(self, context: RefreshContext) -> NewGeneration | None:
        new = super().refresh(context)
        if new is not None:
            self.alignment.restart()
        return new

    def forward(self, batch: Batch, step: Tensor, phase: Phase) -> StepOutput:
        sizes = rows, _ = batch.num_labeled, batch.num_unlabeled
        if rows != batch.num_unlabeled:
            raise ValueError(f"batch: expected as many unlabeled rows as labeled ones, {rows}, found {sizes[1]}")
        labeled, strong, _, weak = batch.images.split(rows)
        averaged_features = self.averaged_features(batch, weak, strong, phase.balancer)
        own = self.own_pass(batch, phase)
        images, batch = gather_views(batch.images, *sizes), gather_batch(batch)

        # 1: the weak views.
        with torch.no_grad(), frozen_statistics(self.network):
            weak_out = self.network(weak)

        # 3: the views as they are. Statistics are frozen, so a pass that nothing uses can be left out: the second
        # strong view's, and without ABC and BaCon the labeled one's.
        with frozen_statistics(self.network):
            strong_out = self.network(strong)
            needed = self.abc is not None or self.regularizer is not None
            labeled_out = self.network(labeled) if needed else None

        # 2: targets.
        logits, seen = wide(gather_views(weak_out[1], 0, rows)), None
        if self.balancer is not None:
            features = (gather_views(part[0], 0, rows) for part in (weak_out, strong_out))
            seen = Rows(logits, *features, averaged_features, batch, own)
        targets, balancing = self._targets(logits, seen, step, phase.balancer)

        # 4: all rows of all views mixed with each other, then block by block through the network.
        coefficient, permutation = self.mixup.draw(len(images), step)
        one_hot = (batch.labels[:, None] == torch.arange(targets.shape[1], device=targets.device)).to(targets.dtype)
        mixed_targets = mix(torch.cat([one_hot, targets, targets, targets]), coefficient, permutation)
        first, *others = own_views(mix(images, coefficient, permutation), *sizes).split(rows)
        mixed_logits = [self.network(first)[1]]
        with frozen_statistics(self.network):
            mixed_logits += [self.network(block)[1] for block in others]
        mixed_logits = wide(gather_views(torch.cat(mixed_logits), *sizes))

        # The rotation task: by how much was the first strong view turned?
        turns = draw_quarter_turns(batch.num_unlabeled, self.seed, step)
        with frozen_statistics(self.network):
            rotated_features = self.network(rotate(strong, own_views(turns, 0, rows)))[0]
        rotation_logits = wide(gather_views(self.rotation_head(rotated_features), 0, rows))

        # 5: soft targets, means over rows, no threshold.
        done, steps = self.schedule(step, self.steps)
        split, ramp = batch.num_labeled, (done / (self.rampup * steps)).clamp(max=1)
        losses = {
            "supervised": F.cross_entropy(mixed_logits[:split], mixed_targets[:split]),
            "unsupervised": self.lambda_u * ramp * F.cross_entropy(mixed_logits[split:], mixed_targets[split:]),
            "unmixed": self.lambda_kl * ramp * F.cross_entropy(wide(gather_views(strong_out[1], 0, rows)), targets),
            "rotation": self.lambda_rot * F.cross_entropy(rotation_logits, turns),
        } | balancing
        pseudo_labels = targets.argmax(1)
        known = batch.true_labels >= 0
        stats = {
            "pseudo_known": known.sum().float(),
            "pseudo_correct": (known & (pseudo_labels == batch.true_labels)).sum().float(),
        }
        if labeled_out is None:
            return step_output(losses, stats, pseudo_labels)

        # ABC and BaCon see passes 1 and 3, so the features of weak rows have no graph.
        views = zip(labeled_out, weak_out, strong_out, strict=True)
        joined = [None if view[0] is None else gather_views(torch.cat(view), *sizes) for view in views]
        out = Outputs(*joined, batch.num_labeled, batch.num_unlabeled)
        if self.abc is not None:
            abc_losses, abc_stats = self.abc(out, batch, step)
            losses, stats = losses | abc_losses, stats | abc_stats
        if self.regularizer is not None:
            contrastive, contrastive_stats = self.regularizer.contrast(out, batch, step, active=phase.contrast)
            losses, stats = losses | contrastive, stats | contrastive_stats
        return step_output(losses, stats, pseudo_labels)

    def _targets(
        self, logits: Tensor, seen: Rows | None, step: Tensor, phase: Hashable
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Targets [U,K] of the unlabeled rows from the weak views' logits [U,K], and the balancer's losses."""
        probabilities, losses, balancer = logits.softmax(1), {}, self.balancer
        if balancer is not None and not balancer.on_targets:
            balanced = balancer(seen, step, phase)
            probabilities, losses = balanced.probabilities, balanced.losses
        if balancer is None or not balancer.aligns:
            probabilities = self.alignment(probabilities)
        targets = powers(probabilities, 1 / self.sharpening)
        targets = targets / targets.sum(1, keepdim=True)
        if balancer is not None and balancer.on_targets:
            balanced = balancer(replace(seen, weak_logits=targets.log()), step, phase)
            targets, losses = balanced.probabilities, balanced.losses
        return targets, losses


def build(
    options: ReMixMatchOptions,
    setup: Setup,
    network: Network,
    balancer: Balancer | ABC | None = None,
    regularizer: BaCon | None = None,
) -> ReMixMatch:
    abc = balancer if isinstance(balancer, ABC) else None
    return ReMixMatch(
        network,
        setup.data.labeled_counts,
        steps=setup.steps,
        seed=setup.seed,
        lambda_u=options.lambda_u,
        lambda_kl=options.lambda_kl,
        lambda_rot=options.lambda_rot,
        rampup=options.rampup,
        sharpening=options.sharpening,
        mixup_alpha=options.mixup_alpha,
        alignment_momentum=setup.shared.distribution_momentum,
        abc=abc,
        regularizer=regularizer,
        balancer=None if abc is not None else balancer,
    )
