"""What a part of a method is: a word of the method's name, with options of its own and a way to build it."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import ClassVar, Literal

from torch import Tensor

from bacon_fast.methods.options import Options, SharedOptions


@dataclass(frozen=True)
class PartOptions(Options):
    """Base of the options of a part.

    Class attributes:
        part: its name.
        operation: the operation of `bacon_fast.ops` whose backend `loss_backend` chooses, or None.
        unlabeled_ratio: the only mu that a base takes; None: any.
        crops_strong_views: a base that resizes random parts of the strong views itself.
        runs_on_length: the part follows t/T (it reads `Setup.steps`), so that a longer run differs from the first step.
        changes: other defaults that a part gives to the parts beside it, {part: {field: value}}.
        variants: other defaults that a value of the part's option `variant` gives to options of the run,
            {value: {name on the command line: default}}.
    """

    operation: ClassVar[str | None] = None
    unlabeled_ratio: ClassVar[int | None] = None
    crops_strong_views: ClassVar[bool] = False
    runs_on_length: ClassVar[bool] = True
    changes: ClassVar[Mapping[str, Mapping[str, object]]] = {}
    variants: ClassVar[Mapping[str, Mapping[str, object]]] = {}

    def check_beside(self, parts: Mapping[str, "PartOptions"]) -> None:
        """Raises ValueError for a value that has no effect beside the other parts of the method."""

    def network(self) -> dict[str, object]:
        """What the part needs of the network: fields of `models.spec.NetworkSpec`."""
        return {}

    def idle_on_frozen_features(self) -> str:
        """Why the part has no effect on what predicts where the backbone gives fixed features; empty if it has one."""
        return ""

    def needs_images(self) -> str:
        """Why the part cannot work with features in the place of images; empty if it can."""
        return ""


@dataclass(frozen=True)
class DataInfo:
    """Sizes and counts of the split and the dataset.

    Attributes:
        num_classes: K.
        labeled_counts: N_c, int64 [K].
        num_labeled, num_unlabeled: sizes of the two sets (0: none).
        mean, std: per channel, for the normalization of images.
        same_imbalance: the unlabeled set is known to be drawn with the imbalance of the labeled one.
    """

    num_classes: int
    labeled_counts: Tensor
    num_labeled: int
    num_unlabeled: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    same_imbalance: bool


@dataclass(frozen=True)
class Setup:
    """What `build` of a part knows of the run, beside the part's own options.

    Attributes:
        data: counts and sizes.
        num_features: F, width of the backbone's features.
        steps, seed: of the run.
        labeled_rows, unlabeled_rows: B and U, labeled and unlabeled images a step.
        ema: momentum of the averaged network.
        shared: options that several parts read.
        parts: options of all parts of the method, by name.
    """

    data: DataInfo
    num_features: int
    steps: int
    seed: int
    labeled_rows: int
    unlabeled_rows: int
    ema: float
    shared: SharedOptions
    parts: Mapping[str, PartOptions]


@dataclass(frozen=True)
class Part:
    """A line of the table of parts.

    Attributes:
        kind: a base learner makes a method; a balancer and a regularizer are added to one; an extension changes the
            part that it extends, which reads its options.
        options: of the part; their class names it.
        build: (options, setup) -> module. For a base: (options, setup, network, balancer, regularizer) -> Method; a
            base without additions takes neither balancer nor regularizer. None for an extension.
        alone: why nothing can be added to a base, but for `takes`; empty if something can.
        takes: what can be added to such a base.
        refuses: parts that a balancer does not go with, and why.
        beside: regularizers that a balancer goes with.
        extends: the part that an extension changes.
    """

    kind: Literal["base", "balancer", "regularizer", "extension"]
    options: type[PartOptions]
    build: Callable | None = None
    alone: str = ""
    takes: tuple[str, ...] = ()
    refuses: Mapping[str, str] = field(default_factory=dict)
    beside: tuple[str, ...] = ()
    extends: str = ""

    @property
    def name(self) -> str:
        return self.options.part
