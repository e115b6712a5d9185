"""Backbone with its classification heads."""

import torch
from torch import Tensor, nn

from bacon_fast.models import build_backbone
from bacon_fast.models.heads import auxiliary_head, main_head
from bacon_fast.reference.values import accumulator_dtype


class Network(nn.Module):
    """Backbone f, main head a and, for balanced methods, auxiliary head b on the same features (methods.md 0.1, C).

    Args:
        backbone: name for `build_backbone`.
        num_classes: K.
        balanced_head: adds the auxiliary head, which is then the one that predicts.
        bn_momentum, image_size: of `build_backbone`.
    """

    def __init__(
        self,
        backbone: str,
        num_classes: int,
        *,
        balanced_head: bool,
        bn_momentum: float | None = None,
        image_size: int | None = None,
    ) -> None:
        super().__init__()
        self.backbone = build_backbone(backbone, bn_momentum=bn_momentum, image_size=image_size)
        self.head = main_head(self.backbone.num_features, num_classes)
        self.balanced_head = auxiliary_head(self.backbone.num_features, num_classes) if balanced_head else None

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """images [N,3,H,W] -> features [N,F], main logits [N,K], auxiliary logits [N,K] or None."""
        features = self.backbone(images)
        return features, self.head(features), None if self.balanced_head is None else self.balanced_head(features)

    @torch.inference_mode()
    def predict(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Features [N,F] and logits [N,K] of the head that evaluation uses (methods.md C, E.7)."""
        features, logits, balanced = self(images)
        return features, logits if balanced is None else balanced


class DebiasedNetwork(Network):
    """Network that predicts by what it answers beyond its answer to an empty image (CDMAD, newer_methods.md L).

    Buffers:
        empty_image: float32 [3], the color of the empty image after normalization.
    """

    def __init__(
        self, backbone: str, num_classes: int, *, bn_momentum: float | None = None, image_size: int | None = None
    ) -> None:
        super().__init__(backbone, num_classes, balanced_head=False, bn_momentum=bn_momentum, image_size=image_size)
        self.register_buffer("empty_image", torch.ones(3))

    def empty(self, images: Tensor) -> Tensor:
        """The empty image, [1,3,H,W], of the size of images [N,3,H,W] and the dtype of the network."""
        return self.empty_image[None, :, None, None].expand(1, *images.shape[1:])

    @torch.inference_mode()
    def predict(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Features [N,F], and logits [N,K] minus those of the empty image, at least float32, in evaluation mode."""
        # In evaluation mode rows do not see each other.
        features, logits, _ = self(torch.cat([images, self.empty(images).to(images.dtype)]))
        logits = logits.to(accumulator_dtype(logits.dtype))
        return features[:-1], logits[:-1] - logits[-1:]


class TeacherNetwork(Network):
    """Network whose balanced head is CoSSL's teacher: it takes no part in the forward pass, and predicts once ready.

    Buffers:
        teacher_ready: 0-d bool, whether the balanced head predicts; before, the main head does.
    """

    def __init__(
        self, backbone: str, num_classes: int, *, bn_momentum: float | None = None, image_size: int | None = None
    ) -> None:
        super().__init__(backbone, num_classes, balanced_head=True, bn_momentum=bn_momentum, image_size=image_size)
        self.register_buffer("teacher_ready", torch.zeros((), dtype=torch.bool))

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, None]:
        """images [N,3,H,W] -> features [N,F], main logits [N,K], None."""
        features = self.backbone(images)
        return features, self.head(features), None

    @torch.inference_mode()
    def predict(self, images: Tensor) -> tuple[Tensor, Tensor]:
        features, logits, _ = self(images)
        return features, torch.where(self.teacher_ready, self.balanced_head(features), logits)
