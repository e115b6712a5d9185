"""DebiasPL (methods.md H; Wang et al., "Debiased learning from naturally imbalanced pseudo-labels", CVPR 2022)."""

from collections.abc import Hashable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from bacon_fast.methods.balancers.base import Balancer, Rows, Targets
from bacon_fast.methods.part import PartOptions, Setup

_SMALLEST = 1e-12  # of a mean probability, so that its logarithm stays finite


@dataclass(frozen=True)
class DebiasPLOptions(PartOptions):
    """DebiasPL (methods.md H)."""

    part: ClassVar[str] = "debiaspl"
    runs_on_length: ClassVar[bool] = False

    tau: float = 0.4
    """Strength of the debiasing and of the margin: 0.4 in USB, 1 in the authors' ImageNet runs."""

    def check(self) -> None:
        self.require_weights("tau")


class DebiasPL(Balancer):
    """Takes the average prediction out of the pseudo-labels, and asks for a margin in proportion to it.

        pseudo-label: softmax(a(h^w) - tau log p_bar);   loss: CE(a(h^s) + tau log p_bar, pseudo-label)

    p_bar starts at 1/K. After the pseudo-labels, p_bar <- m p_bar + (1 - m) mean over the batch of softmax(a(h^w)),
    class by class, and the loss takes the new one. The debiased probabilities give the confidence.

    USB's code differs by its version. In semilearn 0.3.0 and before (and so in the repository that BaCon's code and
    the published numbers come from, methods.md H) the mean is over all elements of softmax(a(h^w)), which is 1/K
    whatever they are: p_bar stays a constant vector, which no softmax sees, and the method is its base learner.
    `usb_ema` brings that back. semilearn 0.3.1 and 0.3.2 average class by class; from ours they still differ in that
    p_bar moves before the pseudo-labels are made, the loss takes the p_bar of the step before and tau 0.4 whatever was
    set, and the first factor is the momentum of the network's average. No published number is theirs, and no option
    brings it back.

    Args:
        num_classes: K.
        tau: strength of the debiasing; 1 in the authors' ImageNet runs, 0.4 in USB.
        momentum: m.
        usb_ema: None, or the momentum of the network's average, to do as semilearn 0.3.0: its first factor.

    Buffers:
        mean_prediction: p_bar, float32 [K].
    """

    def __init__(self, num_classes: int, *, tau: float, momentum: float, usb_ema: float | None = None) -> None:
        super().__init__()
        self.tau, self.momentum, self.usb_ema = tau, momentum, usb_ema
        self.register_buffer("mean_prediction", torch.full((num_classes,), 1 / num_classes))

    @torch.no_grad()
    def forward(self, rows: Rows, step: Tensor, phase: Hashable) -> Targets:
        probabilities = (rows.weak_logits - self._bias()).softmax(1)
        predictions = rows.weak_logits.softmax(1)
        mean = predictions.mean(0) if self.usb_ema is None else predictions.mean()
        kept = self.momentum if self.usb_ema is None else self.usb_ema
        self.mean_prediction.mul_(kept).add_(mean, alpha=1 - self.momentum)
        return Targets(probabilities, strong_bias=self._bias())

    def _bias(self) -> Tensor:
        return self.tau * self.mean_prediction.clamp_min(_SMALLEST).log()


def build(options: DebiasPLOptions, setup: Setup) -> DebiasPL:
    return DebiasPL(
        setup.data.num_classes,
        tau=options.tau,
        momentum=setup.shared.distribution_momentum,
        usb_ema=setup.ema if setup.shared.usb_compat else None,
    )
