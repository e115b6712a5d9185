"""ABC, the auxiliary balanced classifier (methods.md C; Lee, Shin, Kim, NeurIPS 2021), on the views of any base."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from bacon_fast import functional
from bacon_fast.functional import FixMatchABCOutput
from bacon_fast.methods.outputs import Batch, Outputs, weighted
from bacon_fast.methods.part import PartOptions, Setup


@dataclass(frozen=True)
class ABCOptions(PartOptions):
    """ABC (methods.md C)."""

    part: ClassVar[str] = "abc"
    operation: ClassVar[str] = "fixmatch_abc_loss"

    lambda_abc: float = 1.0
    """Weight of ABC's losses."""

    def check(self) -> None:
        self.require_weights("lambda_abc")

    def network(self) -> dict[str, object]:
        return {"heads": "balanced"}


class ABC(nn.Module):
    """A second head, trained like FixMatch's, that keeps rows of class c with probability N_min / N_c.

    Args:
        labeled_counts: N_c, int [K], all at least 1.
        threshold: confidence from which a pseudo-label counts.
        lambda_abc: weight of both losses.
        steps, epochs: T and E; the keep probability of pseudo-labels anneals from 1 to N_min / N_c in E stages.
        seed: of the masks. `functional.fixmatch_abc_loss` draws them from counters (seed, step, stream, row).
        backend: of `functional.fixmatch_abc_loss`.

    Raises:
        ValueError: a class without labeled images, for which N_min / N_c is undefined.
    """

    def __init__(
        self,
        labeled_counts: Tensor,
        *,
        threshold: float,
        lambda_abc: float,
        steps: int,
        epochs: int,
        seed: int,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        if (labeled_counts < 1).any():
            empty = torch.nonzero(labeled_counts < 1).flatten().tolist()
            raise ValueError(f"labeled_counts: expected at least one labeled image per class, found none for {empty}")
        keep = labeled_counts.min() / labeled_counts.to(torch.float64)
        # Derived from the split, which has its own hash.
        self.register_buffer("keep", keep.float(), persistent=False)
        self.register_buffer("_dropped", 1 - self.keep, persistent=False)
        self.register_buffer("_ones", torch.ones_like(self.keep), persistent=False)
        self.threshold, self.lambda_abc = threshold, lambda_abc
        self.steps, self.epochs, self.seed, self.backend = steps, epochs, seed, backend

    def keep_probability(self, step: Tensor) -> Tensor:
        """pi^u_c(e) = 1 - (e/E)(1 - pi_c) at the epoch e of `step` (0-d int64): float32 [K]."""
        if self.steps % self.epochs:
            epoch = torch.div(step * self.epochs, self.steps, rounding_mode="floor")
        else:
            epoch = torch.div(step, self.steps // self.epochs, rounding_mode="floor")
        return torch.addcmul(self._ones, epoch / self.epochs, self._dropped, value=-1)

    def heads(self, out: Outputs, batch: Batch, step: Tensor) -> FixMatchABCOutput:
        """Losses of both heads on the labeled, weak and strong rows of `out`, before weighting, and statistics."""
        return functional.fixmatch_abc_loss(
            out.logits,
            out.balanced,
            batch.labels,
            batch.true_labels,
            self.keep,
            self.keep_probability(step),
            step=step,
            seed=self.seed,
            threshold=self.threshold,
            backend=self.backend,
        )

    def weighted(self, heads: FixMatchABCOutput) -> dict[str, Tensor]:
        """Losses `abc_labeled` and `abc_unlabeled`, 0-d float32."""
        return {
            "abc_labeled": weighted(self.lambda_abc, heads.abc_labeled),
            "abc_unlabeled": weighted(self.lambda_abc, heads.abc_unlabeled),
        }

    def forward(self, out: Outputs, batch: Batch, step: Tensor) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """The balanced head's losses, weighted, and the share of unlabeled rows in them."""
        heads = self.heads(out, batch, step)
        return self.weighted(heads), {"abc_rate": heads.abc_rate}


def build(options: ABCOptions, setup: Setup) -> ABC:
    return ABC(
        setup.data.labeled_counts,
        threshold=setup.shared.threshold,
        lambda_abc=options.lambda_abc,
        steps=setup.steps,
        epochs=setup.shared.epochs,
        seed=setup.seed,
        backend=setup.shared.backend,
    )
