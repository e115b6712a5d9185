"""The base of all methods: one static step, and the work that it may do between steps."""

from collections.abc import Callable, Hashable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from bacon_fast.data.pool import HostPool
from bacon_fast.losses.bacon import BaConLoss
from bacon_fast.methods.outputs import Batch, StepOutput

CHUNK = 4096
"""How many images of the pool are on the device at once between steps."""


@dataclass(frozen=True)
class RefreshContext:
    """What a method may read between two steps. The host may wait for the device there.

    Attributes:
        step: completed optimizer steps.
        pool: uint8 [M, H, W, 3], every image of the run. pool[rows], for rows int64 [n], is on the device even if the
            pool is a mapped file: take `CHUNK` rows at once (`predict_rows` does).
        labeled, unlabeled: int64 [n_lb] and [n_ulb], rows of `pool`; position = slot.
        labels: int64 [n_lb], the labels trained on.
        normalize: uint8 [n, H, W, 3] -> float32 [n, 3, h, w], the center crops, without augmentation.
        predict: (network, uint8 images) -> features float32 [n, F] and logits float32 [n, K], batched, in evaluation
            mode, under the run's precision.
    """

    step: int
    pool: Tensor | HostPool
    labeled: Tensor
    unlabeled: Tensor
    labels: Tensor
    normalize: Callable[[Tensor], Tensor]
    predict: Callable[[nn.Module, Tensor], tuple[Tensor, Tensor]]

    @torch.no_grad()
    def predict_rows(
        self, network: nn.Module, rows: Tensor, keep: Callable[[Tensor, Tensor], tuple[Tensor, ...]]
    ) -> tuple[Tensor, ...]:
        """What `keep` returns for the features and logits of `rows` of the pool, int64 [n], n > 0: tensors [n, ...].

        Beside the result it holds only one `CHUNK` of rows.
        """
        kept: tuple[Tensor, ...] = ()
        for first, chunk in zip(range(0, len(rows), CHUNK), rows.split(CHUNK)):
            parts = keep(*self.predict(network, self.pool[chunk]))
            kept = kept or tuple(part.new_empty(len(rows), *part.shape[1:]) for part in parts)
            for whole, part in zip(kept, parts):
                whole[first : first + len(chunk)] = part
        return kept


@dataclass(frozen=True)
class NewGeneration:
    """A method's request to start again from a fresh network, with another labeled set (CReST).

    labeled int64 [n], rows of the pool; labels int64 [n].
    """

    labeled: Tensor
    labels: Tensor


class Method(nn.Module):
    """Base of all methods. A subclass computes one step in `forward`; all else has a default.

    State lives in buffers of fixed shape and address, updated in place, so that it is in the checkpoint and a captured
    graph may update it. Nothing in `forward` makes the host wait for the device.

    Attributes:
        network: what is averaged and evaluated; has `predict(images) -> (features, logits)`.
        unlabeled_views: "weak" or "strong", one entry for each view of the U unlabeled rows; empty: a supervised step.
        balanced_view: the batch also holds B labeled images drawn class by class, strongly augmented.
        labeled_strong_view: it also holds strong views of its labeled images.
        mixes_images: computes with its images, in float32, before they reach a network. Others' come in the network's
            half precision, to which autocast would cast them.
        regularizer: BaCon's loss, where the method has one; its class temperatures are reported.
    """

    unlabeled_views: tuple[str, ...] = ("weak", "strong")
    balanced_view: bool = False
    labeled_strong_view: bool = False
    mixes_images: bool = True

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        self.regularizer: BaConLoss | None = None
        self._averaged: tuple[nn.Module, ...] = ()

    def bind(self, averaged: nn.Module) -> None:
        """Gives the method the run's averaged network, which does not become part of the method's state."""
        self._averaged = (averaged,)  # in a tuple, so that it is not registered as a submodule

    def check_images(self, height: int, width: int) -> None:
        """Raises ValueError, before the first step, if the method cannot train the network on images of this size."""

    @property
    def averaged(self) -> nn.Module:
        """The averaged network (EMA) of the run. A step only reads it."""
        return self._averaged[0]

    @property
    def uses_unlabeled(self) -> bool:
        return bool(self.unlabeled_views)

    def phase(self, step: int) -> Hashable:
        """Which of the method's static programs runs after `step` completed steps.

        The host decides, from the step alone. Each phase is captured as a graph of its own: there should be few.
        """
        return None

    def forward(self, batch: Batch, step: Tensor, phase: Hashable) -> StepOutput:
        """One step.

        Args:
            batch: the step's views.
            step: completed optimizer steps, 0-d int64 on the device.
            phase: `self.phase(step)`.
        """
        raise NotImplementedError

    def schedule(self, step: int | Tensor, steps: int) -> tuple[int | Tensor, int]:
        """Position and length of the schedules (learning rate, ramps) in the step after `step` of `steps` steps.

        They are the run's, unless the method starts again. `step` is an integer, or 0-d int64 on the device.
        """
        return step, steps

    def refresh_due(self, step: int) -> bool:
        """Whether `refresh` runs before the step that follows `step` completed ones."""
        return False

    def refresh(self, context: RefreshContext) -> NewGeneration | None:
        """Work between steps, such as features of the whole set. It changes buffers only."""
        raise NotImplementedError
