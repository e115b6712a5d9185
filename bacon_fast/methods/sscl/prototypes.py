"""Class prototypes of unit features, and the pixel mixtures that refine them (methods.md F.3)."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bacon_fast.data.philox import Stream, philox, to_range, to_uniform
from bacon_fast.methods.sscl.key_bank import by_class


class ClassPrototypes(nn.Module):
    """What SsCL knows of the classes between two refreshes.

    Buffers:
        vectors [K, F] float32: unit prototypes; present [K] bool: whether a class has labeled images, and so one.
        assigned [n_ulb] int64: offline pseudo-label c(u) of each unlabeled slot; alpha [n_ulb] float32: its cosine to
            a prototype, not below 0.

    Args:
        num_classes: K.
        num_features: F.
        num_unlabeled: n_ulb.
        alpha_of: alpha is of the prototype of the class "assigned", or of the "nearest" one.
    """

    def __init__(self, num_classes: int, num_features: int, num_unlabeled: int, *, alpha_of: str = "assigned") -> None:
        super().__init__()
        self.alpha_of = alpha_of
        self.register_buffer("vectors", torch.zeros(num_classes, num_features))
        self.register_buffer("present", torch.zeros(num_classes, dtype=torch.bool))
        self.register_buffer("assigned", torch.zeros(num_unlabeled, dtype=torch.int64))
        self.register_buffer("alpha", torch.zeros(num_unlabeled))

    @torch.no_grad()
    def similarity(self, features: Tensor) -> Tensor:
        """Cosines s_c of features float [N, F] to the prototypes, -1 for classes without one: float32 [N, K]."""
        with torch.autocast(features.device.type, enabled=False):  # which would round the cosines to half precision
            cosines = F.normalize(features.float(), dim=1) @ self.vectors.T
        return torch.where(self.present, cosines, -1)

    @torch.no_grad()
    def set_(self, vectors: Tensor, present: Tensor, features: Tensor, assigned: Tensor) -> None:
        """Prototypes [K, F] and present [K]; unit features [n_ulb, F] and pseudo-labels int64 [n_ulb] of all
        unlabeled images, which give alpha."""
        self.vectors.copy_(vectors)
        self.present.copy_(present)
        self.assigned.copy_(assigned)
        if self.alpha_of == "nearest":
            cosines = torch.cat([highest_cosine(f, vectors, present) for f in features.split(4096)])
        else:
            cosines = own_cosine(features, vectors, assigned)
        self.alpha.copy_(cosines.clamp(min=0))


def class_means(features: Tensor, labels: Tensor, num_classes: int) -> tuple[Tensor, Tensor]:
    """Unit vectors [K, F] in the direction of the mean feature of each class, and bool [K]: whether it has a feature.

    Features are float [n, F]; a class without one gets zeros.
    """
    sums = features.new_zeros(num_classes, features.shape[1]).index_add_(0, labels, features)
    return F.normalize(sums, dim=1), torch.bincount(labels, minlength=num_classes) > 0


def own_cosine(features: Tensor, vectors: Tensor, classes: Tensor) -> Tensor:
    """Cosine of each unit feature [n, F] to the unit vector [K, F] of its class int64 [n]: [n]."""
    return torch.cat([(f * vectors[c]).sum(1) for f, c in zip(features.split(4096), classes.split(4096))])


def highest_cosine(features: Tensor, vectors: Tensor, present: Tensor) -> Tensor:
    """Highest cosine of each unit feature [n, F] to the unit vectors [K, F] of classes that are present [K]: [n]."""
    return (features @ vectors.T).masked_fill(~present, -1).amax(1)


def draw_mixtures(
    labels: Tensor, assigned: Tensor, nearness: Tensor, num_classes: int, seed: int, step: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Which images are mixed: for a class of n_c labeled images n_c pairs (eq. 4).

    The partner of a random labeled image of c is a random one of the (up to) n_c unlabeled images assigned to c that
    are nearest to its prototype. Draws: Philox counters (seed, step, Stream.SSCL_MIXTURE, number of the pair).

    Args:
        labels: int64 [n_lb].
        assigned, nearness: int64 and float [n_ulb], class of each unlabeled image and similarity to its prototype.

    Returns:
        Of the pairs, at most n_lb: labeled slots, unlabeled slots and classes int64 [n], weights of the labeled images
        float32 [n], uniform, which is Beta(1, 1). A class to which no unlabeled image is assigned has none.
    """
    slots, start, count = by_class(labels, num_classes)
    by_nearness = torch.argsort(nearness, descending=True, stable=True)
    in_class, unlabeled_start, unlabeled_count = by_class(assigned[by_nearness], num_classes)
    nearest = torch.minimum(unlabeled_count, count)
    pairs = torch.arange(len(labels), device=labels.device)
    words = philox(seed, step, Stream.SSCL_MIXTURE, pairs, 3)
    keep = nearest[labels] > 0
    words, classes = words[keep], labels[keep]
    labeled = slots[start[classes] + to_range(words[:, 0], count[classes])]
    unlabeled = by_nearness[in_class[unlabeled_start[classes] + to_range(words[:, 1], nearest[classes])]]
    return labeled, unlabeled, classes, to_uniform(words[:, 2], torch.float32)


def mix_pixels(labeled: Tensor, unlabeled: Tensor, weight: Tensor) -> Tensor:
    """weight * labeled + (1 - weight) * unlabeled of uint8 images [n, H, W, 3], weight float [n], to the nearest level:
    uint8."""
    weight = weight[:, None, None, None]
    return (weight * labeled + (1 - weight) * unlabeled).round().to(torch.uint8)
