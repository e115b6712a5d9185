"""SsCL's work between epochs: assignments of all unlabeled images, prototypes refined by mixtures (methods.md F.3)."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bacon_fast.methods.method import RefreshContext
from bacon_fast.methods.sscl.key_bank import LabeledKeyBank
from bacon_fast.methods.sscl.prototypes import ClassPrototypes, class_means, draw_mixtures, mix_pixels, own_cosine
from bacon_fast.models.momentum import MomentumEncoder

MIXED_CHUNK = 512
"""Mixtures made at once: each is several float32 images on the way."""


@torch.no_grad()
def refresh(
    context: RefreshContext,
    network: nn.Module,
    key_encoder: MomentumEncoder,
    prototypes: ClassPrototypes,
    bank: LabeledKeyBank,
    seed: int,
    unit_features: bool = True,
) -> None:
    """Computes anew the labeled keys, the prototypes, and the class and alpha of every unlabeled image.

    Images are not augmented, and encoders are in evaluation mode. Among the unlabeled images that the classifier
    assigns to a class, the prototypes of the labeled images find the nearest. Mixtures with these count as labeled in
    the final prototypes. With `unit_features`, features are scaled to length 1 before they are averaged. Holds the
    features of all unlabeled images, float32 [n_ulb, F].
    """

    def averaged(features: Tensor) -> Tensor:
        return F.normalize(features, dim=1) if unit_features else features

    def classified(features: Tensor, logits: Tensor) -> tuple[Tensor, Tensor]:
        return F.normalize(features, dim=1), logits.argmax(1)

    labels, num_classes = context.labels, len(prototypes.present)
    (keys,) = context.predict_rows(key_encoder, context.labeled, lambda _, keys: (keys,))
    bank.fill_(keys, labels)
    (labeled,) = context.predict_rows(network, context.labeled, lambda features, _: (averaged(features),))
    unlabeled, assigned = context.predict_rows(network, context.unlabeled, classified)

    plain, _ = class_means(labeled, labels, num_classes)
    nearness = own_cosine(unlabeled, plain, assigned)
    x, partner, mixed_labels, weight = draw_mixtures(labels, assigned, nearness, num_classes, seed, context.step)
    mixed = labeled[:0]
    if len(x):
        parts = (context.labeled[x], context.unlabeled[partner], weight)
        pairs = zip(*(part.split(MIXED_CHUNK) for part in parts))
        images = (mix_pixels(context.pool[a], context.pool[b], w) for a, b, w in pairs)
        mixed = averaged(torch.cat([context.predict(network, chunk)[0] for chunk in images]))
    vectors, present = class_means(torch.cat([labeled, mixed]), torch.cat([labels, mixed_labels]), num_classes)
    prototypes.set_(vectors, present, unlabeled, assigned)
