"""Compiles every Triton kernel for GPUs that this machine need not have, and prints the cost of each.

    python -m bacon_fast.kernels.aot [--arch 80 90] [--only NAME]

The launchers themselves choose the configurations: they run on tensors without storage, and their launches are compiled
ahead of time instead of run. Fails if a kernel spills registers to local memory, needs more shared memory than a
program may have, or multiplies many vectors on a Hopper GPU without HGMMA, the instruction of whole warp groups
(wgmma), which is several times as fast as HMMA. Both are counted in the machine code, as nvdisasm shows it.
"""

import argparse
import functools
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from importlib import import_module
from pathlib import Path
from pkgutil import iter_modules
from typing import NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from . import launch
from .bacon_step_design import DESIGNS
from .contrastive_backward import contrastive_backward
from .contrastive_forward import contrastive_forward

SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024, 120: 99 * 1024}  # bytes a program may have
POINTERS = {
    torch.float64: "*fp64",
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.int64: "*i64",
    torch.int32: "*i32",
    torch.uint8: "*u8",
    torch.bool: "*i1",
}


class Launch(NamedTuple):
    """A kernel with all that decides its machine code: equal launches compile to the same."""

    kernel: object
    signature: tuple[tuple[str, str], ...]
    constants: tuple[tuple[str, object], ...]
    aligned: tuple[int, ...]
    num_warps: int
    num_stages: int
    maxnreg: int | None


class Usage(NamedTuple):
    """Cost of one program: registers a thread, bytes of local memory a thread, bytes of shared memory.

    Also the products in its machine code: HGMMA, of a group of four warps, and HMMA, of one warp.
    """

    registers: int
    local: int
    shared: int
    hgmma: int = 0
    hmma: int = 0

    def fits(self, arch: int) -> bool:
        return self.local == 0 and self.shared <= SHARED_LIMIT[arch]


