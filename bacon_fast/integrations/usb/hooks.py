"""USB's weight average and timer without their copies and synchronizations."""

import time

import torch
from semilearn.core.hooks import Hook
from torch import Tensor, nn


class AveragedModel:
    """USB's ``algorithm.ema``, with the averages kept in the parameters of ``ema_model`` themselves.

    USB keeps a second set of averages, computes them with five operations a parameter, and copies two state dicts a
    step. Here a step is one multi-tensor interpolation and one multi-tensor copy of the buffers. The averages replace
    the weights in place during evaluation, so no tensor changes its address.
    """

    def __init__(self, model: nn.Module, ema_model: nn.Module, decay: float):
        self.model, self.ema_model, self.decay = model, ema_model, decay
        self.backup: list[Tensor] = []

    @property
    def shadow(self) -> dict[str, Tensor]:
        """The averages by the parameters' names in the online model."""
        names = (name for name, _ in self.model.named_parameters())
        return dict(zip(names, _data(self.ema_model.parameters())))

    def register(self) -> None:
        """Start from the online weights."""
        torch._foreach_copy_(_data(self.ema_model.parameters()), _data(self.model.parameters()))

    def load(self, ema_model: nn.Module) -> None:
        """Start from the weights of `ema_model` (resume)."""
        if ema_model is not self.ema_model:
            torch._foreach_copy_(_data(self.ema_model.parameters()), _data(ema_model.parameters()))

    def update(self) -> None:
        """average <- decay · average + (1 - decay) · weight; BatchNorm's buffers are copied."""
        averages, weights = _data(self.ema_model.parameters()), _data(self.model.parameters())
        torch._foreach_lerp_(averages, weights, 1 - self.decay)
        if buffers := _data(self.model.buffers()):
            torch._foreach_copy_(_data(self.ema_model.buffers()), buffers)

    def apply_shadow(self) -> None:
        """Put the averages into the online model, until `restore`."""
        weights = _data(self.model.parameters())
        self.backup = [weight.clone() for weight in weights]
        torch._foreach_copy_(weights, _data(self.ema_model.parameters()))

    def restore(self) -> None:
        """Put the online weights back."""
        torch._foreach_copy_(_data(self.model.parameters()), self.backup)
        self.backup = []


class EMAHook(Hook):
    """USB's EMAHook on top of `AveragedModel`."""

    def before_run(self, algorithm):
        algorithm.ema = AveragedModel(algorithm.model, algorithm.ema_model, algorithm.ema_m)
        if not algorithm.resume:
            algorithm.ema.register()

    def after_train_step(self, algorithm):
        if algorithm.ema is not None:
            algorithm.ema.update()


class TimerHook(Hook):
    """Times of the host, read from its clock: USB's TimerHook makes the host wait for the device twice a step.

    ``train/prefetch_time`` is the time spent waiting for the loaders, ``train/run_time`` the time between the start of
    the step and the end of its hooks. While the device keeps up, their means equal the device's.
    """

    def before_run(self, algorithm):
        self.finished = time.perf_counter()

    def before_train_step(self, algorithm):
        self.started = time.perf_counter()

    def after_train_step(self, algorithm):
        waited, self.finished = self.started - self.finished, time.perf_counter()
        algorithm.log_dict["lr"] = algorithm.optimizer.param_groups[-1]["lr"]
        algorithm.log_dict["train/prefetch_time"] = waited
        algorithm.log_dict["train/run_time"] = self.finished - self.started


def use_fast_hooks(algorithm) -> None:
    """Replace the EMA hook and the timer hook of any USB algorithm. Call it before ``algorithm.train()``."""
    # A hook registered under a name that exists takes its place in the order.
    algorithm.register_hook(EMAHook(), "EMAHook", "HIGH")
    algorithm.register_hook(TimerHook(), "TimerHook", "LOW")


def _data(tensors) -> list[Tensor]:
    return [tensor.data for tensor in tensors]
