"""SsCL's co-calibration: pseudo-labels corrected by similarities to class prototypes (methods.md F.4)."""

import torch
from torch import Tensor, nn

CHOICES = {
    "mode": ("ratio", "literal"),
    "similarity": ("softmax", "cosine"),
    "window_start": ("uniform", "empty"),
}
LOWEST_COSINE = 1e-6


class CoCalibration(nn.Module):
    """Calibrated pseudo-labels p̂_b from the classifier's p_b and the cosines s to the class prototypes.

    With pi = softmax(s / temperature) and p_mean the mean of pi over the last batches, this one included:

        mode "ratio":    p̂_b ∝ p_b * pi / (p_mean + 1e-6)   favors classes that the image is unusually close to
        mode "literal":  p̂_b ∝ p_b * p_mean                 the paper's wording; nothing in it depends on the image

    Buffers:
        history [window, K] float32: batch means of pi, a ring; position: its next row, int64 [1]; with `window_start`
        "empty" seen: batches so far, int64 [1].

    Args:
        num_classes: K.
        temperature: T_s.
        window: batches averaged over; 128 in the paper.
        similarity: "softmax"; or "cosine", the paper's wording: pi is s itself, at least 1e-6.
        window_start: the ring starts "uniform", with 1/K for the batches that there were not; or "empty", the paper's
            wording: the mean is of the batches that there were.
    """

    def __init__(
        self,
        num_classes: int,
        *,
        mode: str = "ratio",
        temperature: float = 0.1,
        window: int = 128,
        similarity: str = "softmax",
        window_start: str = "uniform",
    ) -> None:
        super().__init__()
        for name, value in (("mode", mode), ("similarity", similarity), ("window_start", window_start)):
            if value not in CHOICES[name]:
                raise ValueError(f"{name}: expected one of {', '.join(CHOICES[name])}, found {value!r}")
        if not temperature > 0:
            raise ValueError(f"temperature: expected a number above 0, found {temperature!r}")
        self.mode, self.temperature, self.similarity = mode, temperature, similarity
        start = 1 / num_classes if window_start == "uniform" else 0.0
        self.register_buffer("history", torch.full((window, num_classes), start))
        self.register_buffer("position", torch.zeros(1, dtype=torch.int64))
        self.counts_batches = window_start == "empty"
        if self.counts_batches:
            self.register_buffer("seen", torch.zeros(1, dtype=torch.int64))

    @torch.no_grad()
    def forward(self, logits: Tensor, similarity: Tensor) -> Tensor:
        """Logits float [U, K] of the batch, cosines float [U, K] -> p̂ float32 [U, K]. Updates the history first."""
        if self.similarity == "softmax":
            log_pi = (similarity.float() / self.temperature).log_softmax(1)
        else:
            log_pi = similarity.float().clamp(min=LOWEST_COSINE).log()
        self.history.index_copy_(0, self.position, log_pi.exp().mean(0, keepdim=True).to(self.history.dtype))
        self.position.add_(1).remainder_(len(self.history))
        mean = self.history.mean(0)
        if self.counts_batches:
            self.seen.add_(1)
            mean = self.history.sum(0) / self.seen.clamp(max=len(self.history))
        correction = mean.log() if self.mode == "literal" else log_pi - (mean + 1e-6).log()
        return (logits.float().log_softmax(1) + correction).softmax(1)
