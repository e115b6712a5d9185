"""Arms C, D and E: the same step as an expert in fast PyTorch writes it, without our kernels.

No loop over classes, no read by the host, multi-tensor average and fused optimizer, mixed precision, channels_last;
then the views from our device augmentation in place of loader workers; then torch.compile, whose CUDA graphs hold
forward and backward. The masks are torch's own random numbers.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bacon_fast.data.augment import Augment, ViewRequest
from bacon_fast.data.loader import IndexSampler
from bacon_fast.data.philox import Stream
from benchmarks.loss_arms import bacon_vectorized

from .loaders import HostBatch, Loaders, on_device
from .network import PlainNetwork
from .peers import LABELED, UNLABELED
from .problem import MIDDLE, Problem, State
from .step import Flags, StepArm

AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}
# max-autotune, which times candidates for every product, had not finished on an H200 after 185 s.
COMPILE_MODE = {"cpu": "default", "cuda": "reduce-overhead"}
NAMES = ("supervised", "unsupervised", "abc_labeled", "abc_unlabeled", "contrastive")


def bernoulli(probability: Tensor, stream: int) -> Tensor:
    return (torch.rand_like(probability) < probability).float()


class VectorizedLoss(nn.Module):
    """Network, losses and memory bank of a step; buffers change in place.

    Args:
        problem, state: what to train, from where.
        half: dtype of autocast, None for none.
        dtype: of parameters and losses; float64 for a gate.
    """

    def __init__(self, problem: Problem, state: State, half: torch.dtype | None, dtype: torch.dtype) -> None:
        super().__init__()
        config = self.config = problem.config
        self.half, self.dtype, self.num_labeled = half, dtype, len(problem.labeled)
        self.network = PlainNetwork(config.model.backbone, problem.num_classes, config.model.bn_momentum)
        self.network.load_state_dict(state.network)
        self.projection = nn.Linear(self.network.backbone.num_features, config.parts["bacon"].proj_dim)
        self.projection.load_state_dict(state.projection)
        self.register_buffer("keep", problem.keep)
        for name in ("features", "written", "selected_label", "class_counts", "centers", "has_center"):
            self.register_buffer(name, state.bank[name].clone())
        self.register_buffer("step", torch.tensor(MIDDLE))  # completed steps
        self.draw: Callable[[Tensor, int], Tensor] = bernoulli
        self.to(dtype)

    def forward(self, batch: HostBatch) -> Tensor:
        """The losses `NAMES`, not yet weighted: [5]."""
        config, sizes = self.config, [len(batch.labels), len(batch.unlabeled_slots), len(batch.unlabeled_slots)]
        images = torch.cat([batch.labeled, batch.weak, batch.strong])
        images = images.contiguous(memory_format=torch.channels_last)
        with torch.autocast(images.device.type, dtype=self.half, enabled=self.half is not None):
            features = self.network.backbone(images)
            logits, balanced = self.network.head(features), self.network.balanced_head(features)
            projected = self.projection(features[: sizes[0] + sizes[1]])
        labeled, weak, strong = logits.to(self.dtype).split(sizes)
        labeled_balanced, weak_balanced, strong_balanced = balanced.to(self.dtype).split(sizes)
        weak_balanced = weak_balanced.detach()

        confidence, pseudo = weak.detach().softmax(dim=1).max(dim=1)
        mask = confidence >= config.shared.threshold
        kept = self.draw(self.keep[batch.labels], LABELED)
        probability, label = weak_balanced.softmax(dim=1).max(dim=1)
        share = torch.div(self.step * config.shared.epochs, config.steps, rounding_mode="floor") / config.shared.epochs
        keep = (1 - share * (1 - self.keep))[label]
        used = (probability >= config.shared.threshold) * self.draw(keep, UNLABELED)
        balanced_logits = torch.cat([labeled_balanced.detach(), weak_balanced])
        return torch.stack(
            [
                F.cross_entropy(labeled, batch.labels),
                (F.cross_entropy(strong, pseudo, reduction="none") * mask).mean(),
                (F.cross_entropy(labeled_balanced, batch.labels, reduction="none") * kept).mean(),
                (F.cross_entropy(strong_balanced, label, reduction="none") * used).mean(),
                self._bacon(batch, projected.to(self.dtype), balanced_logits, label),
            ]
        )

    def _bacon(self, batch: HostBatch, projected: Tensor, logits: Tensor, pseudo: Tensor) -> Tensor:
        """BaCon's loss; the bank moves on by two segmented sums (methods.md E.2)."""
        num_classes = len(self.class_counts)
        probability = logits.softmax(dim=1).amax(dim=1)
        reliable = probability >= self.config.parts["bacon"].reliable_threshold
        counted = probability >= self.config.shared.threshold
        counted = torch.cat([torch.ones_like(counted[: len(batch.labels)]), counted[len(batch.labels) :]])
        slots = torch.cat([batch.labeled_slots, batch.unlabeled_slots + self.num_labeled])
        classes = torch.cat([batch.labels, pseudo])
        self.selected_label[slots] = torch.where(counted, classes, self.selected_label[slots])
        # Slots of no class are counted in a class of their own, behind the others.
        places = torch.where(self.selected_label >= 0, self.selected_label, num_classes)
        self.class_counts.copy_(_class_sums(torch.ones_like(places), places, num_classes))
        loss = bacon_vectorized(
            projected,
            batch.labels,
            logits,
            self.centers.clone(),
            reliable,
            self.class_counts,
            self.step / self.config.steps,
            self.has_center.clone(),
        )
        with torch.no_grad():
            self.features[slots] = torch.where(reliable[:, None], projected.detach(), self.features[slots])
            self.written[slots] = self.written[slots] | reliable
            counts = _class_sums(self.written.to(self.dtype), places, num_classes)
            sums = _class_sums(self.features * self.written[:, None], places, num_classes)
            self.centers.copy_(sums / counts.clamp_min(1)[:, None])
            self.has_center.copy_(counts > 0)
        return loss


