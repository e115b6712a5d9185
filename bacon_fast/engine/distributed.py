"""The processes of one run: torchrun's environment, the process group, and what the ranks tell each other.

Each rank computes the losses of the global batch from rows gathered from all ranks (methods/gather.py), so parameters,
buffers and decisions are the same everywhere. Rank 0 writes the files. Without torchrun there is one process, rank 0
of 1, and every exchange returns what it is given.

Messages between hosts travel over gloo, and no device waits for them; a device's tensors travel over NCCL.
"""

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from bacon_fast.methods.gather import num_ranks

T = TypeVar("T")

# Rank 0 leaves the run directory under this key in the store of torchrun, which outlives the processes it restarts.
_RUN_DIR = "bacon_fast/run_dir"

# Groups live as long as the process. A DistributedDataParallel must not hold the last reference: its destructor keeps
# Python's lock while it joins gloo's threads, which may wait for that lock to drop the tensors they just sent.
_JOINED: list[dist.ProcessGroup] = []


class LostProcessError(RuntimeError):
    """Another process of the run ended, or did not answer within the timeout."""


@dataclass(frozen=True)
class Launch:
    """What torchrun tells a process by its environment.

    rank of world_size processes, local_rank of local_world_size on this machine; restarts: how often torchrun has
    started all of them again; keeps_store: torchrun itself serves the store at address:port.
    """

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    address: str
    port: int
    restarts: int
    keeps_store: bool

    @classmethod
    def from_environment(cls) -> "Launch | None":
        """None without RANK and WORLD_SIZE, that is under plain python. Raises ValueError for an incomplete set."""
        if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
            return None
        launch = cls(
            rank=_integer("RANK"),
            world_size=_integer("WORLD_SIZE"),
            local_rank=_integer("LOCAL_RANK"),
            local_world_size=_integer("LOCAL_WORLD_SIZE"),
            address=_variable("MASTER_ADDR"),
            port=_integer("MASTER_PORT"),
            restarts=int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")),
            keeps_store=os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True",
        )
        if not (0 <= launch.rank < launch.world_size and 0 <= launch.local_rank < launch.local_world_size):
            raise ValueError(f"RANK, LOCAL_RANK: expected 0 <= rank < size, found {launch}")
        return launch


def _variable(name: str) -> str:
    if not (value := os.environ.get(name)):
        raise ValueError(f"{name}: expected a value beside RANK and WORLD_SIZE, as torchrun sets it, found none")
    return value


def _integer(name: str) -> int:
    try:
        return int(_variable(name))
    except ValueError as error:
        raise ValueError(f"{name}: expected an integer, as torchrun sets it, found {os.environ.get(name)!r}") from error


# --- the process group -----------------------------------------------------------------------------------------------


@contextmanager
def process_group(device: torch.device, timeout: float) -> Iterator[dist.Store | None]:
    """Inside, the processes that torchrun started are one group. Nothing happens under plain python.

    Args:
        device: of this process; NCCL connects CUDA devices, gloo the hosts and CPUs.
        timeout: seconds that a rank waits for the others.

    Yields:
        The store that all ranks share, None under plain python.

    Raises:
        LostProcessError: another process ended, or did not answer in time.
    """
    launch = Launch.from_environment()
    if launch is None:
        yield None
        return
    lost = False
    try:
        yield _join(launch, device, timedelta(seconds=timeout))
    except RuntimeError as error:
        lost = _says_that_a_rank_is_lost(error)
        if not lost:
            raise
        reason = str(error).splitlines()[0]
        raise LostProcessError(
            f"rank {launch.rank} waits for another process of this run, which ended or was silent for {timeout:g} s "
            f"({reason}). The newest checkpoint is whole: start the same command again with --run-dir and --resume"
        ) from error
    finally:
        if dist.is_initialized() and not lost:  # destroying the group would wait for the lost rank again
            dist.destroy_process_group()
        # gloo's threads still hold the tensors of the last exchange, and need Python's lock for a moment to drop them.
        # If the interpreter ends before that, it aborts.
        time.sleep(0.2)


def _join(launch: Launch, device: torch.device, timeout: timedelta) -> dist.Store:
    serves = launch.rank == 0 and not launch.keeps_store
    store = dist.TCPStore(launch.address, launch.port, is_master=serves, timeout=timeout, wait_for_workers=False)
    cuda = device.type == "cuda"
    if cuda:
        device = torch.device("cuda", device.index or 0)
        torch.cuda.set_device(device)
    # A prefix for each start: torchrun keeps the store, with the addresses of dead processes, over restarts.
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if cuda else "gloo",
        store=dist.PrefixStore(f"bacon_fast/{launch.restarts}/{launch.world_size}", store),
        rank=launch.rank,
        world_size=launch.world_size,
        timeout=timeout,
        device_id=device if cuda else None,
    )
    _JOINED.append(dist.group.WORLD)
    return store


