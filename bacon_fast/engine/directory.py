"""What the files of a run directory say: how far the run came, and what there is to continue or evaluate it from."""

import json
import warnings
from pathlib import Path

import torch

from bacon_fast.data.longtail import Split
from bacon_fast.engine.checkpoint import CheckpointError, content_of, load_latest
from bacon_fast.engine.config import Config
from bacon_fast.files import read_record


def logged_step(run_dir: Path) -> int:
    """Steps completed according to the log; 0 before its first row."""
    path, tail = run_dir / "metrics.jsonl", 1 << 14
    size = path.stat().st_size if path.exists() else 0
    while size:
        with open(path, "rb") as file:
            file.seek(max(0, size - tail))
            lines = file.read(tail).splitlines()
        for line in reversed(lines):
            try:
                step = json.loads(line)["step"]
            except (ValueError, TypeError, KeyError):  # half written, or cut: a number, when the cut fell into a list
                continue
            if type(step) is int:
                return step
        if tail >= size:
            break
        tail *= 8
    return 0


def _summarized_step(run_dir: Path) -> int:
    """Steps of the finished run; 0 without a summary that can be read."""
    try:
        step = read_record(run_dir / "summary.json").get("step")
    except (OSError, ValueError):
        return 0
    return step if type(step) is int else 0


def newest_state(run_dir: Path, map_location: torch.device | str = "cpu") -> tuple[Path, dict]:
    """The newest usable checkpoint of the run. A warning says so when the run came further than it.

    Raises CheckpointError, OSError and ValueError as `load_latest`.
    """
    path, state = load_latest(run_dir / "checkpoints", map_location)
    came_to = max(logged_step(run_dir), _summarized_step(run_dir))
    if came_to > state["step"]:
        warnings.warn(
            f"{path} is used, of step {state['step']}; {run_dir} came to step {came_to}, of which it has no usable "
            "checkpoint",
            stacklevel=2,
        )
    return path, state


def require_own(run_dir: Path, path: Path, state: dict) -> None:
    """Raises CheckpointError, with what differs, when the checkpoint is not of the run in the directory.

    What the directory lacks of config.json and split.json is not compared.
    """
    if (file := run_dir / "config.json").exists():
        own = Config.read(file)
        with content_of(path):
            saved = Config.from_dict(state["config"])
        if saved.steps <= own.steps:  # of a run that was continued to more steps
            saved = saved.replace(steps=own.steps)
        if differences := own.differences(saved):
            raise CheckpointError(f"{path} is not of the run in {file}: {'; '.join(differences)}")
    if (file := run_dir / "split.json").exists():
        own_split = Split.load(file).hash
        with content_of(path):
            used = state["split"]
        if own_split != used:
            raise CheckpointError(f"{file} has hash {own_split}, the run of {path} used {used}")