def _class_sums(values: Tensor, classes: Tensor, num_classes: int) -> Tensor:
    """Sums of the rows of each class but the last."""
    return values.new_zeros(num_classes + 1, *values.shape[1:]).index_add(0, classes, values)[:num_classes]


class DeviceBatches:
    """Batches from our augmentation, with the dataset on the device."""

    ready = 1

    def __init__(self, problem: Problem) -> None:
        config, device = problem.config, problem.device
        self.seed, self.step = config.seed, 0
        self.counter = torch.zeros((), dtype=torch.int64, device=device)  # the step, for the device
        self.pool = torch.from_numpy(problem.images).to(device)
        self.labeled, self.unlabeled, self.labels = (
            torch.from_numpy(array).to(device) for array in (problem.labeled, problem.unlabeled, problem.labels)
        )
        self.augment = Augment(
            config.data.image_size,
            mean=problem.mean,
            std=problem.std,
            hflip=config.views.hflip,
            num_ops=config.views.randaugment_ops,
            cutout=config.views.cutout,
        ).to(device)
        self.samplers = [
            IndexSampler(size, count, config.seed, stream).to(device)
            for size, count, stream in (
                (len(self.labeled), config.views.batch_size, Stream.SAMPLER_LABELED),
                (len(self.unlabeled), problem.unlabeled_batch, Stream.SAMPLER_UNLABELED),
            )
        ]

    def start(self) -> None:
        """Nothing runs beside the step."""

    stop = start

    def next(self) -> HostBatch:
        self.step += 1
        self.counter += 1
        for sampler in self.samplers:
            sampler.prepare(self.step)
        slots, unlabeled_slots = (sampler.batch(self.counter) for sampler in self.samplers)
        rows = self.unlabeled[unlabeled_slots]
        requests = [
            ViewRequest(self.labeled[slots], Stream.LABELED_WEAK, strong=False),
            ViewRequest(rows, Stream.UNLABELED_WEAK, strong=False),
            ViewRequest(rows, Stream.STRONG_0, strong=True),
        ]
        images = self.augment.views(self.pool, requests, self.seed, self.counter, channels_last=True)
        labeled, weak, strong = images.split([len(slots), len(rows), len(rows)])
        return HostBatch(slots, self.labels[slots], labeled, unlabeled_slots, weak, strong)


