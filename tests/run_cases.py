"""Small runs, and the comparison of their results."""

from collections.abc import Mapping
from pathlib import Path

import torch

from bacon_fast.engine.checkpoint import list_checkpoints
from bacon_fast.engine.config import Config
from bacon_fast.engine.presets import PRESETS


def with_parts(config: Config, values: Mapping[str, object]) -> Config:
    """The configuration with these values, such as {"bacon.top_k": 2}, as far as the method has the part."""
    return config.replace(**{name: value for name, value in values.items() if name.split(".")[0] in config.parts})


def tiny(
    run_dir: Path, *, method: str = "fixmatch+abc+bacon", parts: Mapping[str, object] | None = None, **changes
) -> Config:
    """A run of 12 steps. `parts`: values of parts, which act if the method has the part."""
    values = {
        "run_dir": run_dir,
        "steps": 12,
        "batch_size": 8,
        "threshold": 0.15,
        "eval_every": 4,
        "log_every": 3,
        "checkpoint_every": 4,
        "report": False,
        "threads": 1,
        "precision": "fp32",  # whatever the machine
    }
    config = PRESETS["digits"].config(method).replace(**(values | changes))
    # Ten classes: reliable rows, and so a contrastive loss, from the first steps.
    own = {"bacon.contrast_start": 0.4, "bacon.reliable_threshold": 0.15}
    own |= {"simpro.threshold": 0.15, "simpro.estimates": 2}  # most checkpoints hold sums since the last estimate
    return with_parts(config, own | dict(parts or {}))


def final_state(run_dir: Path) -> dict:
    return torch.load(list_checkpoints(run_dir / "checkpoints")[-1], weights_only=True)


def assert_equal_states(one: object, two: object, path: str = "state") -> None:
    """Equal bit for bit, except for times."""
    assert type(one) is type(two), path
    if isinstance(one, torch.Tensor):
        assert one.dtype == two.dtype and torch.equal(one, two), path
    elif isinstance(one, dict):
        assert one.keys() == two.keys(), path
        for key in one:
            if key not in ("train_seconds", "steps_per_second", "run_dir", "resume", "checkpoint_every"):
                assert_equal_states(one[key], two[key], f"{path}.{key}")
    elif isinstance(one, list):
        assert len(one) == len(two), path
        for i, (a, b) in enumerate(zip(one, two)):
            assert_equal_states(a, b, f"{path}[{i}]")
    else:
        assert one == two, path
