"""Named configurations, each with the source of its hyper-parameters.

[BC] BaCon, [US] USB, [AB] ABC, [SC] SSC: their code. A row of methods.md A.1 is a preset, and --method takes any method
with it: what a method wants of its own, such as ReMixMatch mu=1, is its family's default (engine/config.py).
"""

from dataclasses import dataclass

from bacon_fast.engine.config import Config


@dataclass(frozen=True)
class Preset:
    """A configuration and the line that --help shows for it."""

    config: Config
    help: str


def _bacon(name: str, dataset: str, protocol: str, **changes) -> Config:
    """[BC]: B=64, mu=2, 300,000 steps in 1000 epochs, SGD 0.03 constant, weight decay 5e-4, WRN-28-2, EMA 0.999."""
    return Config(preset=name, dataset=dataset, protocol=protocol, **changes)


def _usb(name: str, dataset: str, protocol: str, **changes) -> Config:
    """[US] classic_cv_imb: as [BC], with 262,144 steps in 256 epochs."""
    values = {"steps": 262_144, "epochs": 256, "eval_every": 1024, "checkpoint_every": 1024} | changes
    return Config(preset=name, dataset=dataset, protocol=protocol, **values)


def _abc(name: str, dataset: str, protocol: str, **changes) -> Config:
    """[AB]'s optimizer and schedule: Adam 0.002, decay 0.02*lr a step, 500 x 500 steps, B=64, mu=1, averaged buffers.

    The augmentation and the single strong view are ours, so its numbers are not those of ABC's paper.
    """
    values = {
        "method": "fixmatch+abc",
        "steps": 250_000,
        "epochs": 500,
        "unlabeled_ratio": 1,
        "optimizer": "adam",
        "lr": 0.002,
        "weight_decay": 0.02,
        "ema_buffers": "average",
        "eval_every": 500,
    } | changes
    return Config(preset=name, dataset=dataset, protocol=protocol, **values)


def _digits() -> Config:
    """A run of minutes on two CPU cores: a small WRN, and averages as short as the run (no published source)."""
    return Config(
        preset="digits",
        dataset="digits",
        protocol="digits",
        backbone="wrn-10-1",
        steps=1500,
        batch_size=32,
        precision="auto",
        epochs=100,
        hflip=False,  # a mirrored digit is no digit
        bn_momentum=0.05,
        ema=0.99,
        distribution_momentum=0.99,
        contrast_start=0.25,
        crest_generations=2,  # six of 250 steps would each end before they have learned the rare classes
        eval_every=50,
        log_every=50,
        checkpoint_every=250,
    )


def _folder() -> Config:
    """A practitioner's own images: all of train/ labeled, everything (unlabeled/ too) unlabeled."""
    return Config(preset="folder", dataset="folder", protocol="as-is", image_size=32, steps=30_000, epochs=100)


def _ssc(dataset: str, labels: int, **changes) -> Config:
    """[SC]: B=64, mu=7, 512 x 1024 steps, SGD 0.03, weight decay 5e-4, EMA 0.999, two strong views (methods.md G.5).

    The rate falls with FixMatch's cosine, which methods.md does not settle; the authors used half precision
    (--precision), ours is fp32.
    """
    values = {
        "method": "ssc",
        "steps": 512 * 1024,
        "epochs": 512,
        "unlabeled_ratio": 7,
        "lr_schedule": "cosine",
        "ssc_reduction": "pml",
        "eval_every": 1024,
        "checkpoint_every": 1024,
    } | changes
    return Config(preset=f"ssc-{dataset}-{labels}", dataset=dataset, protocol=f"balanced-{dataset}-{labels}", **values)


def _ssc_rows() -> list[tuple[Config, str]]:
    """4 and 25 labels a class; weight decay 1e-3 on CIFAR-100, WRN-37-2 for STL-10's 96x96 pixels (methods.md G.5)."""
    datasets = {
        "cifar10": (10, {}),
        "cifar100": (100, {"weight_decay": 1e-3}),
        "stl10": (10, {"backbone": "wrn-37-2", "image_size": 96}),
        "svhn": (10, {}),
    }
    return [
        (_ssc(name, classes * n, **changes), f"SSC on balanced {name}, {n} labels a class [SC]")
        for name, (classes, changes) in datasets.items()
        for n in (4, 25)
    ]


def _sscl_cifar10() -> Config:
    """SsCL, table 8: B=64, mu=4, SGD 0.03 with a cosine, weight decay 5e-4, WRN-28-2, D=64, K_q=4096, 200 epochs.

    Not in the paper: that an epoch has 1,024 steps and the cosine 7/16 of a period (FixMatch's, which it starts from),
    and no Cutout after RandAugment. Other numbers of labels: --protocol balanced-cifar10-40 or -4000.
    """
    return Config(
        preset="sscl-cifar10",
        method="sscl",
        dataset="cifar10",
        protocol="balanced-cifar10-250",
        steps=200 * 1024,
        epochs=200,
        unlabeled_ratio=4,
        lr_schedule="cosine",
        cutout=False,
        eval_every=1024,
        checkpoint_every=1024,
    )


