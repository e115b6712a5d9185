"""`python -m bacon_fast.info`: versions, devices, and which backends work here, with the reason where one does not."""

import importlib.metadata
import os
import platform

import torch

import bacon_fast
import bacon_fast.ops  # registers the operations' backends
from bacon_fast.ops import backends

PACKAGES = ("torch", "torchvision", "triton", "numpy", "pillow", "scikit-learn", "tyro")


def native_extension() -> str:
    """One line on `bacon_fast._C`."""
    if backends.native_error is not None:
        return f"{backends.native_error}; run `make setup`"
    from bacon_fast import _C

    return "built, with CUDA" if _C.built_with_cuda else "built, without CUDA (no nvcc, or BACON_FAST_CUDA=0)"


def report() -> str:
    """The text this module prints."""
    lines = [f"bacon_fast {bacon_fast.__version__}, Python {platform.python_version()}, {platform.platform()}"]
    for name in PACKAGES:
        try:
            lines.append(f"  {name:<14}{importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            lines.append(f"  {name:<14}not installed")
    cores = len(os.sched_getaffinity(0))
    lines += ["devices", f"  cpu           {cores} cores usable, {torch.backends.cpu.get_cpu_capability()}"]
    for index in range(torch.cuda.device_count()):
        device = torch.cuda.get_device_properties(index)
        memory = device.total_memory / 2**30
        lines.append(f"  cuda:{index}        {device.name}, sm_{device.major}{device.minor}, {memory:.0f} GiB")
    if not torch.cuda.is_available():
        built = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "built without CUDA"
        lines.append(f"  cuda          none usable (torch is {built}; no device or driver found)")
    lines.append(f"native extension: {native_extension()}")
    devices = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    for device in devices:
        lines.append(f"backends on {device}, the preferred one first")
        for operation, table in backends.BACKENDS.items():
            probe = torch.empty(0, 1, device=device)
            reasons = {name: backend.why_not(probe) for name, backend in table.items()}
            usable = [name for name, reason in reasons.items() if reason is None]
            lines.append(f"  {operation:<20}{', '.join(usable)}")
            lines += [f"    not {name}: {reason}" for name, reason in reasons.items() if reason is not None]
    return "\n".join(lines)


if __name__ == "__main__":
    print(report())
