"""Training steps a second: one step, written as peers write it and as we do, in one process, in turns.

    python -m benchmarks.throughput --device cpu                                       # small network, about 3 minutes
    python -m benchmarks.throughput --device cuda --data-dir CIFAR_FOLDER              # WRN-28-2
    python -m benchmarks.throughput --device cuda --data-dir CIFAR_FOLDER --full-run 2000

The step is that of FixMatch + ABC + BaCon with its contrastive loss on: 64 labeled, 128 weak and 128 strong views of
CIFAR size, the gradient through all 320, the average after every step. An arm whose losses or updates differ from our
reference's gets no speed (gate.py). In every round each arm runs for about --slice seconds; figures are
medians over the rounds with the slowest and the fastest one, ratios are medians of the ratios within the rounds. The
run fails if bacon_fast's step makes the host wait. --full-run measures a whole run of our trainer instead, with
evaluations, log rows and checkpoints. Rows go to results/throughput_DEVICE.csv, a picture beside it.
"""

import argparse
import dataclasses
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from bacon_fast.engine.config import Config
from bacon_fast.engine.graph import WARM_UP
from bacon_fast.engine.trainer import Trainer
from benchmarks.common import RESULTS, append_csv, median_ratio, package_version, peak_memory, print_table, provenance

from .arms import ARMS, OURS, Arm, Bench, with_several
from .counters import Counts, counter
from .gate import RedGateError, truth_of
from .picture import draw
from .problem import STEPS, Problem, decode_folder, make_config, make_trainer, prime, repeat_digits
from .step import StepArm, Stopwatch, synchronize

COUNTED_STEPS = 4
MINUTES = f"minutes_for_{STEPS}_steps"
MEASURED = ("flags", "runs", "rounds", "steps_a_round", "steps_per_s", "slowest", "fastest", "ours_over_arm", MINUTES)
MEASURED += ("prepare_s", "peak_mb", "operations_a_step", "kernels_a_step", "launches_a_step", "host_syncs_a_step")
MEASURED += ("gpu_busy",)


class HostWaitedError(RuntimeError):
    """bacon_fast's step made the host wait for the device."""


def config_of(options: argparse.Namespace, scratch: Path) -> Config:
    if options.data_dir is None:
        images = repeat_digits(scratch)
    else:
        images = decode_folder(options.data_dir, scratch) if options.data_dir.is_dir() else options.data_dir
    return make_config(images, options.device, backbone=options.backbone, threads=options.threads)


def build_bench(options: argparse.Namespace, scratch: Path) -> Bench:
    """Data, reference and the state that all arms begin from."""
    config = config_of(options, scratch)
    reference = make_trainer(config, scratch, loss_backend="reference", precision="fp32")
    state = prime(reference, options.prime)
    truth = None if options.memory_of else truth_of(reference, state)
    return Bench(Problem.of(config, reference), state, truth, scratch, options.precision, options.compile)


def measured_peak(key: str, arm: StepArm, held_before: int, options: argparse.Namespace) -> float | None:
    """Peak memory of an arm in MB: on a GPU what it made the allocator reserve; on a CPU resident memory of the main
    process beyond that of a reference trainer, in a process of its own."""
    if options.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        arm.run(2, Stopwatch(arm.device))
        return (torch.cuda.max_memory_reserved() - held_before) / 1e6
    command = [sys.executable, "-m", "benchmarks.throughput", *sys.argv[1:], "--memory-of", key]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return int(done.stdout.split()[-1]) / 1e6 if done.returncode == 0 else None


def print_peak(key: str, bench: Bench) -> None:
    """What `measured_peak` asks for on a CPU: bytes that building an arm and two of its steps need at their peak."""

    def call() -> None:
        arm = ARMS[key].build(bench)
        arm.warmup = 0
        arm.run(2, Stopwatch(arm.device))

    print(peak_memory(call, "cpu"))


@dataclasses.dataclass
class Ready:
    """An arm that passed its gate, and what is known of it before the rounds."""

    arm: StepArm
    steps: int  # a slice
    prepare_seconds: float
    peak: float | None
    counts: Counts | None  # None where the dispatcher does not see what compiled code does
    rates: list[float] = dataclasses.field(default_factory=list)


def prepare(key: str, arms: dict[str, Arm], bench: Bench, options: argparse.Namespace) -> Ready:
    """Builds and gates an arm, counts its launches and synchronizations, and finds how many steps fill a slice."""
    held = 0
    if bench.cuda:
        torch.cuda.empty_cache()
        held = torch.cuda.memory_reserved()
    began = time.perf_counter()
    arm = arms[key].build(bench)
    watch = Stopwatch(arm.device)
    arm.run(1, watch)
    seconds = time.perf_counter() - began
    arm.run(3, watch)
    steps = max(2, round(options.slice * 3 / watch.seconds))
    peak = measured_peak(key, arm, held, options) if options.memory else None
    counts = None
    if bench.cuda or not arm.compiled:
        counting = counter(arm.device)
        arm.run(COUNTED_STEPS, counting)
        counts = counting.counts
    return Ready(arm, steps, seconds, peak, counts)


