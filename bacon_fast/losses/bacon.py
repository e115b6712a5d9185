"""BaCon's contrastive loss with its state: projection head, memory bank, class counts and centers."""

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .. import functional
from ..models.heads import projection_head
from ..ops.bacon_step import bacon_step_, fuses_bacon_step
from ..ops.checks import check_choice, check_integer, check_number, check_temperatures, check_values
from ..reference.values import accumulator_dtype
from .bank import MemoryBank

CORRECTED = {"count_gate": "prob", "labeled_counts": "always", "center_slots": "written"}
AUTHORS = {"count_gate": "logit", "labeled_counts": "with_pseudo", "center_slots": "selected"}
PAPER_LOSS = {"temperature": 0.1, "bta": 0.005, "negative_weight": 64.0, "neg_mode": "authors", "min_temperature": 0.0}
BLOG_LOSS = {"temperature": 0.5, "bta": 1.0, "negative_weight": None, "neg_mode": "paper", "min_temperature": 0.1}
# The value that each variant gives to an option left at None.
VARIANTS = {
    "fixed": PAPER_LOSS | CORRECTED,
    "official": PAPER_LOSS | AUTHORS,
    "blog": BLOG_LOSS | CORRECTED,
}
# The options that take one of two words.
CHOICES = {
    "neg_mode": ("authors", "paper"),
    "count_gate": ("prob", "logit"),
    "labeled_counts": ("always", "with_pseudo"),
    "center_slots": ("written", "selected"),
    "centers": ("bank", "batch"),
}


class BaConOutput(NamedTuple):
    """The loss, a 0-d float32 tensor, and 0-d tensors to log."""

    loss: Tensor
    stats: dict[str, Tensor]


