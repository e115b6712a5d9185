"""LoRA: a trained product of two thin matrices beside a frozen layer (Hu et al., ICLR 2022, arXiv 2106.09685)."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

LAYERS = ("qkv", "proj")
"""Names of the linear layers of attention, in timm, that get one."""


class LoRALinear(nn.Linear):
    """y = W x + b + B (A x), with W and b frozen; B starts as zeros, so that y starts as the frozen layer's.

    The paper's factor alpha / r is 1 here. Names and shapes of W and b are those of the frozen layer.

    Args:
        layer: whose weight and bias it takes.
        rank: r, rows of A and columns of B.
    """

    def __init__(self, layer: nn.Linear, rank: int) -> None:
        super().__init__(layer.in_features, layer.out_features, layer.bias is not None, device="meta")
        self.weight, self.bias = layer.weight, layer.bias
        self.lora_a = nn.Parameter(layer.weight.new_empty(rank, layer.in_features))
        self.lora_b = nn.Parameter(layer.weight.new_zeros(layer.out_features, rank))
        nn.init.kaiming_uniform_(self.lora_a, a=math.sqrt(5))

    def forward(self, rows: Tensor) -> Tensor:
        return super().forward(rows) + F.linear(F.linear(rows, self.lora_a), self.lora_b)

    @torch.no_grad()
    def merged(self) -> nn.Linear:
        """A plain layer that computes the same: W + B A."""
        layer = nn.Linear(self.in_features, self.out_features, self.bias is not None, device="meta")
        layer.weight = nn.Parameter(self.weight + self.lora_b @ self.lora_a, requires_grad=False)
        layer.bias = self.bias
        return layer.train(self.training)


def add_lora(module: nn.Module, rank: int) -> list[LoRALinear]:
    """Puts a `LoRALinear` in the place of each `nn.Linear` in `module` that is called qkv or proj. Returns them."""
    added = []
    for name, child in module.named_children():
        if name in LAYERS and type(child) is nn.Linear:
            setattr(module, name, LoRALinear(child, rank).train(child.training))
            added.append(getattr(module, name))
        else:
            added += add_lora(child, rank)
    return added


def merge_lora(module: nn.Module) -> None:
    """Puts the merged layer in the place of each `LoRALinear`, for inference: the names are timm's again."""
    for name, child in module.named_children():
        if isinstance(child, LoRALinear):
            setattr(module, name, child.merged())
        else:
            merge_lora(child)
