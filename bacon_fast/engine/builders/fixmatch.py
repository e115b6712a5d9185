"""supervised, fixmatch and what is added to it: abc, the balancers of pseudo-labels, bacon."""

from bacon_fast.engine.builders.bacon import build_bacon_loss
from bacon_fast.engine.builders.balancers import build_balancer
from bacon_fast.engine.builders.info import DataInfo
from bacon_fast.engine.config import Config
from bacon_fast.methods.composed import ComposedMethod
from bacon_fast.methods.fixmatch import FixMatch
from bacon_fast.methods.fixmatch_abc import FixMatchABC
from bacon_fast.methods.supervised import Supervised
from bacon_fast.models.network import Network, TeacherNetwork


def build_network(config: Config, num_classes: int) -> Network:
    if "cossl" in config.method.split("+"):
        return TeacherNetwork(config.backbone, num_classes, bn_momentum=config.bn_momentum)
    return Network(
        config.backbone,
        num_classes,
        balanced_head="abc" in config.method.split("+"),
        bn_momentum=config.bn_momentum,
    )


def build_method(config: Config, network: Network, info: DataInfo) -> ComposedMethod:
    base_name, *others = config.method.split("+")
    if base_name == "supervised":
        base = Supervised()
    elif "abc" in others:
        base = FixMatchABC(
            info.labeled_counts,
            threshold=config.threshold,
            lambda_u=config.lambda_u,
            lambda_abc=config.lambda_abc,
            steps=config.steps,
            epochs=config.epochs,
            seed=config.seed,
            backend=None if config.loss_backend == "auto" else config.loss_backend,
        )
    else:
        base = FixMatch(threshold=config.threshold, lambda_u=config.lambda_u)
    return ComposedMethod(
        network,
        base,
        build_bacon_loss(config, network.backbone.num_features, info) if "bacon" in others else None,
        build_balancer(config, network.backbone.num_features, info),
        steps=config.steps,
        lambda_con=config.lambda_con,
        contrast_start=config.contrast_start,
    )
