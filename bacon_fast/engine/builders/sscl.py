"""sscl."""

from bacon_fast.data.simclr import SimCLRDistortion
from bacon_fast.engine.builders.info import DataInfo
from bacon_fast.engine.config import Config
from bacon_fast.methods.sscl.method import SsCL
from bacon_fast.models.heads import projection_head
from bacon_fast.models.network import Network


def build_network(config: Config, num_classes: int) -> Network:
    return Network(config.backbone, num_classes, balanced_head=False, bn_momentum=config.bn_momentum)


def build_method(config: Config, network: Network, info: DataInfo) -> SsCL:
    return SsCL(
        network,
        projection_head(network.backbone.num_features, config.proj_dim, config.proj_layers),
        SimCLRDistortion(info.mean, info.std, config.seed),
        num_labeled=info.num_labeled,
        num_unlabeled=info.num_unlabeled,
        threshold=config.threshold,
        lambda_u=config.lambda_u,
        lambda_con=config.lambda_con,
        soft=config.sscl_soft,
        momentum=config.sscl_momentum,
        queue_size=config.sscl_queue,
        extra_keys=config.sscl_extra_keys,
        gamma=config.sscl_gamma,
        margin=config.sscl_margin,
        form=config.sscl_form,
        mask_queue=config.sscl_mask_queue,
        calibration=config.sscl_calibration,
        temperature=config.sscl_temperature,
        refresh_every=max(1, round(config.sscl_refresh_epochs * config.steps / config.epochs)),
        seed=config.seed,
        backend=None if config.loss_backend == "auto" else config.loss_backend,
    )