def _sscl_imagenet(name: str, protocol: str, lambda_con: float, lambda_u: float) -> Config:
    """SsCL, table 8 and section 4.2: 256 labeled and 1,024 unlabeled images a step over all processes, SGD 0.4 with a
    cosine, weight decay 1e-4, ResNet-50, K_q=65,536, 200 epochs of the 1,281,167 images; D=128 as in MoCo v2.

    The images are squares of 224 pixels, resized whole; the paper's are crops of larger images.
    """
    steps_per_epoch = 1_281_167 // 1024
    return Config(
        preset=name,
        method="sscl",
        dataset="folder",
        images="mapped",
        image_size=224,
        protocol=protocol,
        backbone="resnet50",
        bn_momentum=0.1,
        batch_size=256,
        unlabeled_ratio=4,
        steps=200 * steps_per_epoch,
        epochs=200,
        lr=0.4,
        weight_decay=1e-4,
        lr_schedule="cosine_to_zero",
        cutout=False,
        threshold=0.6,
        lambda_con=lambda_con,
        lambda_u=lambda_u,
        proj_dim=128,
        sscl_queue=65_536,
        sscl_gamma=10.0,
        eval_every=steps_per_epoch,
        checkpoint_every=steps_per_epoch,
    )


def _presets() -> dict[str, Preset]:
    rows = [
        (_digits(), "scikit-learn's digits, long-tailed; minutes on a CPU, no download (default)"),
        (_folder(), "your own image folder (--data-dir), as it is"),
        (_bacon("bacon-cifar10", "cifar10", "bacon-cifar10-100"), "CIFAR-10-LT, N1=1000, M1=4000, gamma 100 [BC]"),
        (_bacon("bacon-cifar10-150", "cifar10", "bacon-cifar10-150"), "the same, gamma 150 [BC]"),
        (
            _bacon("bacon-cifar10-inverse", "cifar10", "bacon-cifar10-100-inverse"),
            "the same, unlabeled set reversed [BC]",
        ),
        (
            _bacon("bacon-cifar10-150-inverse", "cifar10", "bacon-cifar10-150-inverse"),
            "gamma 150, unlabeled set reversed [BC]",
        ),
        (_bacon("bacon-cifar100", "cifar100", "bacon-cifar100-20"), "CIFAR-100-LT, N1=200, M1=300, gamma 20 [BC]"),
        (_bacon("bacon-stl10", "stl10", "bacon-stl10-10"), "STL-10 at 32x32, N1=150, gamma 10, U unknown [BC]"),
        (_bacon("bacon-stl10-20", "stl10", "bacon-stl10-20"), "the same, gamma 20 [US]"),
        (_bacon("bacon-stl10-450", "stl10", "bacon-stl10-450-10"), "the same, N1=450, gamma 10"),
        (_bacon("bacon-svhn", "svhn", "bacon-svhn-100"), "SVHN-LT (train + extra), N1=1000, M1=4000, gamma 100 [BC]"),
        (_usb("usb-cifar10", "cifar10", "usb-cifar10-1500-100"), "CIFAR-10-LT, N1=1500, M1=3000, gamma 100 [US]"),
        (_usb("usb-cifar10-150", "cifar10", "usb-cifar10-1500-150"), "the same, gamma 150 [US]"),
        (
            _usb("usb-cifar10-inverse", "cifar10", "usb-cifar10-1500-100-inverse"),
            "the same, unlabeled set reversed [US]",
        ),
        (_usb("usb-cifar10-500", "cifar10", "usb-cifar10-500-100"), "CIFAR-10-LT, N1=500, M1=4000, gamma 100 [US]"),
        (_usb("usb-cifar100", "cifar100", "usb-cifar100-10"), "CIFAR-100-LT, N1=150, M1=300, gamma 10 [US]"),
        (_abc("abc-cifar10", "cifar10", "bacon-cifar10-100"), "CIFAR-10-LT with ABC's Adam recipe [AB]"),
        *_ssc_rows(),
        (_sscl_cifar10(), "SsCL on balanced CIFAR-10, 250 labels of 50,000 images (arXiv 2105.07387)"),
        (
            _sscl_imagenet("sscl-imagenet-1pct", "imagenet-1pct", lambda_con=10.0, lambda_u=5.0),
            "SsCL on your ImageNet folder (--data-dir), 1 % of the labels",
        ),
        (
            _sscl_imagenet("sscl-imagenet-10pct", "imagenet-10pct", lambda_con=5.0, lambda_u=10.0),
            "SsCL on your ImageNet folder (--data-dir), 10 % of the labels",
        ),
    ]
    return {config.preset: Preset(config, text) for config, text in rows}


PRESETS: dict[str, Preset] = _presets()
"""Presets by name, as `python train.py NAME` takes them."""
