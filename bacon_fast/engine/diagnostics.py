"""Are the pseudo-labels right, class by class, and does the contrastive space tighten? Counted on the device."""

import numpy as np
import torch
from torch import Tensor, nn

from bacon_fast.losses.bank import MemoryBank
from bacon_fast.ops.records import count_pairs_


class Diagnostics(nn.Module):
    """Pseudo-labels since the last evaluation, and the centers of that evaluation.

    Buffers:
        pairs [K*(K+1)+1] int64: how often a row of true class i got pseudo-label j (cell i*(K+1)+j; j = K: none) since
            the last `read`; the last cell takes the rows whose true class is unknown.
        window [K, K+1] int64: the counts at the last `read`.
        centers [K,D] float32, has_center [K] bool: BaCon's centers at the last `read` (D = 0 without a bank).

    Args:
        num_classes: K.
        bank: of BaCon's loss, or None.
    """

    def __init__(self, num_classes: int, bank: MemoryBank | None = None) -> None:
        super().__init__()
        self.num_classes = num_classes
        self._bank = (bank,)  # in a tuple, so that its buffers are not registered twice
        cells = num_classes * (num_classes + 1)
        self.register_buffer("pairs", torch.zeros(cells + 1, dtype=torch.int64))
        self.register_buffer("window", torch.zeros(num_classes, num_classes + 1, dtype=torch.int64))
        shape = (num_classes, 0) if bank is None else bank.centers.shape
        self.register_buffer("centers", torch.zeros(shape))
        self.register_buffer("has_center", torch.zeros(num_classes, dtype=torch.bool))

    def update(self, pseudo_labels: Tensor, true_labels: Tensor) -> None:
        """Counts one step's rows: pseudo_labels int64 [U], -1 for none; true_labels int64 [U], -1 where unknown."""
        count_pairs_(self.pairs, pseudo_labels, true_labels, self.num_classes)

    @torch.no_grad()
    def read(self) -> dict:
        """JSON-ready values of an evaluation's row, and a fresh start. The host waits for the device here.

        Returns:
            pseudo_precision and pseudo_recall [K], from `pseudo_label_quality`, if a row with a known class was seen.
            With a bank: class_count_estimate [K], BaCon's counts nu_c of selected slots (methods.md E.1), and
            center_drift, the mean of 1 - cosine between a class's center now and at the last read, over the classes
            that have both.
        """
        values = {}
        self.window.copy_(self.pairs[:-1].view_as(self.window))
        self.pairs.zero_()
        counts = self.window.cpu().numpy()
        if counts.any():
            values["pseudo_precision"], values["pseudo_recall"] = pseudo_label_quality(counts)
        (bank,) = self._bank
        if bank is not None:
            values["class_count_estimate"] = bank.class_counts.tolist()
            both = self.has_center & bank.has_center
            drift = 1 - torch.nn.functional.cosine_similarity(self.centers, bank.centers, dim=1, eps=1e-8)
            if both.any():
                values["center_drift"] = float(drift[both].mean())
            self.centers.copy_(bank.centers)
            self.has_center.copy_(bank.has_center)
        return values


def pseudo_label_quality(counts: np.ndarray) -> tuple[list[float | None], list[float | None]]:
    """Precision and recall of the pseudo-labels of each class.

    Args:
        counts: int64 [K, K+1], rows = true class, columns = pseudo-label; the last column counts rows without one.

    Returns:
        precision [K]: of the rows labeled c, the share that are of class c; recall [K]: of the rows of class c, the
        share labeled c. None where there is no such row.
    """
    right, labeled, present = counts.diagonal(), counts[:, :-1].sum(axis=0), counts.sum(axis=1)
    precision = [float(r / n) if n else None for r, n in zip(right, labeled)]
    recall = [float(r / n) if n else None for r, n in zip(right, present)]
    return precision, recall
