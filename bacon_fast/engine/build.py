"""From a configuration to the parts of a run: device, data, split, method, optimizer."""

import dataclasses
import os
import random
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from bacon_fast import methods
from bacon_fast.data.datasets import ImageDataset, load_dataset
from bacon_fast.data.images import Interpolation
from bacon_fast.data.longtail import PROTOCOLS, Protocol, Split, make_split
from bacon_fast.engine.config import Config
from bacon_fast.engine.distributed import Launch
from bacon_fast.engine.optimizers import SGD, Adam, AdamW
from bacon_fast.methods.method import Method
from bacon_fast.methods.part import DataInfo, Setup
from bacon_fast.models.batchnorm import batchnorms
from bacon_fast.models.spec import NetworkSpec, build_network
from bacon_fast.models.timm_backbone import PREFIX, pretrained_input
from bacon_fast.ops.backends import choose_backend
from bacon_fast.system import physical_memory, usable_cores


def resolve_device(name: str) -> torch.device:
    """'auto' -> cuda when usable, else cpu; under torchrun cuda -> the device of this process's local rank.

    Raises ValueError for a device this machine does not have.
    """
    launch = Launch.from_environment()
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if launch is not None and launch.local_world_size > 1 and name.startswith("cuda"):
        if name != "cuda":
            raise ValueError(f"device: expected auto, cuda or cpu for several processes on a machine, found {name!r}")
        if launch.local_world_size > torch.cuda.device_count():
            raise ValueError(
                f"device: {launch.local_world_size} processes on this machine need a CUDA device each, and it has "
                f"{torch.cuda.device_count()}; start fewer, or add --device cpu"
            )
        return torch.device("cuda", launch.local_rank)
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"device: expected auto, cpu, cuda or cuda:N, found {name!r}") from error
    if device.type == "mps":
        raise ValueError("device: expected cpu on this machine, found mps, which has no float64 for the random draws")
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"device: expected auto, cpu, cuda or cuda:N, found {name!r}")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"device: {name!r} is not on this machine, which has {torch.cuda.device_count()} CUDA devices")
    return device


def resolve_precision(name: str, device: torch.device) -> str:
    """'auto' -> bf16 on a device with bfloat16 arithmetic of its own, else fp32. Other names stay.

    Raises ValueError for tf32 without a CUDA device.
    """
    if name == "tf32" and device.type != "cuda":
        raise ValueError(f"precision: tf32 needs a CUDA device, found {device}; use fp32 or bf16")
    if name != "auto":
        return name
    if device.type == "cuda":
        return "bf16" if torch.cuda.get_device_capability(device) >= (8, 0) else "fp32"
    # torch computes bfloat16 on every CPU, but without these instructions slower than float32.
    features = torch.cpu.get_capabilities()
    return "bf16" if features.get("avx512_bf16") or features.get("amx_bf16") else "fp32"


def check_backend(config: Config, device: torch.device) -> None:
    """Raises ValueError when the losses of the method have no backend `loss_backend` on the device."""
    backend = config.shared.backend
    if backend is None:
        return
    for operation in [part.operation for part in config.parts.values() if part.operation is not None]:
        try:
            choose_backend(operation, backend, torch.empty(0, 1, device=device))
        except RuntimeError as error:
            raise ValueError(f"loss_backend: {error}") from error


# More threads only wait for each other, and where the system refuses to start them, OpenMP ends the process.
MAX_THREADS_PER_CORE = 4


