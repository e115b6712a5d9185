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


def build_backbone(name: str, in_channels: int = 3, *, bn_momentum: float | None = None) -> nn.Module:
    """The backbone called ``name``: "wrn-DEPTH-WIDTH" (such as "wrn-28-2"; "wrn-28-2-usb" is USB's, see `WideResNet`),
    "resnet18" or "resnet50".

    ``bn_momentum`` is the weight of the newest batch in BatchNorm's running statistics; None: the backbone's own.
    Raises ValueError for any other name, and for a depth that is neither 6n+4 nor 8n+5.
    """
    if match := re.fullmatch(r"wrn-(\d+)-(\d+)(-usb)?", name):
        backbone = wrn(int(match[1]), int(match[2]), in_channels, usb=match[3] is not None)
    elif name == "resnet18":
        backbone = resnet18(in_channels)
    elif name == "resnet50":
        backbone = resnet50(in_channels)
    else:
        raise ValueError(
            'name: expected "wrn-DEPTH-WIDTH" or "wrn-DEPTH-WIDTH-usb" with DEPTH = 6n+4 or 8n+5 (such as "wrn-28-2"), '
            f'"resnet18" or "resnet50", found {name!r}'
        )
    for module in backbone.modules():
        if isinstance(module, nn.BatchNorm2d) and bn_momentum is not None:
            module.momentum = bn_momentum
    return backbone
