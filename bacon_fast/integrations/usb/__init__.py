"""BaCon, ABC and a sync-free FixMatch for USB (semilearn 0.3), under USB's own registry.

Importing this package registers

* ``imb_algorithm: bacon``: FixMatch (or another core algorithm) + ABC + BaCon,
* ``imb_algorithm: abc`` and ``algorithm: fixmatch``: replacements that compute what USB's classes compute, with the
  same checkpoint layout, without waiting for the device inside a step.

All three average the weights with a few multi-tensor calls instead of hundreds of copies, and drop the two device
synchronizations that USB makes around every step; `use_fast_hooks` gives both to any other algorithm. Import this
package before USB builds the algorithm. ``python -m bacon_fast.integrations.usb --c config.yaml`` does that, and trains
from a USB configuration file, as USB ships it, on one device, also on a CPU.

Installation, in two steps and a few minutes:

    pip install 'bacon_fast[usb]'
    pip install --no-deps semilearn==0.3.2

The first installs the packages that USB needs. The second leaves out aim and wandb, which semilearn requires (aim is
built from source). Where they are missing, this package puts an empty module in their place while it imports semilearn,
so it must be the first to import it. Only ``use_aim`` and ``use_wandb`` need the real ones.
"""

import contextlib
import io

try:
    from bacon_fast.integrations.usb.registry import ALGORITHMS, IMB_ALGORITHMS
except ImportError as error:
    raise ImportError(
        f"bacon_fast.integrations.usb needs USB, which cannot be imported here ({error}). "
        "Install it with: pip install 'bacon_fast[usb]'; pip install --no-deps semilearn==0.3.2"
    ) from error

from bacon_fast.integrations.usb.algorithms import ABC, BaCon, FixMatch
from bacon_fast.integrations.usb.hooks import AveragedModel, EMAHook, TimerHook, use_fast_hooks

__all__ = ["ABC", "AveragedModel", "BaCon", "EMAHook", "FixMatch", "TimerHook", "use_fast_hooks"]

# USB's registry prints a line for every key that is replaced.
with contextlib.redirect_stdout(io.StringIO()):
    ALGORITHMS["fixmatch"] = FixMatch
    IMB_ALGORITHMS["abc"] = ABC
    IMB_ALGORITHMS["bacon"] = BaCon
