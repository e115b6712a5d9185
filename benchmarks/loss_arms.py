"""The losses that benchmarks/loss.py compares: the authors' way, vectorized PyTorch, the peers', and ours.

An arm is a function of a problem's tensors that returns a loss and leaves the gradient to autograd. BaCon also comes as
a whole step: selection, counts, loss, then the memory bank and the class centers (methods.md E.2).
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from bacon_fast import functional
from bacon_fast.losses import MemoryBank
from bacon_fast.ops.backends import BACKENDS
from bacon_fast.ops.bacon_step import bacon_step_

TEMPERATURE, BTA, NEGATIVE_WEIGHT, TOP_K, EPS = 0.1, 0.005, 64.0, 3, 1e-8
RELIABLE, COUNTED = 0.98, 0.95


@dataclass
class BaConBatch:
    """One batch as it looks in the middle of a training, and the state that the step updates."""

    features: Tensor  # [R,D], the B labeled rows first
    labels: Tensor  # [B]
    logits: Tensor  # [R,K]
    centers: Tensor  # [K,D]
    class_counts: Tensor  # [K]
    progress: Tensor  # 0-d
    slots: Tensor  # [R] places in the bank, all different
    bank: Tensor  # [n,D]
    selected_label: Tensor  # [n], -1 for never

    def to(self, device: str, dtype: torch.dtype) -> "BaConBatch":
        """A copy; ``dtype`` is that of the real tensors."""
        moved = {
            name: value.to(device, dtype if value.is_floating_point() else value.dtype, copy=True)
            for name, value in vars(self).items()
        }
        return replace(self, **moved)

    @property
    def reliable(self) -> Tensor:
        return self.logits.softmax(dim=1).amax(dim=1) >= RELIABLE


def bacon_batch(rows: int, num_classes: int, dim: int, num_slots: int = 12_400, seed: int = 0) -> BaConBatch:
    """A third of the rows labeled, logits that are mostly sure and right, features around their classes' centers."""
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    num_slots = max(num_slots, rows)
    truth = (num_classes * torch.rand(rows, generator=generator) ** 2).long()  # more of the first classes
    centers = randn(num_classes, dim)
    logits = randn(rows, num_classes)
    logits[torch.arange(rows), truth] += 6 + 4 * randn(rows)
    slot_class = torch.randint(0, num_classes, (num_slots,), generator=generator)
    slot_class[torch.rand(num_slots, generator=generator) < 0.2] = -1
    return BaConBatch(
        features=centers[truth] + randn(rows, dim),
        labels=truth[: rows // 3],
        logits=logits,
        centers=centers,
        class_counts=torch.bincount(slot_class.clamp_min(0), minlength=num_classes),
        progress=torch.tensor(0.6),
        slots=torch.randperm(num_slots, generator=generator)[:rows],
        bank=randn(num_slots, dim),
        selected_label=slot_class,
    )


def temperatures(class_counts: Tensor, progress: Tensor) -> Tensor:
    share = class_counts / class_counts.max().clamp_min(1)
    return TEMPERATURE * (1 - BTA * (1 - progress) ** 2 * share.sqrt())


def bacon_class_loop(
    features, labels, logits, centers, reliable, class_counts, progress, has_center: Sequence[bool] | None = None
) -> Tensor:
    """Structured like the authors' code: a Python loop over classes, rows picked by boolean masks, broadcast cosines.

    Classes without a center are left out: the host knows them from the loop that made the centers.
    """
    batch = labels.shape[0]
    top = logits[batch:].topk(TOP_K, dim=1).indices
    classes = torch.cat([labels, top[:, 0]])
    tau = temperatures(class_counts, progress)
    total = 0.0
    for c in range(centers.shape[0]):
        if has_center is not None and not has_center[c]:
            continue
        anchors = features[classes == c]
        if anchors.shape[0] == 0:
            continue
        labeled_negatives = features[:batch][labels != c]
        unlabeled_negatives = features[batch:][(top != c).all(dim=1)]
        negatives = torch.cat([labeled_negatives, unlabeled_negatives])
        positive = torch.exp(F.cosine_similarity(anchors, centers[c][None], dim=-1) / tau[c])
        negative = torch.exp(F.cosine_similarity(anchors[:, None], negatives[None], dim=-1) / TEMPERATURE)
        loss = -torch.log(positive / (positive + NEGATIVE_WEIGHT * negative.mean() + EPS))
        total = total + (loss * reliable[classes == c]).sum()
    return total / (reliable.sum() + EPS)


def bacon_vectorized(
    features, labels, logits, centers, reliable, class_counts, progress, has_center: Tensor | None = None
) -> Tensor:
    """The same in one R x R matrix of similarities; no loop, no synchronization. ``has_center`` is [K] bool."""
    batch, num_classes, rows = labels.shape[0], centers.shape[0], features.shape[0]
    top = logits[batch:].topk(TOP_K, dim=1).indices
    classes = torch.cat([labels, top[:, 0]])
    class_numbers = torch.arange(num_classes, device=features.device)[:, None]
    is_negative = torch.cat([labels != class_numbers, (top != class_numbers[:, :, None]).all(dim=2)], dim=1)  # [K,R]
    sum_dtype = torch.promote_types(features.dtype, torch.float32)  # half precision is for the products
    unit = F.normalize(features, dim=1, eps=EPS)
    positive = (unit * F.normalize(centers, dim=1, eps=EPS)[classes]).sum(dim=1)
    positive = positive.to(sum_dtype) / temperatures(class_counts, progress)[classes]
    # Cosines over 0.1 are at most 10: their exponentials do not overflow without subtracting a maximum.
    exponential = torch.where(is_negative[classes], torch.exp((unit @ unit.T).to(sum_dtype) / TEMPERATURE), 0)
    row_sum = exponential.sum(dim=1)
    class_sum = row_sum.new_zeros(num_classes).index_add(0, classes, row_sum)
    class_size = row_sum.new_zeros(num_classes).index_add(0, classes, row_sum.new_ones(rows))
    mean = class_sum / (class_size * is_negative.sum(dim=1)).clamp_min(1)
    loss = torch.log(positive.exp() + NEGATIVE_WEIGHT * mean[classes] + EPS) - positive
    anchors = reliable if has_center is None else reliable & has_center[classes]
    return torch.where(anchors, loss, 0).sum() / (reliable.sum() + EPS)


def loss_call(loss: Callable, batch: BaConBatch) -> Callable[[], tuple[Tensor, Tensor]]:
    """Forward and backward of a loss on a batch: returns the loss and the gradient of the features."""
    features = batch.features.requires_grad_()
    reliable = batch.reliable

    def call() -> tuple[Tensor, Tensor]:
        value = loss(features, batch.labels, batch.logits, batch.centers, reliable, batch.class_counts, batch.progress)
        (gradient,) = torch.autograd.grad(value, features)
        return value, gradient

    return call


def bacon_ours(backend: str) -> Callable:
    """bacon_fast's loss in the signature of the others."""

    def loss(features, labels, logits, centers, reliable, class_counts, progress) -> Tensor:
        return functional.bacon_loss(
            features,
            labels,
            logits[labels.shape[0] :],
            centers,
            reliable,
            class_counts,
            progress=progress,
            temperature=TEMPERATURE,
            bta=BTA,
            negative_weight=NEGATIVE_WEIGHT,
            top_k=TOP_K,
            backend=backend,
        )

    return loss


def _gates(batch: BaConBatch) -> tuple[Tensor, Tensor, Tensor]:
    """Reliable rows [R], rows to select [R] and their classes [R]."""
    probability = batch.logits.softmax(dim=1).amax(dim=1)
    labeled = batch.labels.shape[0]
    select = probability >= COUNTED
    select[:labeled] = True
    return probability >= RELIABLE, select, torch.cat([batch.labels, batch.logits[labeled:].argmax(dim=1)])


def class_loop_step(batch: BaConBatch) -> Callable[[], tuple[Tensor, Tensor, Tensor]]:
    """The authors' step: the loop of the loss, and loops for the counts and for the centers over the whole bank."""
    features = batch.features.requires_grad_()

    def call() -> tuple[Tensor, Tensor, Tensor]:
        reliable, select, classes = _gates(batch)
        batch.selected_label[batch.slots[select]] = classes[select]
        for c in range(batch.centers.shape[0]):
            batch.class_counts[c] = (batch.selected_label == c).sum()
        loss = bacon_class_loop(
            features, batch.labels, batch.logits, batch.centers, reliable, batch.class_counts, batch.progress
        )
        (gradient,) = torch.autograd.grad(loss, features)
        batch.bank[batch.slots[reliable]] = features.detach()[reliable]
        centers = torch.empty_like(batch.centers)
        for c in range(batch.centers.shape[0]):
            centers[c] = batch.bank[batch.selected_label == c].mean(dim=0)
        return loss, gradient, centers

    return call


def vectorized_step(batch: BaConBatch, compiled: bool) -> Callable[[], tuple[Tensor, Tensor, Tensor]]:
    """The step without loops: two segmented sums over the whole bank."""
    features = batch.features.requires_grad_()

    def forward(features: Tensor) -> tuple[Tensor, Tensor]:
        reliable, select, classes = _gates(batch)
        num_classes = batch.centers.shape[0]
        batch.selected_label[batch.slots] = torch.where(select, classes, batch.selected_label[batch.slots])
        # Slots that were never selected count as an extra class.
        slot_class = torch.where(batch.selected_label >= 0, batch.selected_label, num_classes)
        counts = batch.class_counts.new_zeros(num_classes + 1).index_add(0, slot_class, torch.ones_like(slot_class))
        counts = counts[:num_classes]
        batch.class_counts.copy_(counts)
        loss = bacon_vectorized(features, batch.labels, batch.logits, batch.centers, reliable, counts, batch.progress)
        detached = features.detach()
        batch.bank[batch.slots] = torch.where(reliable[:, None], detached, batch.bank[batch.slots])
        sums = batch.bank.new_zeros(num_classes + 1, batch.bank.shape[1]).index_add(0, slot_class, batch.bank)
        return loss, sums[:num_classes] / counts[:, None]

    run = torch.compile(forward, fullgraph=True, dynamic=False) if compiled else forward

    def call() -> tuple[Tensor, Tensor, Tensor]:
        loss, centers = run(features)
        (gradient,) = torch.autograd.grad(loss, features)
        return loss, gradient, centers

    return call


def filled_bank(batch: BaConBatch) -> MemoryBank:
    """bacon_fast's memory bank, holding what the batch's bank holds."""
    bank = MemoryBank(batch.bank.shape[0], batch.centers.shape[0], batch.bank.shape[1]).to(batch.features.device)
    slots = torch.arange(batch.bank.shape[0], device=batch.features.device)
    bank.select_(slots, batch.selected_label.clamp_min(0), batch.selected_label >= 0)
    bank.write_(slots, batch.bank, torch.ones_like(slots, dtype=torch.bool))
    return bank


def our_step(batch: BaConBatch, backend: str) -> Callable[[], tuple[Tensor, Tensor, Tensor]]:
    """The step with bacon_fast's memory bank, which touches the rows of the batch only."""
    features = batch.features.requires_grad_()
    loss_of = bacon_ours(backend)
    bank = filled_bank(batch)

    def call() -> tuple[Tensor, Tensor, Tensor]:
        reliable, select, classes = _gates(batch)
        bank.select_(batch.slots, classes, select)
        loss = loss_of(features, batch.labels, batch.logits, batch.centers, reliable, bank.class_counts, batch.progress)
        (gradient,) = torch.autograd.grad(loss, features)
        bank.write_(batch.slots, features.detach(), reliable)
        return loss, gradient, bank.centers

    return call


def fused_step(batch: BaConBatch, design: str) -> Callable[[], tuple[Tensor, Tensor, Tensor]]:
    """The step as training takes it on a GPU: one op, in one of its designs (kernels.bacon_step_design)."""
    from bacon_fast.kernels.bacon_step_design import use_design

    features, labeled = batch.features.requires_grad_(), batch.labels.shape[0]
    bank = filled_bank(batch)
    bank.centers.copy_(batch.centers)  # the other arms' loss pulls to these
    bank.has_center.fill_(True)
    options = {
        "num_labeled": 0,  # all slots are counted from 0
        "temperature": TEMPERATURE,
        "bta": BTA,
        "min_temperature": 0.0,
        "negative_weight": NEGATIVE_WEIGHT,
        "neg_mode": "authors",
        "top_k": TOP_K,
        "reliable_threshold": RELIABLE,
        "count_threshold": COUNTED,
        "count_gate": "prob",
        "labeled_counts": "always",
    }

    def call() -> tuple[Tensor, Tensor, Tensor]:
        with use_design(design):
            loss, _ = bacon_step_(
                features,
                batch.labels,
                batch.logits,
                batch.slots[:labeled],
                batch.slots[labeled:],
                dict(bank.named_buffers()),
                progress=batch.progress,
                **options,
            )
        (gradient,) = torch.autograd.grad(loss, features)
        return loss, gradient, bank.centers

    return call


def sup_con_vectorized(features: Tensor, labels: Tensor) -> Tensor:
    """SupCon's L_out in one N x N matrix."""
    unit = F.normalize(features, dim=1)
    others = ~torch.eye(labels.shape[0], dtype=torch.bool, device=labels.device)
    positive = (labels[:, None] == labels) & others
    similarity = (unit @ unit.T).to(torch.promote_types(unit.dtype, torch.float32)) / TEMPERATURE
    log_sum = torch.where(others, similarity, -math.inf).logsumexp(dim=1)
    count = positive.sum(dim=1)
    row_loss = log_sum - torch.where(positive, similarity, 0).sum(dim=1) / count.clamp_min(1)
    return torch.where(count > 0, row_loss, 0).sum() / (count > 0).sum()


def info_nce_vectorized(queries: Tensor, keys: Tensor, queue: Tensor) -> Tensor:
    """InfoNCE as in MoCo's published pseudo-code: one matrix of logits, and cross entropy."""
    query, key, negative = (F.normalize(tensor, dim=1) for tensor in (queries, keys, queue))
    logits = torch.cat([(query * key).sum(dim=1, keepdim=True), query @ negative.T], dim=1)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32)) / TEMPERATURE
    return F.cross_entropy(logits, torch.zeros(logits.shape[0], dtype=torch.int64, device=logits.device))


def our_backends(operation: str, tensor: Tensor) -> list[str]:
    """bacon_fast's backends that serve the tensor, the preferred one first."""
    table = BACKENDS[operation]
    return [name for name, backend in table.items() if name != "reference" and backend.why_not(tensor) is None]
