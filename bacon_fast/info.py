"""`python -m bacon_fast.info`: versions, devices, and which backends work here, with the reason where one does not."""

import importlib.metadata
import os
import platform

import torch

import bacon_fast
from bacon_fast.backends import BACKENDS, why_unavailable

PACKAGES = ("torch", "torchvision", "triton", "numpy", "pillow", "scikit-learn", "tyro")


def native_extension() -> str:
    """One line on `bacon_fast._C`."""
    try:
        from bacon_fast import _C
    except ImportError as error:
        return f"not built ({error}); run `make setup`"
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
        properties = torch.cuda.get_device_properties(index)
        memory = properties.total_memory / 2**30
        lines.append(
            f"  cuda:{index}        {properties.name}, sm_{properties.major}{properties.minor}, {memory:.0f} GiB"
        )
    if not torch.cuda.is_available():
        built = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "built without CUDA"
        lines.append(f"  cuda          none usable (torch is {built}; no device or driver found)")
    lines += [f"native extension: {native_extension()}", "backends"]
    for device in ("cpu", "cuda"):
        for name in BACKENDS:
            reason = why_unavailable(name, device)
            lines.append(f"  {name:<12}{device:<6}{'usable' if reason is None else f'not usable: {reason}'}")
    return "\n".join(lines)


if __name__ == "__main__":
    print(report())
