"""Cross entropy on the labeled images alone: the lower bound every semi-supervised method is compared with."""

import torch.nn.functional as F
from torch import Tensor, nn

from bacon_fast.methods.outputs import Batch, Outputs


class Supervised(nn.Module):
    """Mean cross entropy of the labeled rows; needs no unlabeled images."""

    def forward(self, out: Outputs, batch: Batch, step: Tensor) -> tuple[dict[str, Tensor], dict[str, Tensor], None]:
        """Loss `supervised`, 0-d float32."""
        return {"supervised": F.cross_entropy(out.labeled_logits.float(), batch.labels)}, {}, None
