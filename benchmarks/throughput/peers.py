"""Arms A and B: a step of FixMatch + ABC + BaCon as peers ship it, restated from formulas and measured costs.

None of USB's or BaCon's code is here. Only the structure is theirs: views from loader workers, a blocking copy to the
device, each head on each part of the batch, a Python loop over classes with rows picked by boolean masks, loops over
the memory bank for counts and centers, a weight average tensor by tensor followed by two whole state dicts, seven
values read by the host every step, and two full synchronizations.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.loss_arms import bacon_class_loop

from .loaders import HostBatch, Loaders, on_device
from .network import PlainNetwork
from .problem import MIDDLE, Problem, State
from .step import Flags, StepArm, synchronize

# The masks' two streams; a gate replaces the draws by those of our method.
LABELED, UNLABELED = 7, 8


def bernoulli(probability: Tensor, stream: int) -> Tensor:
    return torch.bernoulli(probability)


class TensorwiseAverage:
    """The average of a network's parameters, by name; the averaged network is filled from two state dicts."""

    def __init__(self, network: nn.Module, averaged: nn.Module, momentum: float) -> None:
        self.network, self.averaged, self.momentum = network, averaged, momentum
        self.values = {name: parameter.detach().clone() for name, parameter in averaged.named_parameters()}

    @torch.no_grad()
    def update(self) -> None:
        for name, parameter in self.network.named_parameters():
            self.values[name] = self.momentum * self.values[name] + (1 - self.momentum) * parameter
        self.averaged.load_state_dict(self.network.state_dict())
        self.averaged.load_state_dict(self.values, strict=False)


class LoopedBank:
    """BaCon's memory bank, with counts and centers found again in every step by a loop over the classes."""

    def __init__(self, state: State, num_labeled: int, device: torch.device, dtype: torch.dtype) -> None:
        bank = {name: value.to(device, copy=True) for name, value in state.bank.items()}
        self.features, self.centers = bank["features"].to(dtype), bank["centers"].to(dtype)
        self.written, self.label, self.counts = bank["written"], bank["selected_label"], bank["class_counts"]
        self.has_center = bank["has_center"].tolist()
        self.num_labeled = num_labeled

    def count(self, labeled_slots: Tensor, labels: Tensor, slots: Tensor, pseudo: Tensor, counted: Tensor) -> None:
        """Selects the labeled rows and the ``counted`` unlabeled ones as their classes."""
        self.label[labeled_slots] = labels
        self.label[self.num_labeled + slots[counted]] = pseudo[counted]
        for c in range(len(self.counts)):
            self.counts[c] = (self.label == c).sum()

    def write(self, slots: Tensor, features: Tensor, reliable: Tensor) -> None:
        """Keeps the reliable rows, and takes every center over the whole bank."""
        self.features[slots[reliable]] = features[reliable]
        self.written[slots[reliable]] = True
        self.centers = self.centers.clone()  # the backward still needs those of the loss
        for c in range(len(self.counts)):
            rows = self.features[(self.label == c) & self.written]
            self.has_center[c] = len(rows) > 0
            if self.has_center[c]:
                self.centers[c] = rows.mean(dim=0)


