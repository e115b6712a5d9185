"""Presets: their splits against the lists of methods.md A.1, their hyper-parameters, and any method on any row."""

from pathlib import Path

import pytest
import torch

from bacon_fast.cli import parse
from bacon_fast.data.datasets import ImageDataset
from bacon_fast.engine.build import build_method, build_split
from bacon_fast.engine.config import GROUPS, Config
from bacon_fast.engine.presets import PRESETS
from bacon_fast.methods import METHODS, PARTS
from bacon_fast.methods.method import Method
from bacon_fast.methods.part import DataInfo

# Images per class of the train parts; SVHN: train, then extra.
SVHN_TRAIN = (4948, 13861, 10585, 8497, 7458, 6882, 5727, 5595, 5045, 4659)
SVHN_EXTRA = (45550, 90560, 74740, 60765, 50633, 53490, 41582, 43997, 35358, 34456)
TRAIN_COUNTS = {
    "cifar10": [5000] * 10,
    "cifar100": [500] * 100,
    "stl10": [500] * 10,
    "svhn": [a + b for a, b in zip(SVHN_TRAIN, SVHN_EXTRA)],
}
UNLABELED = {"stl10": 100_000}

L1000 = [1000, 599, 359, 215, 129, 77, 46, 27, 16, 10]
U4000 = [4000, 2397, 1437, 861, 516, 309, 185, 111, 66, 40]
L1000_150 = [1000, 573, 328, 188, 107, 61, 35, 20, 11, 6]
U4000_150 = [4000, 2292, 1313, 752, 431, 247, 141, 81, 46, 26]
L1500 = [1500, 899, 539, 323, 193, 116, 69, 41, 25, 15]
U3000 = [3000, 1798, 1078, 646, 387, 232, 139, 83, 50, 30]
STL10 = 105_000  # the official unlabeled images and all train images
# The table of methods.md A.1: labeled list and sum; unlabeled list and sum, or the sum alone where the list is unknown.
TABLE = {
    "bacon-cifar10": (L1000, 2478, U4000, 9922),
    "bacon-cifar10-150": (L1000_150, 2329, U4000_150, 9329),
    "bacon-cifar10-inverse": (L1000, 2478, U4000[::-1], 9922),
    "bacon-cifar10-150-inverse": (L1000_150, 2329, U4000_150[::-1], 9329),
    "bacon-stl10": ([150, 116, 89, 69, 53, 41, 32, 25, 19, 15], 609, None, STL10),
    "bacon-stl10-20": ([150, 107, 77, 55, 39, 28, 20, 14, 10, 7], 507, None, STL10),
    "bacon-stl10-450": ([450, 348, 269, 208, 161, 125, 96, 75, 58, 45], 1835, None, STL10),
    "bacon-svhn": (L1000, 2478, U4000, 9922),
    "usb-cifar10": (L1500, 3720, U3000, 7443),
    "usb-cifar10-500": ([500, 299, 179, 107, 64, 38, 23, 13, 8, 5], 1236, U4000, 9922),
}


def fake(name: str) -> ImageDataset:
    """The labels of a dataset, on images of one pixel."""
    labels = torch.repeat_interleave(torch.arange(len(TRAIN_COUNTS[name])), torch.tensor(TRAIN_COUNTS[name]))
    pixel = torch.zeros(1, 1, 1, 3, dtype=torch.uint8)
    return ImageDataset(
        name=name,
        train_images=pixel.expand(len(labels), 1, 1, 3),
        train_labels=labels,
        test_images=pixel,
        test_labels=torch.zeros(1, dtype=torch.int64),
        unlabeled_images=pixel.expand(UNLABELED[name], 1, 1, 3) if name in UNLABELED else None,
        class_names=tuple(map(str, range(len(TRAIN_COUNTS[name])))),
        mean=(0.0, 0.0, 0.0),
        std=(1.0, 1.0, 1.0),
    )


@pytest.mark.parametrize("preset", TABLE)
def test_the_split_of_every_row_has_the_documented_counts(preset):
    config = PRESETS[preset].config()
    dataset = fake(config.data.dataset)
    split = build_split(config, dataset, None)
    labeled, labeled_sum, unlabeled, unlabeled_sum = TABLE[preset]
    found = torch.bincount(dataset.train_labels[torch.as_tensor(split.labeled)], minlength=10).tolist()
    assert found == labeled == list(split.labeled_counts) and sum(found) == labeled_sum
    assert len(split.unlabeled) == len(set(split.unlabeled.tolist())) == unlabeled_sum
    if unlabeled is None:
        assert split.unlabeled_counts is None
        return
    found = torch.bincount(dataset.train_labels[torch.as_tensor(split.unlabeled)], minlength=10).tolist()
    assert found == unlabeled == list(split.unlabeled_counts)
    assert not set(split.labeled.tolist()) & set(split.unlabeled.tolist())


