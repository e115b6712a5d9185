"""Compiles recorded launches into TRITON_CACHE_DIR as a launch on the GPU would: `python -m ....compile FILE`.

Triton's own just-in-time path makes the entries, on arguments that only look like tensors, so that their keys are those
that a launch on the GPU looks for.
"""

import os
import pickle
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace

os.environ["TRITON_STORE_BINARY_ONLY"] = "1"  # without the stages in between, which nobody reads

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver

from bacon_fast.kernels import aot

DTYPES = {name: dtype for dtype, name in aot.POINTERS.items()}


def pretend() -> None:
    """Gives Triton a driver of a Hopper GPU that is not there."""
    device, target = torch.device("cpu"), GPUTarget("cuda", 90, 32)
    driver.set_active(
        SimpleNamespace(
            get_current_device=lambda: 0,
            get_current_stream=lambda device: 0,
            get_current_target=lambda: target,
            get_active_torch_device=lambda: device,
        )
    )


def argument(kind: str, aligned: bool) -> object:
    """Something that Triton specializes on as on the argument that was recorded."""
    if kind in DTYPES:
        return SimpleNamespace(dtype=DTYPES[kind], data_ptr=lambda: 0 if aligned else 4)
    if kind == "fp32":
        return 0.5
    return (2**40 if kind == "i64" else 0) + (16 if aligned else 17)


def compile_launch(item: aot.Launch) -> None:
    kinds, constants = dict(item.signature), dict(item.constants)
    names = enumerate(item.kernel.arg_names)
    arguments = {n: constants[n] if n in constants else argument(kinds[n], i in item.aligned) for i, n in names}
    options = {"num_warps": item.num_warps, "num_stages": item.num_stages, "maxnreg": item.maxnreg}
    item.kernel.warmup(grid=(1,), **arguments, **options)


def main() -> None:
    pretend()
    rows = pickle.loads(Path(sys.argv[1]).read_bytes())
    launches = [aot.Launch(getattr(import_module(module), name), *rest) for module, name, *rest in rows]
    began = time.monotonic()
    with ThreadPoolExecutor(int(os.environ.get("MAX_JOBS", os.cpu_count() or 1))) as pool:
        for index, _ in enumerate(pool.map(compile_launch, launches), 1):
            if index % 50 == 0 or index == len(launches):
                print(f"{index} of {len(launches)} launches after {time.monotonic() - began:.0f} s", flush=True)


if __name__ == "__main__":
    main()
