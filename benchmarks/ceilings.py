"""The best that the machine can do: the denominators for every "share of the roof". One CSV row a measurement.

    python -m benchmarks.ceilings --device cuda
    python -m benchmarks.ceilings --device cpu

Copies count the bytes read and written. The matrix product has random operands: on zeros the same hardware is faster.
The gap between kernels is the time a node of a CUDA graph takes when its kernel has next to nothing to do.
"""

import argparse
import statistics
from collections.abc import Callable
from pathlib import Path

import torch

from benchmarks.common import RESULTS, append_csv, graphed, print_table, provenance, quantile, time_interleaved

# Bytes of one operand, side of the product, its dtype, kernels in the graph.
SIZES = {"cuda": (4_300_000_000, 10_500_000, 8192, torch.bfloat16), "cpu": (256_000_000, 500_000, 1024, torch.float32)}
NODES = 1000


def copy_call(size: int, device: str) -> Callable[[], object]:
    """A copy of random bytes."""
    source = torch.randint(256, (size,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return lambda: target.copy_(source)


def product_call(side: int, dtype: torch.dtype, device: str) -> Callable[[], object]:
    """A square matrix product."""
    a, b = (torch.randn(side, side, dtype=dtype, device=device) for _ in range(2))
    out = torch.empty_like(a)
    return lambda: torch.mm(a, b, out=out)


def nodes_call(device: str) -> Callable[[], object]:
    """A graph of kernels that wait for each other and write one element."""
    cell = torch.zeros(1, device=device)

    def call() -> None:
        for _ in range(NODES):
            cell.add_(1)

    return graphed(call)


def measurements(device: str) -> dict[str, tuple[Callable[[], object], float, str]]:
    """By name: the call, how much of the unit it is, and the unit."""
    large, small, side, dtype = SIZES[device]
    cases = {
        f"copy, {2 * large / 1e9:.1f} GB read and written": (copy_call(large, device), 2 * large / 1e9, "GB/s"),
        f"copy in the cache, {2 * small / 1e6:.0f} MB": (copy_call(small, device), 2 * small / 1e9, "GB/s"),
        f"{side}x{side}x{side} product, {str(dtype).removeprefix('torch.')}": (
            product_call(side, dtype, device),
            2 * side**3 / 1e12,
            "TFLOP/s",
        ),
    }
    if device == "cuda":
        cases["node of a graph with an empty kernel"] = (nodes_call(device), NODES, "us")
    return cases


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", type=Path, help="CSV file to append to; default results/ceilings_DEVICE.csv")
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: this machine has no usable CUDA device")
    torch.set_num_threads(options.threads)
    cases = measurements(options.device)
    samples = time_interleaved({name: case[0] for name, case in cases.items()}, options.device, rounds=options.rounds)
    start, rows = provenance(options.device), []
    for name, (_, amount, unit) in cases.items():
        values = [1e6 * s / amount if unit == "us" else amount / s for s in samples[name]]
        low, high = (quantile(values, share) for share in (0.25, 0.75))
        figures = {"median": statistics.median(values), "q25": low, "q75": high}
        rows.append(start | {"ceiling": name, "unit": unit, "rounds": options.rounds} | _rounded(figures))
    columns = ("ceiling", "median", "q25", "q75", "unit")
    print_table(columns, [[str(row[column]) for column in columns] for row in rows])
    append_csv(options.out or RESULTS / f"ceilings_{options.device}.csv", rows)


def _rounded(values: dict[str, float]) -> dict[str, float]:
    """Four significant digits."""
    return {name: float(f"{value:.4g}") for name, value in values.items()}


if __name__ == "__main__":
    main()
