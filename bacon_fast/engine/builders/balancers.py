"""The class balancers that act on pseudo-labels, shared by the families they can be added to."""

from bacon_fast.engine.builders.info import DataInfo
from bacon_fast.engine.config import Config
from bacon_fast.methods.balancer import Balancer
from bacon_fast.methods.debiaspl import DebiasPL
from bacon_fast.methods.saw import SAW


def build_balancer(config: Config, info: DataInfo) -> Balancer | None:
    """The balancer that `config.method` names, or None."""
    parts = config.method.split("+")
    if "debiaspl" in parts:
        return DebiasPL(
            info.num_classes,
            tau=config.debiaspl_tau,
            momentum=config.distribution_momentum,
            usb_ema=config.ema if config.usb_compat else None,
        )
    if "saw" in parts:
        return SAW(info.labeled_counts, steps=config.steps, epochs=config.epochs)
    return None
