"""Speed of BatchNorm + LeakyReLU with the residual sum, forward and backward, at the 25 layers of WRN-28-2.

    python -m benchmarks.batchnorm --device cuda [--quick] [--only TEXT] [--images N] [--out FILE.csv]

The result decides `bacon_fast.ops.batch_norm.default_backend`: the fused kernels stay where they beat torch's own (on a
GPU cuDNN's), and torch.compile. Only correct arms are timed: outputs, gradients and running statistics of every arm are
compared with float64 first. Arms run in turns, in rounds; times are medians over the rounds with their 20th and 80th
percentile, ratios are medians of the ratios within the rounds. On a GPU a call is one of several in a CUDA graph, each
with tensors of its own, together too large for the L2 cache. "network" adds up the layers, each as often as the network
has it. Rows are added to benchmarks/results/batchnorm_DEVICE.csv.
"""

import argparse
import functools
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from bacon_fast import functional, reference
from benchmarks.common import (
    RESULTS,
    append_csv,
    graphed,
    median_ratio,
    print_table,
    provenance,
    quantile,
    time_interleaved,
)
from benchmarks.loss_arms import our_backends

MOMENTUM, EPS, SLOPE = 0.001, 1e-5, 0.1
# Error of a tensor relative to its own size, in the Frobenius norm: a few units in the last place.
TOLERANCES = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}
COLD_BYTES = 2**28  # several times the L2 cache of any card


class Layer(NamedTuple):
    """The input of a BatchNorm of WRN-28-2, whether it adds a residual first, and how many layers are like this one."""

    channels: int
    size: int
    residual: bool
    number: int

    @property
    def name(self) -> str:
        return f"{self.channels}x{self.size}x{self.size}{' + residual' if self.residual else ''}"


LAYERS = (
    Layer(16, 32, False, 1),
    Layer(32, 32, False, 4),
    Layer(32, 32, True, 4),
    Layer(64, 16, False, 4),
    Layer(64, 16, True, 4),
    Layer(128, 8, False, 4),
    Layer(128, 8, True, 4),
)


class Problem(NamedTuple):
    """Inputs and upstream gradients of a layer."""

    x: Tensor
    residual: Tensor | None
    weight: Tensor
    bias: Tensor
    running_mean: Tensor
    running_var: Tensor
    upstream: Tensor
    upstream_sum: Tensor | None


def problem(layer: Layer, images: int, dtype: torch.dtype, device: str, seed: int) -> Problem:
    g = torch.Generator(device).manual_seed(seed)

    def image() -> Tensor:
        shape = images, layer.channels, layer.size, layer.size
        values = torch.randn(shape, generator=g, device=device, dtype=torch.float32)
        return values.to(dtype, memory_format=torch.channels_last)

    def vector() -> Tensor:
        return torch.randn(layer.channels, generator=g, device=device)

    x, residual = image(), image() if layer.residual else None
    weight, bias = 1 + 0.1 * vector(), 0.1 * vector()
    upstream = image()
    # The LeakyReLU has no derivative at zero: next to it the arms may differ.
    z, _ = reference.batch_norm_act(x, weight, bias, None, None, None, residual, True, MOMENTUM, EPS, 1.0)
    upstream.masked_fill_(z.abs() < 1e-2, 0)
    statistics = torch.zeros_like(weight), torch.ones_like(weight)
    return Problem(x, residual, weight, bias, *statistics, upstream, image() if layer.residual else None)


Function = Callable[..., tuple[Tensor, Tensor]]


def torchs(
    x: Tensor, weight: Tensor, bias: Tensor, running_mean: Tensor, running_var: Tensor, residual: Tensor | None
) -> tuple[Tensor, Tensor]:
    """torch's own operations; compiled, the second arm."""
    numbers = MOMENTUM, EPS, SLOPE
    return reference.batch_norm_act(x, weight, bias, running_mean, running_var, None, residual, True, *numbers)


