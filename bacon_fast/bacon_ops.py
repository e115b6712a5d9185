"""BaCon's loss in one native pass (csrc/contrastive/bacon_cpu.cpp): what torch.library has to know about its ops."""

from typing import Any

import torch
from torch import Tensor


def run_cpp(
    features: Tensor,
    labels: Tensor,
    logits: Tensor,
    centers: Tensor,
    selected: Tensor,
    class_counts: Tensor,
    *,
    progress: float | Tensor,
    temperature: float,
    bta: float,
    negative_weight: float | None,
    top_k: int,
    neg_mode: str,
    has_center: Tensor | None,
    min_temperature: float,
) -> Tensor:
    """Backend "cpp" of `functional.bacon_loss`: same arguments, same value. Half precision is computed in float32.

    Equal logits are ranked as torch.topk ranks them on a CPU, which follows no documented rule. Labels outside 0..K-1
    raise ValueError.
    """
    if not isinstance(progress, Tensor):
        progress = torch.tensor(progress, dtype=torch.float64)
    loss, _ = torch.ops.bacon_fast.bacon_step_cpu(
        features,
        labels,
        logits,
        centers,
        has_center,
        selected,
        class_counts,
        progress,
        temperature,
        bta,
        negative_weight,
        top_k,
        neg_mode,
        min_temperature,
    )
    return loss


def _step_fake(features: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
    dtype = torch.promote_types(features.dtype, torch.float32)
    return features.new_empty((), dtype=dtype), features.new_empty(features.shape, dtype=dtype)


def _step_backward_fake(grad_loss: Tensor, grad_features: Tensor, features: Tensor) -> Tensor:
    return torch.empty_like(grad_features, dtype=features.dtype)


def register_native() -> None:
    """Registers the fakes; the ops and their derivatives are registered by bacon_fast._C."""
    torch.library.register_fake("bacon_fast::bacon_step_cpu", _step_fake)
    torch.library.register_fake("bacon_fast::bacon_step_backward_cpu", _step_backward_fake)
