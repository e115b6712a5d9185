"""The tensors of one step, by view."""

import functools
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from bacon_fast.reference.values import accumulator_dtype


@dataclass(frozen=True)
class Batch:
    """One step's input: images float [B + V*U, 3, H, W], labeled rows first, then the U rows of each of V views.

    labels int64 [B]; labeled_slots int64 [B] and unlabeled_slots int64 [U], positions in the two sets of the split;
    true_labels int64 [U], -1 where unknown, for diagnostics only. A supervised batch has U = 0 and no views.

    balanced_images [B, 3, H, W], strong views of labeled images drawn class by class, with balanced_labels int64 [B],
    for methods with a `balanced_view`. labeled_strong_images [B, 3, H, W], strong views of the labeled rows themselves,
    for methods with a `labeled_strong_view`.
    """

    images: Tensor
    labels: Tensor
    labeled_slots: Tensor
    unlabeled_slots: Tensor
    true_labels: Tensor
    balanced_images: Tensor | None = None
    balanced_labels: Tensor | None = None
    labeled_strong_images: Tensor | None = None

    @property
    def num_labeled(self) -> int:
        return len(self.labels)

    @property
    def num_unlabeled(self) -> int:
        return len(self.unlabeled_slots)

    @property
    def labeled_images(self) -> Tensor:
        return self.images[: self.num_labeled]

    def view(self, index: int) -> Tensor:
        """Images [U, 3, H, W] of unlabeled view `index`, in the order of the method's `unlabeled_views`."""
        start = self.num_labeled + index * self.num_unlabeled
        return self.images[start : start + self.num_unlabeled]


def wide(values: Tensor) -> Tensor:
    """The same values in at least float32: a network under autocast may return half precision."""
    return values.to(accumulator_dtype(values.dtype))


class StepOutput(NamedTuple):
    """What a method computes in one step.

    total: the loss to descend, 0-d float32. losses: its weighted terms, "total" first, detached. stats: values to log,
    0-d. pseudo_labels: int64 [U], the class each unlabeled row was trained towards, -1 where none; None for a method
    without pseudo-labels. For diagnostics only.
    """

    total: Tensor
    losses: dict[str, Tensor]
    stats: dict[str, Tensor]
    pseudo_labels: Tensor | None


def weighted(weight: float, loss: Tensor) -> Tensor:
    """weight · loss; at weight 1 the loss itself, as every operation of a step is a launch on a GPU."""
    return loss if weight == 1 else weight * loss


def step_output(losses: dict[str, Tensor], stats: dict[str, Tensor], pseudo_labels: Tensor | None) -> StepOutput:
    """The output of a step whose total is the sum of `losses`, already weighted."""
    total = functools.reduce(torch.add, losses.values())
    return StepOutput(
        total, {"total": total.detach(), **{k: v.detach() for k, v in losses.items()}}, stats, pseudo_labels
    )


@dataclass(frozen=True)
class Outputs:
    """The network's answer to a batch of FixMatch's views (labeled, weak, then V strong ones, mostly one).

    features [B+(1+V)U, F], main and (None without a balanced head) auxiliary logits [B+(1+V)U, K].

    labeled_strong_logits [B, K], the main head's on strong views of the labeled rows, or None.
    """

    features: Tensor
    logits: Tensor
    balanced: Tensor | None
    num_labeled: int
    num_unlabeled: int
    labeled_strong_logits: Tensor | None = None

    def labeled(self, rows: Tensor) -> Tensor:
        """The labeled part of `features`, `logits` or `balanced`."""
        return rows[: self.num_labeled]

    def weak(self, rows: Tensor) -> Tensor:
        """The weak views' part."""
        return rows[self.num_labeled : self.num_labeled + self.num_unlabeled]

    def strong(self, rows: Tensor) -> Tensor:
        """The strong views' part, view by view."""
        return rows[self.num_labeled + self.num_unlabeled :]

    @property
    def labeled_logits(self) -> Tensor:
        return self.labeled(self.logits)

    @property
    def weak_logits(self) -> Tensor:
        return self.weak(self.logits)

    @property
    def strong_logits(self) -> Tensor:
        return self.strong(self.logits)

    @property
    def anchor_features(self) -> Tensor:
        """Labeled and weak unlabeled rows: BaCon's anchors (methods.md E.2)."""
        return self.features[: self.num_labeled + self.num_unlabeled]

    @property
    def anchor_logits(self) -> Tensor:
        """Logits of the anchors from the evaluated head: the auxiliary one where there is one."""
        logits = self.logits if self.balanced is None else self.balanced
        return logits[: self.num_labeled + self.num_unlabeled]
