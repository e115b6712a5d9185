"""Backbones and heads. A backbone maps images [N,C,H,W] to features [N, num_features] and has no classifier."""

import re

from torch import nn

from .backbone import Backbone
from .heads import auxiliary_head, main_head, projection_head
from .resnet import ResNet, resnet18, resnet50
from .timm_backbone import PREFIX, TimmBackbone
from .wrn import WideResNet, wrn

__all__ = [
    "Backbone",
    "ResNet",
    "TimmBackbone",
    "WideResNet",
    "auxiliary_head",
    "build_backbone",
    "main_head",
    "projection_head",
    "resnet18",
    "resnet50",
    "wrn",
]


def build_backbone(
    name: str, in_channels: int = 3, *, bn_momentum: float | None = None, image_size: int | None = None
) -> Backbone:
    """The backbone called ``name``: "wrn-DEPTH-WIDTH" (such as "wrn-28-2"; "wrn-28-2-usb" is USB's, see `WideResNet`),
    "resnet18", "resnet50", or "timm/NAME" for three channels (`TimmBackbone`).

    ``bn_momentum`` is the weight of the newest batch in BatchNorm's running statistics; None: the backbone's own.
    ``image_size`` is the side of the images, for networks of timm with a fixed one.
    Raises ValueError for any other name, and for a depth that is neither 6n+4 nor 8n+5.
    """
    backbone: Backbone
    if match := re.fullmatch(r"wrn-(\d+)-(\d+)(-usb)?", name):
        backbone = wrn(int(match[1]), int(match[2]), in_channels, usb=match[3] is not None)
    elif name == "resnet18":
        backbone = resnet18(in_channels)
    elif name == "resnet50":
        backbone = resnet50(in_channels)
    elif name.startswith(PREFIX):
        backbone = TimmBackbone(name, image_size)
    else:
        raise ValueError(
            'name: expected "wrn-DEPTH-WIDTH" or "wrn-DEPTH-WIDTH-usb" with DEPTH = 6n+4 or 8n+5 (such as "wrn-28-2"), '
            f'"resnet18", "resnet50" or "timm/NAME", found {name!r}'
        )
    for module in backbone.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and bn_momentum is not None:
            module.momentum = bn_momentum
    return backbone
