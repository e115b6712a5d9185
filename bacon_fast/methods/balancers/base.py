"""The base of all class balancers: what they see of a step of FixMatch or ReMixMatch, and what they may change."""

from collections.abc import Hashable
from dataclasses import dataclass, field

from torch import Tensor, nn

from bacon_fast.methods.method import NewGeneration, RefreshContext
from bacon_fast.methods.outputs import Batch


@dataclass(frozen=True)
class Rows:
    """Rows of the global batch: B labeled ones, and U unlabeled ones by view.

    Attributes:
        weak_logits: float32 [U,K], without gradient: the main head's logits of the weak views. In ReMixMatch a balancer
            `on_targets` sees the logarithms of the targets instead.
        weak_features, strong_features: [U,F], of the online backbone; only the strong ones may have a gradient.
        averaged_features: [., F], at least float32, of the averaged backbone on the images that the balancer's
            `averaged_images` chose.
        batch: labels and slots.
        own: what the balancer's `own_pass` returned.
    """

    weak_logits: Tensor
    weak_features: Tensor
    strong_features: Tensor
    averaged_features: Tensor | None
    batch: Batch
    own: Tensor | None = None


@dataclass(frozen=True)
class Targets:
    """What the base learner trains towards.

    Attributes:
        probabilities: float32 [U,K], in place of the weak views' softmax. The largest one names the pseudo-label and
            is its confidence.
        confidence: float32 [U], another confidence, or None.
        soft: the strong views are trained towards the probabilities themselves.
        labeled_bias, strong_bias: float32 [K], added to logits of labeled rows and of strong views within the loss, or
            None.
        labeled_weights, unlabeled_weights: float32 [K], weight of a row by its label or (hard) pseudo-label, or None.
        losses: further losses, 0-d float32, already weighted.
    """

    probabilities: Tensor
    confidence: Tensor | None = None
    soft: bool = False
    labeled_bias: Tensor | None = None
    strong_bias: Tensor | None = None
    labeled_weights: Tensor | None = None
    unlabeled_weights: Tensor | None = None
    losses: dict[str, Tensor] = field(default_factory=dict)


class Balancer(nn.Module):
    """Base of the class balancers that act between the weak views' probabilities and the pseudo-labels (methods.md H).

    In FixMatch they act on the softmax of the weak views. In ReMixMatch too, before its distribution alignment, unless
    `on_targets` or `aligns` is set. Each acts where its authors' code does.

    `forward` computes the targets of one step and updates the state, which lives in buffers. The method asks its
    balancer for `phase`, `schedule`, `refresh_due` and `refresh`; methods/method.py explains them.

    Attributes:
        balanced_view: the batch also holds B labeled images drawn class by class, strongly augmented.
        labeled_strong_view: FixMatch also trains on a strong view of each labeled image.
        strong_views: strong views of each unlabeled image in FixMatch.
        threshold: FixMatch's in place of --threshold, or None.
        on_targets: in ReMixMatch the balancer acts on the aligned and sharpened targets instead.
        aligns: in ReMixMatch the balancer replaces the distribution alignment.
    """

    balanced_view = False
    labeled_strong_view: bool = False
    strong_views: int = 1
    threshold: float | None = None
    on_targets = False
    aligns = False

    def __init__(self) -> None:
        super().__init__()
        self._networks: tuple[nn.Module, ...] = ()

    def bind(self, network: nn.Module, averaged: nn.Module) -> None:
        """Gives the balancer the online and the averaged network. Neither becomes part of its state."""
        self._networks = (network, averaged)

    def check_images(self, height: int, width: int) -> None:
        """Raises ValueError, before the first step, if the balancer cannot work on images of this size."""

    @property
    def network(self) -> nn.Module:
        """The online network of the run."""
        return self._networks[0]

    @property
    def averaged(self) -> nn.Module:
        """The averaged network of the run."""
        return self._networks[1]

    def averaged_images(self, batch: Batch, weak: Tensor, strong: Tensor, phase: Hashable) -> Tensor | None:
        """Images of which `forward` needs averaged features: B labeled rows, then views of U rows each. None: of none.

        weak, strong: images [U, 3, H, W], the weak views and the (first) strong ones.
        """
        return None

    def own_pass(self, batch: Batch, phase: Hashable) -> Tensor | None:
        """What `forward` needs of a pass of its own through the network; it comes before those of the base learner."""
        return None

    def phase(self, step: int) -> Hashable:
        return None

    def forward(self, rows: Rows, step: Tensor, phase: Hashable) -> Targets:
        raise NotImplementedError

    def schedule(self, step: int | Tensor, steps: int) -> tuple[int | Tensor, int]:
        return step, steps

    def refresh_due(self, step: int) -> bool:
        return False

    def refresh(self, context: RefreshContext) -> NewGeneration | None:
        raise NotImplementedError
