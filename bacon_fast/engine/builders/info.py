"""What a method must know about the data."""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class DataInfo:
    """What the split and the dataset say.

    num_classes: K. labeled_counts: N_c, int64 [K]. num_labeled, num_unlabeled: sizes of the two sets (0: none). mean,
    std: per channel, that images are normalized with.
    """

    num_classes: int
    labeled_counts: Tensor
    num_labeled: int
    num_unlabeled: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
