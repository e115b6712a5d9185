"""FixMatch with ABC, the auxiliary balanced classifier (methods.md B, C; Lee, Shin, Kim, NeurIPS 2021)."""

from torch import Tensor, nn

from bacon_fast.methods.abc import ABC
from bacon_fast.methods.outputs import Batch, Outputs, weighted


class FixMatchABC(nn.Module):
    """FixMatch on the main head, and ABC on the balanced one, in one pass over both.

    Args:
        abc: of the balanced head; its threshold counts for both heads.
        lambda_u: weight of FixMatch's unlabeled loss.
    """

    unlabeled_views = ("weak", "strong")

    def __init__(self, abc: ABC, *, lambda_u: float) -> None:
        super().__init__()
        self.abc, self.lambda_u = abc, lambda_u

    def forward(self, out: Outputs, batch: Batch, step: Tensor) -> tuple[dict[str, Tensor], dict[str, Tensor], Tensor]:
        """Losses `supervised`, `unsupervised`, `abc_labeled` and `abc_unlabeled`, all 0-d float32; statistics; the main
        head's pseudo-labels int64 [U], -1 below the threshold.
        """
        heads = self.abc.heads(out, batch, step)
        losses = {"supervised": heads.supervised, "unsupervised": weighted(self.lambda_u, heads.unsupervised)}
        stats = {
            "pseudo_rate": heads.pseudo_rate,
            "abc_rate": heads.abc_rate,
            "pseudo_known": heads.pseudo_known,
            "pseudo_correct": heads.pseudo_correct,
        }
        return losses | self.abc.weighted(heads), stats, heads.pseudo_labels
