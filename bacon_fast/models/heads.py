"""The small layers on top of a backbone: classifiers and the projection of the contrastive loss."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Linear(nn.Linear):
    """`torch.nn.Linear` with the attribute ``half`` of `models.convolution.Conv2d`."""

    half: tuple[Tensor, Tensor | None] | None = None

    def forward(self, rows: Tensor) -> Tensor:
        if self.half is None or not torch.is_autocast_enabled(rows.device.type):
            return super().forward(rows)
        return F.linear(rows, *self.half)


def main_head(in_features: int, num_classes: int) -> Linear:
    """The FixMatch classifier: Linear with Xavier-normal weight and zero bias."""
    head = Linear(in_features, num_classes)
    nn.init.xavier_normal_(head.weight)
    nn.init.zeros_(head.bias)
    return head


def auxiliary_head(in_features: int, num_classes: int) -> Linear:
    """The balanced classifier of ABC and BaCon: Linear with torch's default initialization, like the authors'."""
    return Linear(in_features, num_classes)


def projection_head(in_features: int, out_features: int, num_layers: int = 1) -> nn.Module:
    """Map of backbone features into the contrastive space.

    Args:
        in_features: F, the width of the backbone's features.
        out_features: D, the width of the projection. Ignored when ``num_layers`` is 0, where D = F.
        num_layers: 1 is one Linear with bias, no activation (BaCon); 2 is Linear, ReLU, Linear with hidden width F;
            0 leaves the features as they are.
    """
    if num_layers == 0:
        return nn.Identity()
    if num_layers == 1:
        return Linear(in_features, out_features)
    if num_layers == 2:
        return nn.Sequential(Linear(in_features, in_features), nn.ReLU(), Linear(in_features, out_features))
    raise ValueError(f"num_layers: expected 0, 1 or 2, found {num_layers}")
