"""remixmatch and what is added to it: abc, the balancers of pseudo-labels, bacon."""

from bacon_fast.engine.builders.bacon import build_bacon_loss
from bacon_fast.engine.builders.balancers import build_balancer
from bacon_fast.engine.builders.fixmatch import build_network
from bacon_fast.engine.builders.info import DataInfo
from bacon_fast.engine.config import Config
from bacon_fast.methods.abc import ABC
from bacon_fast.methods.remixmatch import ReMixMatch
from bacon_fast.models.network import Network

__all__ = ["build_method", "build_network"]


def build_method(config: Config, network: Network, info: DataInfo) -> ReMixMatch:
    others, abc = config.method.split("+")[1:], None
    if "abc" in others:
        abc = ABC(
            info.labeled_counts,
            threshold=config.threshold,
            lambda_abc=config.lambda_abc,
            steps=config.steps,
            epochs=config.epochs,
            seed=config.seed,
            backend=None if config.loss_backend == "auto" else config.loss_backend,
        )
    return ReMixMatch(
        network,
        info.labeled_counts,
        steps=config.steps,
        seed=config.seed,
        lambda_u=config.lambda_u,
        lambda_kl=config.lambda_kl,
        lambda_rot=config.lambda_rot,
        rampup=config.rampup,
        sharpening=config.sharpening,
        mixup_alpha=config.mixup_alpha,
        alignment_momentum=config.distribution_momentum,
        abc=abc,
        regularizer=build_bacon_loss(config, network.backbone.num_features, info) if "bacon" in others else None,
        balancer=build_balancer(config, network.backbone.num_features, info),
        lambda_con=config.lambda_con,
        contrast_start=config.contrast_start,
    )
