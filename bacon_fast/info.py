"""`bacon-fast info`: versions, devices, and which backends work here, with the reason where one does not."""

import importlib.metadata
import os
import platform
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec

import torch
import tyro

import bacon_fast
import bacon_fast.ops  # registers the operations' backends
from bacon_fast.ops import backends
from bacon_fast.system import usable_cores

PACKAGES = ("torch", "torchvision", "triton", "numpy", "pillow", "scikit-learn", "tyro")


# What every operation's `why_not` can judge: a batch of images, which has columns, like the batches of vectors.
PROBE = (0, 32, 32, 3)


@dataclass(frozen=True)
class Arguments:
    """Print versions, devices, and which backends work here, with the reason where one does not."""


def native_extension() -> str:
    """One line on `bacon_fast._C`: how it was built, or what is missing."""
    if find_spec("bacon_fast._C") is None:
        compiler = os.environ.get("CXX", "c++")
        missing = f"the C++ compiler {compiler!r} is not there; install one, then" if not shutil.which(compiler) else ""
        return f"not built, operations are slower: {missing or 'to see why,'} run `python setup.py build_ext --inplace`"
    if backends.native_error is not None:
        return f"{backends.native_error}; run `make setup`, or `pip install` again"
    from bacon_fast import _C

    cuda = "with CUDA" if _C.built_with_cuda else "without CUDA (`BACON_FAST_CUDA=1 make setup` compiles it)"
    return f"built, {cuda}" + ("" if _C.built_with_openmp else ", without OpenMP: one thread an operation")


def report() -> str:
    """The text this module prints."""
    lines = [f"bacon_fast {bacon_fast.__version__}, Python {platform.python_version()}, {platform.platform()}"]
    for name in PACKAGES:
        try:
            lines.append(f"  {name:<14}{importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            lines.append(f"  {name:<14}not installed")
    cores = usable_cores()
    lines += ["devices", f"  cpu           {cores} cores usable, {torch.backends.cpu.get_cpu_capability()}"]
    for index in range(torch.cuda.device_count()):
        device = torch.cuda.get_device_properties(index)
        memory = device.total_memory / 2**30
        lines.append(f"  cuda:{index}        {device.name}, sm_{device.major}{device.minor}, {memory:.0f} GiB")
    if not torch.cuda.is_available():
        built = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "built without CUDA"
        lines.append(f"  cuda          none usable (torch is {built}; no device or driver found)")
    if torch.backends.mps.is_available():
        lines.append("  mps           not used: it has no float64, which the random draws need; runs use the cpu")
    lines.append(f"native extension: {native_extension()}")
    devices = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    for device in devices:
        lines.append(f"backends on {device}, the preferred one first")
        for operation, table in backends.BACKENDS.items():
            probe = torch.empty(PROBE, device=device)
            reasons = {name: backend.why_not(probe) for name, backend in table.items()}
            usable = [name for name, reason in reasons.items() if reason is None]
            lines.append(f"  {operation:<20}{', '.join(usable)}")
            lines += [f"    not {name}: {reason}" for name, reason in reasons.items() if reason is not None]
    return "\n".join(lines)


def main(args: Sequence[str] | None = None) -> None:
    """The command, with these words or those of the process."""
    tyro.cli(Arguments, prog="bacon-fast info", args=args)
    print(report())


if __name__ == "__main__":
    main()
