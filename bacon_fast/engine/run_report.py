"""What a finished run leaves behind: summary.json's content, and the data of report.html."""

from __future__ import annotations

import platform
from pathlib import Path
from typing import TYPE_CHECKING

import torch

import bacon_fast
from bacon_fast.data.philox import Stream
from bacon_fast.engine.evaluation import predict
from bacon_fast.methods.gather import num_ranks

if TYPE_CHECKING:
    from bacon_fast.engine.trainer import Trainer

SAMPLE_VIEWS = 10
MAX_EMBEDDED = 2000


def summarize(trainer: Trainer) -> dict:
    """The averaged model after the last step, beside the other two ways papers report accuracy; JSON-ready."""
    config, last = trainer.config, trainer.history.rows[-1]
    cuda = trainer.device.type == "cuda"
    return {
        "dataset": config.data.dataset,
        "method": config.method,
        "preset": config.preset,
        "protocol": trainer.split.protocol.name,
        "seed": config.seed,
        "steps": config.steps,
        **{name: last[name] for name in ("top1", "bacc", "gm", "per_class")},
        "class_names": list(trainer.dataset.class_names),
        **trainer.history.summary(),
        "steps_per_second": trainer.step / trainer.train_seconds,
        "train_seconds": trainer.train_seconds,
        "device": torch.cuda.get_device_name(trainer.device) if cuda else f"cpu, {torch.get_num_threads()} threads",
        "processes": num_ranks(),
        "precision": config.engine.precision,
        "split": trainer.split.hash,
        "versions": {
            "bacon_fast": bacon_fast.__version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
    }


def write_run_report(trainer: Trainer, summary: dict) -> Path:
    """Writes report.html and its pictures into the run directory."""
    # Imported here: matplotlib and scikit-learn take seconds, which a command that fails at once need not wait for.
    from bacon_fast.engine.report import ReportData, write_report

    config, dataset, split = trainer.config.flat(), trainer.dataset, trainer.split
    regularizer = trainer.method.regularizer
    temperatures = temperature_history = projections = None
    images, labels = dataset.test_images[:: max(1, len(dataset.test_images) // MAX_EMBEDDED)], dataset.test_labels
    labels = labels[:: max(1, len(labels) // MAX_EMBEDDED)]
    features, _ = predict(trainer.ema.network, trainer.batches.augment, images, trainer.device)
    if regularizer is not None:
        config["temperature"] = regularizer.temperature
        temperature_history = [{"step": r["step"], "temperatures": r["temperatures"]} for r in trainer.history.rows]
        temperatures = temperature_history[-1]["temperatures"]
        with torch.inference_mode():
            projections = regularizer.projection(features).cpu().numpy()
    originals, weak, strong = _sample_views(trainer)
    evaluation = trainer.evaluation()
    data = ReportData(
        title=f"{trainer.config.method} on {dataset.name}",
        config=config,
        dataset={
            "name": dataset.name,
            "train images": len(dataset.train_images),
            "test images": len(dataset.test_images),
            "image size": " x ".join(str(n) for n in trainer.batches.pool.shape[1:3]),
            "protocol": split.protocol.name,
            "protocol's source": split.protocol.source,
            "labeled images": len(split.labeled),
            "unlabeled images": len(split.unlabeled),
            "split": split.hash,
        },
        class_names=dataset.class_names,
        labeled_counts=split.labeled_counts,
        unlabeled_counts=split.unlabeled_counts,
        history=trainer.history.rows,
        train_history=trainer.logger.train_rows(),
        confusion=evaluation.confusion.cpu().numpy(),
        pseudo_confusion=trainer.diagnostics.window.cpu().numpy(),
        class_count_estimate=trainer.history.rows[-1].get("class_count_estimate"),
        calibration=evaluation.calibration.cpu().numpy(),
        temperatures=temperatures,
        temperature_history=temperature_history,
        features=features.cpu().numpy(),
        projections=projections,
        feature_labels=labels.numpy(),
        original_samples=originals,
        weak_samples=weak,
        strong_samples=strong,
        summary=summary,
    )
    return write_report(trainer.run_dir, data)


def _sample_views(trainer: Trainer):
    """Some unlabeled images (labeled ones for a supervised run), and views as the training step drew them."""
    indices = trainer.batches.unlabeled if trainer.method.uses_unlabeled else trainer.batches.labeled
    chosen = indices[:: max(1, len(indices) // SAMPLE_VIEWS)][:SAMPLE_VIEWS]
    images, seed = trainer.batches.pool[chosen], trainer.config.seed
    weak = trainer.batches.augment.weak(images, seed, 0, Stream.UNLABELED_WEAK)
    strong = trainer.batches.augment.strong(images, seed, 0, Stream.STRONG_0)
    return tuple(t.cpu().numpy() for t in (images, weak, strong))
