"""DistributedDataParallel around a method, whose phases train different sets of parameters."""

from collections.abc import Hashable

from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from bacon_fast.methods.outputs import Batch, StepOutput


class PhaseParallel:
    """Calls `forward` so that the backward of its loss averages gradients over the ranks.

    A phase is a static program (methods.method), so each gets a static-graph wrapper of its own: a parameter without
    gradient in a phase, such as BaCon's projection before its start, then costs no communication, and its `grad` stays
    None, so that it is not decayed.

    Args:
        forward: the method, compiled or not, with the same parameters and buffers on all ranks.
    """

    def __init__(self, forward: nn.Module) -> None:
        self.forward = forward
        self._wrapped: dict[Hashable, DistributedDataParallel] = {}

    def __call__(self, batch: Batch, step: Tensor, phase: Hashable) -> StepOutput:
        if phase not in self._wrapped:
            # Buffers stay equal by themselves. Without synchronization each rank has its own statistics in BatchNorm.
            self._wrapped[phase] = DistributedDataParallel(
                self.forward, broadcast_buffers=False, static_graph=True, init_sync=False
            )
        return self._wrapped[phase](batch, step, phase)
