"""The content of summary.json: the accuracy that a run reached, and how it was run."""

import platform
from typing import Any

import torch

import bacon_fast
from bacon_fast.data.datasets import ImageDataset
from bacon_fast.data.longtail import Split
from bacon_fast.engine.config import Config
from bacon_fast.engine.distributed import num_ranks
from bacon_fast.engine.metrics import History


def summarize(
    config: Config,
    dataset: ImageDataset,
    split: Split,
    history: History,
    device: torch.device,
    train_seconds: float,
) -> dict[str, Any]:
    """The averaged model after the last step, beside the other two ways papers report accuracy; JSON-ready.

    Args:
        history: of the whole run, to its last step.
        train_seconds: time of the steps, without evaluations and checkpoints.
    """
    last = history.rows[-1]
    cuda = device.type == "cuda"
    return {
        "dataset": config.data.dataset,
        "method": config.method,
        "preset": config.preset,
        "protocol": split.protocol.name,
        "seed": config.seed,
        "steps": config.steps,
        **{name: last[name] for name in ("top1", "bacc", "gm", "per_class")},
        "class_names": list(dataset.class_names),
        **history.summary(),
        "steps_per_second": last["step"] / train_seconds,
        "train_seconds": train_seconds,
        "device": torch.cuda.get_device_name(device) if cuda else f"cpu, {torch.get_num_threads()} threads",
        "processes": num_ranks(),
        "precision": config.engine.precision,
        "split": split.hash,
        "versions": {
            "bacon_fast": bacon_fast.__version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
    }
