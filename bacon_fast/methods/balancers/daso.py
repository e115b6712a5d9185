"""DASO, distribution-aware semantics-oriented pseudo-labels (methods.md H; Oh, Kim, Kweon, CVPR 2022)."""

from collections.abc import Hashable
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from bacon_fast.methods.balancers.base import Balancer, Rows, Targets
from bacon_fast.methods.balancers.feature_queue import FeatureQueue
from bacon_fast.methods.outputs import Batch
from bacon_fast.methods.part import PartOptions, Setup
from bacon_fast.methods.powers import powers


@dataclass(frozen=True)
class DASOOptions(PartOptions):
    """DASO (methods.md H)."""

    part: ClassVar[str] = "daso"

    start: float = 0.02
    """Fraction of the run after which it acts (authors: 5,000 of 250,000 steps)."""
    t_dist: float = 1.5
    """T_dist: 1.5 where unlabeled classes are distributed as the labeled ones, else 0.3 (CIFAR-10)."""

    def check(self) -> None:
        self.require_starts("start")
        self.require_positive("t_dist")


class DASO(Balancer):
    """Blends the classifier's prediction with the similarity to class prototypes, the more the commoner the prediction.

        q = softmax(cos(h^w, c) / T_proto);   v = m^(1/T_dist) / max;   k' = argmax p
        p' = (1 - v_k') p + v_k' q;           L_align = mean CE(cos(h^s, c) / T_proto, q)

    c_k is the mean of the latest averaged features of labeled images of class k; a class without one counts as having
    cosine -1. m is how often each class was the final pseudo-label, confident or not, counted anew every `interval`
    steps and at `start`; 1/K before the first count. p' gives confidence and pseudo-label. Before `start` p' is p, and
    there is no L_align.

    USB's code (semilearn 0.3.0 to 0.3.2, whose DASO is one) differs, and `usb_rows` brings that back: q in p' is that
    of the previous batch, so of other images; p gives the confidence; L_align begins one step before p'; there is no
    count at `start`, only every `interval` steps; a class without features has cosine 0.

    Args:
        num_classes: K.
        num_features: F.
        start: completed steps from which p' and L_align are used.
        t_dist: T_dist: 1.5 where the unlabeled images are distributed as the labeled ones, else 0.3 (CIFAR-10).
        t_proto: T_proto.
        queue_length: features kept for each class.
        interval: steps between counts.
        lambda_align: weight of L_align.
        usb_rows: None, or U, unlabeled rows a step, to do as USB's code.

    Buffers:
        distribution: m, float32 [K]; counts: int64 [K], since the last count; the queue's buffers; with `usb_rows`
        previous_q: float32 [U,K].
    """

    on_targets = True

    def __init__(
        self,
        num_classes: int,
        num_features: int,
        *,
        start: int,
        t_dist: float,
        t_proto: float = 0.05,
        queue_length: int = 256,
        interval: int = 100,
        lambda_align: float = 1.0,
        usb_rows: int | None = None,
    ) -> None:
        super().__init__()
        self.start, self.t_dist, self.t_proto = start, t_dist, t_proto
        self.interval, self.lambda_align = interval, lambda_align
        self.queue = FeatureQueue(num_classes, num_features, queue_length)
        self.register_buffer("distribution", torch.full((num_classes,), 1 / num_classes))
        self.register_buffer("counts", torch.zeros(num_classes, dtype=torch.int64))
        self.usb = usb_rows is not None
        self.align_start = start - 1 if self.usb else start
        if self.usb:
            self.register_buffer("previous_q", torch.full((usb_rows, num_classes), 1 / num_classes))

    def averaged_images(self, batch: Batch, weak: Tensor, strong: Tensor, phase: Hashable) -> Tensor:
        return batch.labeled_images

    def phase(self, step: int) -> tuple[bool, bool]:
        """Whether L_align and p' are used."""
        return step >= self.align_start, step >= self.start

    def forward(self, rows: Rows, step: Tensor, phase: tuple[bool, bool]) -> Targets:
        self.queue.enqueue(rows.averaged_features, rows.batch.labels)
        predicted = rows.weak_logits.softmax(1)
        aligns, blends = phase
        targets = self._act(rows, predicted, blends) if aligns else Targets(predicted)
        self._count(targets.probabilities.argmax(1), step)
        return targets

    def _act(self, rows: Rows, predicted: Tensor, blends: bool) -> Targets:
        prototypes, present = self.queue.prototypes()
        with torch.no_grad():
            q = self._similarity(rows.weak_features, prototypes, present).softmax(1)
            blended = self._blend(predicted, self.previous_q.clone() if self.usb else q) if blends else predicted
            if self.usb:
                self.previous_q.copy_(q)
        align = F.cross_entropy(self._similarity(rows.strong_features, prototypes, present), q)
        return Targets(
            blended,
            confidence=predicted.amax(1) if self.usb else None,
            losses={"align": self.lambda_align * align},
        )

    def _blend(self, predicted: Tensor, semantic: Tensor) -> Tensor:
        share = powers(self.distribution, 1 / self.t_dist)
        weight = (share / share.max())[predicted.argmax(1)][:, None]
        return (1 - weight) * predicted + weight * semantic

    def _similarity(self, features: Tensor, prototypes: Tensor, present: Tensor) -> Tensor:
        with torch.autocast(features.device.type, enabled=False):
            cosine = F.normalize(features.float()) @ F.normalize(prototypes).T
        return torch.where(present, cosine, 0 if self.usb else -1) / self.t_proto

    @torch.no_grad()
    def _count(self, pseudo_labels: Tensor, step: Tensor) -> None:
        self.counts.scatter_add_(0, pseudo_labels, torch.ones_like(pseudo_labels))
        completed = step + 1
        due = completed % self.interval == 0
        if not self.usb:
            due = due | (completed == self.start)
        self.distribution.copy_(torch.where(due, self.counts / self.counts.sum(), self.distribution))
        self.counts.masked_fill_(due, 0)


def build(options: DASOOptions, setup: Setup) -> DASO:
    return DASO(
        setup.data.num_classes,
        setup.num_features,
        start=round(options.start * setup.steps),
        t_dist=options.t_dist,
        usb_rows=setup.unlabeled_rows if setup.shared.usb_compat else None,
    )
