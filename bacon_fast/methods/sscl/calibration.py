"""SsCL's co-calibration: pseudo-labels corrected by similarities to class prototypes (methods.md F.4)."""

import torch
from torch import Tensor, nn

MODES = ("ratio", "literal")


class CoCalibration(nn.Module):
    """Calibrated pseudo-labels p̂_b from the classifier's p_b and the cosines s to the class prototypes.

    With pi = softmax(s / temperature) and p_mean the mean of pi over the last batches, this one included:

        mode "ratio":    p̂_b ∝ p_b * pi / (p_mean + 1e-6)   favors classes that the image is unusually close to
        mode "literal":  p̂_b ∝ p_b * p_mean                 the paper's wording; nothing in it depends on the image

    Buffers:
        history [window, K] float32: batch means of pi, a ring that starts uniform; position: its next row, 0-d int64.

    Args:
        num_classes: K.
        temperature: T_s.
        window: batches averaged over; 128 in the paper.
    """

    def __init__(self, num_classes: int, *, mode: str = "ratio", temperature: float = 0.1, window: int = 128) -> None:
        super().__init__()
        if mode not in MODES:
            raise ValueError(f"mode: expected one of {', '.join(MODES)}, found {mode!r}")
        if not temperature > 0:
            raise ValueError(f"temperature: expected a number above 0, found {temperature!r}")
        self.mode, self.temperature = mode, temperature
        self.register_buffer("history", torch.full((window, num_classes), 1 / num_classes))
        self.register_buffer("position", torch.zeros(1, dtype=torch.int64))

    @torch.no_grad()
    def forward(self, logits: Tensor, similarity: Tensor) -> Tensor:
        """Logits float [U, K] of the batch, cosines float [U, K] -> p̂ float32 [U, K]. Updates the history first."""
        log_pi = (similarity.float() / self.temperature).log_softmax(1)
        self.history.index_copy_(0, self.position, log_pi.exp().mean(0, keepdim=True).to(self.history.dtype))
        self.position.add_(1).remainder_(len(self.history))
        mean = self.history.mean(0)
        correction = mean.log() if self.mode == "literal" else log_pi - (mean + 1e-6).log()
        return (logits.float().log_softmax(1) + correction).softmax(1)
