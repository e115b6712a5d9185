"""bacon_fast: a fused training engine for class-imbalanced semi-supervised image classification.

- `functional`, `BaConLoss`, `MemoryBank`: the losses, for a training loop of your own.
- `Config`, `PRESETS`, `Trainer`: a run, and `StoppedError`, `DivergedError`, `CheckpointError`, which end it.
- `train`, `Run`: the same in one call, and the network of a finished run, which evaluates and predicts.
- `load_dataset`: images.

Each is loaded when it is first used: `import bacon_fast` alone loads nothing, not even torch.
"""

import importlib

__version__ = "0.1.0"

# Each public name and the module that has it.
_HOMES = {
    "BaConLoss": "bacon_fast.losses.bacon",
    "CheckpointError": "bacon_fast.engine.checkpoint",
    "Config": "bacon_fast.engine.config",
    "DivergedError": "bacon_fast.engine.trainer",
    "MemoryBank": "bacon_fast.losses.bank",
    "PRESETS": "bacon_fast.engine.presets",
    "Run": "bacon_fast.run",
    "StoppedError": "bacon_fast.engine.trainer",
    "Trainer": "bacon_fast.engine.trainer",
    "load_dataset": "bacon_fast.data.datasets",
    "open_run": "bacon_fast.run",
    "train": "bacon_fast.training",
}
__all__ = ["__version__", "functional", *_HOMES]


def __getattr__(name: str) -> object:
    if name == "functional":
        return importlib.import_module("bacon_fast.functional")
    if name not in _HOMES:
        raise AttributeError(f"module 'bacon_fast' has no attribute {name!r}")
    value = globals()[name] = getattr(importlib.import_module(_HOMES[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