def ours(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    residual: Tensor | None,
    backend: str,
) -> tuple[Tensor, Tensor]:
    return functional.batch_norm_act(
        x,
        weight,
        bias,
        running_mean,
        running_var,
        residual=residual,
        momentum=MOMENTUM,
        eps=EPS,
        negative_slope=SLOPE,
        backend=backend,
    )


def both_ways(function: Function, data: Problem) -> Callable[[], tuple[Tensor, ...]]:
    """A call that returns outputs, gradients and the running statistics, which it updates."""
    statistics = data.running_mean.clone(), data.running_var.clone()
    leaves = [t.detach().requires_grad_() for t in (data.x, data.weight, data.bias)]
    residual = None if data.residual is None else data.residual.detach().requires_grad_()
    inputs = leaves if residual is None else [*leaves, residual]

    def call() -> tuple[Tensor, ...]:
        activated, total = function(*leaves, *statistics, residual)
        if residual is None:
            return activated, *torch.autograd.grad(activated, inputs, data.upstream), *statistics
        gradients = torch.autograd.grad((activated, total), inputs, (data.upstream, data.upstream_sum))
        return activated, total, *gradients, *statistics

    return call


def truth(data: Problem) -> tuple[Tensor, ...]:
    """The same in float64, on the sum as the arms round it to their dtype."""
    wide = data._replace(**{k: None if v is None else v.double() for k, v in data._asdict().items()})
    if data.residual is not None:
        wide = wide._replace(x=(data.x + data.residual).double(), residual=torch.zeros_like(wide.x))
    return both_ways(torchs, wide)()


def wrong(outputs: Sequence[Tensor], expected: Sequence[Tensor], tolerance: float) -> str | None:
    """Why an arm's outputs differ too much from float64; None if they do not."""
    for index, (output, value) in enumerate(zip(outputs, expected, strict=True)):
        error = ((output.detach().double() - value).norm() / value.norm()).item()
        if not error <= tolerance:
            return f"output {index} is off by {error:.1e}, allowed are {tolerance:.0e}"
    return None


def least_bytes(layer: Layer, images: int, dtype: torch.dtype) -> int:
    """The least that two passes forward and two backward read and write."""
    tensors = 5 + 6 if layer.residual else 3 + 5
    return tensors * images * layer.channels * layer.size**2 * dtype.itemsize


def arms_of(device: str) -> dict[str, Function]:
    arms: dict[str, Function] = {
        "torch" if device == "cpu" else "cuDNN": torchs,
        "torch.compile": torch.compile(torchs, fullgraph=True, dynamic=False),
    }
    for backend in our_backends("batch_norm_act", torch.empty(0, LAYERS[0].channels, 1, 1, device=device)):
        if device != "cpu" or backend != "triton":  # there it is interpreted
            arms[f"bacon_fast {backend}"] = functools.partial(ours, backend=backend)
    return arms