def run_rounds(ready: dict[str, Ready], rounds: int, deadline: float) -> None:
    """Every arm once a round, each round beginning with another one; ends early at ``deadline``."""
    names = list(ready)
    for index in range(rounds if ready else 0):
        if index and time.monotonic() > deadline:
            print(f"out of time after {index} rounds", flush=True)
            return
        for name in names[index % len(names) :] + names[: index % len(names)]:
            entry, watch = ready[name], Stopwatch(ready[name].arm.device)
            entry.arm.run(entry.steps, watch)
            entry.rates.append(entry.arm.runs * entry.steps / watch.seconds)
        rates = "  ".join(f"{name} {entry.rates[-1]:.3g}" for name, entry in ready.items())
        print(f"round {index + 1}, steps/s: {rates}", flush=True)


def describe(options: argparse.Namespace, bench: Bench) -> dict:
    """The columns that all rows of a run share."""
    config = bench.problem.config
    batch = f"{config.views.batch_size}+{bench.problem.unlabeled_batch}+{bench.problem.unlabeled_batch}"
    data = "digits, repeated" if options.data_dir is None else options.data_dir.resolve().stem
    return provenance(options.device) | {
        "torchvision": package_version("torchvision"),
        "pillow": package_version("pillow"),
        "load_before": round(os.getloadavg()[0], 2),
        "note": options.note,
        "data": f"{data}, {config.data.image_size}x{config.data.image_size}",
        "protocol": config.data.protocol,
        "backbone": config.model.backbone,
        "batch": batch,
    }


def rows_of(
    arms: dict[str, Arm], bench: Bench, ready: dict[str, Ready], reasons: dict[str, str], shared: dict
) -> list[dict]:
    """A CSV row an arm."""

    def row(key: str) -> dict:
        arm, entry = arms[key], ready.get(key)
        values = {"arm": key, "name": arm.name, "precision": arm.precision(bench), "status": reasons.get(key, "timed")}
        values["workers"] = "+".join(map(str, arm.workers()))
        measured = dict.fromkeys(MEASURED, "")
        if entry is None:
            return shared | values | measured

        def a_step(total: int | None) -> float | str:
            return "" if total is None else round(total / COUNTED_STEPS, 2)

        median, counts = statistics.median(entry.rates), entry.counts or Counts(syncs=None)
        measured |= {
            "flags": str(entry.arm.flags),
            "runs": entry.arm.runs,
            "rounds": len(entry.rates),
            "steps_a_round": entry.steps,
            "steps_per_s": round(median, 3),
            "slowest": round(min(entry.rates), 3),
            "fastest": round(max(entry.rates), 3),
            MINUTES: round(STEPS / median / 60, 1),
            "prepare_s": round(entry.prepare_seconds, 1),
            "peak_mb": "" if entry.peak is None else round(entry.peak, 1),
            "operations_a_step": a_step(counts.operations),
            "kernels_a_step": a_step(counts.kernels),
            "launches_a_step": a_step(counts.launches),
            "host_syncs_a_step": a_step(counts.syncs),
        }
        if OURS in ready:
            measured["ours_over_arm"] = round(median_ratio(ready[OURS].rates, entry.rates), 3)
        if counts.device_seconds is not None:
            measured["gpu_busy"] = round(counts.device_seconds / COUNTED_STEPS * median, 3)
        return shared | values | measured

    return [row(key) for key in (*ready, *reasons)]


def show(rows: list[dict]) -> None:
    """The table and the three ratios."""
    columns = ("steps_per_s", "slowest", "fastest", "ours_over_arm", MINUTES, "peak_mb")
    columns += ("operations_a_step", "kernels_a_step", "launches_a_step", "host_syncs_a_step")
    timed = [row for row in rows if row["status"] == "timed"]
    header = [column.removesuffix("_a_step").replace("_", " ") for column in columns]
    print_table(
        ["arm", "precision", *header],
        [[f"{row['arm']}  {row['name']}", row["precision"], *(str(row[c]) for c in columns)] for row in timed],
    )
    for row in rows:
        if row["status"] != "timed":
            print(f"{row['arm']}  {row['name']}: {row['status']}")
    compared = [row for row in timed if row["ours_over_arm"] != ""]
    ratios = [f"{OURS}/{row['arm']} {row['ours_over_arm']}" for row in compared if row["arm"] in ("A", "B", "E")]
    ratios += [f"{row['arm']}/{OURS} {1 / row['ours_over_arm']:.3g}" for row in compared if row["runs"] > 1]
    print("ratios within the rounds, median: " + ", ".join(ratios or ["none"]))
    print(f"minutes for {STEPS:,} steps are computed from the median, not measured")


