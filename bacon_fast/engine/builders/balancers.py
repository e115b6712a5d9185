"""The class balancers that act on pseudo-labels, shared by the families they can be added to."""

from bacon_fast.engine.builders.info import DataInfo
from bacon_fast.engine.config import Config
from bacon_fast.methods.balancers.base import Balancer
from bacon_fast.methods.balancers.cossl import CoSSL
from bacon_fast.methods.balancers.crest import CReST
from bacon_fast.methods.balancers.darp import DARP
from bacon_fast.methods.balancers.daso import DASO
from bacon_fast.methods.balancers.debiaspl import DebiasPL
from bacon_fast.methods.balancers.saw import SAW


def build_balancer(config: Config, num_features: int, info: DataInfo) -> Balancer | None:
    """The balancer that `config.method` names, for features of width `num_features`; None where it names none."""
    parts = config.method.split("+")
    if "cossl" in parts:
        return CoSSL(
            info.labeled_counts,
            start=round(config.cossl_start * config.steps),
            lambda_0=config.cossl_lambda,
            seed=config.seed,
            usb_compat=config.usb_compat,
        )
    if "crest" in parts:
        return CReST(
            info.labeled_counts,
            steps=config.steps,
            generations=config.crest_generations,
            alpha=config.crest_alpha,
            t_min=config.crest_t_min if "pda" in parts else None,
            momentum=config.distribution_momentum,
            usb_compat=config.usb_compat,
        )
    if "darp" in parts:
        return DARP(info.labeled_counts, info.num_unlabeled, start=round(config.darp_start * config.steps))
    if "daso" in parts:
        return DASO(
            info.num_classes,
            num_features,
            start=round(config.daso_start * config.steps),
            t_dist=config.daso_t_dist,
            usb_rows=config.unlabeled_ratio * config.batch_size if config.usb_compat else None,
        )
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
