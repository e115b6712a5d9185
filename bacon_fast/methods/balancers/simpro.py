"""SimPro: EM over unknown class priors (newer_methods.md K; Du, Han, Huang, ICML 2024)."""

from collections.abc import Hashable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from bacon_fast.methods.balancers.base import Balancer, Rows, Targets
from bacon_fast.methods.part import PartOptions, Setup
from bacon_fast.ops.snapshot import snapshot

_SMALLEST = 1e-12  # the authors', so that a class whose prior is 0 has a finite bias


@dataclass(frozen=True)
class SimProOptions(PartOptions):
    """SimPro (newer_methods.md K)."""

    part: ClassVar[str] = "simpro"

    threshold: float = 0.95
    """Confidence from which a pseudo-label counts, in the place of --threshold: 0.95, 0.2 on CIFAR-100 (authors)."""
    estimates: int = 86
    """Estimates of the priors in a run, evenly spread, at most one a step: 86, one every 500 steps (authors)."""
    tau: float = 2.0
    """Exponent of the priors: 2 on CIFAR-10 and STL-10, 1 on CIFAR-100 (authors)."""
    momentum: float = 0.9
    """Of the priors from one estimate to the next."""
    strong_views: int = 2
    """Strong views of an unlabeled image: 2 (authors), or 1."""
    labeled_strong: bool = True
    """Train on a strong view of each labeled image too (authors)."""

    def check(self) -> None:
        self.require_weights("tau")
        self.require_fractions("momentum", "threshold")
        self.require_integers(1, "estimates")
        self.require(self.strong_views in (1, 2), "strong_views", "1 or 2")


class SimPro(Balancer):
    """Learns p(x | y), with the priors in the losses, and estimates the prior of the unlabeled images along the way.

        q = softmax(a(h^w) + log pi_u^tau);   m = [max q >= threshold]
        L_s = (1/s) mean CE(a(h) + log pi^tau, y), on weak and strong views
        L_u = mean over strong views of m CE(a(h^s) + log pi^tau, q)

    pi_u is the prior of the unlabeled images, 1/K at first, and pi that of all images, first that of the labeled ones.
    n_u sums m q over the steps and n_l the labels. Every T/E steps, or each where E > T, behind the losses,

        pi_u <- 0.9 pi_u + 0.1 n_u / (sum n_u + 1);   pi <- 0.9 pi + 0.1 (n_l + n_u) / sum(n_l + n_u);   n_l, n_u <- 0

    pi_u need not have sum 1, which the softmax does not see. Prediction is by a(h) alone.

    Args:
        labeled_counts: N_c, int [K].
        tau: exponent of both priors within the logarithm.
        momentum: 0.9 above.
        labeled_weight: 1/s.
        steps, estimates: T and E, 43,000 and 86 in the authors' runs.
        threshold: confidence from which a pseudo-label counts.
        strong_views: of an unlabeled image.
        labeled_strong: whether labeled images have a strong view too.

    Buffers:
        unlabeled_prior, prior: pi_u and pi, float32 [K]; unlabeled_sums, labeled_sums: n_u and n_l, float32 [K].
    """

    def __init__(
        self,
        labeled_counts: Tensor,
        *,
        tau: float,
        momentum: float,
        labeled_weight: float,
        steps: int,
        estimates: int,
        threshold: float,
        strong_views: int = 2,
        labeled_strong: bool = True,
    ) -> None:
        super().__init__()
        self.tau, self.momentum, self.steps, self.estimates = tau, momentum, steps, estimates
        self.threshold, self.strong_views, self.labeled_strong_view = threshold, strong_views, labeled_strong
        classes = len(labeled_counts)
        self.register_buffer("labeled_weights", torch.full((classes,), labeled_weight), persistent=False)
        self.register_buffer("unlabeled_prior", torch.full((classes,), 1 / classes))
        self.register_buffer("prior", (labeled_counts / labeled_counts.sum()).float())
        self.register_buffer("unlabeled_sums", torch.zeros(classes))
        self.register_buffer("labeled_sums", torch.zeros(classes))

    @torch.no_grad()
    def forward(self, rows: Rows, step: Tensor, phase: Hashable) -> Targets:
        probabilities = (rows.weak_logits + self._bias(self.unlabeled_prior)).softmax(1)
        bias = self._bias(self.prior)
        mask = probabilities.amax(1, keepdim=True) >= self.threshold
        labels = rows.batch.labels[:, None] == torch.arange(len(bias), device=bias.device)
        self.unlabeled_sums.add_((probabilities * mask).sum(0))
        self.labeled_sums.add_(labels.sum(0))
        self._estimate(step)
        return Targets(
            probabilities,
            soft=True,
            labeled_bias=bias,
            strong_bias=bias,
            labeled_weights=self.labeled_weights,
        )

    def _bias(self, prior: Tensor) -> Tensor:
        return (snapshot(prior) ** self.tau + _SMALLEST).log()  # the step overwrites the prior before its backward

    def _estimate(self, step: Tensor) -> None:
        """New priors and no sums, if an estimate is due behind the step that follows `step` completed ones."""
        before, after = (
            torch.div(done * self.estimates, self.steps, rounding_mode="floor") for done in (step, step + 1)
        )
        due, total = after > before, self.unlabeled_sums + self.labeled_sums
        unlabeled = self.unlabeled_sums / (self.unlabeled_sums.sum() + 1)
        for prior, estimate in ((self.unlabeled_prior, unlabeled), (self.prior, total / total.sum())):
            prior.copy_(torch.where(due, self.momentum * prior + (1 - self.momentum) * estimate, prior))
        self.unlabeled_sums.masked_fill_(due, 0)
        self.labeled_sums.masked_fill_(due, 0)


def labeled_weight(num_labeled: int, num_unlabeled: int, labeled_rows: int, unlabeled_rows: int) -> float:
    """1/s, s = floor(M / U) / floor(N / B): how many epochs of the labeled set one of the unlabeled set is long.

    Where a set is smaller than its batch, s = M B / (U N).
    """
    batches, labeled_batches = num_unlabeled // unlabeled_rows, num_labeled // labeled_rows
    if batches and labeled_batches:
        return labeled_batches / batches
    return unlabeled_rows * num_labeled / (num_unlabeled * labeled_rows)


def build(options: SimProOptions, setup: Setup) -> SimPro:
    data = setup.data
    return SimPro(
        data.labeled_counts,
        tau=options.tau,
        momentum=options.momentum,
        labeled_weight=labeled_weight(data.num_labeled, data.num_unlabeled, setup.labeled_rows, setup.unlabeled_rows),
        steps=setup.steps,
        estimates=options.estimates,
        threshold=options.threshold,
        strong_views=options.strong_views,
        labeled_strong=options.labeled_strong,
    )