def measure(options: argparse.Namespace, scratch: Path) -> None:
    """Every arm that is wanted and can be had."""
    deadline = time.monotonic() + options.seconds
    bench = build_bench(options, scratch)
    if options.memory_of:
        print_peak(options.memory_of, bench)
        return
    shared, ready, reasons, ours_failed = describe(options, bench), {}, {}, []
    print(", ".join(f"{name} {value}" for name, value in shared.items()), flush=True)
    arms = with_several(options.concurrent)
    for key in (*options.arms, *(arms.keys() - ARMS.keys())):
        if reason := arms[key].why_not(bench):
            reasons[key] = f"skipped: {reason}"
        else:
            try:
                ready[key] = prepare(key, arms, bench, options)
            except Exception as error:  # an arm that fails leaves the others to be measured
                red = isinstance(error, RedGateError)
                reasons[key] = f"RED GATE, no speed: {error}" if red else f"failed: {type(error).__name__}: {error}"
                ours_failed += [error] if key.startswith(OURS) else []
        print(f"{key}: {reasons.get(key) or f'ready after {ready[key].prepare_seconds:.1f} s'}", flush=True)
        if key in ready and (counts := ready[key].counts):
            for name, count in counts.waiting.items():
                print(f"   the host waits: {name}, {count / COUNTED_STEPS:g} a step", flush=True)
            print(counts.top, end="", flush=True)
    run_rounds(ready, options.rounds, deadline)
    rows = rows_of(arms, bench, ready, reasons, shared)
    show(rows)
    out = options.out or RESULTS / f"throughput_{options.device}.csv"
    append_csv(out, rows)
    if ready:
        draw(rows, out.with_suffix(".png"))
    print(f"rows added to {out}")
    if ours_failed:
        raise ours_failed[0]
    for key, entry in ready.items():
        if key.startswith(OURS) and entry.counts and entry.counts.syncs:
            raise HostWaitedError(f"{key} made the host wait in {COUNTED_STEPS} steps: {entry.counts.waiting}")


def full_run(options: argparse.Namespace, scratch: Path) -> None:
    """A whole run of our trainer: evaluations, log rows and checkpoints included, what happens only once apart."""
    config = config_of(options, scratch).replace(
        steps=options.full_run,
        precision=options.precision,
        run_dir=scratch / "run",
        report=False,
    )
    began = time.perf_counter()
    trainer = Trainer(config)
    first = WARM_UP + 3  # the step before the contrastive loss, those that warm a graph up, the one that captures it
    for _ in range(first):
        trainer.train_step()
    synchronize(trainer.device)
    prepare_seconds = time.perf_counter() - began
    watch = Stopwatch(trainer.device)
    with watch:
        summary = trainer.fit()
    steps = options.full_run - first
    row = provenance(options.device) | {
        "load_before": round(os.getloadavg()[0], 2),
        "note": options.note,
        "protocol": config.data.protocol,
        "backbone": config.model.backbone,
        "precision": config.engine.precision,
        "steps": steps,
        "evaluations": steps // config.log.eval_every + 1,
        "checkpoints": steps // config.log.checkpoint_every + 1,
        "prepare_s": round(prepare_seconds, 1),
        "seconds": round(watch.seconds, 4),
        "steps_per_s": round(steps / watch.seconds, 2),
        MINUTES: round(STEPS / steps * watch.seconds / 60, 2),
        "bacc": summary["bacc"],
    }
    for name, value in row.items():
        print(f"{name}: {value}")
    out = options.out or RESULTS / f"throughput_run_{options.device}.csv"
    append_csv(out, [row])
    print(f"row added to {out}; the minutes are computed from the seconds of {steps} steps")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--data-dir", type=Path, help="folder (or .npz) with CIFAR-10; default: the digits, repeated")
    parser.add_argument("--backbone", help="wrn-DEPTH-WIDTH; default wrn-10-1 on a CPU, wrn-28-2 on a GPU")
    parser.add_argument("--precision", choices=("fp32", "tf32", "bf16", "fp16"), help="of C and on; default fp32, bf16")
    parser.add_argument("--arms", nargs="+", choices=list(ARMS), default=list(ARMS), metavar="ARM")
    parser.add_argument("--concurrent", type=int, default=0, metavar="N", help="also N runs of ours at once on a GPU")
    parser.add_argument("--compile", action="store_true", help="compiled arms on a CPU too")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--slice", type=float, default=4.0, help="seconds of an arm in a round")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="begin no round after so many")
    parser.add_argument("--prime", type=int, default=60, help="steps on labels alone before the measured state")
    parser.add_argument("--threads", type=int, default=0, help="of torch; 0: the cores this process may use")
    parser.add_argument("--no-memory", dest="memory", action="store_false", help="leave peak memory out")
    parser.add_argument("--full-run", type=int, metavar="STEPS", help="measure a run of our trainer instead")
    parser.add_argument("--note", default="", help="a column of the rows, such as: machine loaded")
    parser.add_argument("--out", type=Path, help="CSV file to append to; the picture goes beside it")
    parser.add_argument("--memory-of", choices=list(ARMS), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: this machine has no usable CUDA device")
    options.backbone = options.backbone or {"cpu": "wrn-10-1", "cuda": "wrn-28-2"}[options.device]
    options.precision = options.precision or {"cpu": "fp32", "cuda": "bf16"}[options.device]
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as scratch:
        (full_run if options.full_run else measure)(options, Path(scratch))


if __name__ == "__main__":
    main()
