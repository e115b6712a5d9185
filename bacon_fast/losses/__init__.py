"""Losses that own state (bank, counts, centers) as buffers."""

from .bacon import BaConLoss, BaConOutput
from .bank import MemoryBank

__all__ = ["BaConLoss", "BaConOutput", "MemoryBank"]
