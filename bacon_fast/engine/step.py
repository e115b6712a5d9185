"""One training step: views, forward, backward, update, average (methods.md 0.3), without the host reading anything."""

from collections.abc import Hashable

import torch
from torch import Tensor, nn

from bacon_fast.engine.batches import Batches
from bacon_fast.engine.config import Config
from bacon_fast.engine.diagnostics import Diagnostics
from bacon_fast.engine.ema import EMA
from bacon_fast.engine.schedule import learning_rate
from bacon_fast.methods.gather import gather_batch
from bacon_fast.methods.method import Method

AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}


def autocast(config: Config, device: torch.device) -> torch.autocast:
    """The network's arithmetic, as a context."""
    half = AUTOCAST.get(config.precision)
    return torch.autocast(device.type, dtype=half, enabled=half is not None)


class TrainStep:
    """The step of a run, in eager mode. All it changes has a fixed address: parameters, buffers, optimizer, average.

    Args:
        config: of the run.
        method: whose buffers and parameters are trained.
        forward: `method`, or what wraps it (torch.compile, DistributedDataParallel).
        batches, optimizer, ema, diagnostics: of the run.

    Attributes:
        counter: completed steps, 0-d int64 on the device.
        scaler: fp16's loss scale, which lives on the device.
    """

    def __init__(
        self,
        config: Config,
        method: Method,
        forward: nn.Module,
        batches: Batches,
        optimizer: torch.optim.Optimizer,
        ema: EMA,
        diagnostics: Diagnostics,
    ) -> None:
        self.config, self.method, self.forward = config, method, forward
        self.batches, self.optimizer, self.ema, self.diagnostics = batches, optimizer, ema, diagnostics
        self.device = batches.device
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=config.precision == "fp16")
        self.counter = torch.zeros((), dtype=torch.int64, device=self.device)

    def __call__(self, step: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Runs the step that follows `step` completed ones. Returns losses and statistics as 0-d tensors."""
        rate = learning_rate(self.config.lr_schedule, self.config.lr, step, self.config.steps)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.batches.prepare(step)
        return self.run(self.method.phase(step))

    def run(self, phase: Hashable) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """The static program of a phase."""
        config = self.config
        batch = self.batches.batch(self.counter)
        with autocast(config, self.device):
            output = self.forward(batch, self.counter, phase)
        self.optimizer.zero_grad(set_to_none=True)
        self.scaler.scale(output.total).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        if config.optimizer == "adam" and config.weight_decay:
            rate = self.optimizer.param_groups[0]["lr"]
            with torch.no_grad():
                started = [p for p in self.method.parameters() if p.grad is not None]
                torch._foreach_mul_(started, 1 - config.weight_decay * rate)
        self.ema.update(self.method.network)
        if output.pseudo_labels is not None:
            self.diagnostics.update(output.pseudo_labels, gather_batch(batch).true_labels)
        self.counter += 1
        return output.losses, output.stats