def use_threads(threads: int) -> None:
    """Sets torch's CPU threads; 0 means the cores this process may run on, shared by torchrun's processes.

    Raises ValueError above MAX_THREADS_PER_CORE for each core of the machine.
    """
    most = MAX_THREADS_PER_CORE * (os.cpu_count() or 1)
    if threads > most:
        raise ValueError(f"threads: expected at most {most} on this machine of {os.cpu_count()} cores, found {threads}")
    launch = Launch.from_environment()
    processes = 1 if launch is None else launch.local_world_size
    torch.set_num_threads(threads or max(1, usable_cores() // processes))


def seed_everything(seed: int) -> None:
    """Seeds the initialization. Sampling, views and masks do not depend on it: they are drawn from counters."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def build_dataset(
    config: Config, device: torch.device | None = None, resized: Interpolation | None = None
) -> ImageDataset:
    """The images that the configuration names, for the device; None: a CPU.

    Args:
        resized: how a run's images were resized; None: as a new run's are, see `interpolation`.
    """
    data = config.data
    return load_dataset(
        data.dataset,
        data_dir=data.data_dir,
        download=data.download,
        image_size=config.views.stored_size or image_size(config),
        classes=data.classes,
        images=data.images,
        most_in_memory=_most_in_memory(device),
        follow_links=data.follow_links,
        unlabeled=data.unlabeled,
        test=data.test,
        val=data.val,
        other_labels=data.other_labels,
        unreadable=data.unreadable,
        interpolation=resized or interpolation(config),
    )


def _most_in_memory(device: torch.device | None) -> int | None:
    """Bytes of images up to which "auto" keeps them in memory: a quarter of it, which the processes of a machine share,
    and half of the GPU's."""
    launch, memory = Launch.from_environment(), physical_memory()
    quarter = None if memory is None else memory // 4 // (1 if launch is None else launch.local_world_size)
    if device is None or device.type != "cuda":
        return quarter
    half = torch.cuda.get_device_properties(device).total_memory // 2
    return half if quarter is None else min(half, quarter)


def image_size(config: Config) -> int | None:
    """Side of the images: the configured one, else that of a timm backbone; None: the dataset's own."""
    if config.data.image_size is None and config.model.backbone.startswith(PREFIX):
        return pretrained_input(config.model.backbone).default_size
    return config.data.image_size


def interpolation(config: Config) -> Interpolation:
    """How images are resized: as those that a timm backbone was trained on, else bilinearly."""
    backbone = config.model.backbone
    return pretrained_input(backbone).interpolation if backbone.startswith(PREFIX) else "bilinear"


def normalized_for(config: Config, dataset: ImageDataset) -> ImageDataset:
    """The dataset with the mean and the standard deviation of a timm backbone's training; others take its own."""
    if not config.model.backbone.startswith(PREFIX):
        return dataset
    known = pretrained_input(config.model.backbone)
    return dataclasses.replace(dataset, mean=known.mean, std=known.std)


ENOUGH_LABELS, HELD_OUT = 100, 0.2
"""From so many labeled images on, validation None holds out this share of them."""


def settle_validation(config: Config, dataset: ImageDataset) -> float:
    """The share to hold out: the configured one, or what None comes to for these data, see `DataOptions`.

    0 where the validation images are given, by the data or by --split.
    """
    if config.data.validation is not None:
        return config.data.validation
    if dataset.val_images is not None or config.data.split is not None:
        return 0.0
    counts = build_split(config.replace(validation=0.0), dataset, None).labeled_counts
    return HELD_OUT if sum(counts) >= ENOUGH_LABELS and max(counts) > 1 else 0.0


def build_split(config: Config, dataset: ImageDataset, saved: Path | None) -> Split:
    """The split of the file `saved`, or of --split, or else one drawn by protocol, overrides and seed.

    The configuration's share of validation images is settled: None holds out none.

    Raises ValueError when `saved` and --split are not the same split.
    """
    file = saved or config.data.split
    if file is not None:
        overrides = split_overrides(config) | ({"validation": config.data.validation} if config.data.validation else {})
        if overrides and saved is None:
            raise ValueError(f"split: expected no {', '.join(overrides)} beside --split, which fixes the split already")
        split = Split.load(file)
        try:
            split.verify(dataset)
        except ValueError as error:
            raise ValueError(f"{file}: {error}") from error
        if config.data.split is not None and (other := Split.load(config.data.split)).hash != split.hash:
            raise ValueError(f"split: expected the run's own, {file} of hash {split.hash}, found hash {other.hash}")
        return split
    protocol, overrides = PROTOCOLS[config.data.protocol], split_overrides(config)
    if overrides:
        changes = ", ".join(f"{name}={value}" for name, value in overrides.items())
        # Numbers of a changed protocol must not pass for numbers of the named one.
        named = {"name": f"{protocol.name} with {changes}", "source": f"changed on the command line: {changes}"}
        _refuse_without_effect(protocol, overrides)
        protocol = dataclasses.replace(protocol, **overrides, **named)
    if config.data.validation and dataset.val_images is not None:
        raise ValueError("validation: expected 0, for the data have validation images of their own")
    return make_split(dataset, protocol, config.seed, config.data.validation or 0.0)


def _refuse_without_effect(protocol: Protocol, overrides: dict) -> None:
    """Raises ValueError for an override that the protocol does not ask for: a run would record it and not do it."""
    reasons = {}
    if protocol.unlabeled_all:
        reason = "in which every image is in the unlabeled set, the labeled ones too"
        reasons = dict.fromkeys(("unlabeled_head", "gamma_u", "lb_in_ulb"), reason)
    if overrides.get("labeled_head", protocol.labeled_head) is None:
        reasons["gamma_l"] = "whose labeled set is not drawn by counts; --labeled-head makes it so"
    for name, reason in reasons.items():
        if name in overrides:
            raise ValueError(f"{name}: expected none for protocol {protocol.name}, {reason}; found {overrides[name]!r}")


def split_overrides(config: Config) -> dict:
    """Fields of the protocol that the configuration sets."""
    names = ("labeled_head", "unlabeled_head", "gamma_l", "gamma_u", "lb_in_ulb")
    return {name: value for name in names if (value := getattr(config.data, name)) is not None}


def network_spec(config: Config, num_classes: int) -> NetworkSpec:
    """The network of the method: the configured backbone, with the heads that its parts ask for."""
    asked = {name: value for part in config.parts.values() for name, value in part.network().items()}
    model = config.model
    size = image_size(config) if model.backbone.startswith(PREFIX) else None
    own = {"image_size": size, "train": model.train, "lora_rank": model.lora_rank}
    return NetworkSpec(model.backbone, num_classes, model.bn_momentum, **own, **asked)


def build_method(config: Config, data: DataInfo, weights: Mapping[str, Tensor] | None = None) -> Method:
    """The method of the configuration, on a fresh network, whose backbone has these weights."""
    network = build_network(network_spec(config, data.num_classes), weights)
    _refuse_batchnorm_options(config, network)
    setup = Setup(
        data,
        network.backbone.num_features,
        steps=config.steps,
        seed=config.seed,
        labeled_rows=config.views.batch_size,
        unlabeled_rows=config.views.unlabeled_ratio * config.views.batch_size,
        ema=config.optimizer.ema,
        shared=config.shared,
        parts=config.parts,
    )
    return methods.build_method(config.parts, setup, network)


def _refuse_batchnorm_options(config: Config, network: nn.Module) -> None:
    """Raises ValueError for an option of BatchNorm's statistics where none change."""
    backbone = network.backbone
    if any(layer.training for layer in batchnorms(network)):
        return
    reason = f"backbone {config.model.backbone}, which has no BatchNorm"
    if batchnorms(backbone):
        reason = f"train {config.model.train}, where BatchNorm keeps the statistics of the weights"
    options = {
        "bn_momentum": (config.model.bn_momentum, None),
        "ema_buffers": (config.optimizer.ema_buffers, "copy"),
        "sync_batchnorm": (config.engine.sync_batchnorm, False),
    }
    for name, (found, expected) in options.items():
        if found != expected:
            raise ValueError(f"{name}: expected {expected} for {reason}; found {found!r}")


def weights_line(weights: dict, method: Method) -> str:
    """What a run says of its backbone's weights: file, license, and how much is trained."""
    trained = sum(p.numel() for p in method.parameters() if p.requires_grad)
    note = f", license {weights['licence']}" if weights["licence"] else ""
    own = sum(p.numel() for p in method.parameters())
    source = f"{weights['source']} (SHA-256 {weights['sha256'][:12]}{note})"
    return f"weights {source}; trained {trained:,} of {own:,} parameters"


def build_optimizer(config: Config, method: Method) -> SGD | Adam | AdamW:
    """SGD with Nesterov momentum, or AdamW, without decay of one-dimensional parameters ([US]); or ABC's Adam.

    With layer decay, a group for each rate; its `lr_scale` is the rate's factor.
    """
    parameters = [p for p in method.parameters() if p.requires_grad]
    options = config.optimizer
    if options.optimizer == "adam":
        return Adam(parameters, options.lr, shrink=options.weight_decay)
    scale_of: dict[int, float] = {}
    if options.layer_decay != 1:
        backbone = method.network.backbone
        scales = backbone.layer_scales(options.layer_decay)
        scale_of = {id(p): scales[name] for name, p in backbone.body.named_parameters()}
    groups = []
    for scale in sorted({scale_of.get(id(p), 1.0) for p in parameters}, reverse=True):
        own = [p for p in parameters if scale_of.get(id(p), 1.0) == scale]
        matrices, vectors = [p for p in own if p.dim() > 1], [p for p in own if p.dim() <= 1]
        for params, decay in ((matrices, options.weight_decay), (vectors, 0.0)):
            groups.append({"params": params, "weight_decay": decay, "lr_scale": scale})
    groups = [group for group in groups if group["params"]]
    if options.optimizer == "adamw":
        return AdamW(groups, options.lr)
    return SGD(groups, options.lr, momentum=0.9)
