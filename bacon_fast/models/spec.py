"""The description of a network, from which a checkpoint is opened without the run's configuration."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from bacon_fast.models.network import DebiasedNetwork, Network, TeacherNetwork
from bacon_fast.models.ssc import PrototypeNetwork
from bacon_fast.models.tuning import Trained, train_only


@dataclass(frozen=True)
class NetworkSpec:
    """A network in numbers and words.

    Attributes:
        backbone: name for `build_backbone`.
        num_classes: K.
        bn_momentum: weight of the newest batch in BatchNorm's running statistics; None: the backbone's own.
        heads: "main" is one classifier, "debiased" one that CDMAD debiases; "balanced" adds the auxiliary one (ABC),
            "teacher" CoSSL's; "prototypes" has SSC's prototypes in place of a classifier.
        temperature: similarities to the prototypes are divided by it.
        image_size: side of the images, for a backbone of timm; None: its default.
        train: what of the backbone is trained (`train_only`).
        lora_rank: of "lora".
    """

    backbone: str
    num_classes: int
    bn_momentum: float | None = None
    heads: Literal["main", "balanced", "teacher", "prototypes", "debiased"] = "main"
    temperature: float | None = None
    image_size: int | None = None
    train: Trained = "all"
    lora_rank: int = 4


def build_network(spec: NetworkSpec, weights: Mapping[str, Tensor] | None = None) -> Network | PrototypeNetwork:
    """The network that is trained, averaged and evaluated, freshly initialized from torch's generator.

    ``weights`` are the backbone's at its start, by name (`Backbone.load`).

    Example:
        >>> build_network(NetworkSpec("wrn-10-1", num_classes=10, bn_momentum=0.1)).head.out_features
        10
    """
    network = _fresh_network(spec)
    if weights is not None:
        network.backbone.load(weights)
    train_only(network.backbone, spec.train, spec.lora_rank)
    return network


def _fresh_network(spec: NetworkSpec) -> Network | PrototypeNetwork:
    sizes = {"num_classes": spec.num_classes, "bn_momentum": spec.bn_momentum, "image_size": spec.image_size}
    if spec.heads == "prototypes":
        return PrototypeNetwork(spec.backbone, temperature=spec.temperature, **sizes)
    if spec.heads == "teacher":
        return TeacherNetwork(spec.backbone, **sizes)
    if spec.heads == "debiased":
        return DebiasedNetwork(spec.backbone, **sizes)
    return Network(spec.backbone, balanced_head=spec.heads == "balanced", **sizes)
