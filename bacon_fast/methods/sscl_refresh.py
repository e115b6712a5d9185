"""SsCL's work between epochs: assignments of all unlabeled images, prototypes refined by mixtures (methods.md F.3)."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bacon_fast.losses.key_bank import LabeledKeyBank
from bacon_fast.losses.prototypes import ClassPrototypes, class_means, draw_mixtures, mix_pixels, own_cosine
from bacon_fast.methods.method import RefreshContext
from bacon_fast.models.momentum import MomentumEncoder

CHUNK = 4096
"""Images taken from the pool at once."""


@torch.no_grad()
def refresh(
    context: RefreshContext,
    network: nn.Module,
    key_encoder: MomentumEncoder,
    prototypes: ClassPrototypes,
    bank: LabeledKeyBank,
    seed: int,
) -> None:
    """Anew: the labeled keys, the prototypes, and of every unlabeled image its class and alpha.

    Images are not augmented, encoders in evaluation mode. The prototypes of the labeled images find the unlabeled ones
    near to each class, among those that the classifier assigns to it; mixtures with these then count as labeled in the
    final prototypes. Holds the features of all unlabeled images, float32 [n_ulb, F].
    """

    def encode(encoder: nn.Module, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Unit features and second output of the encoder for rows of the pool."""
        chunks = [context.predict(encoder, context.pool[chunk]) for chunk in rows.split(CHUNK)]
        features, second = (torch.cat(part) for part in zip(*chunks))
        return F.normalize(features, dim=1), second

    labels, num_classes = context.labels, len(prototypes.present)
    bank.fill_(encode(key_encoder, context.labeled)[1], labels)
    labeled, _ = encode(network, context.labeled)
    unlabeled, logits = encode(network, context.unlabeled)
    assigned = logits.argmax(1)

    plain, _ = class_means(labeled, labels, num_classes)
    nearness = own_cosine(unlabeled, plain, assigned)
    x, partner, mixed_labels, weight = draw_mixtures(labels, assigned, nearness, num_classes, seed, context.step)
    mixed = labeled[:0]
    if len(x):
        pairs = zip(context.labeled[x].split(CHUNK), context.unlabeled[partner].split(CHUNK), weight.split(CHUNK))
        images = (mix_pixels(context.pool[a], context.pool[b], w) for a, b, w in pairs)
        mixed = F.normalize(torch.cat([context.predict(network, chunk)[0] for chunk in images]), dim=1)
    vectors, present = class_means(torch.cat([labeled, mixed]), torch.cat([labels, mixed_labels]), num_classes)
    prototypes.set_(vectors, present, unlabeled, assigned)
