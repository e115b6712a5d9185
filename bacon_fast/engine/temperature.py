"""Temperature scaling: one number that makes a network's probabilities honest (Guo et al., ICML 2017, section 4.2)."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

RANGE = (0.05, 20.0)
"""Temperatures that are sought."""


def fit_temperature(logits: Tensor, labels: Tensor) -> float | None:
    """The T in `RANGE` for which softmax(logits / T) has the least mean log-loss.

    The mean is over images, unweighted: probabilities are then right for images as frequent as these. The loss is
    convex in 1/T, so LBFGS finds the least one. None when the images determine no T: if all are classified right, the
    loss falls with T for ever, and none is honest; or a logit is not finite.

    Args:
        logits: float [N,K], N > 0. labels: int64 [N].

    Example:
        >>> logits = torch.tensor([[4.0, 0.0], [4.0, 0.0], [4.0, 0.0], [0.0, 4.0]])
        >>> round(fit_temperature(logits, torch.tensor([0, 0, 1, 1])), 3)  # right 3 times of 4: 4/T = log 3
        3.641
    """
    logits, labels = logits.cpu().double(), labels.cpu()
    if not bool(logits.isfinite().all()) or bool((logits.argmax(1) == labels).all()):
        return None
    low, high = (1 / bound for bound in reversed(RANGE))
    inverse = torch.ones((), dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([inverse], max_iter=100, tolerance_grad=1e-10, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = F.cross_entropy(inverse * logits, labels)
        value.backward()
        return value

    with torch.inference_mode(False), torch.enable_grad():
        logits = logits.clone()  # a tensor of inference mode has no gradients
        optimizer.step(loss)
    found = float(inverse.detach())
    # Beyond an end of the range the end is best, for the loss is convex.
    return 1 / min(max(found, low), high) if math.isfinite(found) else None
