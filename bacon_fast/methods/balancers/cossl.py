"""CoSSL, co-learning of representation and classifier (methods.md H; Fan, Dai, Kukleva, Schiele, CVPR 2022)."""

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from bacon_fast.data.philox import Stream, philox, to_uniform
from bacon_fast.methods.balancers.base import Balancer, Rows, Targets
from bacon_fast.methods.balancers.cossl_warmup import balanced_features, imprinted_weights, train_head
from bacon_fast.methods.method import RefreshContext
from bacon_fast.methods.outputs import Batch, wide
from bacon_fast.methods.part import PartOptions, Setup


@dataclass(frozen=True)
class CoSSLOptions(PartOptions):
    """CoSSL (methods.md H)."""

    part: ClassVar[str] = "cossl"

    start: float = 0.8
    """Fraction of the run after which the teacher head labels: 0.8 (authors), 0.2 (BaCon's runs)."""
    lambda_0: float = 0.6
    """The least share of the labeled image's feature in a blend."""

    def check(self) -> None:
        self.require_starts("start")
        self.require_fractions("lambda_0")

    def network(self) -> dict[str, object]:
        return {"heads": "teacher"}


class CoSSL(Balancer):
    """A teacher head on the averaged backbone learns from class-balanced, blended rows, and makes the pseudo-labels.

    Until `start` the base learner trains alone. Then the teacher is warmed up (cossl_warmup.py), and from there
    on, beside the base learner, each step takes B labeled images (x, y) drawn class by class, and

        with probability (N_1 - N_y) / N_1:   f <- lambda f(x) + (1 - lambda) f(u),   lambda ~ U(lambda_0, 1)
        L_teacher = mean CE(teacher(f), y)

    with f of the averaged backbone on strong views and u the step's unlabeled images: tail-class feature enhancement.
    The softmax of the teacher on the averaged backbone's features of the weak views takes the place of the base
    learner's predictions, and the averaged teacher is what evaluation uses (models.network.TeacherNetwork). As in USB,
    u comes from the unlabeled set; in the authors' code it comes from both sets.

    Args:
        labeled_counts: N_c, int [K].
        start: completed steps before the warm-up; 400 of 500 epochs (authors), 200 of 1,000 (BaCon's runs).
        lambda_0: 0.6 (USB; the authors' runs) or 0.8 (their default).
        seed: of the draws.
        usb_compat: as in USB's code. There every row has the probability of class 0 (an argmax is taken of a label), so
            nothing is blended when class 0 is the head, and the base learner keeps making its own pseudo-labels.

    Raises:
        ValueError: a class without labeled images.
    """

    balanced_view = True

    def __init__(
        self, labeled_counts: Tensor, *, start: int, lambda_0: float, seed: int, usb_compat: bool = False
    ) -> None:
        super().__init__()
        if (labeled_counts < 1).any():
            empty = torch.nonzero(labeled_counts < 1).flatten().tolist()
            raise ValueError(f"labeled_counts: expected at least one labeled image per class, found none for {empty}")
        self.start, self.lambda_0, self.seed, self.usb_compat = start, lambda_0, seed, usb_compat
        largest = labeled_counts.max()
        probability = ((largest - labeled_counts) / largest).float()
        if usb_compat:
            probability = probability[:1].expand_as(probability).clone()
        self.register_buffer("blend_probability", probability, persistent=False)  # derived from the split

    def phase(self, step: int) -> bool:
        """Whether the teacher takes part."""
        return step >= self.start

    def averaged_images(self, batch: Batch, weak: Tensor, strong: Tensor, phase: bool) -> Tensor | None:
        """The class-balanced labeled images, then the weak and the strong views."""
        return torch.cat([batch.balanced_images, weak, strong]) if phase else None

    def forward(self, rows: Rows, step: Tensor, phase: bool) -> Targets:
        predicted = rows.weak_logits.softmax(1)
        if not phase:
            return Targets(predicted)
        teacher, labels = self.network.balanced_head, rows.batch.balanced_labels
        sizes = [len(labels), len(predicted), len(predicted)]
        labeled, weak, strong = rows.averaged_features.split(sizes)
        blended = self.blend(labeled, strong[: len(labeled)], labels, step)
        loss = F.cross_entropy(wide(teacher(blended)), labels)
        if not self.usb_compat:
            predicted = wide(teacher(weak).detach()).softmax(1)
        return Targets(predicted, losses={"teacher": loss})

    def blend(self, features: Tensor, others: Tensor, labels: Tensor, step: Tensor) -> Tensor:
        """Rows [B,F] of `features`, some of them blended with the same row of `others`, by the labels int64 [B]."""
        slots = torch.arange(len(labels), device=labels.device)
        draws = to_uniform(philox(self.seed, step, Stream.COSSL_BLEND, slots, 2), features.dtype)
        share = self.lambda_0 + (1 - self.lambda_0) * draws[:, 1:]
        drawn = draws[:, :1] < self.blend_probability[labels][:, None]
        return torch.where(drawn, torch.lerp(others, features, share), features)

    def refresh_due(self, step: int) -> bool:
        return step == self.start

    def refresh(self, context: RefreshContext) -> None:
        """Warms up the teacher head, online and averaged, and lets it predict from now on."""
        online, averaged = self.network.balanced_head, self.averaged.balanced_head
        labeled, unlabeled = (
            context.predict_rows(self.averaged, rows, lambda features, _: (features.to(online.weight.dtype),))[0]
            for rows in (context.labeled, context.unlabeled)
        )
        imprint = imprinted_weights(labeled, context.labels, len(self.blend_probability))
        features, labels = balanced_features(labeled, context.labels, unlabeled, imprint, self.seed)
        trained, mean = train_head(online, features, labels, self.seed)
        with torch.no_grad():
            for head, weights in ((online, trained), (averaged, mean)):
                for parameter, value in zip(head.parameters(), weights, strict=True):
                    parameter.copy_(value)
            for network in (self.network, self.averaged):
                network.teacher_ready.fill_(True)


def build(options: CoSSLOptions, setup: Setup) -> CoSSL:
    return CoSSL(
        setup.data.labeled_counts,
        start=round(options.start * setup.steps),
        lambda_0=options.lambda_0,
        seed=setup.seed,
        usb_compat=setup.shared.usb_compat,
    )