class UsbStyleStep(StepArm):
    """The USB-style reference.

    Args:
        problem, state: what to train, from where.
        workers: of the loaders, for labeled and unlabeled images; None for a step that is only ever given batches.
        dtype: of all it computes; float64 for a gate.
    """

    def __init__(
        self, problem: Problem, state: State, workers: tuple[int, int] | None, dtype: torch.dtype = torch.float32
    ) -> None:
        config = self.config = problem.config
        self.problem, self.device, self.keep = problem, problem.device, problem.keep.to(problem.device)
        # USB asks cuDNN for deterministic kernels and leaves torch's default of TF32 convolutions as it is.
        self.flags = Flags(deterministic=True, tf32_convolutions=self.device.type == "cuda")
        self.network, averaged = (
            PlainNetwork(config.model.backbone, problem.num_classes, config.model.bn_momentum).to(self.device, dtype)
            for _ in range(2)
        )
        self.network.load_state_dict(state.network)
        dim = config.parts["bacon"].proj_dim
        self.projection = nn.Linear(self.network.backbone.num_features, dim).to(self.device, dtype)
        self.projection.load_state_dict(state.projection)
        self.bank = LoopedBank(state, len(problem.labeled), self.device, dtype)
        parameters = [*self.network.parameters(), *self.projection.parameters()]
        self.optimizer = torch.optim.SGD(
            [
                {"params": [p for p in parameters if p.dim() > 1], "weight_decay": config.optimizer.weight_decay},
                {"params": [p for p in parameters if p.dim() <= 1], "weight_decay": 0.0},
            ],
            lr=config.optimizer.lr,
            momentum=0.9,
            nesterov=True,
        )
        averaged.load_state_dict(state.averaged)
        self.average = TensorwiseAverage(self.network, averaged, config.optimizer.ema)
        self.completed = MIDDLE
        if workers is not None:
            self.loaders = Loaders(problem, workers)
            self.warmup = self.loaders.ready

    @property
    def averaged(self) -> nn.Module:
        return self.average.averaged

    def start(self) -> None:
        self.loaders.start()

    def stop(self) -> None:
        self.loaders.stop()

    def step(self) -> dict[str, float]:
        return self.update(self.loaders.next())

    def update(self, batch: HostBatch, draw: Callable[[Tensor, int], Tensor] = bernoulli) -> dict[str, float]:
        """The step on a batch, ``draw(probability [n], stream)`` giving ABC's masks. Returns the losses."""
        config, network = self.config, self.network
        synchronize(self.device)
        batch = on_device(batch, self.device)
        labels, sizes = batch.labels, [len(batch.labels), len(batch.unlabeled_slots), len(batch.unlabeled_slots)]

        features = network.backbone(torch.cat([batch.labeled, batch.weak, batch.strong]))
        labeled_logits, weak_logits, strong_logits = network.head(features).split(sizes)
        labeled, weak, strong = features.split(sizes)
        supervised = F.cross_entropy(labeled_logits, labels)
        confidence, pseudo = weak_logits.detach().softmax(dim=1).max(dim=1)
        mask = (confidence >= config.shared.threshold).float()
        unsupervised = (F.cross_entropy(strong_logits, pseudo, reduction="none") * mask).mean()

        labeled_balanced, strong_balanced = network.balanced_head(labeled), network.balanced_head(strong)
        with torch.no_grad():
            weak_balanced = network.balanced_head(weak)
            confidence, balanced_pseudo = weak_balanced.softmax(dim=1).max(dim=1)
            kept = draw(self.keep[labels], LABELED)
            keep = 1 - self.problem.epoch_share(self.completed) * (1 - self.keep)
            used = (confidence >= config.shared.threshold).float() * draw(keep[balanced_pseudo], UNLABELED)
        abc_labeled = (F.cross_entropy(labeled_balanced, labels, reduction="none") * kept).mean()
        abc_unlabeled = (F.cross_entropy(strong_balanced, balanced_pseudo, reduction="none") * used).mean()

        contrastive, reliable = self._bacon(batch, labeled, weak, labeled_balanced, weak_balanced)
        abc = abc_labeled + abc_unlabeled
        parts = config.parts
        total = supervised + parts["fixmatch"].lambda_u * unsupervised
        total = total + parts["abc"].lambda_abc * abc + parts["bacon"].lambda_con * contrastive
        total.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        synchronize(self.device)
        self.average.update()
        self.completed += 1
        return {
            "total": total.item(),
            "supervised": supervised.item(),
            "unsupervised": unsupervised.item(),
            "abc": abc.item(),
            "contrastive": contrastive.item(),
            "pseudo_rate": mask.mean().item(),
            "reliable": reliable.item(),
        }

    def _bacon(
        self, batch: HostBatch, labeled: Tensor, weak: Tensor, labeled_balanced: Tensor, weak_balanced: Tensor
    ) -> tuple[Tensor, Tensor]:
        """BaCon's loss and the share of reliable rows; the bank moves on (methods.md E.2)."""
        config = self.config
        logits = torch.cat([labeled_balanced.detach(), weak_balanced])
        probability = logits.softmax(dim=1).amax(dim=1)
        reliable = probability >= config.parts["bacon"].reliable_threshold
        counted = probability[len(labeled) :] >= config.shared.threshold
        self.bank.count(batch.labeled_slots, batch.labels, batch.unlabeled_slots, weak_balanced.argmax(dim=1), counted)
        projected = self.projection(torch.cat([labeled, weak]))
        loss = bacon_class_loop(
            projected,
            batch.labels,
            logits,
            self.bank.centers,
            reliable,
            self.bank.counts,
            self.completed / config.steps,
            self.bank.has_center,
        )
        slots = torch.cat([batch.labeled_slots, batch.unlabeled_slots + len(self.problem.labeled)])
        self.bank.write(slots, projected.detach(), reliable)
        return loss, reliable.float().mean()
