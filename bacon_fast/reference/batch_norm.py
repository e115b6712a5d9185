"""Batch normalization with the residual sum before and LeakyReLU after it, by torch's own operations.

Ioffe and Szegedy, "Batch Normalization", ICML 2015, placed as in He et al., "Identity Mappings in Deep Residual
Networks", ECCV 2016.
"""

import torch.nn.functional as F
from torch import Tensor


def batch_norm_act(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    num_batches_tracked: Tensor | None,
    residual: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
    negative_slope: float,
) -> tuple[Tensor, Tensor]:
    """(activated, s), both [N,C,H,W], with s = x + residual, or x itself without a residual.

    activated = LeakyReLU(weight · (s - mean) / sqrt(var + eps) + bias) by channel. In training, mean and var (biased)
    are computed from s over N, H and W, and the running statistics, if given, move towards them (the variance unbiased)
    by ``momentum``. Otherwise mean and var are the running ones.
    """
    s = x if residual is None else x + residual
    if training and num_batches_tracked is not None:
        num_batches_tracked.add_(1)
    normalized = F.batch_norm(s, running_mean, running_var, weight, bias, training, momentum, eps)
    return F.leaky_relu(normalized, negative_slope), s
