"""Training steps a second of the built-in run (`make train`) on a CPU, by what the CPU engine adds. One CSV row an arm.

    python -m benchmarks.cpu_step

Arms: float32 with torch's BatchNorm, LeakyReLU and sum as single operations; the same fused (csrc/batch_norm); bfloat16
autocast, fused or not. All train the digits preset with the contrastive loss active; rounds are interleaved, and a
ratio is the median of the rounds' ratios. Before anything is timed, each arm's loss of the first step must agree with
that of the first arm: within 1e-5 in float32 and 5 % in bfloat16.
"""

import argparse
import tempfile
from pathlib import Path

import torch

from bacon_fast.engine.presets import PRESETS
from bacon_fast.engine.trainer import Trainer
from bacon_fast.models.batchnorm import BatchNormAct2d
from benchmarks.common import RESULTS, append_csv, median_ratio, print_table, provenance, quantile, time_interleaved

ARMS = {
    "fp32, single operations": ("fp32", "reference"),
    "fp32, fused": ("fp32", None),
    "bf16, single operations": ("bf16", "reference"),
    "bf16, fused": ("bf16", None),
}


def build(folder: Path, precision: str, backend: str | None) -> Trainer:
    config = PRESETS["digits"].config()
    config = config.replace(run_dir=folder, precision=precision, device="cpu", **{"bacon.contrast_start": 0.0})
    trainer = Trainer(config)
    for layer in trainer.method.modules():
        if isinstance(layer, BatchNormAct2d):
            layer.backend = backend
    return trainer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--output", type=Path, default=RESULTS / "cpu_step.csv")
    arguments = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        trainers = {name: build(Path(folder) / str(i), *arm) for i, (name, arm) in enumerate(ARMS.items())}
        losses = {name: trainer.train_step()[0]["total"].clone() for name, trainer in trainers.items()}
        first = next(iter(ARMS))
        for name, (precision, _) in ARMS.items():
            tolerance = 1e-5 if precision == "fp32" else 0.05
            torch.testing.assert_close(losses[name], losses[first], rtol=tolerance, atol=0)
        calls = {name: trainer.train_step for name, trainer in trainers.items()}
        samples = time_interleaved(calls, "cpu", rounds=arguments.rounds, slice_seconds=1.0)
        for trainer in trainers.values():
            trainer.logger.close()
    for name, (precision, backend) in ARMS.items():
        seconds = samples[name]
        rows.append(
            provenance("cpu")
            | {
                "precision": precision,
                "batch_norm": backend or "fused",
                "steps_per_s": f"{1 / quantile(seconds, 0.5):.1f}",
                "steps_per_s_q25": f"{1 / quantile(seconds, 0.75):.1f}",
                "steps_per_s_q75": f"{1 / quantile(seconds, 0.25):.1f}",
                "speedup": f"{median_ratio(samples[first], seconds):.2f}",
                "rounds": arguments.rounds,
            }
        )
    append_csv(arguments.output, rows)
    shown = ["precision", "batch_norm", "steps_per_s", "steps_per_s_q25", "steps_per_s_q75", "speedup"]
    print_table(shown, [[row[name] for name in shown] for row in rows])


if __name__ == "__main__":
    main()
