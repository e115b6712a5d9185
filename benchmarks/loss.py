"""Speed and memory of the contrastive losses, forward and backward, against what people write without them.

    python -m benchmarks.loss --device cpu [--quick] [--only TEXT] [--threads N] [--out FILE.csv]

Only correct arms are timed: every arm's loss and gradient (and, of a whole step, class centers) are compared
with float64 first, and an arm that is off gets no speed. Arms run in turns, in rounds; times are medians over the
rounds with their 20th and 80th percentile, ratios are medians of the ratios within the rounds. On a GPU an arm is
replayed as a CUDA graph where it can be captured, torch.compile's too, and compared with float64 again then. There the
losses come in float32, in float32 with TF32 products allowed ("tf32"), and in bfloat16 ("bf16"), by name in the shape.
Rows are added to benchmarks/results/loss_DEVICE.csv, and with --times FILE those of the family's backends to a table
that bacon_fast/ops/contrastive_times.csv can be: by it a backend is chosen.
"""

import argparse
import contextlib
import functools
import json
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from bacon_fast import functional, reference
from bacon_fast.ops.bacon_step import fuses_bacon_step
from bacon_fast.ops.contrastive_times import Time
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

# Of the loss, and of the gradient relative to its largest element. A logit is a cosine over 0.1: TF32 has 11 bits of
# it, and plain PyTorch rounds it to the 8 bits of bfloat16.
TOLERANCES = {"float32": (1e-5, 1e-4), "tf32": (2e-3, 2e-2), "bf16": (3e-2, 6e-2)}
DTYPES = {"float32": torch.float32, "tf32": torch.float32, "bf16": torch.bfloat16}
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
    numbers: str = "float32"
    sizes: tuple[int, int, int] | None = None  # rows, columns, elements, of a loss of the contrastive family


def _suffix(numbers: str) -> str:
    return "" if numbers == "float32" else f" {numbers}"


def reference_bacon(features, labels, logits, centers, reliable, class_counts, progress) -> Tensor:
    return reference.bacon_loss(
        features, labels, logits[labels.shape[0] :], centers, reliable, class_counts, progress=progress
    )


def bacon_cases(rows: int, num_classes: int, dim: int, device: str, numbers: str = "float32") -> list[Case]:
    """The loss alone, and, in float32, the whole step with counts, bank and centers."""

    def rounded() -> BaConBatch:
        whole = bacon_batch(rows, num_classes, dim)
        return replace(whole, features=whole.features.to(DTYPES[numbers]), centers=whole.centers.to(DTYPES[numbers]))

    def batch() -> BaConBatch:
        moved = rounded().to(device, torch.float32)
        return replace(moved, features=moved.features.to(DTYPES[numbers]), centers=moved.centers.to(DTYPES[numbers]))

    def truth_batch() -> BaConBatch:
        return rounded().to("cpu", torch.float64)

    backends = our_backends("bacon_loss", torch.empty(0, 1, device=device))
    compiled = torch.compile(bacon_vectorized, fullgraph=True, dynamic=False)
    loss_arms = {
        "class loop": lambda: loss_call(bacon_class_loop, batch()),
        "eager": lambda: loss_call(bacon_vectorized, batch()),
        "torch.compile": lambda: loss_call(compiled, batch()),
    } | {f"bacon_fast {name}": lambda name=name: loss_call(bacon_ours(name), batch()) for name in backends}
    # The loop keeps four arrays of anchors x negatives x features for the backward.
    classes = bacon_batch(rows, num_classes, dim).logits.argmax(dim=1)
    pairs = int(torch.bincount(classes).sum()) * rows
    needs = {"class loop": 4 * 4 * pairs * dim}
    shape = f"R={rows} K={num_classes} D={dim}{_suffix(numbers)}"
    sizes = rows, rows, dim
    loss_case = Case(
        "bacon loss", shape, loss_arms, lambda: loss_call(reference_bacon, truth_batch())(), needs, numbers, sizes
    )
    if numbers != "float32":
        return [loss_case]
    step_arms = {
        "class loop": lambda: class_loop_step(batch()),
        "eager": lambda: vectorized_step(batch(), compiled=False),
        "torch.compile": lambda: vectorized_step(batch(), compiled=True),
    }
    probes = torch.empty(rows, dim, device=device), torch.empty(rows, num_classes, device=device)
    if fuses_bacon_step(None, *probes, TOP_K):
        from bacon_fast.kernels.bacon_step_design import DESIGNS

        step_arms |= {f"bacon_fast fused, {name}": lambda name=name: fused_step(batch(), name) for name in DESIGNS}
    step_arms |= {f"bacon_fast {name}": lambda name=name: our_step(batch(), name) for name in backends}
    return [
        loss_case,
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
    numbers: str = "float32",
    sizes: tuple[int, int, int] | None = None,
) -> Case:
    """A loss of some tensors, of which the first gets the gradient."""

    def prepared(loss: Callable, on: str, dtype: torch.dtype) -> Callable[[], Outputs]:
        tensors = [tensor.to(DTYPES[numbers]) if tensor.is_floating_point() else tensor for tensor in leaves()]
        tensors = [tensor.to(on, dtype if tensor.is_floating_point() else None, copy=True) for tensor in tensors]
        tensors[0].requires_grad_()

        def call() -> Outputs:
            value = loss(*tensors)
            return value, torch.autograd.grad(value, tensors[0])[0]

        return call

    build = functools.partial(functools.partial, prepared, on=device, dtype=DTYPES[numbers])
    arms = {"eager": build(plain), "torch.compile": build(torch.compile(plain, fullgraph=True, dynamic=False))}
    if peer is not None:
        arms["metric-learning"] = build(peer)
    for backend in our_backends("contrastive", torch.empty(0, 1, device=device)):
        arms[f"bacon_fast {backend}"] = build(functools.partial(ours, backend=backend))
    return Case(name, shape + _suffix(numbers), arms, prepared(plain, "cpu", torch.float64), {}, numbers, sizes)