def test_cifar100_has_the_documented_counts():
    split = build_split(PRESETS["bacon-cifar100"].config(), fake("cifar100"), None)
    assert split.labeled_counts[:6] == (200, 194, 188, 182, 177, 171)
    assert split.labeled_counts[-5:] == (11, 10, 10, 10, 10) and sum(split.labeled_counts) == 6333
    assert split.unlabeled_counts[:6] == (300, 291, 282, 273, 265, 257)
    assert split.unlabeled_counts[-3:] == (15, 15, 15) and sum(split.unlabeled_counts) == 9527


@pytest.mark.parametrize("dataset, classes", [("cifar10", 10), ("cifar100", 100), ("stl10", 10), ("svhn", 10)])
@pytest.mark.parametrize("per_class", [4, 25])
def test_ssc_s_presets(dataset, classes, per_class):
    """methods.md G.5, and the balanced split: so many labels a class, every image unlabeled."""
    config = PRESETS[f"ssc-{dataset}-{classes * per_class}"].config()
    assert (config.method, config.parts["ssc"].reduction, config.optimizer.lr_schedule) == ("ssc", "pml", "cosine")
    assert (config.views.batch_size, config.views.unlabeled_ratio, config.steps) == (64, 7, 524_288)
    assert (config.optimizer.lr, config.optimizer.ema, config.shared.threshold) == (0.03, 0.999, 0.95)
    assert config.optimizer.weight_decay == (1e-3 if dataset == "cifar100" else 5e-4)
    ssc = config.parts["ssc"]
    assert (ssc.temperature, ssc.pl_temperature) == (0.1, 0.08)
    assert (ssc.lambda_proto, ssc.lambda_up, ssc.lambda_down) == (1, 1, 0.2)
    expected = ("wrn-37-2", 96) if dataset == "stl10" else ("wrn-28-2", None)
    assert (config.model.backbone, config.data.image_size) == expected
    images = fake(dataset)
    split = build_split(config, images, None)
    assert split.labeled_counts == (per_class,) * classes
    assert len(split.unlabeled) == images.pool_size


@pytest.mark.parametrize(
    ("preset", "lambdas", "queue", "threshold", "gamma", "recipe"),
    [
        ("sscl-cifar10", (1, 1), 4096, 0.95, 5, ("wrn-28-2", 64, 0.03, 5e-4, "cosine", 64)),
        ("sscl-imagenet-1pct", (10, 5), 65_536, 0.6, 10, ("resnet50", 128, 0.4, 1e-4, "cosine_to_zero", 256)),
        ("sscl-imagenet-10pct", (5, 10), 65_536, 0.6, 10, ("resnet50", 128, 0.4, 1e-4, "cosine_to_zero", 256)),
    ],
)
def test_sscl_s_presets(preset, lambdas, queue, threshold, gamma, recipe):
    """methods.md F.5; D=128 on ImageNet is MoCo v2's."""
    config = PRESETS[preset].config()
    sscl, optimizer = config.parts["sscl"], config.optimizer
    assert (sscl.lambda_con, sscl.lambda_u) == lambdas
    assert (sscl.queue, config.shared.threshold, sscl.gamma) == (queue, threshold, gamma)
    found = config.model.backbone, sscl.proj_dim, optimizer.lr, optimizer.weight_decay, optimizer.lr_schedule
    assert (*found, config.views.batch_size) == recipe
    assert (config.method, config.views.unlabeled_ratio, sscl.margin, sscl.form) == ("sscl", 4, -0.25, "prod")
    assert (config.shared.epochs, sscl.refresh_epochs, optimizer.optimizer) == (200, 5, "sgd")


def recipe(config: Config) -> tuple:
    optimizer = config.optimizer
    update = optimizer.optimizer, optimizer.lr, optimizer.weight_decay, optimizer.lr_schedule
    return *update, optimizer.ema, optimizer.ema_buffers


def built(config: Config, num_labeled: int = 1000, num_unlabeled: int = 10_000) -> Method:
    classes = 100 if config.data.dataset == "cifar100" else 10
    sizes = num_labeled, num_unlabeled
    return build_method(config, DataInfo(classes, torch.ones(classes), *sizes, (0,) * 3, (1,) * 3, same_imbalance=True))


