"""SsCL, semi-supervised contrastive learning with similarity co-calibration (methods.md F; arXiv 2105.07387)."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bacon_fast import functional
from bacon_fast.data.philox import Stream, philox
from bacon_fast.data.simclr import LARGEST_SMALL_IMAGE, SimCLRDistortion
from bacon_fast.methods.fixmatch import pseudo_label_stats
from bacon_fast.methods.gather import gather_batch, gather_views, num_ranks, own_views
from bacon_fast.methods.method import Method, RefreshContext
from bacon_fast.methods.outputs import Batch, Outputs, StepOutput, step_output
from bacon_fast.methods.part import PartOptions, Setup
from bacon_fast.methods.sscl.calibration import CoCalibration
from bacon_fast.methods.sscl.key_bank import LabeledKeyBank
from bacon_fast.methods.sscl.prototypes import ClassPrototypes
from bacon_fast.methods.sscl.queue import KeyQueue
from bacon_fast.methods.sscl.refresh import refresh
from bacon_fast.models.heads import projection_head
from bacon_fast.models.momentum import MomentumEncoder
from bacon_fast.models.network import Network

# Where the paper's sentence and our reading of it differ (methods.md F.7): what each variant gives to an option left at
# None. "default" and "paper" also differ in the learning rate, which belongs to the run.
VARIANTS = {
    "default": {
        "calibration": "ratio", "targets": "hard", "similarity": "softmax", "alpha_of": "assigned",
        "prototype_features": "unit", "small_views": "color", "window_start": "uniform",
    },
    "paper": {
        "calibration": "literal", "targets": "soft", "similarity": "cosine", "alpha_of": "nearest",
        "prototype_features": "raw", "small_views": "full", "window_start": "empty",
    },
}  # fmt: skip


@dataclass(frozen=True)
class SsCLOptions(PartOptions):
    """SsCL (methods.md F; arXiv 2105.07387). A default of None is the variant's."""

    part: ClassVar[str] = "sscl"
    operation: ClassVar[str] = "contrastive"
    crops_strong_views: ClassVar[bool] = True
    variants: ClassVar[Mapping[str, Mapping[str, object]]] = {"paper": {"lr_schedule": "cosine_to_zero"}}

    lambda_u: float = 1.0
    """Weight of the pseudo-label loss, lambda_pl."""
    lambda_con: float = 1.0
    """Weight of the contrastive loss, lambda_ctr."""
    proj_dim: int = 64
    """D, width of the contrastive space."""
    proj_layers: int = 2
    """Linear layers of the projection head; 0: none."""
    queue: int = 4096
    """K_q, keys in the queue (CIFAR-10; 65,536 on ImageNet)."""
    momentum: float = 0.999
    """Momentum of the key encoder (MoCo)."""
    extra_keys: int = 3
    """Keys of labeled images that are positives of each query, beside its own; 0: MoCo with a margin."""
    gamma: float = 5.0
    """One over the temperature of the contrastive loss (5 on CIFAR-10, 10 on ImageNet)."""
    margin: float = -0.25
    """m, added to the similarities of the negatives."""
    form: Literal["prod", "sum"] = "prod"
    """Equation (5) by its third line, where all positives must be close, or by its second: one suffices."""
    mask_queue: bool = False
    """Keys of the query's own class in the queue are no negatives."""
    variant: Literal["default", "paper"] = "default"
    """Ours, or the paper's sentences to the letter: sets the next seven, and --lr-schedule cosine_to_zero."""
    calibration: Literal["ratio", "literal"] | None = None
    """Pseudo-labels times an image's similarities to the classes over their average, or, as worded, the average."""
    targets: Literal["hard", "soft"] | None = None
    """Train towards the largest class of the calibrated distribution, or towards all of it."""
    similarity: Literal["softmax", "cosine"] | None = None
    """An image's similarities: softmax of its cosines to the prototypes, or these."""
    alpha_of: Literal["assigned", "nearest"] | None = None
    """alpha_p: cosine to the prototype of the class that the classifier gave, or to the nearest prototype."""
    prototype_features: Literal["unit", "raw"] | None = None
    """Prototypes are means of features of length 1, or of features as they are."""
    small_views: Literal["color", "full"] | None = None
    """Strong views of images up to 64 pixels: jitter and gray, or crop and blur too."""
    window_start: Literal["uniform", "empty"] | None = None
    """Average similarity over 128 batches: those before the first count as uniform, or not at all."""
    temperature: float = 0.1
    """T_s of the softmax over the similarities to the class prototypes."""
    refresh_epochs: int = 5
    """Epochs, of steps/epochs steps, between refreshes of prototypes and assignments."""

    def check(self) -> None:
        self.require_weights("lambda_u", "lambda_con")
        self.require_integers(1, "proj_dim", "queue", "refresh_epochs")
        self.require_integers(0, "extra_keys")
        self.require(self.proj_layers in (0, 1, 2), "proj_layers", "0, 1 or 2")
        self.require_positive("gamma", "temperature")
        self.require_fractions("momentum")

    def choices(self) -> dict[str, str]:
        """The options that a variant sets: as given, else the variant's."""
        values = VARIANTS[self.variant]
        return {name: value if (given := getattr(self, name)) is None else given for name, value in values.items()}


