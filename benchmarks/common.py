"""Shared by the benchmarks: commit and machine, timing in interleaved rounds, peak memory, CSV rows, a table."""

import csv
import ctypes
import datetime
import gc
import io
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from bacon_fast.engine.graph import Capture, CudaCapture

ROOT = Path(__file__).resolve().parents[1]
RESULTS = Path(__file__).resolve().parent / "results"
Call = Callable[[], object]


def commit() -> str:
    """The checked-out commit, with a "+" if tracked files differ from it; "unknown" outside a checkout."""

    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()

    try:
        return git("rev-parse", "--short", "HEAD") + ("+" if git("status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def machine(device: str) -> str:
    """Name of the processor that measures."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    names = {}
    if Path("/proc/cpuinfo").exists():
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            key, _, value = line.partition(":")
            names.setdefault(key.strip(), value.strip())
    name = names.get("model name") or platform.processor() or platform.machine()
    return f"{name} {torch.backends.cpu.get_cpu_capability()}"


def package_version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "none"


def provenance(device: str) -> dict[str, str | int]:
    """The columns that every row of every CSV starts with."""
    return {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "commit": commit(),
        "device": device,
        "machine": machine(device),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": package_version("torch"),
        "triton": package_version("triton"),
    }


def quantile(values: Sequence[float], share: float) -> float:
    """The value that ``share`` of the sorted values lie below, between neighbors linearly."""
    ordered = sorted(values)
    place = share * (len(ordered) - 1)
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (place - low) * (ordered[high] - ordered[low])


def median_ratio(numerator: Sequence[float], denominator: Sequence[float]) -> float:
    """Median over the rounds of the ratio within each: a slow round slows both arms."""
    return statistics.median(a / b for a, b in zip(numerator, denominator))


class Replay:
    """A call that was captured once and is replayed from then on.

    A graph holds addresses and not tensors: what the call reads, and what it returned, lives as long as the replay.
    """

    def __init__(self, call: Call, capture: Capture) -> None:
        self._call = call
        self._replay, self._result = capture(call)

    def __call__(self) -> object:
        """The results of this replay, in the same tensors every time."""
        self._replay()
        return self._result


def graphed(call: Call) -> Call:
    """The call as one CUDA graph launch. Raises RuntimeError if it cannot be captured."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
        replay = Replay(call, CudaCapture())
    torch.cuda.current_stream().wait_stream(stream)
    return replay


def _time_calls(call: Call, count: int, device: str) -> float:
    """Seconds a call, of ``count`` in a row."""
    if device == "cuda":
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        for _ in range(count):
            call()
        stop.record()
        stop.synchronize()
        return start.elapsed_time(stop) / 1e3 / count
    began = time.perf_counter()
    for _ in range(count):
        call()
    return (time.perf_counter() - began) / count


def time_interleaved(
    arms: dict[str, Call], device: str, *, rounds: int, slice_seconds: float = 0.03
) -> dict[str, list[float]]:
    """Seconds a call, one value an arm and round. In every round every arm runs for about ``slice_seconds``.

    The first call of a slice, on another arm's caches, is not timed. A round starts with another arm each time.
    """
    counts = {}
    for name, call in arms.items():
        for _ in range(2):  # compile, allocate, choose kernels
            call()
        single = _time_calls(call, 1, device)
        counts[name] = max(1, min(1000, round(slice_seconds / single)))
    samples: dict[str, list[float]] = {name: [] for name in arms}
    names = list(arms)
    gc.collect()
    gc.disable()
    try:
        for index in range(rounds):
            for name in names[index % len(names) :] + names[: index % len(names)]:
                arms[name]()
                samples[name].append(_time_calls(arms[name], counts[name], device))
            gc.collect()
    finally:
        gc.enable()
    return samples


def _resident(field: str) -> int:
    """VmRSS or VmHWM, the resident memory of this process now or at its peak, in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}")


def peak_memory(call: Call, device: str) -> int:
    """Bytes that a call needs at its peak, beyond what is held before it, after two calls to warm up.

    On a CPU that is resident memory, and only right in a fresh process with one thing in it: what an allocator keeps
    of earlier work is used again unseen.
    """
    for _ in range(2):
        call()
    gc.collect()
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the peak is now the current memory
    before = _resident("VmRSS")
    call()
    return _resident("VmHWM") - before


def append_csv(path: Path, rows: list[dict]) -> None:
    """Adds rows to a CSV file, which is never seen half written. Raises ValueError if its columns are others."""
    columns = list(rows[0])
    text = path.read_text() if path.exists() else ""
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, columns, lineterminator="\n")
    if not text:
        writer.writeheader()
    elif text.splitlines()[0].split(",") != columns:
        raise ValueError(f"{path}: expected the columns {','.join(columns)}, found {text.splitlines()[0]}")
    writer.writerows(rows)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text + buffer.getvalue())
    os.replace(temporary, path)


def print_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Columns as wide as their widest cell, the first one flush left."""
    widths = [max(len(line[i]) for line in [header, *rows]) for i in range(len(header))]
    for line in [header, *rows]:
        cells = [
            cell.ljust(width) if i == 0 else cell.rjust(width) for i, (cell, width) in enumerate(zip(line, widths))
        ]
        print("  ".join(cells), flush=True)
