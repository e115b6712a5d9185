"""What one training step computes: base learner + class balancer + contrastive regularizer."""

from torch import Tensor, nn

from bacon_fast.losses.bacon import BaConLoss
from bacon_fast.methods.abc import ABC
from bacon_fast.methods.fixmatch import FixMatch
from bacon_fast.methods.outputs import Batch, Outputs
from bacon_fast.methods.supervised import Supervised
from bacon_fast.models.network import Network


class Method(nn.Module):
    """One forward of all views together (`use_cat`: BatchNorm sees labeled, weak and strong rows), then the losses.

    Args:
        network: backbone and heads.
        base: FixMatch or Supervised.
        balancer: ABC, or None.
        regularizer: BaConLoss, or None.
        steps: T, for BaCon's temperature schedule.
        lambda_abc, lambda_con: weights of the balancer's and the regularizer's losses.
    """

    def __init__(
        self,
        network: Network,
        base: FixMatch | Supervised,
        balancer: ABC | None = None,
        regularizer: BaConLoss | None = None,
        *,
        steps: int,
        lambda_abc: float = 1.0,
        lambda_con: float = 1.0,
    ) -> None:
        super().__init__()
        self.network, self.base, self.balancer, self.regularizer = network, base, balancer, regularizer
        self.steps, self.lambda_abc, self.lambda_con = steps, lambda_abc, lambda_con

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
        losses, stats = self.base(out, batch.labels, batch.true_labels)
        if self.balancer is not None:
            terms, more = self.balancer(out, batch.labels, step)
            losses |= {name: self.lambda_abc * value for name, value in terms.items()}
            stats |= more
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
