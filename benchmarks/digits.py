"""`python benchmarks/digits.py`: every method on the built-in digits over seeds, as a Markdown table and CSV rows.

Each run is `train.py digits --method M --seed S` in a process of its own; finished ones are not repeated.
"""

import argparse
import csv
import json
import statistics
import subprocess
import sys
from pathlib import Path

from bacon_fast.engine.checkpoint import write_atomically

ROOT = Path(__file__).resolve().parents[1]
METHODS = ("supervised", "fixmatch", "fixmatch+abc", "fixmatch+abc+bacon")


def run(folder: Path, method: str, seed: int) -> dict:
    """summary.json of one run, made or continued when it is not there."""
    target = folder / f"{method}-seed{seed}"
    summary = target / "summary.json"
    if not summary.exists():
        command = [sys.executable, str(ROOT / "train.py"), "digits", "--method", method, "--seed", str(seed)]
        command += ["--run-dir", str(target), "--no-report"]
        if (target / "config.json").exists():
            command.append("--resume")
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return json.loads(summary.read_text())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=Path, default=ROOT / "runs" / "digits-table", help="where the runs go")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "digits.csv")
    arguments = parser.parse_args()

    results = {method: [run(arguments.runs, method, seed) for seed in arguments.seeds] for method in METHODS}

    def write(path: Path) -> None:
        with open(path, "w", newline="") as file:
            names = ["method", "seed", "steps", "bacc", "gm", "top1", "bacc_mean_last_20", "split"]
            writer = csv.DictWriter(file, names)
            writer.writeheader()
            for method, summaries in results.items():
                for s in summaries:
                    row = {name: s[name] for name in names if name in s}
                    writer.writerow(row | {"method": method, "bacc_mean_last_20": s["mean_last_20"]["bacc"]})

    write_atomically(arguments.out, write)
    print("| method | bACC, last | GM, last | bACC, mean of last 20 evaluations | recall, 3 rarest classes |")
    print("|---|---|---|---|---|")
    for method, summaries in results.items():
        columns = [
            [s["bacc"] for s in summaries],
            [s["gm"] for s in summaries],
            [s["mean_last_20"]["bacc"] for s in summaries],
            [statistics.mean(s["per_class"][-3:]) for s in summaries],
        ]
        cells = [f"{100 * statistics.mean(c):.1f} ± {100 * statistics.stdev(c):.1f}" for c in columns]
        print(f"| {method} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
