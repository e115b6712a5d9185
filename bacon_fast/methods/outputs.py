"""The tensors of one step, by view."""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Batch:
    """One step's input: images float [B + U + U, 3, H, W], in the order labeled weak, unlabeled weak, strong.

    labels int64 [B]; labeled_slots int64 [B] and unlabeled_slots int64 [U], positions in the two sets of the split;
    true_labels int64 [U], -1 where unknown, for diagnostics only. A supervised batch has U = 0 and no strong views.
    """

    images: Tensor
    labels: Tensor
    labeled_slots: Tensor
    unlabeled_slots: Tensor
    true_labels: Tensor


@dataclass(frozen=True)
class Outputs:
    """The network's answer to a batch: features [B+2U, F], main and (None without a balanced head) auxiliary logits."""

    features: Tensor
    logits: Tensor
    balanced: Tensor | None
    num_labeled: int
    num_unlabeled: int

    def _labeled(self, rows: Tensor) -> Tensor:
        return rows[: self.num_labeled]

    def _weak(self, rows: Tensor) -> Tensor:
        return rows[self.num_labeled : self.num_labeled + self.num_unlabeled]

    def _strong(self, rows: Tensor) -> Tensor:
        return rows[self.num_labeled + self.num_unlabeled :]

    @property
    def labeled_logits(self) -> Tensor:
        return self._labeled(self.logits)

    @property
    def weak_logits(self) -> Tensor:
        return self._weak(self.logits)

    @property
    def strong_logits(self) -> Tensor:
        return self._strong(self.logits)

    @property
    def labeled_balanced(self) -> Tensor:
        return self._labeled(self.balanced)

    @property
    def weak_balanced(self) -> Tensor:
        return self._weak(self.balanced)

    @property
    def strong_balanced(self) -> Tensor:
        return self._strong(self.balanced)

    @property
    def anchor_features(self) -> Tensor:
        """Labeled and weak unlabeled rows: BaCon's anchors (methods.md E.2)."""
        return self.features[: self.num_labeled + self.num_unlabeled]

    @property
    def anchor_logits(self) -> Tensor:
        """Logits of the anchors by the evaluated head: the auxiliary one where there is one."""
        logits = self.logits if self.balanced is None else self.balanced
        return logits[: self.num_labeled + self.num_unlabeled]
