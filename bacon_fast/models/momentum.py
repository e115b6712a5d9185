"""MoCo's momentum encoder: a slowly moving copy of the query encoder, whose outputs are the keys."""

import copy
from itertools import chain

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class MomentumEncoder(nn.Module):
    """theta_k <- m * theta_k + (1 - m) * theta_q on parameters (He et al., MoCo, CVPR 2020, eq. 2; methods.md F.3).

    The copy has its own running statistics in BatchNorm, as it sees other batches than the query encoder. Its
    parameters receive no gradient, and the optimizer does not decay them.

    Args:
        backbone, projection: the query encoder, copied as it is now.
        momentum: m in [0, 1].
    """

    def __init__(self, backbone: nn.Module, projection: nn.Module, momentum: float) -> None:
        super().__init__()
        if not 0 <= momentum <= 1:
            raise ValueError(f"momentum: expected a number between 0 and 1, found {momentum!r}")
        self.momentum = momentum
        self.backbone = copy.deepcopy(backbone).requires_grad_(False)
        self.projection = copy.deepcopy(projection).requires_grad_(False)

    @torch.no_grad()
    def update(self, backbone: nn.Module, projection: nn.Module) -> None:
        """Takes in the query encoder's current parameters: one foreach launch, fixed storage."""
        online = [p.detach() for p in chain(backbone.parameters(), projection.parameters())]
        torch._foreach_lerp_(list(self.parameters()), online, 1 - self.momentum)

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """Keys of images [N, 3, H, W]: float32 [N, D], unit norm. In training mode BatchNorm takes this batch's
        statistics, as for the queries."""
        return F.normalize(self.projection(self.backbone(images)).float(), dim=1)

    def predict(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Features [N, F] and keys [N, D], for `RefreshContext.predict`."""
        features = self.backbone(images)
        return features, F.normalize(self.projection(features).float(), dim=1)