class SsCL(Method):
    """FixMatch with pseudo-labels calibrated by class prototypes, and a contrastive loss on the unlabeled images.

    The contrastive loss compares queries with the keys of a momentum encoder. Positives are the image's own key and
    keys of labeled images of its class; negatives are a queue. Labeled, weak and strong views go through the query
    encoder as one batch, labeled and weak ones through the key encoder as another; BatchNorm is in training mode in
    both. Between refreshes an unlabeled image belongs to the class that the classifier gave it at the last one,
    confident or not.

    Args:
        network: backbone and classifier; what is averaged and evaluated.
        projection: features [N, F] -> [N, D], of the queries.
        distortion: what strong views undergo beyond RandAugment, (images, step, slots) -> images; see
            `SimCLRDistortion`.
        num_labeled, num_unlabeled: sizes of the two sets.
        threshold: tau_p, confidence from which a calibrated pseudo-label counts.
        lambda_u, lambda_con: weights of the pseudo-label loss (lambda_pl) and of the contrastive loss (lambda_ctr).
        soft: train towards the calibrated distribution instead of its largest class.
        momentum: m_k of the key encoder.
        queue_size: K_q.
        extra_keys: labeled keys drawn as positives of each query; 0 is MoCo with a margin.
        gamma, margin, form: of `functional.sscl_loss`.
        mask_queue: a queued key that was assigned to the query's class is no negative.
        calibration, temperature, similarity, window_start: mode and the others of `CoCalibration`.
        alpha_of: of `ClassPrototypes`.
        unit_features: of `refresh`.
        refresh_every: steps between refreshes of prototypes, assignments and labeled keys; the first is before step 0.
        seed: of the draws of keys and mixtures.
        backend: of `functional.sscl_loss`.
    """

    def __init__(
        self,
        network: Network,
        projection: nn.Module,
        distortion: nn.Module,
        *,
        num_labeled: int,
        num_unlabeled: int,
        threshold: float,
        lambda_u: float,
        lambda_con: float,
        soft: bool,
        momentum: float,
        queue_size: int,
        extra_keys: int,
        gamma: float,
        margin: float,
        form: str,
        mask_queue: bool,
        calibration: str,
        temperature: float,
        refresh_every: int,
        seed: int,
        similarity: str = "softmax",
        window_start: str = "uniform",
        alpha_of: str = "assigned",
        unit_features: bool = True,
        backend: str | None = None,
    ) -> None:
        super().__init__(network)
        num_classes, num_features = network.head.out_features, network.head.in_features
        dim = projection(torch.zeros(1, num_features)).shape[1]
        self.projection, self.distortion = projection, distortion
        self.key_encoder = MomentumEncoder(network.backbone, projection, momentum)
        self.queue = KeyQueue(queue_size, dim)
        self.bank = LabeledKeyBank(num_labeled, num_classes, dim)
        self.prototypes = ClassPrototypes(num_classes, num_features, num_unlabeled, alpha_of=alpha_of)
        self.calibration = CoCalibration(
            num_classes, mode=calibration, temperature=temperature, similarity=similarity, window_start=window_start
        )
        self.threshold, self.soft, self.lambda_u, self.lambda_con = threshold, soft, lambda_u, lambda_con
        self.extra_keys, self.mask_queue, self.unit_features = extra_keys, mask_queue, unit_features
        self.contrast = {"gamma": gamma, "margin": margin, "form": form, "backend": backend}
        self.refresh_every, self.seed = refresh_every, seed

    def refresh_due(self, step: int) -> bool:
        return step % self.refresh_every == 0

    def refresh(self, context: RefreshContext) -> None:
        refresh(context, self.network, self.key_encoder, self.prototypes, self.bank, self.seed, self.unit_features)

    def forward(self, batch: Batch, step: Tensor, phase: None) -> StepOutput:
        sizes = batch.num_labeled, batch.num_unlabeled
        weak = batch.images[: sum(sizes)]
        strong = self.distortion(batch.view(1), step, global_slots(batch))

        # Both encoders on this rank's images; everything after that is on the rows of all ranks.
        features, logits, _ = self.network(torch.cat([weak, strong]))
        queries = gather_views(self.projection(features[len(weak) :]), 0, batch.num_unlabeled)
        self.key_encoder.update(self.network.backbone, self.projection)
        keys = self._encode(weak, sizes, step)
        features, logits = gather_views(features.detach(), *sizes), gather_views(logits, *sizes)
        batch = gather_batch(batch)
        out = Outputs(features, logits, None, batch.num_labeled, batch.num_unlabeled)
        labeled_keys, own_keys = keys.split([batch.num_labeled, batch.num_unlabeled])

        # Cross entropy on labels, and on confident pseudo-labels: the weak view's, calibrated by the prototypes.
        supervised = F.cross_entropy(out.labeled_logits.float(), batch.labels)
        calibrated = self.calibration(out.weak_logits.detach(), self.prototypes.similarity(out.weak(features)))
        confidence, pseudo_labels = calibrated.max(1)
        mask = confidence >= self.threshold
        target = calibrated if self.soft else pseudo_labels
        per_row = F.cross_entropy(out.strong_logits.float(), target, reduction="none")

        # Each query beside its own key and labeled keys of its class, among the queue as it was before this step.
        classes = self.prototypes.assigned[batch.unlabeled_slots]
        drawn, present = self.bank.draw(classes, self.extra_keys, self.seed, step)
        mined_keys, alpha = self.bank.current(drawn), self.prototypes.alpha[batch.unlabeled_slots]
        queue, queue_classes = self.queue.current()
        contrastive = functional.sscl_loss(
            queries,
            torch.cat([own_keys[:, None], mined_keys], dim=1),
            queue,
            alpha=F.pad(alpha[:, None].expand(drawn.shape), (1, 0), value=1.0),
            key_mask=F.pad(present, (1, 0), value=True),
            query_classes=classes if self.mask_queue else None,
            queue_classes=queue_classes if self.mask_queue else None,
            **self.contrast,
        )
        self.queue.enqueue_(own_keys, classes)
        self.bank.write_(batch.labeled_slots, labeled_keys)

        losses = {
            "supervised": supervised,
            "unsupervised": self.lambda_u * (per_row * mask).mean(),
            "contrastive": self.lambda_con * contrastive,
        }
        stats = pseudo_label_stats(mask, pseudo_labels, batch.true_labels) | {"alpha": alpha.mean()}
        return step_output(losses, stats, torch.where(mask, pseudo_labels, -1))

    def _encode(self, images: Tensor, sizes: tuple[int, int], step: Tensor) -> Tensor:
        """Keys float32 [n, D] of the images of all ranks, from this rank's: `sizes` labeled and unlabeled ones.

        Under several ranks each rank encodes a random share of all images, MoCo's shuffled BatchNorm: a query and its
        key in the same small batch would recognize each other by the batch's statistics.
        """
        if num_ranks() == 1:
            return self.key_encoder(images)
        everyone = gather_views(images, *sizes)
        rows = torch.arange(len(everyone), device=images.device)
        order = philox(self.seed, step, Stream.SSCL_SHUFFLE, rows, 1)[:, 0].argsort(stable=True)
        share = torch.empty_like(images).copy_(own_views(everyone[order], 0, len(images)))  # in their memory format
        keys = gather_views(self.key_encoder(share), 0, len(images))
        return torch.empty_like(keys).index_copy_(0, order, keys)


