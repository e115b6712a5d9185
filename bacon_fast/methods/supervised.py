"""Cross entropy on the labeled images alone: the lower bound every semi-supervised method is compared with."""

from dataclasses import dataclass
from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from bacon_fast.methods.balancers.base import Balancer, Targets
from bacon_fast.methods.composed import ComposedMethod
from bacon_fast.methods.outputs import Batch, Outputs
from bacon_fast.methods.part import PartOptions, Setup
from bacon_fast.models.network import Network


@dataclass(frozen=True)
class SupervisedOptions(PartOptions):
    """The supervised baseline has no options of its own."""

    part: ClassVar[str] = "supervised"
    runs_on_length: ClassVar[bool] = False


class Supervised(nn.Module):
    """Mean cross entropy of the labeled rows; needs no unlabeled images."""

    unlabeled_views = ()

    def forward(
        self, out: Outputs, batch: Batch, step: Tensor, targets: Targets | None = None
    ) -> tuple[dict[str, Tensor], dict[str, Tensor], None]:
        """Loss `supervised`, 0-d float32. Of a balancer's `targets` it takes the bias of the labeled rows."""
        logits = out.labeled_logits.float()
        if targets is not None and targets.labeled_bias is not None:
            logits = logits + targets.labeled_bias
        return {"supervised": F.cross_entropy(logits, batch.labels)}, {}, None


def build(
    options: SupervisedOptions, setup: Setup, network: Network, balancer: Balancer | None = None
) -> ComposedMethod:
    return ComposedMethod(network, Supervised(), balancer=balancer)
