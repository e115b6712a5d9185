"""Speed and memory of the contrastive losses, forward and backward, against what people write without them.

    python -m benchmarks.loss --device cpu [--quick] [--only TEXT] [--threads N] [--out FILE.csv]

Only correct arms are timed: every arm's loss and gradient (and, of a whole step, class centers) are compared
with float64 first, and an arm that is off gets no speed. Arms run in turns, in rounds; times are medians over the
rounds with their 20th and 80th percentile, ratios are medians of the ratios within the rounds. On a GPU an arm is
replayed as a CUDA graph where it can be captured. Rows are added to benchmarks/results/loss_DEVICE.csv.
"""

import argparse
import functools
import json
import statistics
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from bacon_fast import functional, reference
from bacon_fast.ops.bacon_step import fuses_bacon_step
from benchmarks.common import (
    RESULTS,
    append_csv,
    graphed,
    median_ratio,
    package_version,
    peak_memory,
    print_table,
    provenance,
    quantile,
    time_interleaved,
)
from benchmarks.loss_arms import (
    TEMPERATURE,
    TOP_K,
    BaConBatch,
    bacon_batch,
    bacon_class_loop,
    bacon_ours,
    bacon_vectorized,
    class_loop_step,
    fused_step,
    info_nce_vectorized,
    loss_call,
    our_backends,
    our_step,
    sup_con_vectorized,
    vectorized_step,
)

LOSS_TOLERANCE, GRADIENT_TOLERANCE = 1e-5, 1e-4  # relative; the gradient's to its largest element
Outputs = tuple[Tensor, ...]


@dataclass(frozen=True)
class Case:
    """One problem: its arms by name, each built on request, and its result in float64."""

    name: str
    shape: str
    arms: dict[str, Callable[[], Callable[[], Outputs]]]
    truth: Callable[[], Outputs]
    # What an arm may need at its peak, in bytes, where that is known to be much.
    needs: dict[str, int]


def reference_bacon(features, labels, logits, centers, reliable, class_counts, progress) -> Tensor:
    return reference.bacon_loss(
        features, labels, logits[labels.shape[0] :], centers, reliable, class_counts, progress=progress
    )


def bacon_cases(rows: int, num_classes: int, dim: int, device: str) -> list[Case]:
    """The loss alone, and the whole step with counts, bank and centers."""

    def batch() -> BaConBatch:
        return bacon_batch(rows, num_classes, dim).to(device, torch.float32)

    def truth_batch() -> BaConBatch:
        return bacon_batch(rows, num_classes, dim).to("cpu", torch.float64)

    backends = our_backends("bacon_loss", torch.empty(0, 1, device=device))
    compiled = torch.compile(bacon_vectorized, fullgraph=True, dynamic=False)
    loss_arms = {
        "class loop": lambda: loss_call(bacon_class_loop, batch()),
        "eager": lambda: loss_call(bacon_vectorized, batch()),
        "torch.compile": lambda: loss_call(compiled, batch()),
    } | {f"bacon_fast {name}": lambda name=name: loss_call(bacon_ours(name), batch()) for name in backends}
    step_arms = {
        "class loop": lambda: class_loop_step(batch()),
        "eager": lambda: vectorized_step(batch(), compiled=False),
        "torch.compile": lambda: vectorized_step(batch(), compiled=True),
    }
    sizes = torch.empty(rows, dim, device=device), torch.empty(rows, num_classes, device=device)
    if fuses_bacon_step(None, *sizes, TOP_K):
        from bacon_fast.kernels.bacon_step_design import DESIGNS

        step_arms |= {f"bacon_fast fused, {name}": lambda name=name: fused_step(batch(), name) for name in DESIGNS}
    step_arms |= {f"bacon_fast {name}": lambda name=name: our_step(batch(), name) for name in backends}
    # The loop keeps four arrays of anchors x negatives x features for the backward.
    classes = bacon_batch(rows, num_classes, dim).logits.argmax(dim=1)
    pairs = int(torch.bincount(classes).sum()) * rows
    needs = {"class loop": 4 * 4 * pairs * dim}
    shape = f"R={rows} K={num_classes} D={dim}"
    return [
        Case("bacon loss", shape, loss_arms, lambda: loss_call(reference_bacon, truth_batch())(), needs),
        Case("bacon step", shape, step_arms, lambda: vectorized_step(truth_batch(), compiled=False)(), needs),
    ]


