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
        operation: of `bacon_fast.ops`, if `loss_backend` chooses who computes it.
        unlabeled_ratio: of a base, the only mu it takes; None: any.
        changes: other defaults for the options of parts that are beside it in a method, {part: {field: value}}.
    """

    operation: ClassVar[str | None] = None
    unlabeled_ratio: ClassVar[int | None] = None
    changes: ClassVar[Mapping[str, Mapping[str, object]]] = {}

    def network(self) -> dict[str, object]:
        """What it asks of the network: fields of `models.spec.NetworkSpec`."""
        return {}


@dataclass(frozen=True)
class DataInfo:
    """What the split and the dataset say.

    num_classes: K. labeled_counts: N_c, int64 [K]. num_labeled, num_unlabeled: sizes of the two sets (0: none). mean,
    std: per channel, that images are normalized with.
    """

    num_classes: int
    labeled_counts: Tensor
    num_labeled: int
    num_unlabeled: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]


@dataclass(frozen=True)
class Setup:
    """What a part may know of the run it is built for, beside its own options.

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
        build: (options, setup) -> module; of a base (options, setup, network, balancer, regularizer) -> Method, where
            a base that takes no additions leaves out the last two. None for an extension.
        alone: of a base, why nothing can be added to it; empty: something can.
        refuses: parts that a balancer does not go with, and why.
        beside: regularizers that a balancer goes with.
        extends: of an extension, the part.
    """

    kind: Literal["base", "balancer", "regularizer", "extension"]
    options: type[PartOptions]
    build: Callable | None = None
    alone: str = ""
    refuses: Mapping[str, str] = field(default_factory=dict)
    beside: tuple[str, ...] = ()
    extends: str = ""

    @property
    def name(self) -> str:
        return self.options.part
