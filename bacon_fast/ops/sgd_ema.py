"""SGD with Nesterov momentum and the moving average of the parameters, in one pass: `sgd_ema_`."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import reference
from .backends import BACKENDS, Backend, always, choose_backend, why_not_cpp, why_not_cuda
from .checks import check_number


@torch.no_grad()
def sgd_ema_(
    parameters: Sequence[Tensor],
    gradients: Sequence[Tensor | None],
    momenta: Sequence[Tensor | None],
    averages: Sequence[Tensor | None],
    weight_decays: Sequence[float],
    copies: Sequence[Tensor] = (),
    copied: Sequence[Tensor] = (),
    *,
    rate: Tensor,
    momentum: float = 0.9,
    average_momentum: float = 0.999,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
    backend: str | None = None,
) -> None:
    """One step of many tensors at once, in place: the update after the backward pass of a training step.

    The native backends read and write every element once; on a GPU that is one launch for up to 512 tensors of a dtype.
    Formula: `reference.sgd_ema.sgd_ema_`. The learning rate and the overflow flag are read where the step runs, never
    by the host.

    Args:
        parameters: float tensors, dense in any memory order, all on one device.
        gradients: one a parameter, of its shape and dtype; None where a parameter is not trained in this step. They are
            read only: unlike torch's fused SGD, this leaves them multiplied by ``grad_scale``.
        momenta: velocities of the trained parameters, in their shape, dtype and memory order.
        averages: moving averages, in the same shape, dtype and memory order; None for parameters without one. They
            move in every step, whether the parameter is trained or not.
        weight_decays: L2 coefficient of each parameter.
        copies, copied: pairs of equal tensors of any dtype; each of ``copies`` is set to its counterpart.
        rate: learning rate, one float32 number.
        momentum: of the velocities.
        average_momentum: weight of the old average, 0 to 1.
        grad_scale: the gradients were multiplied by this, one float32 number (`torch.amp.GradScaler`).
        found_inf: one float32 number; if it is not 0, parameters and momenta stay as they are.
        backend: None for the best one, "reference", "cpp" or "cuda".

    Raises:
        TypeError, ValueError: an argument does not fit; the message names it.
        RuntimeError: the named backend is not available here.

        >>> weight, gradient, velocity, average = torch.ones(2), torch.ones(2), torch.zeros(2), torch.ones(2)
        >>> sgd_ema_([weight], [gradient], [velocity], [average], [0.0], rate=torch.tensor(0.1), average_momentum=0.5)
        >>> weight, average
        (tensor([0.8100, 0.8100]), tensor([0.9050, 0.9050]))
    """
    lists = {"gradients": gradients, "momenta": momenta, "averages": averages, "weight_decays": weight_decays}
    for name, values in lists.items():
        if len(values) != len(parameters):
            raise ValueError(f"{name}: expected one a parameter, {len(parameters)}, found {len(values)}")
    if len(copied) != len(copies):
        raise ValueError(f"copied: expected {len(copies)} tensors, one a copy, found {len(copied)}")
    for name, number in (("rate", rate), ("grad_scale", grad_scale), ("found_inf", found_inf)):
        if number is not None:
            _check_scalar(name, number)
    check_number("momentum", momentum, low=0, low_allowed=True)
    check_number("average_momentum", average_momentum, low=0, low_allowed=True)
    if average_momentum > 1:
        raise ValueError(f"average_momentum: expected at most 1, found {average_momentum}")
    for i, (gradient, velocity) in enumerate(zip(gradients, momenta)):
        if gradient is not None and velocity is None:
            raise ValueError(f"momenta[{i}]: expected a tensor, as there is a gradient, found None")
    none = rate.new_empty(0)
    choose_backend("sgd_ema_", backend, rate)(
        list(parameters),
        *([none if tensor is None else tensor for tensor in tensors] for tensors in (gradients, momenta, averages)),
        list(weight_decays),
        list(copies),
        list(copied),
        rate,
        momentum,
        average_momentum,
        grad_scale,
        found_inf,
    )


def _check_scalar(name: str, tensor: Tensor) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name}: expected a float32 tensor of one number, found {type(tensor).__name__}")
    if tensor.dtype != torch.float32:
        raise TypeError(f"{name}: expected dtype {torch.float32}, found {tensor.dtype}")
    if tensor.numel() != 1:
        raise ValueError(f"{name}: expected one number, found shape {list(tensor.shape)}")


# An empty gradient or average stands for none.
torch.library.define(
    "bacon_fast::sgd_ema_",
    "(Tensor(a!)[] parameters, Tensor[] gradients, Tensor(b!)[] momenta, Tensor(c!)[] averages, float[] weight_decays, "
    "Tensor(d!)[] copies, Tensor[] copied, Tensor rate, float momentum, float average_momentum, Tensor? grad_scale, "
    "Tensor? found_inf) -> ()",
)


@torch.library.register_fake("bacon_fast::sgd_ema_")
def _(*arguments: Any) -> None:
    """Returns nothing; the schema says which tensors change."""


def _run(*arguments: Any) -> None:
    torch.ops.bacon_fast.sgd_ema_(*arguments)


BACKENDS["sgd_ema_"] = {
    "cpp": Backend(_run, why_not_cpp),
    "cuda": Backend(_run, why_not_cuda),
    "reference": Backend(reference.sgd_ema_, always),
}