class VectorizedStep(StepArm):
    """The step without loops and reads.

    Args:
        problem, state: what to train, from where.
        precision: fp32, tf32, bf16 or fp16 (without a loss scale: for measuring only).
        batches: where the views come from; None for a step that is only ever given batches.
        compiled: through torch.compile.
        dtype: of parameters, losses and averages; float64 for a gate.
    """

    def __init__(
        self,
        problem: Problem,
        state: State,
        precision: str,
        batches: Loaders | DeviceBatches | None,
        compiled: bool = False,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        config, self.device = problem.config, problem.device
        self.loss = VectorizedLoss(problem, state, AUTOCAST.get(precision), dtype).to(
            self.device, memory_format=torch.channels_last
        )
        averaged = PlainNetwork(config.model.backbone, problem.num_classes, config.model.bn_momentum)
        self.averaged = averaged.to(self.device, dtype)
        self.averaged.load_state_dict(state.averaged)
        self.averaged.requires_grad_(False)
        parameters = [*self.loss.network.parameters(), *self.loss.projection.parameters()]
        self.optimizer = torch.optim.SGD(
            [
                {"params": [p for p in parameters if p.dim() > 1], "weight_decay": config.optimizer.weight_decay},
                {"params": [p for p in parameters if p.dim() <= 1], "weight_decay": 0.0},
            ],
            lr=config.optimizer.lr,
            momentum=0.9,
            nesterov=True,
            fused=True,
        )
        parts = config.parts
        lambda_u, lambda_abc, lambda_con = (
            parts["fixmatch"].lambda_u,
            parts["abc"].lambda_abc,
            parts["bacon"].lambda_con,
        )
        weights = [1.0, lambda_u, lambda_abc, lambda_abc, lambda_con]
        self.weights = torch.tensor(weights, device=self.device)
        self.logged = torch.zeros(len(weights), device=self.device)  # sum of the losses, read when somebody asks
        self.momentum, self.batches, self.compiled = config.optimizer.ema, batches, compiled
        self.forward = self.loss
        if compiled:
            self.forward = torch.compile(self.loss, mode=COMPILE_MODE[self.device.type], dynamic=False)
        if batches is not None:
            self.warmup = batches.ready + 2
        tf32 = self.device.type == "cuda" and precision == "tf32"
        self.flags = Flags(tf32_convolutions=tf32, tf32_matmul=tf32)

    def start(self) -> None:
        self.batches.start()

    def stop(self) -> None:
        self.batches.stop()

    def step(self) -> Tensor:
        return self.update(self.batches.next())

    def update(self, batch: HostBatch) -> Tensor:
        """The step on a batch. Returns its losses [5], on the device."""
        if self.compiled and self.device.type == "cuda":
            torch.compiler.cudagraph_mark_step_begin()
        losses = self.forward(on_device(batch, self.device, non_blocking=True))
        (losses * self.weights).sum().backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self._average()
        self.loss.step += 1
        losses = losses.detach().clone()
        self.logged += losses
        return losses

    @torch.no_grad()
    def _average(self) -> None:
        online, averaged = self.loss.network, self.averaged
        torch._foreach_lerp_(list(averaged.parameters()), list(online.parameters()), 1 - self.momentum)
        torch._foreach_copy_(list(averaged.buffers()), list(online.buffers()))
