"""SSC: one contrastive loss for labels, pseudo-labels and unconfident images (methods.md G; arXiv 2409.07292)."""

import torch
from torch import Tensor

from bacon_fast import functional
from bacon_fast.methods.fixmatch import pseudo_label_stats
from bacon_fast.methods.gather import gather_batch, gather_views
from bacon_fast.methods.method import Method
from bacon_fast.methods.outputs import Batch, StepOutput, step_output
from bacon_fast.models.ssc import PrototypeNetwork


class SSC(Method):
    """Prototypes, labeled images and both strong views of the unlabeled ones, each row against all others.

    An unlabeled image whose weak view lies close enough to a prototype has that class, and so all rows of the class as
    positives. Any other one has a label of its own, and so its other view as its only positive, as in SimCLR.

    Args:
        network: backbone, projector and prototypes; its temperature is that of the pseudo-labels.
        threshold: confidence from which a pseudo-label counts.
        temperature: T of the loss.
        lambda_proto, lambda_up, lambda_down: weight of the prototypes' rows, of confident and of unconfident ones;
            labeled rows have weight 1.
        reduction: "wmean", the weighted mean over the rows that have a positive, or "pml", what the authors' code makes
            of it with pytorch-metric-learning (methods.md G.3).
        backend: of `functional.sup_con_loss`.
    """

    unlabeled_views = ("weak", "strong", "strong")

    def __init__(
        self,
        network: PrototypeNetwork,
        *,
        threshold: float = 0.95,
        temperature: float = 0.1,
        lambda_proto: float = 1.0,
        lambda_up: float = 1.0,
        lambda_down: float = 0.2,
        reduction: str = "wmean",
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
