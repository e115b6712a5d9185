"""BaCon as a part of a method: its loss on the rows of a step, with its weight and its start (methods.md E)."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from bacon_fast.losses.bacon import BaConLoss
from bacon_fast.methods.outputs import Batch, Outputs, weighted
from bacon_fast.methods.part import PartOptions, Setup


@dataclass(frozen=True)
class BaConOptions(PartOptions):
    """BaCon (methods.md E); losses/bacon.py explains each. A default of None is the variant's."""

    part: ClassVar[str] = "bacon"
    operation: ClassVar[str] = "bacon_loss"

    lambda_con: float = 1.0
    """Weight of the contrastive loss."""
    contrast_start: float = 0.5
    """Fraction of the run after which the loss is added."""
    variant: Literal["fixed", "official", "blog"] = "fixed"
    """The specification, the released code, or the copied listing."""
    neg_mode: Literal["authors", "paper"] | None = None
    """One denominator for the anchors of a class (authors), or for each (paper)."""
    proj_dim: int = 32
    """D, width of the contrastive space."""
    proj_layers: int = 1
    """Linear layers of the projection head; 0: none."""
    temperature: float | None = None
    """tau of the negatives, and upper bound of the class temperatures."""
    bta: float | None = None
    """eta, strength of the balanced temperature adjustment; 0: off."""
    negative_weight: float | None = None
    """Lambda: how many negatives the mean negative stands for."""
    top_k: int = 3
    """An image is no negative of its top k classes; 1: no such selection."""
    reliable_threshold: float = 0.98
    """Confidence from which a feature enters the memory bank."""
    centers: Literal["bank", "batch"] = "bank"
    """Class centers: means over the bank or the batch (ablation)."""
    count_gate: Literal["prob", "logit"] | None = None
    """Compare --threshold with the largest probability or logit."""
    labeled_counts: Literal["always", "with_pseudo"] | None = None
    """Count labeled images always, or beside a selected unlabeled one."""
    center_slots: Literal["written", "selected"] | None = None
    """A center averages the slots with a feature, or all selected ones."""

    def check(self) -> None:
        self.require_weights("lambda_con", "bta")
        self.require_fractions("contrast_start", "reliable_threshold")
        self.require_integers(1, "proj_dim", "top_k")
        self.require(self.proj_layers in (0, 1, 2), "proj_layers", "0, 1 or 2")
        self.require_positive("temperature", "negative_weight")
        if self.variant != "blog":  # which bounds the class temperatures from below; others reach tau·(1 - bta)
            self.require(self.bta is None or self.bta < 1, "bta", "a number below 1, except for variant blog")

    def idle_on_frozen_features(self) -> str:
        return "whose gradient would reach its own projection alone"


class BaCon(BaConLoss):
    """`BaConLoss` on the rows of a step, weighted, from `contrast_start` on.

    Args:
        sizes, options: of `BaConLoss`.
        steps: T.
        lambda_con: weight of the loss.
        contrast_start: fraction of T after which it is added.
    """

    def __init__(self, *sizes: int, steps: int, lambda_con: float, contrast_start: float, **options) -> None:
        super().__init__(*sizes, **options)
        self.steps, self.lambda_con, self.contrast_start = steps, lambda_con, contrast_start

    def active(self, step: int) -> bool:
        """Whether the loss is added in the step that follows `step` completed ones."""
        return step > self.contrast_start * self.steps

    def contrast(
        self, out: Outputs, batch: Batch, step: Tensor, *, active: bool
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Loss `contrastive`, 0-d float32, and statistics; updates the bank. `active`: what `active(step)` says."""
        loss, stats = self(
            out.anchor_features,
            batch.labels,
            out.anchor_logits,
            batch.labeled_slots,
            batch.unlabeled_slots,
            progress=step / self.steps,
            active=active,
        )
        return {"contrastive": weighted(self.lambda_con, loss)}, stats


def build(options: BaConOptions, setup: Setup) -> BaCon:
    """On features of width F, with a bank of one slot for each labeled and unlabeled image."""
    data = setup.data
    return BaCon(
        setup.num_features,
        data.num_classes,
        data.num_labeled,
        data.num_unlabeled,
        steps=setup.steps,
        lambda_con=options.lambda_con,
        contrast_start=options.contrast_start,
        variant=options.variant,
        neg_mode=options.neg_mode,
        proj_dim=options.proj_dim,
        proj_layers=options.proj_layers,
        temperature=options.temperature,
        bta=options.bta,
        negative_weight=options.negative_weight,
        top_k=options.top_k,
        reliable_threshold=options.reliable_threshold,
        centers=options.centers,
        count_gate=options.count_gate,
        labeled_counts=options.labeled_counts,
        center_slots=options.center_slots,
        count_threshold=setup.shared.threshold,
        backend=setup.shared.backend,
    )