@pytest.mark.parametrize(
    ("dataset", "protocol", "mu", "tau", "threshold", "sizes", "s"),
    [
        ("cifar10", "simpro-cifar10-100", 8, 2, 0.95, (1236, 9922), 1),
        ("cifar100", "simpro-cifar100-20", 8, 1, 0.2, (1545, 12_719), 1),
        ("stl10", "simpro-stl10-10", 16, 2, 0.95, (1835, 100_000), 97 / 28),
    ],
)
def test_simpros_presets(dataset, protocol, mu, tau, threshold, sizes, s):
    """newer_methods.md K and N.1, with the weight that follows."""
    config = PRESETS[f"simpro-{dataset}"].config()
    views, simpro = config.views, config.parts["simpro"]
    assert (config.method, config.data.dataset, config.data.protocol) == ("fixmatch+simpro", dataset, protocol)
    assert (config.steps, simpro.estimates, config.log.eval_every) == (43_000, 86, 500)
    assert (views.batch_size, views.unlabeled_ratio, views.randaugment_ops) == (64, mu, 2)
    assert recipe(config) == ("sgd", 0.17, 5e-4, "cosine", 0.999, "copy")
    assert (config.model.backbone, config.model.bn_momentum) == ("wrn-28-2-usb", None)
    assert (simpro.threshold, config.parts["fixmatch"].lambda_u) == (threshold, 1)
    assert (simpro.tau, simpro.momentum, simpro.strong_views, simpro.labeled_strong) == (tau, 0.9, 2, True)
    weights = built(config, *sizes).balancer.labeled_weights.tolist()
    assert weights == pytest.approx([1 / s] * len(weights), rel=1e-6)


@pytest.mark.parametrize(
    ("preset", "protocol", "weight_decay"),
    [
        ("cdmad-cifar10", "cossl-cifar10-100", 0.04),
        ("cdmad-cifar100", "cossl-cifar100-20", 0.08),
        ("cdmad-stl10", "cdmad-stl10-10", 0.01),
        ("cdmad-remixmatch-cifar10", "usb-cifar10-1500-100", 0.04),
        ("cdmad-remixmatch-cifar100", "cdmad-disjoint-cifar100-20", 0.08),
    ],
)
def test_cdmads_presets(preset, protocol, weight_decay):
    """newer_methods.md L and N.2; BatchNorm's momentum is that of the authors' passes in a step together."""
    config = PRESETS[preset].config()
    base = "remixmatch" if "remixmatch" in preset else "fixmatch"
    epochs, batch_size, mu, lr, passes = (300, 64, 1, 0.002, 11) if base == "remixmatch" else (500, 32, 2, 0.0015, 4)
    assert (config.method, config.data.dataset) == (f"{base}+cdmad", preset.split("-")[-1])
    assert config.data.protocol == protocol
    assert (config.steps, config.shared.epochs, config.log.eval_every) == (epochs * 500, epochs, 500)
    assert (config.views.batch_size, config.views.unlabeled_ratio, config.views.randaugment_ops) == (batch_size, mu, 3)
    assert recipe(config) == ("adam", lr, weight_decay, "constant", 0.999, "average")
    assert (config.model.backbone, config.model.bn_momentum) == ("wrn-28-2", 1 - 0.9**passes)
    cdmad, part = config.parts["cdmad"], config.parts[base]
    assert (cdmad.threshold, cdmad.image, cdmad.authors_statistics) == (0, "ones", False)
    if base == "remixmatch":
        assert (part.lambda_u, part.lambda_kl, part.lambda_rot, part.rampup, part.sharpening) == (2, 0.5, 1, 1, 1)
    method = built(config)
    assert not method.balancer.aligns
    assert [method.phase(t).balancer for t in (50_499, 50_500)] == [False, True]


def test_cpgs_preset():
    """newer_methods.md N.3, with the unlabeled list of seed 0."""
    config = PRESETS["cpg-cifar10"].config()
    assert (config.method, config.steps, config.parts["simpro"].estimates) == ("fixmatch+simpro", 262_144, 86)
    assert (config.log.eval_every, config.log.checkpoint_every) == (1024, 1024)
    assert (config.data.dataset, config.data.protocol) == ("cifar10", "cpg-cifar10-100-random")
    assert (config.views.batch_size, config.views.unlabeled_ratio) == (64, 7)
    assert recipe(config) == ("sgd", 0.03, 5e-4, "cosine", 0.999, "copy")
    assert (config.model.backbone, config.parts["simpro"].threshold) == ("wrn-28-2", 0.95)
    split = build_split(config, fake("cifar10"), None)
    assert split.labeled_counts == (400, 239, 143, 86, 51, 30, 18, 11, 6, 4)
    assert split.unlabeled_counts == (127, 76, 2757, 356, 991, 594, 1653, 4600, 46, 213)


