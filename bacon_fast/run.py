"""A finished or running run, opened for inference: `evaluate` and `predict` share it."""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from bacon_fast.data.augment import Augment
from bacon_fast.engine.build import resolve_device
from bacon_fast.engine.checkpoint import CheckpointError, load_latest
from bacon_fast.models.spec import NetworkSpec, build_network


@dataclass(frozen=True)
class Run:
    """The averaged network of a run's newest checkpoint, in evaluation mode, and what it needs to read images.

    saved: the run's configuration in the checkpoint, as `Config.to_dict` gives it.
    """

    directory: Path
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
        CheckpointError: the directory holds no usable checkpoint.
        ValueError: its checkpoint has another format.
    """
    directory = Path(directory)
    if not directory.is_dir():
        raise CheckpointError(f"run: expected a run directory, found nothing at {directory}")
    target = resolve_device(device)
    _, state = load_latest(directory / "checkpoints", map_location=target)
    info = state["inference"]
    network = build_network(NetworkSpec(**info["network"]))
    prefix = "network."
    network.load_state_dict({k.removeprefix(prefix): v for k, v in state["ema"].items() if k.startswith(prefix)})
    size = tuple(info["image_size"])
    normalize = Augment(image_size=size, mean=tuple(info["mean"]), std=tuple(info["std"])).to(target)
    return Run(
        directory,
        state["config"],
        state["step"],
        network.to(target).eval(),
        normalize,
        tuple(info["class_names"]),
        size,
        target,
    )
