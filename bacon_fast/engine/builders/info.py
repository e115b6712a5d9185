"""What a method must know about the data."""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class DataInfo:
    """num_classes: K. labeled_counts: N_c, int64 [K]. num_labeled, num_unlabeled: sizes of the two sets (0: none)."""

    num_classes: int
    labeled_counts: Tensor
    num_labeled: int
    num_unlabeled: int
