"""FixMatch (methods.md B; Sohn et al., NeurIPS 2020)."""

import torch.nn.functional as F
from torch import Tensor, nn

from bacon_fast.methods.outputs import Outputs


class FixMatch(nn.Module):
    """Cross entropy on labels, and on the strong views against confident hard pseudo-labels of the weak views.

    Args:
        threshold: confidence from which a pseudo-label counts.
        lambda_u: weight of the unlabeled loss.
    """

    def __init__(self, *, threshold: float, lambda_u: float) -> None:
        super().__init__()
        self.threshold, self.lambda_u = threshold, lambda_u

    def forward(
        self, out: Outputs, labels: Tensor, true_labels: Tensor, step: Tensor
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Losses `supervised` and `unsupervised`, both 0-d float32.

        `true_labels` int64 [U] (-1 where unknown) serve only the logged pseudo-label accuracy.
        """
        confidence, pseudo_labels = out.weak_logits.detach().float().softmax(1).max(1)
        mask = confidence >= self.threshold
        # Divided by U, not by the number of confident rows: no confident row gives exactly 0.
        per_row = F.cross_entropy(out.strong_logits.float(), pseudo_labels, reduction="none")
        losses = {
            "supervised": F.cross_entropy(out.labeled_logits.float(), labels),
            "unsupervised": self.lambda_u * (per_row * mask).mean(),
        }
        return losses, pseudo_label_stats(mask, pseudo_labels, true_labels)


def pseudo_label_stats(mask: Tensor, pseudo_labels: Tensor, true_labels: Tensor) -> dict[str, Tensor]:
    """Rate of confident rows; how many of them have a known true label, and how many of those are right."""
    known = mask & (true_labels >= 0)
    return {
        "pseudo_rate": mask.float().mean(),
        "pseudo_known": known.sum().float(),
        "pseudo_correct": (known & (pseudo_labels == true_labels)).sum().float(),
    }
