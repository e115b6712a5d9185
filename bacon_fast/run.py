"""A finished or running run, opened for inference: `evaluate` and `predict` share it."""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from bacon_fast.data.augment import Augment
from bacon_fast.data.datasets import check_image_size
from bacon_fast.engine.build import resolve_device
from bacon_fast.engine.checkpoint import CheckpointError, content_of
from bacon_fast.engine.directory import newest_state, require_own
from bacon_fast.engine.finite import not_finite
from bacon_fast.models.spec import NetworkSpec, build_network


@dataclass(frozen=True)
class Run:
    """The averaged network of a run's newest checkpoint, in evaluation mode, and what it needs to read images: the one
    that validation chose (--select validation), else the newest.

    step: after which the network had these weights.
    saved: the run's configuration in the checkpoint, as `Config.to_dict` gives it. checkpoint: the file.
    """

    directory: Path
    checkpoint: Path
    saved: dict
    step: int
    network: nn.Module
    normalize: Augment
    class_names: tuple[str, ...]
    image_size: tuple[int, int]
    device: torch.device


def open_run(directory: Path | str, device: str = "auto") -> Run:
    """Opens the run in `directory`.

    Raises:
        CheckpointError: the directory holds no usable checkpoint, one of another run, or one whose content does not fit
            or is not finite.
        ValueError: its checkpoint has another format; config.json or split.json is damaged.
    """
    directory = Path(directory)
    if not directory.is_dir():
        raise CheckpointError(f"run: expected a run directory, found nothing at {directory}")
    target = resolve_device(device)
    path, state = newest_state(directory, map_location=target)
    with content_of(path):
        info = state["inference"]
        network = build_network(NetworkSpec(**info["network"]))
        prefix = "network."
        newest = {k.removeprefix(prefix): v for k, v in state["ema"].items() if k.startswith(prefix)}
        network.load_state_dict(state["selected"] or newest)
        if broken := not_finite(network.state_dict().items()):
            raise ValueError(f"not finite: {', '.join(broken[:3])}")
        size = tuple(info["image_size"])
        check_image_size(*size)
        normalize = Augment(image_size=size, mean=tuple(info["mean"]), std=tuple(info["std"])).to(target)
        class_names = tuple(info["class_names"])
        if len(class_names) != info["network"]["num_classes"] or not all(isinstance(n, str) for n in class_names):
            raise ValueError(f"class_names: expected {info['network']['num_classes']} names, found {class_names!r}")
    require_own(directory, path, state)
    network = network.to(target).eval()
    saved, step = state.get("config"), info["selected_step"] or state["step"]
    return Run(directory, path, saved, step, network, normalize, class_names, size, target)
