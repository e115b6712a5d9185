"""The operations in plain PyTorch, float64-capable: the specification that runs, and the backend "reference"."""

from .bacon import bacon_loss, balanced_temperatures

__all__ = ["bacon_loss", "balanced_temperatures"]
