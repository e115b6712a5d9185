"""The operations in plain PyTorch, float64-capable: the specification that runs, and the backend "reference"."""

from .bacon_loss import bacon_loss, balanced_temperatures
from .batch_norm import batch_norm_act
from .contrastive import contrastive
from .fixmatch_abc import fixmatch_abc_loss
from .memory_bank import bank_select_, bank_write_
from .sgd_ema import sgd_ema_

__all__ = [
    "bacon_loss",
    "balanced_temperatures",
    "bank_select_",
    "bank_write_",
    "batch_norm_act",
    "contrastive",
    "fixmatch_abc_loss",
    "sgd_ema_",
]
