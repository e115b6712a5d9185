"""Places for runs at the same time: on a CPU each has a group of cores, on GPUs each has a device."""

import itertools
import os
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import IO

import torch

from bacon_fast.engine.build import resolve_device

MAX_DEFAULT_JOBS = 8


@dataclass(frozen=True)
class Slot:
    """Room for one process.

    Attributes:
        cores: the CPU cores it is pinned to, empty for no pinning. Processes whose threads share cores wait for each
            other in every parallel region, so groups are disjoint.
        environment: variables set for it.
    """

    cores: frozenset[int] = frozenset()
    environment: dict[str, str] = field(default_factory=dict)

    def start(self, command: Sequence[str], output: IO | int, **options) -> subprocess.Popen:
        """The command as a process of this slot, out of reach of the terminal's Ctrl-C.

        stdout and stderr go to `output`; Popen gets `options`.
        """
        mine = os.sched_getaffinity(0)
        if self.cores:  # inherited by the child; setting it there would come after torch has counted
            os.sched_setaffinity(0, self.cores)
        try:
            return subprocess.Popen(
                command,
                env=os.environ | self.environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                **options,
            )
        finally:
            os.sched_setaffinity(0, mine)


def make_slots(device: str, jobs: int | None, runs: int) -> list[Slot]:
    """Slots for `runs` runs.

    Args:
        device: as in Config.
        jobs: runs at once; None: one a GPU, or one a core (at most 8, which then have several cores).
        runs: runs to be done; no more slots than that are made.

    Raises:
        ValueError: jobs is not positive, or the device does not exist.
    """
    if jobs is not None and jobs < 1:
        raise ValueError(f"jobs: expected at least 1, found {jobs}")
    target = resolve_device(device)
    if target.type == "cuda":
        count = 1 if target.index is not None else torch.cuda.device_count()
        jobs = min(jobs or count, max(runs, 1))
        if count == 1:
            return [Slot()] * jobs
        visible = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(count)))
        names = visible.split(",")[:count]
        return [Slot(environment={"CUDA_VISIBLE_DEVICES": names[i % count]}) for i in range(jobs)]
    cores = sorted(os.sched_getaffinity(0))
    jobs = min(jobs or min(len(cores), MAX_DEFAULT_JOBS), max(runs, 1))
    if jobs > len(cores):
        return [Slot(frozenset({cores[i % len(cores)]})) for i in range(jobs)]
    bounds = [round(i * len(cores) / jobs) for i in range(jobs + 1)]
    return [Slot(frozenset(cores[low:high])) for low, high in itertools.pairwise(bounds)]
