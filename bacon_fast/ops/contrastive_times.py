"""Which GPU backend of the contrastive family is expected to be the fastest one: from times of problems like it.

The table contrastive_times.csv has microseconds, forward and backward. `benchmarks.loss --times FILE` writes measured
rows, with the name of the card. The rows that come with the package are predictions (docs/gpu_design.md) and say so:
they are asked only for cards, and kinds of numbers, that no row was measured for.
"""

import csv
import functools
import math
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

TABLE = Path(__file__).with_name("contrastive_times.csv")
SOURCES = ("measured", "predicted")


class Time(NamedTuple):
    """One row of the table. ``numbers``: what is multiplied, "float32", "tf32" or "half"."""

    source: str
    card: str
    numbers: str
    rows: int
    columns: int
    dim: int
    backend: str
    us: float

    def distance(self, rows: int, columns: int, dim: int) -> float:
        """How far its shape is from another one, in doublings."""
        pairs = (self.rows, rows), (self.columns, columns), (self.dim, dim)
        return sum(abs(math.log2(own / max(other, 1))) for own, other in pairs)


def read_times(path: Path = TABLE) -> list[Time]:
    """The rows of a table. Raises ValueError if one is not such a row."""
    with path.open(newline="") as file:
        lines = list(csv.reader(file))
    if not lines or tuple(lines[0]) != Time._fields:
        raise ValueError(
            f"{path}: expected the columns {','.join(Time._fields)}, found {','.join(lines[0] if lines else [])}"
        )
    try:
        found = [Time(*line[:3], *map(int, line[3:6]), line[6], float(line[7])) for line in lines[1:]]
    except (ValueError, IndexError) as error:
        raise ValueError(
            f"{path}: expected rows of {','.join(Time._fields)}, found one that is not: {error}"
        ) from error
    if wrong := [time for time in found if time.source not in SOURCES or min(time[3:6]) < 1]:
        raise ValueError(f"{path}: expected a source of {', '.join(SOURCES)} and sizes above 0, found {wrong[0]}")
    return found


def numbers_of(dtype: torch.dtype, tf32: bool) -> str:
    """The ``numbers`` of vectors of a dtype; float64 counts as float32."""
    if dtype.itemsize == 2:
        return "half"
    return "tf32" if tf32 and dtype == torch.float32 else "float32"


def fastest(times: list[Time], card: str, numbers: str, rows: int, columns: int, dim: int) -> str | None:
    """Backend of the least time among those of the nearest shape; None if the table has none."""
    times = [time for time in times if time.numbers == numbers]
    measured = [time for time in times if time.source == "measured" and time.card == card]
    if not (known := measured or [time for time in times if time.source == "predicted"]):
        return None
    nearest = min(time.distance(rows, columns, dim) for time in known)
    return min(
        (time for time in known if time.distance(rows, columns, dim) == nearest), key=lambda time: time.us
    ).backend


@functools.cache
def _fastest_here(device: torch.device, numbers: str, rows: int, columns: int, dim: int) -> str | None:
    return fastest(_shipped(), torch.cuda.get_device_name(device), numbers, rows, columns, dim)


@functools.cache
def _shipped() -> list[Time]:
    return read_times()


def fastest_on_gpu(vectors: Tensor, columns: int) -> str | None:
    """The backend to prefer for rows [R,D] against so many columns.

    None, no preference, on a CPU, and under torch.compile, which may not know the sizes.
    """
    if not vectors.is_cuda or torch.compiler.is_compiling():
        return None
    numbers = numbers_of(vectors.dtype, torch.backends.cuda.matmul.fp32_precision == "tf32")
    return _fastest_here(vectors.device, numbers, vectors.shape[0], columns, vectors.shape[1])
