"""Launches and host synchronizations of a training step, counted.

On a GPU by torch's profiler: what ran on the device, what the host launched, and where it waited. On a CPU by the
dispatcher: the operations that Python or autograd called, and those among them for which a host would have to wait
for a GPU. A native operation, which calls others below Python, counts as one.
"""

import os
import sys
import warnings
from collections import Counter
from collections.abc import Iterable
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, field

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

WAITING_OPS = frozenset(
    {"_local_scalar_dense", "is_nonzero", "nonzero", "masked_select", "equal", "_unique2", "unique_dim", "bincount"}
    | {"repeat_interleave"}
)
WAITING_METHODS = frozenset({"tolist", "numpy", "cpu", "__array__"})
INDEXING_OPS = frozenset({"index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index"})
VIEW_OPS = frozenset(
    {"view", "_unsafe_view", "t", "transpose", "permute", "expand", "slice", "select", "split", "split_with_sizes"}
    | {"unsqueeze", "squeeze", "detach", "alias", "as_strided", "unbind", "_reshape_alias", "reshape", "lift_fresh"}
)
# Memory without content, types, and marks for the profiler: a GPU would have nothing to do.
IDLE_OPS = frozenset(
    {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "promote_types"}
    | {"_record_function_enter_new", "_record_function_exit"}
)
WAITING_CALLS = frozenset(
    {"cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize"}
    | {"cuStreamSynchronize", "cuCtxSynchronize", "cuEventSynchronize"}
)
LAUNCHING_CALLS = ("cudaLaunch", "cuLaunch", "cudaGraphLaunch", "cuGraphLaunch", "cudaMemcpy", "cudaMemset")
RANGE = "measured steps"


@dataclass
class Counts:
    """Totals over the steps counted; None where this device cannot say.

    operations: dispatched operations that compute something. by_file: how often each, as "FILE NAME" with the file of
    bacon_fast that called it, or "backward" for torch's own derivatives. kernels: kernels, copies and fills that ran on
    the device.
    launches: calls by which the host started them, a graph's being one. syncs: times the host waited for the device.
    waiting: how often by which name. device_seconds: time the kernels took.
    """

    operations: int | None = None
    kernels: int | None = None
    launches: int | None = None
    syncs: int | None = 0
    device_seconds: float | None = None
    waiting: dict[str, int] = field(default_factory=dict)
    by_file: Counter = field(default_factory=Counter)
    top: str = ""

    def wait(self, name: str) -> None:
        self.syncs += 1
        self.waiting[name] = self.waiting.get(name, 0) + 1


def _caller() -> str:
    """The file of bacon_fast whose line is at work; "backward" where autograd runs a derivative of torch's own."""
    frame, inside = sys._getframe(1), ""
    while frame is not None:
        if f"{os.sep}bacon_fast{os.sep}" in frame.f_code.co_filename:
            return inside or frame.f_code.co_filename.rpartition(f"{os.sep}bacon_fast{os.sep}")[2]
        if frame.f_code.co_qualname == "Tensor.backward":
            inside = "backward"
        frame = frame.f_back
    return inside or "elsewhere"


class _Dispatched(TorchDispatchMode):
    def __init__(self, counts: Counts) -> None:
        super().__init__()
        self.counts = counts

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if name not in VIEW_OPS | IDLE_OPS:
            self.counts.operations += 1
            self.counts.by_file[f"{_caller()} {name}"] += 1
        masks = name in INDEXING_OPS and any(i is not None and i.dtype in (torch.bool, torch.uint8) for i in args[1])
        if masks or name in WAITING_OPS:
            self.counts.wait(f"{name} by a mask" if masks else name)
        return func(*args, **(kwargs or {}))


class _Methods(TorchFunctionMode):
    """Counts copies to the host that the dispatcher does not see when the tensor is on the host already."""

    def __init__(self, counts: Counts) -> None:
        super().__init__()
        self.counts = counts

    def __torch_function__(self, func, types, args=(), kwargs=None):
        name = getattr(func, "__name__", "")
        if name in WAITING_METHODS:
            self.counts.wait(name)
        return func(*args, **(kwargs or {}))


class DispatchCounter(AbstractContextManager):
    """Counts on a CPU, in `counts`, the operations of this thread and of the backward passes it starts."""

    def __enter__(self) -> "DispatchCounter":
        self.counts = Counts(operations=0)
        self.stack = ExitStack()
        self.stack.enter_context(_Methods(self.counts))
        self.stack.enter_context(_Dispatched(self.counts))
        return self

    def __exit__(self, *exception) -> None:
        self.stack.__exit__(*exception)


class ProfilerCounter(AbstractContextManager):
    """Counts on a GPU, in `counts` once it is left."""

    def __enter__(self) -> "ProfilerCounter":
        activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
        torch.cuda.synchronize()
        self.profile = torch.profiler.profile(activities=activities, acc_events=True)
        self.profile.__enter__()
        self.stack = ExitStack()
        self.warned = self.stack.enter_context(warnings.catch_warnings(record=True))
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        self.stack.enter_context(torch.profiler.record_function(RANGE))
        return self

    def __exit__(self, *exception) -> None:
        self.stack.__exit__(None, None, None)
        torch.cuda.set_sync_debug_mode("default")
        torch.cuda.synchronize()
        self.profile.__exit__(*exception)
        self.counts = count_events(self.profile.events())
        # The allocator and the indexing kernels report themselves too, where they wait by other means.
        reported = sum("called a synchronizing CUDA operation" in str(warning.message) for warning in self.warned)
        if reported > self.counts.syncs:
            self.counts.waiting["reported by torch.cuda.set_sync_debug_mode"] = reported - self.counts.syncs
            self.counts.syncs = reported
        self.counts.top = self.profile.key_averages().table(sort_by="self_device_time_total", row_limit=10)


def count_events(events: Iterable) -> Counts:
    """Counts of a profile: host calls inside the range, and everything that ran on the device."""
    events = list(events)
    on_host = [event for event in events if event.device_type == torch.autograd.DeviceType.CPU]
    span = next(event.time_range for event in on_host if event.name == RANGE)
    counts = Counts(kernels=0, launches=0, device_seconds=0.0)
    for event in on_host:
        if not span.start <= event.time_range.start <= span.end:
            continue
        if event.name in WAITING_CALLS:
            counts.wait(event.name)
        counts.launches += event.name.startswith(LAUNCHING_CALLS)
    for event in events:
        # A range of the host, such as the optimizer's step, appears a second time on the device.
        if event.device_type == torch.autograd.DeviceType.CUDA and not event.is_user_annotation:
            counts.kernels += 1
            counts.device_seconds += (event.time_range.end - event.time_range.start) / 1e6
    return counts


def counter(device: torch.device) -> DispatchCounter | ProfilerCounter:
    return ProfilerCounter() if device.type == "cuda" else DispatchCounter()
