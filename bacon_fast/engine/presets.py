"""Named configurations, each with the source of its hyper-parameters.

[BC] BaCon, [US] USB, [AB] ABC, [SC] SSC, [SP] SimPro, [CD] CDMAD, [CP] CPG: their code. A row of methods.md A.1 is a
preset, and --method takes any method with it: what a method wants of its own, such as ReMixMatch mu=1, is a default of
its parts.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

from bacon_fast.engine.config import STEPS, Config
from bacon_fast.methods import PARTS, parts_of

Overrides = Mapping[str, object]


@dataclass(frozen=True)
class Preset:
    """What a preset changes in the defaults, {group or part: {field: value}}, and the line that --help shows for it.

    Overrides of a part, such as {"bacon": {"contrast_start": 0.25}}, act when the method has it.
    """

    name: str
    help: str
    method: str = "fixmatch+abc+bacon"
    steps: int = STEPS
    overrides: Overrides = field(default_factory=dict, hash=False)

    def config(self, method: str | None = None) -> Config:
        """The configuration, for the preset's own method or another.

        A base learner that takes only one mu overrides the preset's.
        """
        method = method or self.method
        views = dict(self.overrides.get("views", {}))
        if PARTS[parts_of(method)[0]].options.unlabeled_ratio is not None:
            views.pop("unlabeled_ratio", None)
        return Config.of(method, {"preset": self.name, "steps": self.steps, **self.overrides, "views": views})


def _data(dataset: str, protocol: str, **more) -> Overrides:
    return {"data": {"dataset": dataset, "protocol": protocol, **more}}


def _bacon(name: str, dataset: str, protocol: str, text: str) -> Preset:
    """[BC]: B=64, mu=2, 300,000 steps in 1000 epochs, SGD 0.03 constant, weight decay 5e-4, WRN-28-2, EMA 0.999."""
    return Preset(name, text, overrides=_data(dataset, protocol))


def _usb(name: str, dataset: str, protocol: str, text: str) -> Preset:
    """[US] classic_cv_imb: as [BC], with 262,144 steps in 256 epochs."""
    log = {"eval_every": 1024, "checkpoint_every": 1024}
    overrides = {**_data(dataset, protocol), "shared": {"epochs": 256}, "log": log}
    return Preset(name, text, steps=262_144, overrides=overrides)


def _abc(name: str, dataset: str, protocol: str, text: str) -> Preset:
    """[AB]'s optimizer and schedule: Adam 0.002, decay 0.02*lr a step, 500 x 500 steps, B=64, mu=1, averaged buffers.

    The augmentation and the single strong view are ours, so its numbers are not those of ABC's paper.
    """
    overrides = {
        **_data(dataset, protocol),
        "views": {"unlabeled_ratio": 1},
        "optimizer": {"optimizer": "adam", "lr": 0.002, "weight_decay": 0.02, "ema_buffers": "average"},
        "shared": {"epochs": 500},
        "log": {"eval_every": 500},
    }
    return Preset(name, text, "fixmatch+abc", 250_000, overrides)


def _digits() -> Preset:
    """A run of minutes on two CPU cores: a small WRN, and averages as short as the run (no published source)."""
    overrides = {
        **_data("digits", "digits"),
        "views": {"batch_size": 32, "hflip": False},  # a mirrored digit is no digit
        "model": {"backbone": "wrn-10-1", "bn_momentum": 0.05},
        "optimizer": {"ema": 0.99},
        "shared": {"epochs": 100, "distribution_momentum": 0.99},
        "engine": {"precision": "auto"},
        "log": {"eval_every": 50, "log_every": 50, "checkpoint_every": 250},
        "bacon": {"contrast_start": 0.25},
        "crest": {"generations": 2},  # six of 250 steps would each end before they have learned the rare classes
    }
    text = "scikit-learn's digits, long-tailed; minutes on a CPU, no download (default)"
    return Preset("digits", text, steps=1500, overrides=overrides)


def _cpu_cifar10() -> Preset:
    """BaCon's CIFAR-10 protocol in a setting that two CPU cores can afford (no published source).

    The network, the batch and the run are all smaller than [BC]'s, and the averages are as short as the run: compare
    its numbers with each other only.
    """
    overrides = {
        **_data("cifar10", "bacon-cifar10-100"),
        "views": {"batch_size": 32},
        "model": {"backbone": "wrn-10-1", "bn_momentum": 0.01},
        "optimizer": {"ema": 0.995},
        "shared": {"epochs": 100, "distribution_momentum": 0.99},
        "engine": {"precision": "auto"},
        "log": {"eval_every": 250, "checkpoint_every": 1000},
    }
    text = "a reduced CIFAR-10-LT for a CPU: WRN-10-1, 5,000 steps, N1=1000, M1=4000, gamma 100"
    return Preset("cpu-cifar10", text, steps=5000, overrides=overrides)


def _folder() -> Preset:
    """A practitioner's own images: all of train/ labeled, everything (unlabeled/ too) unlabeled.

    Averages as short as a first trial: BatchNorm's statistics are those of the last hundred steps or so, where [BC]'s
    0.001 needs thousands, and the network's average starts short.
    """
    overrides = {
        **_data("folder", "as-is", image_size=32),
        "model": {"bn_momentum": 0.01},
        "optimizer": {"ema_warmup": True},
        "shared": {"epochs": 100},
    }
    return Preset("folder", "your own image folder (--data-dir), as it is", steps=30_000, overrides=overrides)


def _photos() -> Preset:
    """A practitioner's own photos: LoRA of rank 4 on a pretrained DINOv2 ViT-B/14, in the recipe of V-PET's code
    ("Revisiting semi-supervised learning in the era of foundation models", arXiv 2503.09707).

    From there: backbone, LoRA, AdamW without layer decay, B=32, mu=1, 3,420 steps, a warm-up of 2.5 % and USB's weight
    decay 5e-4 and cosine. There the rate is searched from 1e-3 to 1e-5; 1e-4 is its middle. Not there: LoRA on proj
    beside qkv, ABC, validation images, and the average of 0.99, which nobody has measured. Views as USB has them for
    photos (augmentation.md). A quarter of the work: --backbone timm/vit_small_patch14_dinov2.lvd142m.
    """
    overrides = {
        **_data("folder", "as-is", image_size=224, validation=None),
        "views": {"batch_size": 32, "unlabeled_ratio": 1, "stored_size": 256, "strong_crop": "resized"},
        "model": {"backbone": "timm/vit_base_patch14_dinov2.lvd142m", "weights": "pretrained", "train": "lora"},
        "optimizer": {
            "optimizer": "adamw",
            "lr": 1e-4,
            "lr_schedule": "cosine",
            "warmup": 0.025,
            "ema": 0.99,
            "ema_warmup": True,
        },
        "shared": {"epochs": 100, "distribution_momentum": 0.99},
        "engine": {"precision": "auto"},
        "log": {"eval_every": 342, "log_every": 38, "checkpoint_every": 342},
    }
    text = "your own photos (--data-dir): LoRA on pretrained DINOv2, 224 pixels; needs the extra timm"
    return Preset("photos", text, "fixmatch+abc", 3420, overrides)


def _photos_cached() -> Preset:
    """Heads on the features of a frozen DINOv2 ViT-S/14, each image in 2 weak and 2 strong views that are made once.

    The sizes are those of `_photos`, the batch is the one of USB's images of 32 pixels. The rate is ours: nobody has
    searched it.
    """
    photos = _photos().overrides
    model = {"backbone": "timm/vit_small_patch14_dinov2.lvd142m", "weights": "pretrained", "train": "head"}
    overrides = {
        **photos,
        "views": {**photos["views"], "batch_size": 64, "unlabeled_ratio": 2, "cached_views": 2},
        "model": model,
        "optimizer": {**photos["optimizer"], "lr": 1e-3},
    }
    text = "your own photos (--data-dir): heads on cached features of a frozen DINOv2; needs the extra timm"
    return Preset("photos-cached", text, "fixmatch+abc", 3420, overrides)


def _ssc(dataset: str, classes: int, labels: int) -> Preset:
    """[SC]: B=64, mu=7, 512 x 1024 steps, SGD 0.03, weight decay 5e-4, EMA 0.999, two strong views (methods.md G.5).

    Weight decay 1e-3 on CIFAR-100, WRN-37-2 for STL-10's 96x96 pixels. The rate falls with FixMatch's cosine, which
    methods.md does not settle; the authors used half precision (--precision), ours is fp32.
    """
    stl10, decay = dataset == "stl10", {"weight_decay": 1e-3} if dataset == "cifar100" else {}
    overrides = {
        **_data(dataset, f"balanced-{dataset}-{classes * labels}", **{"image_size": 96} if stl10 else {}),
        "views": {"unlabeled_ratio": 7},
        "model": {"backbone": "wrn-37-2"} if stl10 else {},
        "optimizer": {"lr_schedule": "cosine", **decay},
        "shared": {"epochs": 512},
        "log": {"eval_every": 1024, "checkpoint_every": 1024},
        "ssc": {"reduction": "pml"},
    }
    text = f"SSC on balanced {dataset}, {labels} labels a class [SC]"
    return Preset(f"ssc-{dataset}-{classes * labels}", text, "ssc", 512 * 1024, overrides)


def _sscl_cifar10() -> Preset:
    """SsCL, table 8: B=64, mu=4, SGD 0.03 with a cosine, weight decay 5e-4, WRN-28-2, D=64, K_q=4096, 200 epochs.

    Not in the paper: that an epoch has 1,024 steps and the cosine 7/16 of a period (FixMatch's, which it starts from),
    and no Cutout after RandAugment. Other numbers of labels: --protocol balanced-cifar10-40 or -4000.
    """
    overrides = {
        **_data("cifar10", "balanced-cifar10-250"),
        "views": {"unlabeled_ratio": 4, "cutout": False},
        "optimizer": {"lr_schedule": "cosine"},
        "shared": {"epochs": 200},
        "log": {"eval_every": 1024, "checkpoint_every": 1024},
    }
    text = "SsCL on balanced CIFAR-10, 250 labels of 50,000 images (arXiv 2105.07387)"
    return Preset("sscl-cifar10", text, "sscl", 200 * 1024, overrides)


def _sscl_imagenet(percent: int, lambda_con: float, lambda_u: float) -> Preset:
    """SsCL, table 8 and section 4.2: 256 labeled and 1,024 unlabeled images a step over all processes, SGD 0.4 with a
    cosine, weight decay 1e-4, ResNet-50, K_q=65,536, 200 epochs of the 1,281,167 images; D=128 as in MoCo v2.

    The images are squares of 224 pixels, resized whole; the paper's are crops of larger images.
    """
    steps_per_epoch = 1_281_167 // 1024
    overrides = {
        **_data("folder", f"imagenet-{percent}pct", images="mapped", image_size=224),
        "views": {"batch_size": 256, "unlabeled_ratio": 4, "cutout": False},
        "model": {"backbone": "resnet50", "bn_momentum": 0.1},
        "optimizer": {"lr": 0.4, "weight_decay": 1e-4, "lr_schedule": "cosine_to_zero"},
        "shared": {"epochs": 200, "threshold": 0.6},
        "log": {"eval_every": steps_per_epoch, "checkpoint_every": steps_per_epoch},
        "sscl": {"lambda_con": lambda_con, "lambda_u": lambda_u, "proj_dim": 128, "queue": 65_536, "gamma": 10.0},
        # The same weights and width for what is compared with it.
        "fixmatch": {"lambda_u": lambda_u},
        "bacon": {"lambda_con": lambda_con, "proj_dim": 128},
    }
    text = f"SsCL on your ImageNet folder (--data-dir), {percent} % of the labels"
    return Preset(f"sscl-imagenet-{percent}pct", text, "sscl", 200 * steps_per_epoch, overrides)


def _simpro(dataset: str, protocol: str, text: str, tau: float = 2.0, threshold: float = 0.95, mu: int = 8) -> Preset:
    """[SP], newer_methods.md N.1: B=64, mu=8 (STL-10 16), 86 epochs of 500 steps, SGD 0.17 with FixMatch's cosine,
    weight decay 5e-4, EMA 0.999, USB's WRN-28-2.

    Not there: the authors' strong view, of which each of 2 operations acts with probability 1/2 at one of 9 strengths,
    and Cutout of 16 pixels (ours are 2 operations of methods.md 0.3); CIFAR's own mean and deviation; a stem without
    bias; images in the dataset's order. The other unlabeled sets: --protocol simpro-cifar10-100-middle, and so on.
    """
    overrides = {
        **_data(dataset, protocol),
        "views": {"unlabeled_ratio": mu, "randaugment_ops": 2},
        "model": {"backbone": "wrn-28-2-usb"},
        "optimizer": {"lr": 0.17, "lr_schedule": "cosine"},
        "shared": {"epochs": 86},
        "log": {"eval_every": 500, "checkpoint_every": 500},
        "simpro": {"tau": tau, "threshold": threshold},
    }
    return Preset(f"simpro-{dataset}", text, "fixmatch+simpro", 86 * 500, overrides)


def _cdmad(name: str, dataset: str, protocol: str, text: str, weight_decay: float) -> Preset:
    """[CD], newer_methods.md N.2: B=32, mu=2, 500 x 500 steps, Adam 0.0015, decay of all parameters by
    weight_decay*lr a step, EMA 0.999 with averaged BatchNorm statistics.

    BatchNorm: their four passes of a step move the statistics by 0.1 each, our one by as much as all four. Not there:
    their RandAugment of 3 among 16 operations before the crop (ours are 3 of methods.md 0.3, behind it), their Cutout
    of 16x16 zeros, zeros around the image at the crop (ours are its reflection), CIFAR's own mean and deviation (so
    that their image of ones has another color), a decay that takes in the statistics and comes behind the EMA, the
    shortcuts of their WRN, images in the dataset's order.
    """
    overrides = {
        **_data(dataset, protocol),
        "views": {"batch_size": 32},
        "model": {"bn_momentum": 1 - 0.9**4},
        "optimizer": {"optimizer": "adam", "lr": 0.0015, "weight_decay": weight_decay, "ema_buffers": "average"},
        "shared": {"epochs": 500},
        "log": {"eval_every": 500, "checkpoint_every": 500},
        "simpro": {"tau": 1.0, "threshold": 0.2} if dataset == "cifar100" else {},  # [SP]'s
    }
    return Preset(name, text, "fixmatch+cdmad", 500 * 500, overrides)


def _cdmad_remixmatch(name: str, dataset: str, protocol: str, text: str, weight_decay: float) -> Preset:
    """[CD] with ReMixMatch, newer_methods.md L: B=64, 300 x 500 steps, Adam 0.002; the rest as in `_cdmad`.

    Not there, beside what is missing in that: mu=2, strong labeled views in MixUp, a loss of the weak labeled rows as
    they are, an alignment by the last 128 batches that starts again each epoch.
    """
    base = _cdmad(name, dataset, protocol, text, weight_decay)
    overrides = {
        **base.overrides,
        "views": {"batch_size": 64},
        "model": {"bn_momentum": 1 - 0.9**11},
        "optimizer": {**base.overrides["optimizer"], "lr": 0.002},
        "shared": {"epochs": 300, "distribution_momentum": 0.99},
        "remixmatch": {"lambda_u": 2.0, "lambda_kl": 0.5, "lambda_rot": 1.0},
    }
    return Preset(name, text, "remixmatch+cdmad", 300 * 500, overrides)


def _cpg_cifar10() -> Preset:
    """[CP], newer_methods.md N.3: B=64, mu=7, 262,144 steps, SGD 0.03 with a cosine. Its method is not here, its
    unlabeled sets are: --protocol cpg-cifar10-100-inverse, and so on.
    """
    overrides = {
        **_data("cifar10", "cpg-cifar10-100-random"),
        "views": {"unlabeled_ratio": 7},
        "optimizer": {"lr_schedule": "cosine"},
        "shared": {"epochs": 256},
        "log": {"eval_every": 1024, "checkpoint_every": 1024},
    }
    text = "CIFAR-10-LT, N1=400, M1=4600, gamma 100, U in a random order [CP]"
    return Preset("cpg-cifar10", text, "fixmatch+simpro", 262_144, overrides)


def _presets() -> dict[str, Preset]:
    rows = [
        _digits(),
        _cpu_cifar10(),
        _folder(),
        _photos(),
        _photos_cached(),
        _bacon("bacon-cifar10", "cifar10", "bacon-cifar10-100", "CIFAR-10-LT, N1=1000, M1=4000, gamma 100 [BC]"),
        _bacon("bacon-cifar10-150", "cifar10", "bacon-cifar10-150", "the same, gamma 150 [BC]"),
        _bacon(
            "bacon-cifar10-inverse", "cifar10", "bacon-cifar10-100-inverse", "the same, unlabeled set reversed [BC]"
        ),
        _bacon(
            "bacon-cifar10-150-inverse",
            "cifar10",
            "bacon-cifar10-150-inverse",
            "gamma 150, unlabeled set reversed [BC]",
        ),
        _bacon("bacon-cifar100", "cifar100", "bacon-cifar100-20", "CIFAR-100-LT, N1=200, M1=300, gamma 20 [BC]"),
        _bacon("bacon-stl10", "stl10", "bacon-stl10-10", "STL-10 at 32x32, N1=150, gamma 10, U unknown [BC]"),
        _bacon("bacon-stl10-20", "stl10", "bacon-stl10-20", "the same, gamma 20 [US]"),
        _bacon("bacon-stl10-450", "stl10", "bacon-stl10-450-10", "the same, N1=450, gamma 10"),
        _bacon("bacon-svhn", "svhn", "bacon-svhn-100", "SVHN-LT (train + extra), N1=1000, M1=4000, gamma 100 [BC]"),
        _usb("usb-cifar10", "cifar10", "usb-cifar10-1500-100", "CIFAR-10-LT, N1=1500, M1=3000, gamma 100 [US]"),
        _usb("usb-cifar10-150", "cifar10", "usb-cifar10-1500-150", "the same, gamma 150 [US]"),
        _usb("usb-cifar10-inverse", "cifar10", "usb-cifar10-1500-100-inverse", "the same, unlabeled set reversed [US]"),
        _usb("usb-cifar10-500", "cifar10", "usb-cifar10-500-100", "CIFAR-10-LT, N1=500, M1=4000, gamma 100 [US]"),
        _usb("usb-cifar100", "cifar100", "usb-cifar100-10", "CIFAR-100-LT, N1=150, M1=300, gamma 10 [US]"),
        _abc("abc-cifar10", "cifar10", "bacon-cifar10-100", "CIFAR-10-LT with ABC's Adam recipe [AB]"),
        *(
            _ssc(dataset, classes, labels)
            for dataset, classes in (("cifar10", 10), ("cifar100", 100), ("stl10", 10), ("svhn", 10))
            for labels in (4, 25)
        ),
        _sscl_cifar10(),
        _sscl_imagenet(1, lambda_con=10.0, lambda_u=5.0),
        _sscl_imagenet(10, lambda_con=5.0, lambda_u=10.0),
        _simpro("cifar10", "simpro-cifar10-100", "SimPro on CIFAR-10-LT, N1=500, M1=4000, gamma 100 [SP]"),
        _simpro("cifar100", "simpro-cifar100-20", "SimPro on CIFAR-100-LT, N1=50, M1=400, gamma 20 [SP]", 1.0, 0.2),
        _simpro("stl10", "simpro-stl10-10", "SimPro on STL-10 at 32x32, N1=450, gamma 10, U unknown [SP]", mu=16),
        _cdmad("cdmad-cifar10", "cifar10", "cossl-cifar10-100", "CDMAD, N1=1500, M1=3000, gamma 100 [CD]", 0.04),
        _cdmad("cdmad-cifar100", "cifar100", "cossl-cifar100-20", "CDMAD, N1=150, M1=300, gamma 20 [CD]", 0.08),
        _cdmad("cdmad-stl10", "stl10", "cdmad-stl10-10", "CDMAD on STL-10 at 32x32, N1=450, gamma 10 [CD]", 0.01),
        _cdmad_remixmatch(
            "cdmad-remixmatch-cifar10", "cifar10", "usb-cifar10-1500-100", "CDMAD on ReMixMatch, gamma 100 [CD]", 0.04
        ),
        _cdmad_remixmatch(
            "cdmad-remixmatch-cifar100",
            "cifar100",
            "cdmad-disjoint-cifar100-20",
            "CDMAD on ReMixMatch, gamma 20 [CD]",
            0.08,
        ),
        _cpg_cifar10(),
    ]
    return {preset.name: preset for preset in rows}


PRESETS: dict[str, Preset] = _presets()
"""Presets by name, as `bacon-fast train NAME` takes them."""