def global_slots(batch: Batch) -> Tensor:
    """Places int64 [U] of this rank's unlabeled rows in the global batch."""
    rows = num_ranks() * batch.num_unlabeled
    return own_views(torch.arange(rows, device=batch.images.device), 0, batch.num_unlabeled)


def build(options: SsCLOptions, setup: Setup, network: Network) -> SsCL:
    choices = options.choices()
    largest_small = LARGEST_SMALL_IMAGE if choices["small_views"] == "color" else 0
    return SsCL(
        network,
        projection_head(setup.num_features, options.proj_dim, options.proj_layers),
        SimCLRDistortion(setup.data.mean, setup.data.std, setup.seed, largest_small=largest_small),
        num_labeled=setup.data.num_labeled,
        num_unlabeled=setup.data.num_unlabeled,
        threshold=setup.shared.threshold,
        lambda_u=options.lambda_u,
        lambda_con=options.lambda_con,
        soft=choices["targets"] == "soft",
        momentum=options.momentum,
        queue_size=options.queue,
        extra_keys=options.extra_keys,
        gamma=options.gamma,
        margin=options.margin,
        form=options.form,
        mask_queue=options.mask_queue,
        calibration=choices["calibration"],
        similarity=choices["similarity"],
        window_start=choices["window_start"],
        alpha_of=choices["alpha_of"],
        unit_features=choices["prototype_features"] == "unit",
        temperature=options.temperature,
        refresh_every=max(1, round(options.refresh_epochs * setup.steps / setup.shared.epochs)),
        seed=setup.seed,
        backend=setup.shared.backend,
    )
