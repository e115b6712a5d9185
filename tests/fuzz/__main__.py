"""Calls every public function of bacon_fast.functional with hostile arguments, and judges every backend's answer.

Run: python -m tests.fuzz --calls 10000
A case is a seed: `--only sup_con_loss --first 123 --cases 1` runs it again.
"""

import argparse
import os
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable, Sequence

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before triton is imported

from bacon_fast.ops.backends import BACKENDS
from tests.fuzz import losses, steps
from tests.fuzz.draws import Draws

Case = Callable[[Draws, Sequence[str]], int]
# Each with the operation whose backends it runs.
CASES: dict[str, tuple[Case, str]] = {
    "sup_con_loss": (losses.sup_con_loss, "contrastive"),
    "info_nce": (losses.info_nce, "contrastive"),
    "sscl_loss": (losses.sscl_loss, "contrastive"),
    "bacon_loss": (losses.bacon_loss, "bacon_loss"),
    "fixmatch_abc_loss": (losses.fixmatch_abc_loss, "fixmatch_abc_loss"),
    "batch_norm_act": (steps.batch_norm_act, "batch_norm_act"),
    "bank_select_, bank_write_": (steps.memory_bank, "bank_write_"),
    "class_centers": (steps.class_centers, ""),
    "balanced_temperatures": (steps.balanced_temperatures, ""),
    "sgd_ema_": (steps.sgd_ema, "sgd_ema_"),
}
TRITON_EVERY = 15  # cases: its interpreter takes a hundred times as long


def backends_of(operation: str, case: int) -> list[str]:
    """What can run on a CPU, Triton now and then."""
    usable = [name for name, b in BACKENDS.get(operation, {}).items() if b.why_not(torch.empty(1, 1)) is None]
    return [name for name in usable if name != "triton" or case % TRITON_EVERY == 0]


def run(name: str, seed: int) -> int:
    """One case; returns the number of calls. Raises an error that names it where an answer is wrong."""
    case, operation = CASES[name]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # numpy in Triton's interpreter
            return case(Draws(seed), backends_of(operation, seed))
    except Exception as error:
        raise AssertionError(f"{name}, seed {seed}: {type(error).__name__}: {error}") from error


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--calls", type=int, default=10_000, help="stop after so many calls of a backend")
    parser.add_argument("--cases", type=int, default=sys.maxsize, help="stop after so many cases a function")
    parser.add_argument("--first", type=int, default=0, help="seed of the first case")
    parser.add_argument("--only", choices=list(CASES), help="this function alone")
    args = parser.parse_args()
    names, start = [args.only] if args.only else list(CASES), time.monotonic()
    calls, failures = Counter(), []
    for seed in range(args.first, args.first + args.cases):
        for name in names:
            try:
                calls[name] += run(name, seed)
            except AssertionError as error:
                failures.append(str(error))
                calls[name] += 1
        if sum(calls.values()) >= args.calls:
            break
    for name in names:
        print(f"{name:28} {calls[name]:6} calls")
    print(f"{sum(calls.values())} calls in {time.monotonic() - start:.0f} s, {len(failures)} wrong")
    print(*failures, sep="\n")
    return bool(failures)


if __name__ == "__main__":
    sys.exit(main())