@pytest.mark.parametrize("preset", [*TABLE, "bacon-cifar100"])
def test_every_row_takes_every_method_by_its_name(preset):
    steps = 300_000 if preset.startswith("bacon") else 262_144
    for method in METHODS:
        config = parse([preset, "--method", method, "--run-dir", "run"])
        assert (config.preset, config.method, config.steps) == (preset, method, steps)
        mu, start, lambda_u = (1, 1 / 30, 1.5) if method.startswith("remixmatch") else (2, 0.5, 1.0)
        assert config.views.unlabeled_ratio == mu
        assert config.flat().get("bacon.contrast_start", start) == start
        base = method.split("+")[0]
        assert config.flat().get(f"{base}.lambda_u", lambda_u) == lambda_u


def test_what_is_given_goes_before_the_method_s_default():
    words = ["bacon-cifar10", "--method", "remixmatch+abc+bacon", "--run-dir", "run"]
    config = parse([*words, "--bacon.contrast-start", "0.2", "--remixmatch.lambda-u", "1", "--unlabeled-ratio", "1"])
    assert (config.parts["bacon"].contrast_start, config.parts["remixmatch"].lambda_u) == (0.2, 1.0)
    with pytest.raises(ValueError, match="unlabeled_ratio: expected 1 for remixmatch, found 2"):
        config.replace(unlabeled_ratio=2)


def test_a_preset_s_mu_gives_way_to_a_base_that_takes_only_one():
    assert PRESETS["ssc-cifar10-40"].config("remixmatch+abc").views.unlabeled_ratio == 1
    assert PRESETS["ssc-cifar10-40"].config("fixmatch+abc").views.unlabeled_ratio == 7


@pytest.mark.parametrize("preset", PRESETS.values(), ids=PRESETS)
def test_overrides_are_options_of_groups_and_parts(preset):
    for name, values in preset.overrides.items():
        options = GROUPS[name] if name in GROUPS else PARTS[name].options
        options(**values)


def test_overrides_of_a_part_act_where_the_method_has_it():
    preset = PRESETS["digits"]
    assert preset.config("remixmatch+bacon").parts["bacon"].contrast_start == 0.25
    assert preset.config("fixmatch+crest+pda").parts["crest"].generations == 2
    assert list(preset.config("fixmatch").parts) == ["fixmatch"]


def test_a_resumed_run_is_compared_by_what_computes_something_else():
    config = PRESETS["bacon-cifar10"].config()
    moved = config.replace(run_dir=Path("x"), data_dir=Path("y"), resume=True, log_every=1, graph="off", report=False)
    assert config.differences(moved) == []
    other = config.replace(**{"unlabeled_ratio": 1, "bacon.top_k": 5})
    assert config.differences(other) == ["unlabeled_ratio: checkpoint 1, now 2", "bacon.top_k: checkpoint 5, now 3"]
    assert config.differences(PRESETS["bacon-cifar10"].config("fixmatch+daso")) == [
        "method: checkpoint 'fixmatch+daso', now 'fixmatch+abc+bacon'"
    ]


def test_photos_is_v_pets_recipe_on_dinov2():
    """The numbers of V-PET's configurations (arXiv 2503.09707), and of the model card of the weights."""
    config = PRESETS["photos"].config()
    assert (config.method, config.steps, config.data.dataset, config.data.image_size) == (
        "fixmatch+abc", 3420, "folder", 224,
    )  # fmt: skip
    assert (config.views.batch_size, config.views.unlabeled_ratio) == (32, 1)
    model, optimizer = config.model, config.optimizer
    assert (model.backbone, model.weights) == ("timm/vit_base_patch14_dinov2.lvd142m", "pretrained")
    assert (model.train, model.lora_rank, model.bn_momentum) == ("lora", 4, None)
    assert (optimizer.optimizer, optimizer.layer_decay, optimizer.warmup) == ("adamw", 1.0, 0.025)
    assert 1e-5 <= optimizer.lr <= 1e-3 and optimizer.lr_schedule == "cosine"


def test_only_the_presets_of_ones_own_images_warm_the_average_up():
    warm = {name for name, preset in PRESETS.items() if preset.config().optimizer.ema_warmup}
    assert warm == {"folder", "photos", "photos-cached"}
    assert PRESETS["folder"].config().model.bn_momentum == 0.01
