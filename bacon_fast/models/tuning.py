"""Which parameters of a backbone are trained."""

from typing import Literal

import torch
from torch import nn

from bacon_fast.models.backbone import Backbone
from bacon_fast.models.lora import LoRALinear, add_lora

Trained = Literal["all", "lora", "bias", "head"]


def train_only(backbone: Backbone, trained: Trained, rank: int) -> None:
    """Freezes the backbone but for LoRA's matrices of this rank ("lora"), its biases ("bias", BitFit, arXiv 2106.10199)
    or nothing ("head"). "all" changes nothing.

    Raises ValueError for a backbone without linear layers of attention (lora), or without biases (bias).
    """
    if trained == "all":
        return
    backbone.requires_grad_(False)
    backbone.frozen = True
    backbone.train(backbone.training)
    if trained == "bias":
        biases = [p for name, p in backbone.named_parameters() if name.rpartition(".")[2] == "bias"]
        if not biases:
            raise ValueError("train: expected all, lora or head for a backbone without biases, found 'bias'")
        for bias in biases:
            bias.requires_grad_(True)
    elif trained == "lora":
        layers = add_lora(backbone, rank)
        if not layers or not _all_used(backbone, layers):
            raise ValueError(
                "train: expected all, bias or head for a backbone without attention in linear layers qkv and proj that "
                "it calls, found 'lora'"
            )


def _all_used(backbone: nn.Module, layers: list[LoRALinear]) -> bool:
    """Whether a pass calls every one of the layers: some networks take the weights of a layer past it."""
    called: set[nn.Module] = set()
    hooks = [layer.register_forward_hook(lambda layer, *_: called.add(layer)) for layer in layers]
    weight = next(backbone.parameters())
    with torch.no_grad():
        backbone(weight.new_zeros(1, 3, backbone.image_size, backbone.image_size))
    for hook in hooks:
        hook.remove()
    return called == set(layers)
