"""The optimizers of a run. A step also moves the run's average, and never makes the host wait.

Both use the fused path of torch.amp.GradScaler: the step itself divides by fp16's gradient scale, and a step with
overflowed gradients changes only the average.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from bacon_fast import functional
from bacon_fast.engine.ema import AveragePairs
from bacon_fast.ops.backends import is_native


class SGD(torch.optim.SGD):
    """torch.optim.SGD with Nesterov momentum: parameters, momentum and average in one pass over memory.

    Groups, state and checkpoints are torch's, in both directions. A group's learning rate is a number or a 0-d float32
    tensor on the parameters' device; groups with the same one are updated together. Where `functional.sgd_ema_`
    has no native backend, torch's fused kernels take the step.

    Momentum starts as zeros, which give the same first step. By itself torch allocates momentum without filling it, and
    its fused kernel leaves the garbage in place when fp16's first step overflows and is skipped. torch also lets no
    parameter of a group, such as the projection, start later than the others.
    """

    def __init__(self, params: Iterable, lr: float | Tensor, momentum: float = 0.9, weight_decay: float = 0.0) -> None:
        super().__init__(params, lr, momentum, weight_decay=weight_decay, nesterov=True, fused=True)

    def _set_momenta(self) -> None:
        """Gives every parameter a momentum in its own memory order: zeros, or what a checkpoint brought."""
        for group in self.param_groups:
            for parameter in group["params"]:
                current = self.state[parameter].get("momentum_buffer")
                if current is None or current.stride() != parameter.stride():
                    momentum = self.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
                    if current is not None:
                        momentum.copy_(current)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        self._set_momenta()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self._set_momenta()

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None, *, average: AveragePairs | None = None) -> float | None:
        """One step. `average` moves towards the new parameters."""
        if not is_native("sgd_ema_", self.param_groups[0]["params"][0]):
            loss = super().step(closure)
            if average is not None:
                average.apply()
            return loss
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        later = None
        if average is not None and isinstance(average.momentum, Tensor):  # the operation takes a number
            average, later = None, average
        if average is None:
            average = AveragePairs([], [], [], [], 0.0)
        groups: dict[float | int, list[dict]] = {}
        for group in self.param_groups:  # a tensor is one rate by its identity: the host does not read it
            groups.setdefault(id(rate) if isinstance(rate := group["lr"], Tensor) else rate, []).append(group)
        own = {id(p) for group in self.param_groups for p in group["params"]}
        for number, together in enumerate(groups.values()):
            self._step(together, own, average, first=number == 0)
        if later is not None:
            later.apply()
        return loss

    def _step(self, groups: list[dict], own: set[int], average: AveragePairs, *, first: bool) -> None:
        """Updates groups of one rate, and the averages of their parameters. `first`: also what else the average
        follows; `own` are the ids of all parameters of the optimizer.
        """
        rate, parameters = groups[0]["lr"], [(p, group) for group in groups for p in group["params"]]
        average_of = dict(zip(map(id, average.sources), average.averages))
        rows = [
            (p, p.grad, self.state[p]["momentum_buffer"], average_of.pop(id(p), None), group["weight_decay"])
            for p, group in parameters
        ]
        if first:  # frozen parameters, and averaged statistics
            others = [source for source in average.sources if id(source) not in own]
            rows += [(source, None, None, average_of[id(source)], 0.0) for source in others]
        if not isinstance(rate, Tensor):
            rate = torch.full((), rate, device=parameters[0][0].device)
        functional.sgd_ema_(
            *zip(*rows),
            average.copies if first else [],
            average.copied if first else [],
            rate=rate,
            momentum=self.param_groups[0]["momentum"],
            average_momentum=average.momentum,
            grad_scale=getattr(self, "grad_scale", None),
            found_inf=getattr(self, "found_inf", None),
        )


class _Fused:
    """What torch's fused Adam and AdamW lack here: a CUDA graph may capture the step, which also moves an average."""

    def _set_capturable(self) -> None:
        """Lets a CUDA graph capture the step. The device decides, whatever a checkpoint says."""
        for group in self.param_groups:
            group["capturable"] = group["params"][0].is_cuda

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self._set_capturable()

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None, *, average: AveragePairs | None = None) -> float | None:
        """One step. `average` moves towards the new parameters."""
        loss = super().step(closure)
        if average is not None:
            average.apply()
        return loss


class AdamW(_Fused, torch.optim.AdamW):
    """torch.optim.AdamW, fused. A group's `lr` may be a 0-d float32 tensor on the parameters' device."""

    def __init__(self, params: Iterable, lr: float | Tensor, weight_decay: float = 0.0) -> None:
        super().__init__(params, lr, weight_decay=weight_decay, fused=True)
        self._set_capturable()


class Adam(_Fused, torch.optim.Adam):
    """ABC's recipe (methods.md C): torch's fused Adam; then the trained parameters are multiplied by 1 - shrink * lr.

    `lr` may be a 0-d float32 tensor on the parameters' device.
    """

    def __init__(self, params: Iterable, lr: float | Tensor, shrink: float = 0.0) -> None:
        super().__init__(params, lr, fused=True)
        self.shrink = shrink
        self._set_capturable()

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None, *, average: AveragePairs | None = None) -> float | None:
        """One step. `average` moves towards the new parameters."""
        loss = super().step(closure)
        if self.shrink:
            trained = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
            lost = self.shrink * self.param_groups[0]["lr"]
            if (found_inf := getattr(self, "found_inf", None)) is not None:
                lost = lost * (found_inf == 0)
            torch._foreach_mul_(trained, 1 - lost)
        if average is not None:
            average.apply()
        return loss