def describe(kernel, arguments, constants, num_warps: int, num_stages: int, maxnreg: int | None) -> Launch:
    """The properties on which Triton's compiler specializes: dtypes, None, the number 1, multiples of 16."""
    signature, values, aligned = {}, {}, []
    for index, name in enumerate(kernel.arg_names):
        value = constants[name] if name in constants else arguments[index]
        if name in constants or value is None or (isinstance(value, int) and value == 1):
            signature[name], values[name] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            signature[name] = POINTERS[value.dtype]
            if value.storage_offset() * value.element_size() % 16 == 0:
                aligned.append(index)
        elif isinstance(value, float):
            signature[name] = "fp32"
        else:
            signature[name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            if value % 16 == 0:
                aligned.append(index)
    return Launch(
        kernel, tuple(signature.items()), tuple(values.items()), tuple(aligned), num_warps, num_stages, maxnreg
    )


def record(run: Callable[[], None]) -> list[Launch]:
    """The distinct launches of ``run``, none of which is executed."""
    launches: dict[Launch, None] = {}
    launch.recorder = lambda *launched: launches.setdefault(describe(*launched))
    try:
        run()
    finally:
        launch.recorder = None
    return list(launches)


def compile_for(item: Launch, arch: int) -> Usage:
    source = ASTSource(
        fn=item.kernel,
        signature=dict(item.signature),
        constexprs=dict(item.constants),
        attrs={(index,): [["tt.divisibility", 16]] for index in item.aligned},
    )
    options = {"num_warps": item.num_warps, "num_stages": item.num_stages, "maxnreg": item.maxnreg}
    compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    tools = Path(triton.__file__).parent / "backends/nvidia/bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        commands = [tools / "cuobjdump", "--dump-resource-usage"], [tools / "nvdisasm", "-c"]
        dump, code = (
            subprocess.run([*command, file.name], check=True, capture_output=True, text=True).stdout
            for command in commands
        )
    usage = dict(re.findall(r"\b(REG|STACK|LOCAL):(\d+)", dump))
    products = Counter(re.findall(r"\b(HGMMA|HMMA)\.", code))
    local = int(usage["STACK"]) + int(usage["LOCAL"])
    return Usage(int(usage["REG"]), local, compiled.metadata.shared, products["HGMMA"], products["HMMA"])


def contrastive(
    arch: int,
    rows: int,
    dim: int,
    dtype: torch.dtype,
    *,
    columns: int = 0,
    own: int = 0,
    codes: int = 0,
    groups: int = 0,
    detached: bool = False,
    precision: str = "tf32x3",
    form: str = "mean",
    match: str = "positive",
) -> None:
    """Forward and backward of one instance of the family; ``columns=0``: the rows are the columns."""
    meta = functools.partial(torch.empty, device="meta")
    row = functools.partial(meta, rows, dtype=launch.accumulator_dtype(dtype))
    index = functools.partial(meta, dtype=torch.int32)
    arguments = (
        meta(rows, dim, dtype=dtype),
        meta(columns, dim, dtype=dtype) if columns else None,
        meta(rows, own, dim, dtype=dtype) if own else None,
        index(rows),
        index(columns or rows, codes) if codes else None,
        index(rows) if form == "mean" else None,
        row(),
        meta(rows, own, dtype=row().dtype) if own else None,
        row(),
        row() if form == "prod" else None,
        row() if groups else None,
        index(rows) if groups else None,
        groups,
    )
    options = {
        "form": form,
        "match": match,
        "floor": 1e-8 if groups else 0.0,
        "eps": 1e-8,
        "input_precision": precision,
        "arch": arch,
    }
    _, *saved = contrastive_forward(*arguments, **options, keep_mean=detached)
    needs = {"needs_rows": True, "needs_columns": not detached, "needs_own": bool(own) and not groups}
    contrastive_backward(row(), *saved, *arguments, **options, **needs)


def step(
    arch: int, rows: int, dim: int, num_classes: int, dtype: torch.dtype, precision: str, design: str = "phases"
) -> None:
    """One step of BaCon with its bank, a third of the rows labeled."""
    meta = functools.partial(torch.empty, device="meta")
    index = functools.partial(meta, dtype=torch.int64)
    flag = functools.partial(meta, dtype=torch.bool)
    batch, slots = rows // 3, 12_000
    DESIGNS[design](
        meta(rows, dim, dtype=dtype),
        index(batch),
        meta(rows, num_classes, dtype=dtype),
        index(batch),
        index(rows - batch),
        meta(()),
        meta(slots, dim),
        flag(slots),
        index(slots),
        index(num_classes),
        index(num_classes, dim),
        index(num_classes),
        meta(num_classes, dim),
        flag(num_classes),
        num_labeled=slots // 3,
        temperature=0.1,
        bta=0.005,
        min_temperature=0.0,
        negative_weight=64.0,
        neg_mode="authors",
        top_k=3,
        reliable_threshold=0.98,
        count_threshold=0.95,
        count_gate="prob",
        labeled_counts="always",
        input_precision=precision,
        arch=arch,
    )


_BACON = {"own": 1, "codes": 3, "form": "sum", "match": "ignore"}
_QUEUE = {"own": 1, "form": "sum", "detached": True}
# The losses at the shapes of a training and of benchmarks/loss.py.
INSTANCES = {
    "bacon-192x32": {"rows": 192, "dim": 32, "groups": 10} | _BACON,
    "bacon-1024x64": {"rows": 1024, "dim": 64, "groups": 100} | _BACON,
    "bacon-3584x64": {"rows": 3584, "dim": 64, "groups": 100} | _BACON,
    "bacon-7168x128": {"rows": 7168, "dim": 128, "groups": 1000} | _BACON,
    "ssc-1060x64": {"rows": 1060, "dim": 64, "codes": 1},
    "ssc-4096x128": {"rows": 4096, "dim": 128, "codes": 1},
    "nt-xent-256x128": {"rows": 256, "dim": 128, "codes": 1},
    "infonce-192x65536x128": {"rows": 192, "dim": 128, "columns": 65536} | _QUEUE,
    "infonce-4096x65536x128": {"rows": 4096, "dim": 128, "columns": 65536} | _QUEUE,
    "infonce-256x4096x512": {"rows": 256, "dim": 512, "columns": 4096} | _QUEUE,
    "sscl-256x65536x64": {"rows": 256, "dim": 64, "columns": 65536} | _QUEUE | {"own": 4, "form": "prod"},
    "supcon-memory-512x8192x256": {"rows": 512, "dim": 256, "columns": 8192, "codes": 1},
    "supcon-1024x256": {"rows": 1024, "dim": 256, "codes": 1},
    "supcon-1024x512": {"rows": 1024, "dim": 512, "codes": 1},
}
PRODUCTS = ("_statistics_kernel", "_gradient_kernel")


def lacks_hgmma(names: list[str], item: Launch, arch: int, usage: Usage) -> bool:
    """Whether the launch multiplies many vectors of a usual length, but not by warp groups, which Hopper GPUs have."""
    shapes = [shape for name, shape in INSTANCES.items() if any(subject.startswith(f"{name}-") for subject in names)]
    large = any(shape["rows"] >= 1024 and shape["dim"] <= 128 for shape in shapes)
    return arch == 90 and large and item.kernel.__name__ in PRODUCTS and usage.hgmma == 0


def subjects() -> dict[str, Callable[[int], None]]:
    """Name -> what to compile at the shapes of a training: the losses below, and every kernel file's `aot_subjects`."""
    found = {}
    kinds = {
        "float32": (torch.float32, "tf32x3"),
        "float32-tf32": (torch.float32, "tf32"),
        "bfloat16": (torch.bfloat16, "tf32"),
        "float16": (torch.float16, "tf32"),
    }
    for name, (dtype, precision) in kinds.items():
        run = functools.partial(contrastive, dtype=dtype, precision=precision)
        for instance, shape in INSTANCES.items():
            found[f"{instance}-{name}"] = functools.partial(run, **shape)
        for rows, dim, num_classes in ((192, 16, 10), (192, 32, 10), (192, 64, 100), (1024, 128, 1000)):
            for design in DESIGNS:
                found[f"bacon-step-{design}-{rows}x{dim}x{num_classes}-{name}"] = functools.partial(
                    step, rows=rows, dim=dim, num_classes=num_classes, dtype=dtype, precision=precision, design=design
                )
    for module in iter_modules([str(Path(__file__).parent)]):
        of_kernel = import_module(f".{module.name}", __package__)
        found |= getattr(of_kernel, "aot_subjects", dict)()
    return found


def measure(names: list[str], archs: list[int]) -> Iterator[tuple[list[str], int, Launch, Usage]]:
    """(subjects, architecture, launch, usage), every distinct launch once an architecture."""
    available = subjects()
    work: dict[tuple[Launch, int], list[str]] = {}
    for arch in archs:
        for name in names:
            for item in record(functools.partial(available[name], arch)):
                work.setdefault((item, arch), []).append(name)
    with ThreadPoolExecutor() as pool:
        for (item, arch), usage in zip(work, pool.map(lambda key: compile_for(*key), work)):
            yield work[item, arch], arch, item, usage


def _tile(item: Launch) -> str:
    """Vectors that a program of the contrastive family keeps, and those that it reads at a time."""
    constants = dict(item.constants)
    sizes = [str(constants[f"BLOCK_{axis}"]) for axis in "RCXY" if f"BLOCK_{axis}" in constants]
    return "x".join(sizes) if item.kernel.__name__ in PRODUCTS else ""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--arch", type=int, nargs="+", default=list(SHARED_LIMIT), choices=list(SHARED_LIMIT))
    parser.add_argument("--only", default="", help="subjects whose name contains this")
    options = parser.parse_args()
    names = [name for name in subjects() if options.only in name]
    failures = 0
    columns = [("arch", 5), ("warps", 6), ("tile", 9), ("regs", 5), ("local", 6), ("shared", 8), ("HGMMA", 6)]
    columns += [("HMMA", 6)]
    print(f"{'kernel':24}" + "".join(f"{name:>{width}}" for name, width in columns) + "  first needed by")
    for subjects_of_it, arch, item, usage in measure(names, options.arch):
        wrong = "" if usage.fits(arch) else "  <-- does not fit"
        if lacks_hgmma(subjects_of_it, item, arch, usage):
            wrong += "  <-- no HGMMA"
        failures += wrong != ""
        values = arch, item.num_warps, _tile(item), *usage
        cells = "".join(f"{value:>{width}}" for value, (_, width) in zip(values, columns))
        print(f"{item.kernel.__name__.strip('_'):24}{cells}  {subjects_of_it[0]}{wrong}", flush=True)
    print(f"{failures} do not do" if failures else "all fit: nothing spills, shared memory is within the limits")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
