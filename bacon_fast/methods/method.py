"""What one training step computes: a base learner, balanced or not, and a contrastive regularizer."""

from torch import Tensor, nn

from bacon_fast.losses.bacon import BaConLoss
from bacon_fast.methods.fixmatch import FixMatch
from bacon_fast.methods.fixmatch_abc import FixMatchABC
from bacon_fast.methods.outputs import Batch, Outputs
from bacon_fast.methods.supervised import Supervised
from bacon_fast.models.network import Network


class Method(nn.Module):
    """One forward of all views together (`use_cat`: BatchNorm sees labeled, weak and strong rows), then the losses.

    Args:
        network: backbone and heads.
        base: Supervised, FixMatch, or FixMatchABC, which needs a network with a balanced head.
        regularizer: BaConLoss, or None.
        steps: T, for BaCon's temperature schedule.
        lambda_con: weight of the regularizer's loss.
    """

    def __init__(
        self,
        network: Network,
        base: Supervised | FixMatch | FixMatchABC,
        regularizer: BaConLoss | None = None,
        *,
        steps: int,
        lambda_con: float = 1.0,
    ) -> None:
        super().__init__()
        self.network, self.base, self.regularizer = network, base, regularizer
        self.steps, self.lambda_con = steps, lambda_con

    @property
    def uses_unlabeled(self) -> bool:
        return not isinstance(self.base, Supervised)

    def forward(
        self, batch: Batch, step: Tensor, contrast: bool
    ) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]:
        """Total loss, its weighted terms, and statistics to log; all 0-d float32, nothing read back by the host.

        Args:
            batch: the step's views.
            step: completed optimizer steps, 0-d int64 on the device.
            contrast: whether BaCon's loss is added yet. A Python bool, so that before its start the projection head has
                no gradient and is not decayed.
        """
        features, logits, balanced = self.network(batch.images)
        out = Outputs(features, logits, balanced, len(batch.labels), len(batch.unlabeled_slots))
        losses, stats = self.base(out, batch.labels, batch.true_labels, step)
        if self.regularizer is not None:
            contrastive, more = self.regularizer(
                out.anchor_features,
                batch.labels,
                out.anchor_logits,
                batch.labeled_slots,
                batch.unlabeled_slots,
                progress=step / self.steps,
                active=contrast,
            )
            losses["contrastive"] = self.lambda_con * contrastive
            stats |= more
        total = sum(losses.values())
        return total, {"total": total.detach(), **{k: v.detach() for k, v in losses.items()}}, stats