class BaConLoss(nn.Module):
    """Balanced feature-level contrastive loss (BaCon, AAAI 2024, arXiv 2403.12986) on top of backbone features.

    One call is one step (methods.md E.2): it selects samples as classes and counts them, computes the loss with the
    centers of the step before, writes the reliable projections into the memory bank, and moves the centers. The loss
    itself is `functional.bacon_loss`, its formula `reference.bacon_loss.bacon_loss`.

    Args:
        in_features: F, width of the backbone's features.
        num_classes: K.
        num_labeled, num_unlabeled: sizes of the two training sets; the bank has a slot for every sample.
        proj_dim: D, width of the projection; 32 in the paper, 16 in the released code.
        proj_layers: 1, 2, or 0 for none, where D = F (`models.heads.projection_head`).
        temperature, bta, negative_weight, neg_mode, min_temperature: see `functional.bacon_loss`; None takes the
            variant's value.
        top_k: an unlabeled row is no negative of its ``top_k`` likeliest classes; lowered to K-1 if K is small. 1 is
            the loss without reliable negative selection (methods.md E.4): every row predicted as another class is a
            negative.
        reliable_threshold: rows of at least this confidence are reliable: they are the anchors of the loss and are
            written to the bank.
        count_threshold: unlabeled rows of at least this confidence are selected as their pseudo-label.
        variant: "fixed" is the paper's loss with the released code's slips corrected; "official" the released code;
            "blog" what the blog post's listing means (temperature 0.5, bta 1, at least 0.1, sum of negatives, unit
            projections).
        backend: of the loss, see `functional.bacon_loss`. "reference" also takes the bank's reference.
        count_gate: ``count_threshold`` is compared with the largest "prob" or, in the released code, "logit".
        labeled_counts: labeled rows are selected as their labels "always" or, in the released code, only
            "with_pseudo", that is if an unlabeled row of the batch is selected too.
        center_slots: a center is the mean over the slots of its class that were "written" or, in the released code, of
            all "selected" ones, which hold a vector of ones until they are written.
        centers: the loss pulls rows to the centers of the memory "bank", as published, or, for an ablation, to the mean
            over the reliable rows of the class in this "batch", labeled and weak, without a gradient. The bank is kept
            up to date either way.

    The released code also projects the strong views and drops the result, which changes nothing and is not offered. As
    there, a slot whose class changes keeps its old feature under the new class.

    One step on 2 labeled and 4 unlabeled rows of 10 classes; the backbone's features are drawn here:

        >>> criterion = BaConLoss(in_features=64, num_classes=10, num_labeled=100, num_unlabeled=500)
        >>> features, logits = torch.randn(6, 64, requires_grad=True), torch.randn(6, 10)
        >>> labels, labeled_slots, unlabeled_slots = torch.tensor([3, 7]), torch.tensor([0, 9]), torch.arange(4)
        >>> out = criterion(features, labels, logits, labeled_slots, unlabeled_slots, progress=0.3, active=True)
        >>> out.loss.shape, sorted(out.stats)
        (torch.Size([]), ['bank_fill', 'reliable', 'selected'])
    """

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        num_labeled: int,
        num_unlabeled: int,
        *,
        proj_dim: int = 32,
        proj_layers: int = 1,
        temperature: float | None = None,
        bta: float | None = None,
        negative_weight: float | None = None,
        top_k: int = 3,
        reliable_threshold: float = 0.98,
        count_threshold: float = 0.95,
        neg_mode: str | None = None,
        min_temperature: float | None = None,
        variant: str = "fixed",
        backend: str | None = None,
        count_gate: str | None = None,
        labeled_counts: str | None = None,
        center_slots: str | None = None,
        centers: str = "bank",
    ):
        super().__init__()
        if variant not in VARIANTS:
            raise ValueError(f"variant: expected one of {', '.join(VARIANTS)}, found {variant!r}")
        for name, size in (("in_features", in_features), ("num_classes", num_classes), ("proj_dim", proj_dim)):
            check_integer(name, size, low=1)
        for name, size in (("num_labeled", num_labeled), ("num_unlabeled", num_unlabeled)):
            check_integer(name, size, low=0)
        check_integer("top_k", top_k, low=1)
        check_number("reliable_threshold", reliable_threshold, low=0, low_allowed=True)
        check_number("count_threshold", count_threshold, low=-math.inf)
        given = {
            "temperature": temperature,
            "bta": bta,
            "negative_weight": negative_weight,
            "neg_mode": neg_mode,
            "min_temperature": min_temperature,
            "count_gate": count_gate,
            "labeled_counts": labeled_counts,
            "center_slots": center_slots,
            "centers": centers,
        }
        options = VARIANTS[variant] | {name: value for name, value in given.items() if value is not None}
        for name, allowed in CHOICES.items():
            check_choice(name, options[name], allowed)
        check_temperatures(options["temperature"], options["bta"], options["min_temperature"])
        if options["negative_weight"] is not None:
            check_number("negative_weight", options["negative_weight"], low=0)
        self.variant, self.backend = variant, backend
        self.temperature, self.bta = options["temperature"], options["bta"]
        self.min_temperature = options["min_temperature"]
        self.negative_weight, self.neg_mode = options["negative_weight"], options["neg_mode"]
        self.count_gate, self.labeled_counts = options["count_gate"], options["labeled_counts"]
        self.center_slots, self.centers = options["center_slots"], options["centers"]
        self.top_k = max(1, min(top_k, num_classes - 1))
        self.reliable_threshold, self.count_threshold = reliable_threshold, count_threshold
        self.num_labeled, self.num_unlabeled = num_labeled, num_unlabeled
        self.projection = projection_head(in_features, proj_dim, proj_layers)
        self.bank = MemoryBank(
            num_labeled + num_unlabeled,
            num_classes,
            in_features if proj_layers == 0 else proj_dim,
            start_with_ones=self.center_slots == "selected",
            backend="reference" if backend == "reference" else None,
        )

    def forward(
        self,
        features: Tensor,
        labels: Tensor,
        logits: Tensor,
        labeled_slots: Tensor,
        unlabeled_slots: Tensor,
        *,
        progress: float | Tensor,
        active: bool,
    ) -> BaConOutput:
        """Loss of one step, and the update of bank, counts and centers.

        Args:
            features: [B+U,F] backbone features of the labeled, then the weakly augmented unlabeled rows; may carry a
                graph.
            labels: [B] int64.
            logits: [B+U,K] of the same rows, by the head whose predictions are trusted; detached here.
            labeled_slots, unlabeled_slots: [B] and [U] int64, positions of the rows in the labeled set and in the
                unlabeled set, each counted from 0. Others raise ValueError on a CPU.
            progress: t/T, a number or a 0-d tensor.
            active: False before the loss starts. The loss then is a zero without graph, so the projection has no
                gradient and is not decayed; bank, counts and centers are still updated.

        Returns:
            BaConOutput. Its stats are "reliable", the share of reliable rows, "bank_fill", the share of slots that hold
            a feature, and "selected", the share of slots that are selected as a class.
        """
        for name, slots, size in (
            ("labeled_slots", labeled_slots, self.num_labeled),
            ("unlabeled_slots", unlabeled_slots, self.num_unlabeled),
        ):
            check_values(name, slots, f"values in 0..{size - 1}", 0, size - 1)
        projected = self.projection(features)
        if self.variant == "blog":  # its centers are means of unit vectors
            projected = torch.nn.functional.normalize(projected, dim=1)
        fuses = self.centers == "bank" and fuses_bacon_step(self.backend, projected, logits, self.top_k)
        if active and fuses:
            loss, reliable = self._fused_step(projected, labels, logits, labeled_slots, unlabeled_slots, progress)
        else:
            loss, reliable = self._composed_step(
                projected, labels, logits, labeled_slots, unlabeled_slots, progress, active
            )
        stats = {
            "reliable": reliable,
            "bank_fill": self.bank.written.mean(dtype=torch.float32),
            "selected": self.bank.class_counts.sum() / self.bank.selected_label.shape[0],
        }
        return BaConOutput(loss, stats)

    def _fused_step(
        self,
        projected: Tensor,
        labels: Tensor,
        logits: Tensor,
        labeled_slots: Tensor,
        unlabeled_slots: Tensor,
        progress: float | Tensor,
    ) -> tuple[Tensor, Tensor]:
        """Loss and share of reliable rows, by the kernels of BaCon's step."""
        with torch.autocast(projected.device.type, enabled=False):
            return bacon_step_(
                projected,
                labels,
                logits,
                labeled_slots,
                unlabeled_slots,
                dict(self.bank.named_buffers()),
                progress=progress,
                num_labeled=self.num_labeled,
                temperature=self.temperature,
                bta=self.bta,
                min_temperature=self.min_temperature,
                negative_weight=self.negative_weight,
                neg_mode=self.neg_mode,
                top_k=self.top_k,
                reliable_threshold=self.reliable_threshold,
                count_threshold=self.count_threshold,
                count_gate=self.count_gate,
                labeled_counts=self.labeled_counts,
            )

    def _composed_step(
        self,
        projected: Tensor,
        labels: Tensor,
        logits: Tensor,
        labeled_slots: Tensor,
        unlabeled_slots: Tensor,
        progress: float | Tensor,
        active: bool,
    ) -> tuple[Tensor, Tensor]:
        """The same step, operation by operation."""
        batch = labels.shape[0]
        logits = logits.detach().to(accumulator_dtype(logits.dtype))
        probability = logits.softmax(dim=1).amax(dim=1)
        reliable = probability >= self.reliable_threshold
        gate = probability if self.count_gate == "prob" else logits.amax(dim=1)
        counted = gate >= self.count_threshold
        if self.labeled_counts == "always":
            counted[:batch].fill_(True)
        else:
            counted[:batch] = counted[batch:].any()

        # topk rather than argmax: the loss takes a row's class from topk, and ties must fall the same way.
        pseudo_labels = logits[batch:].topk(self.top_k, dim=1).indices[:, 0]
        slots = torch.cat([labeled_slots, unlabeled_slots + self.num_labeled])
        classes = torch.cat([labels, pseudo_labels])
        self.bank.select_(slots, classes, counted)

        if active:
            if self.centers == "bank":
                centers, has_center = self.bank.current_centers()
            else:
                centers, has_center = functional.class_centers(projected.float(), classes, logits.shape[1], reliable)
            loss = functional.bacon_loss(
                projected,
                labels,
                logits[batch:],
                centers,
                reliable,
                self.bank.class_counts,
                progress=progress,
                temperature=self.temperature,
                bta=self.bta,
                negative_weight=self.negative_weight,
                top_k=self.top_k,
                neg_mode=self.neg_mode,
                has_center=has_center,
                min_temperature=self.min_temperature,
                backend=self.backend,
            )
        else:
            loss = torch.zeros((), device=projected.device)
        self.bank.write_(slots, projected.detach(), reliable)
        return loss, reliable.mean(dtype=torch.float32)

    @torch.no_grad()
    def temperatures(self, progress: float | Tensor) -> Tensor:
        """Temperature [K] of each class's positive logit at ``progress`` = t/T, for reports."""
        return functional.balanced_temperatures(
            self.bank.class_counts,
            progress=progress,
            temperature=self.temperature,
            bta=self.bta,
            min_temperature=self.min_temperature,
        )
