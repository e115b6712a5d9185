"""USB's registries. They load without aim and wandb too, which USB imports even if it does not use them."""

import importlib.util
import sys
import types

MISSING_TRACKERS = tuple(name for name in ("aim", "wandb") if importlib.util.find_spec(name) is None)
"""What an empty module stands in for while semilearn is imported. Nobody else shall take it for the real one."""

for _name in MISSING_TRACKERS:
    sys.modules[_name] = types.ModuleType(_name)
try:
    from semilearn.core.utils import ALGORITHMS, IMB_ALGORITHMS
finally:
    for _name in MISSING_TRACKERS:
        del sys.modules[_name]

__all__ = ["ALGORITHMS", "IMB_ALGORITHMS", "MISSING_TRACKERS"]
