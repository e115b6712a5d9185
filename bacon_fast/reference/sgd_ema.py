"""One step of SGD with Nesterov momentum, and of the moving average of the parameters, in plain PyTorch.

Momentum: Sutskever et al., "On the importance of initialization and momentum in deep learning", ICML 2013, in the form
of torch.optim.SGD. The average: methods.md 0.3.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from .values import accumulator_dtype


def sgd_ema_(
    parameters: Sequence[Tensor],
    gradients: Sequence[Tensor],
    momenta: Sequence[Tensor],
    averages: Sequence[Tensor],
    weight_decays: Sequence[float],
    copies: Sequence[Tensor],
    copied: Sequence[Tensor],
    rate: Tensor,
    momentum: float,
    average_momentum: float,
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
) -> None:
    """Arguments: see `bacon_fast.functional.sgd_ema_`, with an empty tensor for every None in a list.

    One after the other; the first three only with a gradient, the second and third not if found_inf:

        slope = gradient / grad_scale + weight_decay · parameter
        velocity <- momentum · velocity + slope
        parameter <- parameter - rate · (slope + momentum · velocity)
        average <- average_momentum · average + (1 - average_momentum) · parameter
    """
    for parameter, gradient, velocity, average, decay in zip(
        parameters, gradients, momenta, averages, weight_decays, strict=True
    ):
        dtype = accumulator_dtype(parameter.dtype)
        if gradient.numel():
            slope = gradient.to(dtype)
            if grad_scale is not None:
                slope = slope / grad_scale
            slope = slope + decay * parameter.to(dtype)
            new_velocity = momentum * velocity.to(dtype) + slope
            new_parameter = parameter.to(dtype) - rate * (slope + momentum * new_velocity)
            if found_inf is not None:
                overflow = found_inf != 0
                new_velocity = torch.where(overflow, velocity.to(dtype), new_velocity)
                new_parameter = torch.where(overflow, parameter.to(dtype), new_parameter)
            velocity.copy_(new_velocity)
            parameter.copy_(new_parameter)
        if average.numel():
            average.copy_(torch.lerp(average.to(dtype), parameter.to(dtype), 1 - average_momentum))
    for to, source in zip(copies, copied, strict=True):
        to.copy_(source)