def sup_con_case(rows: int, dim: int, num_classes: int, device: str, numbers: str = "float32") -> Case:
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
    shape, sizes = f"N={rows} D={dim}", (rows, rows, dim)
    return pair_case("sup_con", shape, leaves, sup_con_vectorized, ours, device, peer, numbers, sizes)


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


def info_nce_case(rows: int, queue: int, dim: int, device: str, numbers: str = "float32") -> Case:
    def leaves() -> list[Tensor]:
        generator = torch.Generator().manual_seed(0)
        keys = torch.randn(rows, dim, generator=generator)
        negatives = F.normalize(torch.randn(queue, dim, generator=generator), dim=1)
        return [keys + torch.randn(rows, dim, generator=generator), keys, negatives]

    def ours(queries: Tensor, keys: Tensor, negatives: Tensor, backend: str) -> Tensor:
        return functional.info_nce(queries, keys, negatives, temperature=TEMPERATURE, backend=backend)

    shape, sizes = f"B={rows} Q={queue} D={dim}", (rows, queue, dim)
    return pair_case("info_nce", shape, leaves, info_nce_vectorized, ours, device, None, numbers, sizes)


def all_cases(device: str, quick: bool) -> list[Case]:
    cases = bacon_cases(192, 10, 32, device) + bacon_cases(192, 100, 32, device)
    if device == "cpu":
        cases += [*bacon_cases(3584, 100, 64, device), sup_con_case(1060, 128, 100, device)]
        cases += [nt_xent_case(256, 128, device)]
        return [*cases, info_nce_case(256, 4096 if quick else 65_536, 128, device)]
    for numbers in DTYPES:
        for rows, num_classes, dim in ((3584, 100, 64), (7168, 1000, 128), (1024, 100, 64)):
            cases += bacon_cases(rows, num_classes, dim, device, numbers)
        # 4,096 queries are what the first measurement on a GPU had.
        cases += [info_nce_case(rows, 65_536, 128, device, numbers) for rows in (4096, 192, 1024, 3584, 7168)]
        cases += [info_nce_case(rows, 4096, 128, device, numbers) for rows in (192, 1024, 3584, 7168)]
        cases += [sup_con_case(4096, 128, 100, device, numbers)]
    return [*cases, nt_xent_case(256, 128, device)]


def wrong(outputs: Outputs, truth: Outputs, numbers: str = "float32") -> str | None:
    """Why an arm's outputs differ too much from float64; None if they do not."""
    of_loss, of_gradient = TOLERANCES[numbers]
    for name, output, expected in zip(("loss", "gradient", "centers"), outputs, truth):
        tolerance = of_loss if name == "loss" else of_gradient
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


@contextlib.contextmanager
def products_of(numbers: str) -> Iterator[None]:
    """Products of float32 tensors as TF32 ones within, for the numbers "tf32"."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if numbers == "tf32" else "highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def captured(call: Callable[[], Outputs]) -> tuple[Callable[[], Outputs], str]:
    """The call as a graph and "graph", or itself and "eager" if it cannot be captured, as it synchronizes."""
    try:
        return graphed(call), "graph"
    except RuntimeError:
        torch.cuda.synchronize()
        return call, "eager"


def usable_arms(case: Case, device: str) -> tuple[dict[str, Callable], dict[str, str], dict[str, str]]:
    """The arms of a case that fit and are right, ready to be timed, how each is launched, and what is against others.

    An arm that changes its state is compared before it is captured; of the others the graph is compared too.
    """
    truth = case.truth()
    calls, modes, reasons = {}, {}, {}
    for name, build in case.arms.items():
        if (need := case.needs.get(name, 0)) > free_memory(device) // 2:
            reasons[name] = f"left out: needs about {need / 2**30:.0f} GiB"
            continue
        try:
            call, mode = build(), "eager"
            reason = wrong(call(), truth, case.numbers)
            if reason is None and device == "cuda":
                call, mode = captured(call)
                if mode == "graph" and len(truth) == 2:
                    reason = wrong(call(), truth, case.numbers)
        except torch.OutOfMemoryError:
            call, reason = None, "out of memory"
        if reason is None:
            calls[name], modes[name] = call, mode
        else:
            reasons[name] = f"WRONG: {reason}" if call else reason
    return calls, modes, reasons


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
    calls, how, reasons = usable_arms(case, device)
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


def times_of(case: Case, rows: list[dict], card: str) -> list[dict]:
    """Rows of bacon_fast/ops/contrastive_times.csv from the rows of a case: those of the family's backends."""
    if case.sizes is None:
        return []
    numbers = "half" if case.numbers == "bf16" else case.numbers
    known = ("measured", card, numbers, *case.sizes)
    backends = {f"bacon_fast {name}": name for name in ("triton", "chunks")}
    return [Time(*known, backends[row["arm"]], row["median_us"])._asdict() for row in rows if row["arm"] in backends]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--quick", action="store_true", help="fewer rounds, and memory of the large case only")
    parser.add_argument("--only", default="", help="cases whose name and shape contain this text")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", type=Path, help="CSV file to add to")
    parser.add_argument("--times", type=Path, help="CSV file for the times of the contrastive family's backends")
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
        with products_of(case.numbers):
            rows = run_case(case, options.device, rounds, with_memory)
        if rows:
            append_csv(out, [start | row for row in rows])
            if options.times and (times := times_of(case, rows, start["machine"])):
                append_csv(options.times, times)
        torch.compiler.reset()
    print(f"\nrows added to {out}")


if __name__ == "__main__":
    main()
