"""One training step: views, forward, backward, update, average (methods.md 0.3), without the host reading anything."""

from collections.abc import Hashable
from contextlib import nullcontext

import torch
from torch import Tensor, nn

from bacon_fast.engine.batches import Batches
from bacon_fast.engine.config import Config
from bacon_fast.engine.diagnostics import Diagnostics
from bacon_fast.engine.ema import EMA
from bacon_fast.engine.meter import Meter
from bacon_fast.engine.optimizers import SGD, Adam, AdamW
from bacon_fast.engine.schedule import set_learning_rate
from bacon_fast.methods.gather import gather_batch, num_ranks
from bacon_fast.methods.method import Method
from bacon_fast.models.half import HalfCopies
from bacon_fast.ops.checks import trusted_values

AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}


def autocast(config: Config, device: torch.device) -> torch.autocast:
    """The network's arithmetic, as a context."""
    half = AUTOCAST.get(config.engine.precision)
    return torch.autocast(device.type, dtype=half, enabled=half is not None)


class TrainStep:
    """The step of a run. Whatever it changes has a fixed address: parameters, buffers, optimizer, average, sums.

    Args:
        config: of the run.
        method: the method; its buffers and parameters are trained.
        forward: `method`, or its wrapper (torch.compile, DistributedDataParallel).
        batches, optimizer, ema, diagnostics: of the run.
        meter: receives the losses and statistics of every step.

    Attributes:
        counter: completed steps, 0-d int64 on the device.
        rate: learning rate of the last step, 0-d float32 on the device.
        rates: `rate` times each `lr_scale` of the optimizer's groups, float32 [scales]. A group's `lr` is `rate` where
            no group has a scale, else a 0-d view of `rates`.
        scaler: fp16's loss scale, which lives on the device.
    """

    def __init__(
        self,
        config: Config,
        method: Method,
        forward: nn.Module,
        batches: Batches,
        optimizer: SGD | Adam | AdamW,
        ema: EMA,
        diagnostics: Diagnostics,
        meter: Meter,
    ) -> None:
        self.config, self.method, self.forward = config, method, forward
        self.batches, self.optimizer, self.ema = batches, optimizer, ema
        self.diagnostics, self.meter = diagnostics, meter
        self.device = batches.device
        self.scaler = _scaler(config, self.device)
        self.counter = torch.zeros((), dtype=torch.int64, device=self.device)
        self.rate = torch.full((), config.optimizer.lr, device=self.device)
        scales = [group.get("lr_scale", 1.0) for group in optimizer.param_groups]
        distinct = sorted(set(scales))
        self._scales = torch.tensor(distinct, device=self.device)
        self.rates = self.rate * self._scales
        self._has_scales = distinct != [1.0]
        views = self.rates.unbind() if self._has_scales else (self.rate,)
        self._rate_of_group = [views[distinct.index(scale)] for scale in scales]
        self._one = torch.ones((), device=self.device)  # the gradient of the loss by itself
        # torch.compile fuses casts by itself, and ranks exchange gradients as they come, not all at the end.
        plain = forward is method and num_ranks() == 1
        half = AUTOCAST.get(config.engine.precision)
        self.half = nullcontext() if half is None or not plain else HalfCopies(method, half)

    def __call__(self, step: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Runs the step that follows `step` completed ones. Returns losses and statistics as 0-d tensors."""
        return self.run(self.prepare(step))

    def prepare(self, step: int) -> Hashable:
        """The host's work before a step can run. Returns the step's phase."""
        self.batches.prepare(step)
        return self.method.phase(step)

    def run(self, phase: Hashable) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """The static program of a phase."""
        config = self.config
        batch = self.batches.batch(self.counter)
        with autocast(config, self.device), self.half, trusted_values():
            output = self.forward(batch, self.counter, phase)
        self.optimizer.zero_grad(set_to_none=True)
        self.scaler.scale(output.total).backward(self._one)
        options, schedule = config.optimizer, self.method.schedule(self.counter, config.steps)
        set_learning_rate(self.rate, options.lr_schedule, options.lr, *schedule, options.warmup)
        if self._has_scales:
            torch.mul(self._scales, self.rate, out=self.rates)
        # Set in every step: a checkpoint may have brought another rate.
        for group, rate in zip(self.optimizer.param_groups, self._rate_of_group):
            group["lr"] = rate
        self.ema.set_step(schedule[0])
        self.scaler.step(self.optimizer, average=self.ema.pairs(self.method.network))
        self.scaler.update()
        if output.pseudo_labels is not None:
            self.diagnostics.update(output.pseudo_labels, gather_batch(batch).true_labels)
        values = {f"loss/{name}": value for name, value in output.losses.items()}
        self.meter.add(phase, values | {f"stats/{name}": value for name, value in output.stats.items()})
        self.counter += 1
        return output.losses, output.stats

    def forget_broken_step(self) -> None:
        """Clears what a step left on the host when its recording broke off before it was executed."""
        self.optimizer.zero_grad(set_to_none=True)
        for name in ("grad_scale", "found_inf"):  # GradScaler's, for the length of a step
            vars(self.optimizer).pop(name, None)
        state, self.scaler = self.scaler.state_dict(), _scaler(self.config, self.device)
        self.scaler.load_state_dict(state)


def _scaler(config: Config, device: torch.device) -> torch.amp.GradScaler:
    return torch.amp.GradScaler(device.type, enabled=config.engine.precision == "fp16")
