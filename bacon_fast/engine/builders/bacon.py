"""BaCon's loss, shared by the families it can be added to."""

from bacon_fast.engine.builders.info import DataInfo
from bacon_fast.engine.config import Config
from bacon_fast.losses.bacon import BaConLoss


def build_bacon_loss(config: Config, num_features: int, info: DataInfo) -> BaConLoss:
    """The loss on features of width `num_features`, with a bank of one slot for each labeled and unlabeled image."""
    return BaConLoss(
        num_features,
        info.num_classes,
        info.num_labeled,
        info.num_unlabeled,
        proj_dim=config.proj_dim,
        proj_layers=config.proj_layers,
        temperature=config.temperature,
        bta=config.bta,
        negative_weight=config.negative_weight,
        top_k=config.top_k,
        reliable_threshold=config.reliable_threshold,
        count_threshold=config.threshold,
        neg_mode=config.neg_mode,
        variant=config.variant,
        backend=None if config.loss_backend == "auto" else config.loss_backend,
        count_gate=config.count_gate,
        labeled_counts=config.labeled_counts,
        center_slots=config.center_slots,
        centers=config.centers,
    )