def pair_case(
    name: str,
    shape: str,
    leaves: Callable[[], list[Tensor]],
    plain: Callable[..., Tensor],
    ours: Callable[..., Tensor],
    device: str,
    peer: Callable[..., Tensor] | None = None,
) -> Case:
    """A loss of some tensors, of which the first gets the gradient."""

    def prepared(loss: Callable, on: str, dtype: torch.dtype) -> Callable[[], Outputs]:
        tensors = [tensor.to(on, dtype if tensor.is_floating_point() else None, copy=True) for tensor in leaves()]
        tensors[0].requires_grad_()

        def call() -> Outputs:
            value = loss(*tensors)
            return value, torch.autograd.grad(value, tensors[0])[0]

        return call

    build = functools.partial(functools.partial, prepared, on=device, dtype=torch.float32)
    arms = {"eager": build(plain), "torch.compile": build(torch.compile(plain, fullgraph=True, dynamic=False))}
    if peer is not None:
        arms["metric-learning"] = build(peer)
    for backend in our_backends("contrastive", torch.empty(0, 1, device=device)):
        arms[f"bacon_fast {backend}"] = build(functools.partial(ours, backend=backend))
    return Case(name, shape, arms, prepared(plain, "cpu", torch.float64), {})


def sup_con_case(rows: int, dim: int, num_classes: int, device: str) -> Case:
    def leaves() -> list[Tensor]:
        generator = torch.Generator().manual_seed(0)
        labels = torch.randint(0, num_classes, (rows,), generator=generator)
        centers = torch.randn(num_classes, dim, generator=generator)
        return [centers[labels] + torch.randn(rows, dim, generator=generator), labels]

    def ours(features: Tensor, labels: Tensor, backend: str) -> Tensor:
        return functional.sup_con_loss(features, labels, temperature=TEMPERATURE, backend=backend)

    peer = None
    if package_version("pytorch-metric-learning") != "none":
        from pytorch_metric_learning.losses import SupConLoss

        peer = SupConLoss(temperature=TEMPERATURE)
    return pair_case("sup_con", f"N={rows} D={dim}", leaves, sup_con_vectorized, ours, device, peer)


