"""The description of a network, from which a checkpoint is opened without the run's configuration."""

from dataclasses import dataclass
from typing import Literal

from bacon_fast.models.network import DebiasedNetwork, Network, TeacherNetwork
from bacon_fast.models.ssc import PrototypeNetwork


@dataclass(frozen=True)
class NetworkSpec:
    """A network in numbers and words.

    Attributes:
        backbone: name for `build_backbone`.
        num_classes: K.
        bn_momentum: weight of the newest batch in BatchNorm's running statistics.
        heads: "main" is one classifier, "debiased" one that CDMAD debiases; "balanced" adds the auxiliary one (ABC),
            "teacher" CoSSL's; "prototypes" has SSC's prototypes in place of a classifier.
        temperature: similarities to the prototypes are divided by it.
    """

    backbone: str
    num_classes: int
    bn_momentum: float
    heads: Literal["main", "balanced", "teacher", "prototypes", "debiased"] = "main"
    temperature: float | None = None


def build_network(spec: NetworkSpec) -> Network | PrototypeNetwork:
    """The network that is trained, averaged and evaluated, freshly initialized from torch's generator.

    Example:
        >>> build_network(NetworkSpec("wrn-10-1", num_classes=10, bn_momentum=0.1)).head.out_features
        10
    """
    sizes = {"num_classes": spec.num_classes, "bn_momentum": spec.bn_momentum}
    if spec.heads == "prototypes":
        return PrototypeNetwork(spec.backbone, temperature=spec.temperature, **sizes)
    if spec.heads == "teacher":
        return TeacherNetwork(spec.backbone, **sizes)
    if spec.heads == "debiased":
        return DebiasedNetwork(spec.backbone, **sizes)
    return Network(spec.backbone, balanced_head=spec.heads == "balanced", **sizes)