def _says_that_a_rank_is_lost(error: RuntimeError) -> bool:
    # gloo raises plain RuntimeErrors, which name it or its source files.
    return isinstance(error, dist.DistError) or (type(error) is RuntimeError and "gloo" in str(error).lower())


def rank() -> int:
    """This process's rank in the group; 0 without one."""
    return dist.get_rank() if num_ranks() > 1 else 0


def is_main() -> bool:
    """Whether this process is rank 0, the one that writes."""
    return rank() == 0


def own_part(rows: int) -> slice:
    """This rank's consecutive part of `rows` rows. Raises ValueError when they do not divide among the ranks."""
    if rows % num_ranks():
        raise ValueError(f"batch_size: expected a multiple of the number of processes, {num_ranks()}, found {rows}")
    part = rows // num_ranks()
    return slice(rank() * part, (rank() + 1) * part)


# --- what ranks tell each other --------------------------------------------------------------------------------------


def broadcast(value: T) -> T:
    """Rank 0's value, on all ranks."""
    if num_ranks() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def from_main(work: Callable[[], T]) -> T:
    """Runs `work` on rank 0 only. All ranks return its result, or raise its error."""
    if num_ranks() == 1:
        return work()
    value, error = None, None
    if is_main():
        try:
            value = work()
        except Exception as raised:
            error = raised
    value, error = broadcast((value, error))
    if error is not None:
        raise error
    return value


def all_reduce_max(*values: int) -> list[int]:
    """The largest of each value over all ranks."""
    if num_ranks() == 1:
        return list(values)
    tensor = torch.tensor(values)
    dist.all_reduce(tensor, dist.ReduceOp.MAX)
    return tensor.tolist()


def require_equal(values: dict[str, object]) -> None:
    """Raises ValueError, on all ranks, if any value differs between them."""
    if num_ranks() == 1:
        return
    found: list[dict] = [{}] * num_ranks()
    dist.all_gather_object(found, values)
    lines = [
        f"{name}: expected the same value on all ranks, found {found[0].get(name)!r} on rank 0 "
        f"and {other.get(name)!r} on rank {i}"
        for i, other in enumerate(found)
        for name in found[0] | other
        if other.get(name) != found[0].get(name)
    ]
    if lines:
        raise ValueError("\n".join(lines))


def leader_first(work: Callable[[], T]) -> T:
    """Runs `work` on every process, on the first one of each machine before the others: for downloads."""
    launch = Launch.from_environment() if num_ranks() > 1 else None
    if launch is None:
        return work()
    result = work() if launch.local_rank == 0 else None
    all_reduce_max(0)  # a barrier
    return work() if launch.local_rank else result


@torch.no_grad()
def copy_from_main(*modules: nn.Module) -> None:
    """Copies all parameters and buffers of the modules from rank 0, bit for bit."""
    if num_ranks() > 1:
        for module in modules:
            for tensor in (*module.parameters(), *module.buffers()):
                dist.broadcast(tensor, src=0)


@torch.no_grad()
def copy_statistics_from_main(*modules: nn.Module) -> None:
    """Copies the running statistics of all BatchNorm layers from rank 0.

    Unless they are synchronized (`--sync-batchnorm`), each rank's statistics describe the rows that this rank has seen.
    """
    if num_ranks() == 1:
        return
    layers = [m for module in modules for m in module.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    statistics = [s for layer in layers for s in (layer.running_mean, layer.running_var) if s is not None]
    if statistics:
        together = torch.cat(statistics)
        dist.broadcast(together, src=0)
        torch._foreach_copy_(statistics, list(together.split([len(s) for s in statistics])))


def gather_rows(rows: Tensor, total: int) -> Tensor:
    """Joins the consecutive parts [ceil(total / ranks), ...] of all ranks, without the padding: [total, ...]."""
    if num_ranks() == 1:
        return rows
    gathered = rows.new_empty(num_ranks() * len(rows), *rows.shape[1:])
    dist.all_gather_into_tensor(gathered, rows.contiguous())
    return gathered[:total]


# --- over restarts ---------------------------------------------------------------------------------------------------


def started_before(store: dist.Store | None) -> Path | None:
    """The directory of this run, if torchrun has started it before (--max-restarts)."""
    found = None
    if store is not None and is_main() and store.check([_RUN_DIR]):
        found = store.get(_RUN_DIR).decode()
    found = broadcast(found)
    return None if found is None else Path(found)


def mark_started(store: dist.Store | None, run_dir: Path) -> None:
    """Tells the processes that torchrun may start after a failure which run to continue."""
    if store is not None and is_main():
        store.set(_RUN_DIR, str(run_dir))