def nt_xent_case(rows: int, dim: int, device: str) -> Case:
    """Two views of each sample; pytorch-metric-learning compares all positive with all negative pairs, so small."""

    def leaves() -> list[Tensor]:
        generator = torch.Generator().manual_seed(0)
        sample = torch.arange(rows) // 2
        views = torch.randn(rows // 2, dim, generator=generator)[sample]
        return [views + torch.randn(rows, dim, generator=generator), sample]

    def ours(features: Tensor, labels: Tensor, backend: str) -> Tensor:
        return functional.sup_con_loss(features, labels, temperature=TEMPERATURE, backend=backend)

    peer = None
    if package_version("pytorch-metric-learning") != "none":
        from pytorch_metric_learning.losses import NTXentLoss

        peer = NTXentLoss(temperature=TEMPERATURE)
    return pair_case("nt_xent", f"N={rows} D={dim}", leaves, sup_con_vectorized, ours, device, peer)


def info_nce_case(rows: int, queue: int, dim: int, device: str) -> Case:
    def leaves() -> list[Tensor]:
        generator = torch.Generator().manual_seed(0)
        keys = torch.randn(rows, dim, generator=generator)
        negatives = F.normalize(torch.randn(queue, dim, generator=generator), dim=1)
        return [keys + torch.randn(rows, dim, generator=generator), keys, negatives]

    def ours(queries: Tensor, keys: Tensor, negatives: Tensor, backend: str) -> Tensor:
        return functional.info_nce(queries, keys, negatives, temperature=TEMPERATURE, backend=backend)

    return pair_case("info_nce", f"B={rows} Q={queue} D={dim}", leaves, info_nce_vectorized, ours, device)


def all_cases(device: str, quick: bool) -> list[Case]:
    cases = bacon_cases(192, 10, 32, device) + bacon_cases(192, 100, 32, device) + bacon_cases(3584, 100, 64, device)
    if device == "cpu":
        cases += [sup_con_case(1060, 128, 100, device), nt_xent_case(256, 128, device)]
        return [*cases, info_nce_case(256, 4096 if quick else 65_536, 128, device)]
    cases += bacon_cases(7168, 1000, 128, device)
    cases += [sup_con_case(4096, 128, 100, device), nt_xent_case(256, 128, device)]
    return [*cases, info_nce_case(448, 65_536, 128, device), info_nce_case(4096, 65_536, 128, device)]


def wrong(outputs: Outputs, truth: Outputs) -> str | None:
    """Why an arm's outputs differ too much from float64; None if they do not."""
    for name, output, expected in zip(("loss", "gradient", "centers"), outputs, truth):
        tolerance = LOSS_TOLERANCE if name == "loss" else GRADIENT_TOLERANCE
        error = (output.detach().cpu().double() - expected.detach()).abs().max().item()
        allowed = tolerance * expected.detach().abs().max().item()
        if not error <= allowed:
            return f"{name} is off by {error:.1e}, allowed are {allowed:.1e}"
    return None


def free_memory(device: str) -> int:
    if device == "cuda":
        return torch.cuda.mem_get_info()[0]
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("/proc/meminfo has no MemAvailable")


def usable_arms(case: Case, device: str) -> tuple[dict[str, Callable], dict[str, str]]:
    """The arms of a case that fit and are right, ready to be timed, and the reasons against the others."""
    truth = case.truth()
    calls, reasons = {}, {}
    for name, build in case.arms.items():
        if (need := case.needs.get(name, 0)) > free_memory(device) // 2:
            reasons[name] = f"left out: needs about {need / 2**30:.0f} GiB"
            continue
        try:
            call = build()
            reason = wrong(call(), truth)
        except torch.OutOfMemoryError:
            call, reason = None, "out of memory"
        if reason is None:
            calls[name] = call
        else:
            reasons[name] = f"WRONG: {reason}" if call else reason
    return calls, reasons


def measure_memory(case: Case, arm: str, device: str, threads: int) -> int | None:
    """Peak memory of an arm in bytes; on a CPU in a process of its own. None where it cannot be had."""
    if device == "cuda":
        return peak_memory(case.arms[arm](), device)
    command = [sys.executable, "-m", "benchmarks.loss", "--device", device, "--threads", str(threads)]
    command += ["--memory-of", json.dumps([case.name, case.shape, arm])]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return int(done.stdout.split()[-1]) if done.returncode == 0 else None


def run_case(case: Case, device: str, rounds: int, with_memory: bool) -> list[dict]:
    """Measures a case, prints its table, returns its CSV rows."""
    print(f"\n{case.name}  {case.shape}", flush=True)
    calls, reasons = usable_arms(case, device)
    how = dict.fromkeys(calls, "eager")
    if device == "cuda":
        for name, call in calls.items():
            try:
                calls[name], how[name] = graphed(call), "graph"
            except RuntimeError:  # it synchronizes: timed as it is
                torch.cuda.synchronize()
    samples = time_interleaved(calls, device, rounds=rounds) if calls else {}
    ours = next((name for name in samples if name.startswith("bacon_fast")), None)
    table, rows = [], []
    for name in case.arms:
        if name in reasons:
            table.append([name, reasons[name], "", "", "", ""])
            continue
        peak = measure_memory(case, name, device, torch.get_num_threads()) if with_memory else None
        microseconds = [1e6 * sample for sample in samples[name]]
        row = {
            "case": case.name,
            "shape": case.shape.replace(" ", ";"),
            "arm": name,
            "mode": how[name],
            "rounds": rounds,
            "median_us": round(statistics.median(microseconds), 1),
            "p20_us": round(quantile(microseconds, 0.2), 1),
            "p80_us": round(quantile(microseconds, 0.8), 1),
            "ratio_to_ours": round(median_ratio(samples[name], samples[ours]), 3) if ours else "",
            "peak_mb": "" if peak is None else round(peak / 1e6, 2),
        }
        rows.append(row)
        spread = f"{row['p20_us']:.0f} .. {row['p80_us']:.0f}"
        ratio = f"{row['ratio_to_ours']:.2f}x" if ours else ""
        table.append([name, how[name], f"{row['median_us']:.1f}", spread, ratio, str(row["peak_mb"])])
    print_table(["arm", "", "median us", "p20 .. p80", "time / ours", "peak MB"], table)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--quick", action="store_true", help="fewer rounds, and memory of the large case only")
    parser.add_argument("--only", default="", help="cases whose name and shape contain this text")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", type=Path, help="CSV file to add to")
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    cases = all_cases(options.device, options.quick)
    if options.memory_of:
        name, shape, arm = json.loads(options.memory_of)
        case = next(case for case in cases if (case.name, case.shape) == (name, shape))
        print(peak_memory(case.arms[arm](), options.device))
        return
    start = provenance(options.device)
    print(", ".join(f"{name} {value}" for name, value in start.items()))
    rounds = 7 if options.quick else 21
    out = options.out or RESULTS / f"loss_{options.device}.csv"
    for case in cases:
        if options.only not in f"{case.name} {case.shape}":
            continue
        with_memory = not options.quick or "R=3584" in case.shape
        if rows := run_case(case, options.device, rounds, with_memory):
            append_csv(out, [start | row for row in rows])
        torch.compiler.reset()
    print(f"\nrows added to {out}")


if __name__ == "__main__":
    main()
