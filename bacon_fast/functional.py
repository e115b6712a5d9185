"""The public, stateless operations of bacon_fast.

Every function checks its arguments, then hands them to a backend: "reference" is plain PyTorch, "cpp" the native CPU
code, "triton" and "cuda" the GPU code. ``backend=None`` takes the best one usable for the tensors at hand; asking by
name for one that is not usable raises RuntimeError with the reason.

On a CPU the values in tensors are checked too: a class, slot or count out of range raises ValueError. On a GPU, where
the host would have to wait for them, they are not.
"""

from .ops.bacon_loss import bacon_loss, balanced_temperatures
from .ops.batch_norm import batch_norm_act
from .ops.contrastive_losses import info_nce, sscl_loss, sup_con_loss
from .ops.fixmatch_abc import FixMatchABCOutput, fixmatch_abc_loss
from .ops.memory_bank import bank_select_, bank_write_, class_centers
from .ops.sgd_ema import sgd_ema_

__all__ = [
    "FixMatchABCOutput",
    "bacon_loss",
    "balanced_temperatures",
    "bank_select_",
    "bank_write_",
    "batch_norm_act",
    "class_centers",
    "fixmatch_abc_loss",
    "info_nce",
    "sgd_ema_",
    "sscl_loss",
    "sup_con_loss",
]
