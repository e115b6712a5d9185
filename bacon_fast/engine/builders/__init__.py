"""From a configuration to a method: one file a family, found by the first part of the method's name."""

from torch import nn

from bacon_fast.engine.builders import fixmatch, remixmatch, ssc, sscl
from bacon_fast.engine.builders.info import DataInfo
from bacon_fast.engine.config import Config
from bacon_fast.methods.method import Method

# Each has build_network(config, num_classes) and build_method(config, network, info).
FAMILIES = {"supervised": fixmatch, "fixmatch": fixmatch, "remixmatch": remixmatch, "ssc": ssc, "sscl": sscl}

__all__ = ["DataInfo", "build_method", "build_network"]


def build_network(config: Config, num_classes: int) -> nn.Module:
    """The network of `config.method`, freshly initialized from torch's generator: what is averaged and evaluated."""
    return FAMILIES[config.method.split("+")[0]].build_network(config, num_classes)


def build_method(config: Config, info: DataInfo) -> Method:
    """The method named by `config.method`, on a fresh network."""
    family = FAMILIES[config.method.split("+")[0]]
    return family.build_method(config, family.build_network(config, info.num_classes), info)
