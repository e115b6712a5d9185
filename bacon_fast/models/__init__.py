"""Backbones and heads. A backbone maps images [N,C,H,W] to features [N, num_features] and has no classifier."""

import re

from torch import nn

from .heads import auxiliary_head, main_head, projection_head
from .resnet import ResNet, resnet18, resnet50
from .wrn import WideResNet, wrn

__all__ = [
    "ResNet",
    "WideResNet",
    "auxiliary_head",
    "build_backbone",
    "main_head",
    "projection_head",
    "resnet18",
    "resnet50",
    "wrn",
]


def build_backbone(name: str, in_channels: int = 3) -> nn.Module:
    """The backbone called ``name``: "wrn-DEPTH-WIDTH" (such as "wrn-28-2"), "resnet18" or "resnet50".

    Raises ValueError for any other name, and for a depth that is not 6n+4.
    """
    if match := re.fullmatch(r"wrn-(\d+)-(\d+)", name):
        return wrn(int(match[1]), int(match[2]), in_channels)
    if name == "resnet18":
        return resnet18(in_channels)
    if name == "resnet50":
        return resnet50(in_channels)
    raise ValueError(
        'name: expected "wrn-DEPTH-WIDTH" with DEPTH = 6n+4 (such as "wrn-28-2"), "resnet18" or "resnet50", '
        f"found {name!r}"
    )
