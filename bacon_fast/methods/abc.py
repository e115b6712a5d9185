"""ABC: auxiliary balanced classifier (methods.md C; Lee, Shin, Kim, NeurIPS 2021)."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bacon_fast.data.philox import Stream, uniform
from bacon_fast.methods.outputs import Outputs


class ABC(nn.Module):
    """Balanced cross entropy on a second head: samples of a class are kept with probability N_min / N_c.

    Args:
        labeled_counts: N_c, int [K], all at least 1.
        threshold: confidence from which a pseudo-label of the balanced head counts.
        steps, epochs: T and E; the keep probability of pseudo-labels anneals from 1 to N_min / N_c in E stages.
        seed: of the masks, which are drawn from counters (seed, step, stream, row).

    Raises:
        ValueError: a class without labeled images, for which N_min / N_c is undefined.
    """

    def __init__(self, labeled_counts: Tensor, *, threshold: float, steps: int, epochs: int, seed: int) -> None:
        super().__init__()
        if (labeled_counts < 1).any():
            empty = torch.nonzero(labeled_counts < 1).flatten().tolist()
            raise ValueError(f"labeled_counts: expected at least one labeled image per class, found none for {empty}")
        keep = labeled_counts.min() / labeled_counts.to(torch.float64)
        self.register_buffer("keep", keep.float(), persistent=False)  # derived from the split, which has its own hash
        self.threshold, self.steps, self.epochs, self.seed = threshold, steps, epochs, seed

    def keep_probability(self, step: Tensor) -> Tensor:
        """pi^u_c(e) = 1 - (e/E)(1 - pi_c) at the epoch e of `step` (0-d int64): float32 [K]."""
        epoch = torch.div(step * self.epochs, self.steps, rounding_mode="floor")
        return 1 - (epoch / self.epochs) * (1 - self.keep)

    def forward(self, out: Outputs, labels: Tensor, step: Tensor) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Losses `abc_labeled` and `abc_unlabeled`, both 0-d float32."""
        rows = torch.arange(len(labels), device=labels.device)
        labeled_mask = uniform(self.seed, step, Stream.ABC_LABELED, rows) < self.keep[labels]
        labeled = F.cross_entropy(out.labeled_balanced.float(), labels, reduction="none")

        confidence, pseudo_labels = out.weak_balanced.detach().float().softmax(1).max(1)
        rows = torch.arange(len(pseudo_labels), device=labels.device)
        kept = uniform(self.seed, step, Stream.ABC_UNLABELED, rows) < self.keep_probability(step)[pseudo_labels]
        confident = confidence >= self.threshold
        unlabeled = F.cross_entropy(out.strong_balanced.float(), pseudo_labels, reduction="none")
        losses = {
            "abc_labeled": (labeled * labeled_mask).mean(),
            "abc_unlabeled": (unlabeled * (confident & kept)).mean(),
        }
        return losses, {"abc_rate": (confident & kept).float().mean()}
