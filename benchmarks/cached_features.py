"""Training steps a second of heads on cached features, beside steps that run the backbone. One CSV row an arm.

    python -m benchmarks.cached_features

Arms: the preset photos-cached, whose steps draw from features in a file; the same frozen backbone on fresh views
(--cached-views 0); and all of the backbone trained (--train all). A ViT-Ti/16 with random weights, generated images of
224 pixels, FixMatch with ABC, one thread; rounds are interleaved, and a ratio is the median of the rounds' ratios.
Making the file costs a forward pass a view once, which is not in the rows. Before anything is timed, the cached
features of the center crops must be those that the backbone gives, within float16's last places.
"""

import argparse
import tempfile
from pathlib import Path

import numpy as np
import torch

from bacon_fast.engine.presets import PRESETS
from bacon_fast.engine.trainer import Trainer
from bacon_fast.models.timm_backbone import timm_package
from benchmarks.common import (
    RESULTS,
    append_csv,
    median_ratio,
    package_version,
    print_table,
    provenance,
    quantile,
    time_interleaved,
)

MODEL = "vit_tiny_patch16_224"
ARMS = {
    "heads on kept features": {"cached_views": 2},
    "heads, frozen backbone": {"cached_views": 0},
    "all trained": {"cached_views": 0, "train": "all", "lr": 1e-4},
}


def write_problem(folder: Path) -> tuple[Path, Path]:
    """Images of three classes, and a file of weights."""
    generator, classes = np.random.default_rng(0), np.repeat([0, 1, 2], [12, 8, 4])
    images = generator.integers(0, 256, (len(classes), 256, 256, 3), dtype=np.uint8)
    np.savez(folder / "images.npz", train_images=images, train_labels=classes)
    torch.manual_seed(0)
    torch.save(timm_package().create_model(MODEL).state_dict(), folder / "weights.pt")
    return folder / "images.npz", folder / "weights.pt"


def build(run_dir: Path, images: Path, weights: Path, batch_size: int, changes: dict) -> Trainer:
    config = (
        PRESETS["photos-cached"]
        .config()
        .replace(
            **{"run_dir": run_dir, "data_dir": images, "backbone": f"timm/{MODEL}", "weights": str(weights)},
            **{"batch_size": batch_size, "device": "cpu", "threads": 1, "validation": 0.0, **changes},
        )
    )
    return Trainer(config)


def check(cached: Trainer, fresh: Trainer) -> None:
    """Compares cached features with a forward pass of the frozen backbone."""
    images, augment = fresh.batches.pool[:4], fresh.batches.augment
    with torch.inference_mode():
        expected = fresh.method.network.backbone(augment.normalize(augment.center(images)))
    torch.testing.assert_close(cached.batches.pool[:4].float(), expected, rtol=2e-3, atol=2e-3)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch-size", type=int, default=8, help="B, labeled images a step")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--output", type=Path, default=RESULTS / "cached_features_cpu.csv")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        problem = write_problem(Path(folder))
        trainers = {
            name: build(Path(folder) / str(i), *problem, arguments.batch_size, changes)
            for i, (name, changes) in enumerate(ARMS.items())
        }
        cached, fresh, _ = trainers.values()
        check(cached, fresh)
        calls = {name: trainer.train_step for name, trainer in trainers.items()}
        samples = time_interleaved(calls, "cpu", rounds=arguments.rounds, slice_seconds=0.5)
        precision, views = fresh.config.engine.precision, len(fresh.batches.batch(torch.tensor(0)).images)
        for trainer in trainers.values():
            trainer.logger.close()
    baseline, rows = "heads, frozen backbone", []
    for name, seconds in samples.items():
        low, median, high = (1 / quantile(seconds, share) for share in (0.75, 0.5, 0.25))
        rows.append(
            provenance("cpu")
            | {"timm": package_version("timm"), "backbone": MODEL, "precision": precision, "arm": name}
            | {"views_a_step": views, "rounds": arguments.rounds}
            | {"steps_per_s": f"{median:.3g}", "steps_per_s_q25": f"{low:.3g}", "steps_per_s_q75": f"{high:.3g}"}
            | {"times_as_fast": f"{median_ratio(samples[baseline], seconds):.3g}", "baseline": baseline}
        )
    append_csv(arguments.output, rows)
    shown = ("arm", "steps_per_s", "steps_per_s_q25", "steps_per_s_q75", "times_as_fast")
    print_table(shown, [[row[name] for name in shown] for row in rows])


if __name__ == "__main__":
    main()
