"""BatchNorm layers of the backbones, with control over their statistics, and fused with their neighbors."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from bacon_fast import functional
from bacon_fast.models.batchnorm_sync import sync_batch_norm


class BatchNorm2d(nn.BatchNorm2d):
    """`torch.nn.BatchNorm2d` whose statistics can be frozen, or taken over all ranks. Same state, same results.

    Args:
        num_features: C.
        eps: added to the variance.
        momentum: weight of the newest batch in the running statistics.

    Attributes:
        update_statistics: False leaves running_mean, running_var and num_batches_tracked as they are; a pass in
            training mode still normalizes with the statistics of its own batch. See `frozen_statistics`.
        sync_group: a process group of torch.distributed, or True for all ranks: in training mode the statistics are
            taken over their batches together. None: each process for itself. See `synchronize`. A layer with a process
            group cannot be copied or pickled; one with True can.
    """

    def __init__(self, num_features: int, eps: float = 1e-5, momentum: float = 0.1) -> None:
        super().__init__(num_features, eps, momentum)
        self.update_statistics = True
        self.sync_group: ProcessGroup | Literal[True] | None = None

    def _statistics(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """The buffers that this pass reads or updates."""
        if self.training and not self.update_statistics:
            return None, None, None
        return self.running_mean, self.running_var, self.num_batches_tracked

    def _synchronizes(self) -> bool:
        return self.training and self.sync_group is not None

    def _synchronized(self, x: Tensor) -> Tensor:
        group = None if self.sync_group is True else self.sync_group
        return sync_batch_norm(
            x, self.weight, self.bias, *self._statistics(), momentum=self.momentum, eps=self.eps, group=group
        )

    def forward(self, x: Tensor) -> Tensor:
        """x [N,C,H,W] float, normalized by channel."""
        self._check_input_dim(x)
        if self._synchronizes():
            return self._synchronized(x)
        mean, variance, batches = self._statistics()
        if self.training and batches is not None:
            batches.add_(1)
        return F.batch_norm(x, mean, variance, self.weight, self.bias, self.training, self.momentum, self.eps)


class BatchNormAct2d(BatchNorm2d):
    """BatchNorm, the residual sum before it and the LeakyReLU after it, in few passes over memory where that is faster.

    Args:
        num_features, eps, momentum: as in `BatchNorm2d`.
        negative_slope: slope of the LeakyReLU.

    Attribute ``backend``: for `functional.batch_norm_act`; None for the best one.
    """

    def __init__(
        self, num_features: int, eps: float = 1e-5, momentum: float = 0.1, *, negative_slope: float = 0.01
    ) -> None:
        super().__init__(num_features, eps, momentum)
        self.negative_slope = negative_slope
        self.backend: str | None = None

    def forward(self, x: Tensor, residual: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """x and residual [N,C,H,W] -> (LeakyReLU(BN(x + residual)), x + residual); the sum is x without a residual."""
        self._check_input_dim(x)
        if self._synchronizes():
            total = x if residual is None else x + residual
            return F.leaky_relu(self._synchronized(total), self.negative_slope), total
        return functional.batch_norm_act(
            x,
            self.weight,
            self.bias,
            *self._statistics(),
            residual=residual,
            training=self.training,
            momentum=self.momentum,
            eps=self.eps,
            negative_slope=self.negative_slope,
            backend=self.backend,
        )

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, negative_slope={self.negative_slope}"


def convert_batchnorm(module: nn.Module) -> None:
    """Makes every plain `torch.nn.BatchNorm2d` inside ``module`` a `BatchNorm2d` with the same parameters and buffers.

    Raises ValueError for a layer without parameters, running statistics or a momentum, which `BatchNorm2d` always has.
    """
    for name, child in module.named_children():
        if type(child) is not nn.BatchNorm2d:
            convert_batchnorm(child)
            continue
        if not child.affine or not child.track_running_stats or child.momentum is None:
            raise ValueError(f"module: expected BatchNorm2d with parameters, statistics and momentum, found {child}")
        converted = BatchNorm2d(child.num_features, child.eps, child.momentum).train(child.training)
        for key in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked"):
            setattr(converted, key, getattr(child, key))
        setattr(module, name, converted)


def batchnorms(module: nn.Module) -> list[nn.modules.batchnorm._BatchNorm]:
    """Every BatchNorm layer inside ``module``, of whatever class and number of dimensions."""
    return [layer for layer in module.modules() if isinstance(layer, nn.modules.batchnorm._BatchNorm)]


@contextmanager
def frozen_statistics(module: nn.Module) -> Iterator[None]:
    """Inside, no BatchNorm layer of ``module`` updates its running statistics; in training mode each normalizes with
    its batch's own (the "BN frozen" passes of methods.md D). A layer of another class than ours, such as timm's
    BatchNormAct2d, gets momentum 0, and goes on counting batches.
    """
    layers = [layer for layer in module.modules() if isinstance(layer, BatchNorm2d)]
    before = [layer.update_statistics for layer in layers]
    others = [layer for layer in batchnorms(module) if not isinstance(layer, BatchNorm2d)]
    for layer in layers:
        layer.update_statistics = False
    try:
        with _momentum(others, 0.0):
            yield
    finally:
        for layer, value in zip(layers, before, strict=True):
            layer.update_statistics = value


@contextmanager
def statistics_momentum(module: nn.Module, momentum: float) -> Iterator[None]:
    """Inside, the newest batch has this weight in the running statistics of every BatchNorm layer of ``module``."""
    with _momentum(batchnorms(module), momentum):
        yield


@contextmanager
def _momentum(layers: list[nn.modules.batchnorm._BatchNorm], momentum: float) -> Iterator[None]:
    before = [layer.momentum for layer in layers]
    for layer in layers:
        layer.momentum = momentum
    try:
        yield
    finally:
        for layer, value in zip(layers, before, strict=True):
            layer.momentum = value


def synchronize(module: nn.Module, group: ProcessGroup | Literal[True] | None = True) -> None:
    """Sets the `sync_group` of every `BatchNorm2d` of ``module``: all ranks (True), some, or each for itself (None).

    Raises ValueError for BatchNorm layers of other classes, which would go on with the statistics of their own rows.
    """
    layers = batchnorms(module)
    if others := {type(layer).__name__ for layer in layers if not isinstance(layer, BatchNorm2d)}:
        raise ValueError(
            f"sync_batchnorm: expected False for a backbone with layers of class {', '.join(sorted(others))}, "
            "which cannot be synchronized, found True"
        )
    for layer in layers:
        layer.sync_group = group
