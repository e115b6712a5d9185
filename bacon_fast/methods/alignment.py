"""Distribution alignment (methods.md D; Berthelot et al., "ReMixMatch", ICLR 2020), with a moving average."""

import torch
from torch import Tensor, nn

_EPSILON = 1e-6


class DistributionAlignment(nn.Module):
    """Scales probabilities by the target over the current average prediction: p' ∝ p · (target + ε) / (p̄ + ε).

    Args:
        target: the wanted distribution, float [K]: the frequencies of the labeled classes.
        momentum: p̄ <- momentum · p̄ + (1 - momentum) · mean of p over the batch, before it is used; the first batch
            sets it.

    Buffers:
        average: p̄, float32 [K]; started: whether it holds one, 0-d bool.
    """

    def __init__(self, target: Tensor, momentum: float) -> None:
        super().__init__()
        self.momentum = momentum
        self.register_buffer("target", target.float(), persistent=False)  # derived from the split
        self.register_buffer("average", torch.zeros_like(self.target))
        self.register_buffer("started", torch.zeros((), dtype=torch.bool))

    def restart(self) -> None:
        """Forgets the average: the next batch sets it."""
        self.started.fill_(False)

    @torch.no_grad()
    def forward(self, probabilities: Tensor, exponent: Tensor | None = None) -> Tensor:
        """Aligned probabilities [U,K] of one batch; updates the average.

        With `exponent`, 0-d float, the target is the wanted distribution to that power, scaled to sum 1.
        """
        target = self.target
        if exponent is not None:
            target = target**exponent
            target = target / target.sum()
        mean = probabilities.mean(0)
        self.average.copy_(torch.where(self.started, torch.lerp(mean, self.average.to(mean), self.momentum), mean))
        self.started.fill_(True)
        aligned = probabilities * ((target + _EPSILON) / (self.average + _EPSILON))
        return aligned / aligned.sum(1, keepdim=True)
