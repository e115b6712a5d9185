"""CDMAD: what the classifier answers to an empty image is its bias (newer_methods.md L; Lee, Kim, CVPR 2024)."""

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from bacon_fast.methods.balancers.base import Balancer, Rows, Targets
from bacon_fast.methods.outputs import Batch, wide
from bacon_fast.methods.part import PartOptions, Setup
from bacon_fast.models.batchnorm import BatchNorm2d, batchnorms, frozen_statistics, statistics_momentum

AUTHORS_PASSES = {"fixmatch": 4, "remixmatch": 11}
"""Passes of a step of the authors' code that move the running statistics, beside that of the empty image."""


@dataclass(frozen=True)
class CDMADOptions(PartOptions):
    """CDMAD (newer_methods.md L). Before `start` the bias stays in the pseudo-labels; predictions never have it."""

    part: ClassVar[str] = "cdmad"
    changes: ClassVar[Mapping[str, Mapping[str, object]]] = {"remixmatch": {"sharpening": 1.0, "rampup": 1.0}}

    start: float = 50_500 / 250_000
    """Fraction of the run after which pseudo-labels are debiased (with remixmatch 50,500 of 150,000 steps)."""
    threshold: float = 0.0
    """Confidence from which a pseudo-label counts in FixMatch, in the place of --threshold; 0: all."""
    image: Literal["ones", "white", "black", "zeros"] = "ones"
    """The empty image: all ones (authors) or zeros after normalization, or white or black before."""
    align: Literal["auto", "on", "off"] = "auto"
    """Keep ReMixMatch's alignment; auto: where both sets are drawn with one imbalance (authors)."""
    authors_statistics: bool = False
    """Let the empty image move BatchNorm's running statistics, as it does in the authors' code."""

    def check(self) -> None:
        self.require_starts("start")
        self.require_fractions("threshold")

    def check_beside(self, parts: Mapping[str, PartOptions]) -> None:
        if "fixmatch" in parts and self.align != "auto":
            raise ValueError(f"cdmad.align: expected auto with fixmatch, which aligns nothing, found {self.align}")
        if "remixmatch" in parts and self.threshold != 0:
            raise ValueError(f"cdmad.threshold: expected 0 with remixmatch, which has none, found {self.threshold}")

    def network(self) -> dict[str, object]:
        return {"heads": "debiased"}

    def needs_images(self) -> str:
        return "whose empty image is made of pixels"


class CDMAD(Balancer):
    """Takes the network's answer to an empty image out of the pseudo-labels, which are soft, and out of predictions.

        beta = a(f(I));   q = softmax(a(h^w) - beta);   L_u = mean over both strong views of CE(a(h^s), q)

    I passes through the network alone, in training mode. Prediction is by a(f(x)) - a(f(I)) of the averaged network in
    evaluation mode (models.network.DebiasedNetwork), also before `start`.

    Args:
        color: of I after normalization, by channel.
        start: completed steps before beta is taken out of pseudo-labels.
        threshold: confidence from which a pseudo-label counts in FixMatch.
        align: leaves ReMixMatch its distribution alignment, behind the debiasing.
        authors_passes: None, or to repeat a slip of the authors' code how many passes of its step, beside that of I,
            move BatchNorm's running statistics: I then moves them first in every step, also before `start`, with the
            weight of one of these passes where those of ours have together the weight of theirs.
    """

    strong_views = 2

    def __init__(
        self,
        color: tuple[float, float, float],
        *,
        start: int,
        threshold: float = 0.0,
        align: bool = False,
        authors_passes: int | None = None,
    ) -> None:
        super().__init__()
        self.color, self.start, self.threshold = color, start, threshold
        self.aligns, self.authors_passes = not align, authors_passes

    @torch.no_grad()
    def check_images(self, height: int, width: int) -> None:
        """In training mode BatchNorm needs more than one value a channel, and I passes alone."""
        if self.authors_passes is not None and not any(layer.training for layer in batchnorms(self.network)):
            raise ValueError(
                "cdmad.authors_statistics: expected False where no statistics of BatchNorm change, found True"
            )
        network = copy.deepcopy(self.network)
        for layer in network.modules():
            if isinstance(layer, BatchNorm2d):
                layer.sync_group = None  # the same pixel on all ranks is still one
        try:
            network(network.empty(network.empty_image.new_empty(1, 3, height, width)))
        except ValueError as error:
            raise ValueError(
                "image_size: expected images so large that the last feature map has more than one pixel, as cdmad "
                f"passes one image alone in training mode; found {height}x{width} ({error})"
            ) from error

    def bind(self, network: nn.Module, averaged: nn.Module) -> None:
        """Also tells both networks the color of the empty image, which is then in the checkpoint."""
        super().bind(network, averaged)
        for one in (network, averaged):
            one.empty_image.copy_(torch.tensor(self.color))

    def phase(self, step: int) -> bool:
        """Whether pseudo-labels are debiased."""
        return step >= self.start

    @torch.no_grad()
    def own_pass(self, batch: Batch, phase: bool) -> Tensor | None:
        """beta, [1,K], at least float32: the same on all ranks."""
        if not phase and self.authors_passes is None:
            return None
        network, images = self.network, batch.images
        with self._statistics(network), torch.autocast(images.device.type, enabled=False):
            return wide(network(network.empty(images))[1])

    def _statistics(self, network: nn.Module):
        if self.authors_passes is None:
            return frozen_statistics(network)
        momentum = next((layer.momentum for layer in batchnorms(network)), 0.0)  # 0: there are none
        return statistics_momentum(network, 1 - (1 - momentum) ** (1 / self.authors_passes))

    def forward(self, rows: Rows, step: Tensor, phase: bool) -> Targets:
        logits = rows.weak_logits - rows.own if phase else rows.weak_logits
        return Targets(logits.softmax(1), soft=True)


def build(options: CDMADOptions, setup: Setup) -> CDMAD:
    of_pixel = {"white": 1.0, "black": 0.0}
    if options.image in of_pixel:
        pixel = of_pixel[options.image]
        color = tuple((pixel - mean) / std for mean, std in zip(setup.data.mean, setup.data.std))
    else:
        color = (1.0 if options.image == "ones" else 0.0,) * 3
    (base,) = set(setup.parts) & set(AUTHORS_PASSES)
    return CDMAD(
        color,
        start=round(options.start * setup.steps),
        threshold=options.threshold,
        align=setup.data.same_imbalance if options.align == "auto" else options.align == "on",
        authors_passes=AUTHORS_PASSES[base] if options.authors_statistics else None,
    )
