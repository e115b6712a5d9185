"""SSC: one contrastive loss for labels, pseudo-labels and unconfident images (methods.md G; arXiv 2409.07292)."""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from bacon_fast import functional
from bacon_fast.methods.fixmatch import pseudo_label_stats
from bacon_fast.methods.gather import gather_batch, gather_views
from bacon_fast.methods.method import Method
from bacon_fast.methods.outputs import Batch, StepOutput, step_output
from bacon_fast.methods.part import PartOptions, Setup
from bacon_fast.models.ssc import PrototypeNetwork


@dataclass(frozen=True)
class SSCOptions(PartOptions):
    """SSC (methods.md G)."""

    part: ClassVar[str] = "ssc"
    runs_on_length: ClassVar[bool] = False
    operation: ClassVar[str] = "contrastive"

    temperature: float = 0.1
    """T of the contrastive loss."""
    pl_temperature: float = 0.08
    """T_pl of the similarities to the prototypes, which pseudo-labels and predictions are made of."""
    lambda_proto: float = 1.0
    """Weight of the prototypes' rows in the loss."""
    lambda_up: float = 1.0
    """Weight of the confident unlabeled rows."""
    lambda_down: float = 0.2
    """Weight of the unconfident unlabeled rows."""
    reduction: Literal["wmean", "pml"] = "wmean"
    """Weighted mean over the rows with a positive, or what the released code gets from pytorch-metric-learning."""

    def check(self) -> None:
        self.require_positive("temperature", "pl_temperature")
        self.require_weights("lambda_proto", "lambda_up", "lambda_down")

    def network(self) -> dict[str, object]:
        return {"heads": "prototypes", "temperature": self.pl_temperature}


class SSC(Method):
    """Prototypes, labeled images and both strong views of the unlabeled ones, each row against all others.

    An unlabeled image whose weak view lies close enough to a prototype has that class, and so all rows of the class as
    positives. Any other one has a label of its own, and so its other view as its only positive, as in SimCLR.

    Args:
        network: backbone, projector and prototypes; pseudo-labels have its temperature.
        threshold: confidence from which a pseudo-label counts.
        temperature: T of the loss.
        lambda_proto, lambda_up, lambda_down: weight of the prototypes' rows, of confident and of unconfident ones;
            labeled rows have weight 1.
        reduction: "wmean", the weighted mean over the rows that have a positive, or "pml", what the authors' code
            computes with pytorch-metric-learning (methods.md G.3).
        backend: of `functional.sup_con_loss`.
    """

    unlabeled_views = ("weak", "strong", "strong")

    def __init__(
        self,
        network: PrototypeNetwork,
        *,
        threshold: float,
        temperature: float,
        lambda_proto: float,
        lambda_up: float,
        lambda_down: float,
        reduction: str,
        backend: str | None = None,
    ) -> None:
        super().__init__(network)
        self.threshold, self.temperature = threshold, temperature
        self.lambda_proto, self.lambda_up, self.lambda_down = lambda_proto, lambda_up, lambda_down
        self.reduction, self.backend = reduction, backend

    def forward(self, batch: Batch, step: Tensor, phase: None) -> StepOutput:
        projections = gather_views(self.network(batch.images), batch.num_labeled, batch.num_unlabeled)
        batch = gather_batch(batch)
        count = batch.num_unlabeled
        labeled, weak, strong = projections.split([batch.num_labeled, count, 2 * count])

        with torch.no_grad():
            logits = self.network.logits(weak)
            confidence, pseudo_labels = logits.softmax(1).max(1)
            mask = confidence >= self.threshold
            own_labels = logits.shape[1] + torch.arange(count, device=logits.device)
            strong_labels = torch.where(mask, pseudo_labels, own_labels)
            up, down = logits.new_full((), self.lambda_up), logits.new_full((), self.lambda_down)
            strong_weights = torch.where(mask, up, down)
            weights = torch.cat([logits.new_ones(batch.num_labeled), strong_weights, strong_weights])

        loss = functional.sup_con_loss(
            torch.cat([labeled, strong]),
            torch.cat([batch.labels, strong_labels, strong_labels]),
            prototypes=self.network.prototypes,
            weights=weights,
            prototype_weight=self.lambda_proto,
            temperature=self.temperature,
            reduction=self.reduction,
            backend=self.backend,
        )
        stats = pseudo_label_stats(mask, pseudo_labels, batch.true_labels)
        return step_output({"contrastive": loss}, stats, torch.where(mask, pseudo_labels, -1))


def build(options: SSCOptions, setup: Setup, network: PrototypeNetwork) -> SSC:
    return SSC(
        network,
        threshold=setup.shared.threshold,
        temperature=options.temperature,
        lambda_proto=options.lambda_proto,
        lambda_up=options.lambda_up,
        lambda_down=options.lambda_down,
        reduction=options.reduction,
        backend=setup.shared.backend,
    )
