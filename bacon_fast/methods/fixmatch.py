"""FixMatch (methods.md B; Sohn et al., NeurIPS 2020)."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bacon_fast.methods.outputs import Batch, Outputs


class FixMatch(nn.Module):
    """Cross entropy on labels, and on the strong views against confident hard pseudo-labels of the weak views.

    Args:
        threshold: confidence from which a pseudo-label counts.
        lambda_u: weight of the unlabeled loss.
    """

    def __init__(self, *, threshold: float, lambda_u: float) -> None:
        super().__init__()
        self.threshold, self.lambda_u = threshold, lambda_u

    def forward(self, out: Outputs, batch: Batch, step: Tensor) -> tuple[dict[str, Tensor], dict[str, Tensor], Tensor]:
        """Losses `supervised` and `unsupervised`, 0-d float32; statistics; pseudo-labels int64 [U], -1 for none."""
        confidence, pseudo_labels = out.weak_logits.detach().float().softmax(1).max(1)
        mask = confidence >= self.threshold
        # Divided by U, not by the number of confident rows: no confident row gives exactly 0.
        per_row = F.cross_entropy(out.strong_logits.float(), pseudo_labels, reduction="none")
        losses = {
            "supervised": F.cross_entropy(out.labeled_logits.float(), batch.labels),
            "unsupervised": self.lambda_u * (per_row * mask).mean(),
        }
        stats = pseudo_label_stats(mask, pseudo_labels, batch.true_labels)
        return losses, stats, torch.where(mask, pseudo_labels, -1)


def pseudo_label_stats(mask: Tensor, pseudo_labels: Tensor, true_labels: Tensor) -> dict[str, Tensor]:
    """Rate of confident rows; how many of them have a known true label, and how many of those are right."""
    known = mask & (true_labels >= 0)
    return {
        "pseudo_rate": mask.float().mean(),
        "pseudo_known": known.sum().float(),
        "pseudo_correct": (known & (pseudo_labels == true_labels)).sum().float(),
    }
