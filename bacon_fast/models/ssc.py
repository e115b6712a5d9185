"""SSC's network: a backbone, a projector, and one prototype a class in place of a classifier (methods.md G.1)."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bacon_fast.models import build_backbone
from bacon_fast.models.heads import projection_head
from bacon_fast.reference.values import accumulator_dtype


class PrototypeNetwork(nn.Module):
    """Backbone, projector (Linear, ReLU, Linear of the backbone's width) and prototypes in the projected space.

    Args:
        backbone: name for `build_backbone`.
        num_classes: K.
        bn_momentum, image_size: of `build_backbone`.
        temperature: T_pl; similarities divided by it are the logits.

    Attributes:
        prototypes: parameter [K,F], with standard normal entries at first. Only the direction of each counts.
    """

    def __init__(
        self,
        backbone: str,
        num_classes: int,
        *,
        bn_momentum: float | None = None,
        image_size: int | None = None,
        temperature: float,
    ) -> None:
        super().__init__()
        self.backbone = build_backbone(backbone, bn_momentum=bn_momentum, image_size=image_size)
        width = self.backbone.num_features
        self.projector = projection_head(width, width, num_layers=2)
        self.prototypes = nn.Parameter(torch.randn(num_classes, width))
        self.temperature = temperature

    def forward(self, images: Tensor) -> Tensor:
        """images [N,3,H,W] -> projections [N,F], not normalized."""
        return self.projector(self.backbone(images))

    def logits(self, projections: Tensor) -> Tensor:
        """Cosine similarities to the prototypes over the temperature: [N,K], at least float32."""
        dtype = accumulator_dtype(projections.dtype)
        with torch.autocast(projections.device.type, enabled=False):
            similarities = F.normalize(projections.to(dtype), dim=1) @ F.normalize(self.prototypes.to(dtype), dim=1).T
        return similarities / self.temperature

    @torch.inference_mode()
    def predict(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Unit projections [N,F], in the space of the prototypes, and logits [N,K] (methods.md G.2)."""
        projections = self(images)
        return F.normalize(projections.float(), dim=1), self.logits(projections)
