"""ssc."""

from bacon_fast.engine.builders.info import DataInfo
from bacon_fast.engine.config import Config
from bacon_fast.methods.ssc import SSC
from bacon_fast.models.ssc import PrototypeNetwork


def build_network(config: Config, num_classes: int) -> PrototypeNetwork:
    return PrototypeNetwork(
        config.backbone, num_classes, bn_momentum=config.bn_momentum, temperature=config.ssc_pl_temperature
    )


def build_method(config: Config, network: PrototypeNetwork, info: DataInfo) -> SSC:
    return SSC(
        network,
        threshold=config.threshold,
        temperature=config.ssc_temperature,
        lambda_proto=config.ssc_lambda_proto,
        lambda_up=config.ssc_lambda_up,
        lambda_down=config.ssc_lambda_down,
        reduction=config.ssc_reduction,
        backend=None if config.loss_backend == "auto" else config.loss_backend,
    )