def measure(
    layer: Layer, images: int, dtype: torch.dtype, device: str, rounds: int
) -> tuple[dict[str, list[float]], dict[str, str], dict[str, str]]:
    """Seconds a call, one value an arm and round; how each arm was run; why an arm was not."""
    first = problem(layer, images, dtype, device, seed=0)
    size = first.x.numel() * dtype.itemsize * (7 if layer.residual else 4)
    copies = max(1, -(-COLD_BYTES // size)) if device == "cuda" else 1
    problems = [first] + [problem(layer, images, dtype, device, seed) for seed in range(1, copies)]
    expected = truth(first)
    calls, modes, reasons = {}, {}, {}
    for name, function in arms_of(device).items():
        if reason := wrong(both_ways(function, first)(), expected, TOLERANCES[dtype]):
            reasons[name] = f"WRONG: {reason}"
            continue
        several = [both_ways(function, data) for data in problems]

        def call(several: list[Callable] = several) -> None:
            for one in several:
                one()

        calls[name], modes[name] = call, "eager"
        if device == "cuda":
            try:
                calls[name], modes[name] = graphed(call), "graph"
            except RuntimeError:  # it cannot be captured: timed as it is
                torch.cuda.synchronize()
    samples = time_interleaved(calls, device, rounds=rounds)
    return {name: [s / copies for s in values] for name, values in samples.items()}, modes, reasons


def report(
    case: str,
    shape: str,
    dtype: torch.dtype,
    samples: dict[str, list[float]],
    modes: dict[str, str],
    reasons: dict[str, str],
    moved: int,
) -> list[dict]:
    """Prints the table of a case and returns its CSV rows."""
    print(f"\n{case}  {shape}  {str(dtype).removeprefix('torch.')}", flush=True)
    fused = next((name for name in samples if name.startswith("bacon_fast")), None)
    table, rows = [[name, reason, "", "", "", ""] for name, reason in reasons.items()], []
    for name, seconds in samples.items():
        microseconds = [1e6 * s for s in seconds]
        row = {
            "case": case,
            "shape": shape.replace(" ", ";"),
            "dtype": str(dtype).removeprefix("torch."),
            "arm": name,
            "mode": modes[name],
            "rounds": len(seconds),
            "median_us": round(statistics.median(microseconds), 2),
            "p20_us": round(quantile(microseconds, 0.2), 2),
            "p80_us": round(quantile(microseconds, 0.8), 2),
            "ratio_to_ours": round(median_ratio(seconds, samples[fused]), 3) if fused else "",
            "least_gb_per_s": round(moved / statistics.median(seconds) / 1e9, 1),
        }
        rows.append(row)
        spread = f"{row['p20_us']:.1f} .. {row['p80_us']:.1f}"
        ratio = f"{row['ratio_to_ours']:.2f}x" if fused else ""
        table.append([name, modes[name], f"{row['median_us']:.1f}", spread, ratio, f"{row['least_gb_per_s']:.0f}"])
    print_table(["arm", "", "median us", "p20 .. p80", "time / ours", "GB/s"], table)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    parser.add_argument("--quick", action="store_true", help="fewer rounds; on a GPU bf16 only, on a CPU 8 images")
    parser.add_argument("--only", default="", help="layers whose name contains this text")
    parser.add_argument("--images", type=int, help="images of a batch; 320, or 8 on a CPU with --quick")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", type=Path, help="CSV file to add to")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    on_cpu = options.device == "cpu"
    images = options.images or (8 if on_cpu and options.quick else 320)
    rounds = 7 if options.quick else 21
    out = options.out or RESULTS / f"batchnorm_{options.device}.csv"
    start = provenance(options.device)
    print(", ".join(f"{name} {value}" for name, value in start.items()))
    dtypes = [torch.float32] if on_cpu else [torch.bfloat16, torch.float16, torch.float32][: 1 if options.quick else 3]
    for dtype in dtypes:
        totals, moved, modes = {}, 0, {}
        complete = True
        for layer in LAYERS:
            if options.only not in layer.name:
                complete = False
                continue
            samples, modes, reasons = measure(layer, images, dtype, options.device, rounds)
            least = least_bytes(layer, images, dtype)
            rows = report(layer.name, f"N={images}", dtype, samples, modes, reasons, least)
            append_csv(out, [start | row for row in rows])  # at once: a time limit costs only the cases not done yet
            complete = complete and not reasons
            moved += layer.number * least
            for name, seconds in samples.items():
                known = totals.setdefault(name, [0.0] * rounds)
                totals[name] = [a + layer.number * b for a, b in zip(known, seconds)]
            torch.compiler.reset()
        if complete:
            number = sum(layer.number for layer in LAYERS)
            rows = report("network", f"N={images} layers={number}", dtype, totals, modes, {}, moved)
            append_csv(out, [start | row for row in rows])
    print(f"\nrows added to {out}")


if __name__ == "__main__":
    main()
