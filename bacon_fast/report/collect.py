"""From a run to what its report shows."""

import numpy as np
import torch

from bacon_fast.data.augment import Augment
from bacon_fast.data.philox import Stream
from bacon_fast.engine.evaluation import Evaluation, Part, parts_of, predict
from bacon_fast.engine.trainer import Trainer
from bacon_fast.report.data import MAX_MISTAKES, MAX_POINTS, MAX_VIEWS, Mistake, ReportData


def collect(trainer: Trainer, summary: dict) -> ReportData:
    """Everything a report can show of a finished run. Predicts the test images, or else the
    validation images, once more.

    Args:
        summary: the result of `trainer.fit`.
    """
    config, dataset, split = trainer.config.flat(), trainer.dataset, trainer.split
    regularizer = trainer.method.regularizer
    base_temperature = temperatures = temperature_history = projections = None
    part, network = trainer.parts[0] if trainer.parts else None, trainer.chosen_network()
    features = labels = confusion = calibration = None
    mistakes: list[Mistake] = []
    if part is not None:
        every = slice(None, None, max(1, len(part.labels) // MAX_POINTS))
        images, labels = part.images[every], part.labels[every].numpy()
        features, _ = predict(network, trainer.batches.augment, images, trainer.device)
        evaluation = trainer.evaluation(part, network)
        confusion, calibration = evaluation.confusion.cpu().numpy(), evaluation.calibration.cpu().numpy()
        mistakes = _mistakes(trainer, part, evaluation)
    if regularizer is not None:
        config["temperature"] = base_temperature = regularizer.temperature
        temperature_history = [{"step": r["step"], "temperatures": r["temperatures"]} for r in trainer.history.rows]
        temperatures = temperature_history[-1]["temperatures"] if temperature_history else None
        if features is not None:
            with torch.inference_mode():
                projections = regularizer.projection(features).cpu().numpy()
    originals, weak, strong = _sample_views(trainer)
    return ReportData(
        title=f"{trainer.config.method} on {_data_name(trainer)}",
        config=config,
        dataset={
            "name": _data_name(trainer),
            "train images": len(dataset.train_images),
            "image size": _size_words(trainer.batches.augment),
            **{f"{part.name} images": len(part.labels) for part in trainer.parts},
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
        confusion=confusion,
        measured_on="test" if part is None else part.name,
        pseudo_confusion=trainer.diagnostics.window.cpu().numpy(),
        class_count_estimate=trainer.history.rows[-1].get("class_count_estimate") if trainer.history.rows else None,
        calibration=calibration,
        temperatures=temperatures,
        base_temperature=base_temperature,
        temperature_history=temperature_history,
        features=None if features is None else features.cpu().numpy(),
        projections=projections,
        feature_labels=labels,
        original_samples=originals,
        weak_samples=weak,
        strong_samples=strong,
        mistakes=mistakes,
        summary=summary,
    )


def _data_name(trainer: Trainer) -> str:
    """What a person calls the data: the name of their folder or file, else of the dataset."""
    data = trainer.config.data
    own = data.dataset in ("folder", "arrays") and data.data_dir is not None and data.data_dir.name
    return own or trainer.dataset.name


def _mistakes(trainer: Trainer, part: Part, evaluation: Evaluation) -> list[Mistake]:
    """The images of the part that are wrong with the highest probability, by the run's temperature if it has one."""
    probabilities = (evaluation.logits.double().cpu() / (trainer.temperature or 1.0)).softmax(1)
    highest, predicted = probabilities.max(1)
    wrong = torch.nonzero(predicted != part.labels)[:, 0]
    wrong = wrong[highest[wrong].argsort(descending=True, stable=True)[:MAX_MISTAKES]].tolist()
    images = part.images
    if images.dim() == 2:  # cached features: the images are the dataset's
        images = next(p.images for p in parts_of(trainer.dataset, trainer.split) if p.name == part.name)
    shown = trainer.batches.augment.center(images[wrong]).numpy() if wrong else ()
    return [Mistake(image, int(part.labels[i]), int(predicted[i]), float(highest[i])) for image, i in zip(shown, wrong)]


def _size_words(augment: Augment) -> str:
    """The size of the images, and of the views if it is another one."""
    stored = " x ".join(map(str, augment.source_size))
    size = f"{augment.height} x {augment.width}"
    return stored if stored == size else f"{stored}, views of {size}"


def _sample_views(trainer: Trainer) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Some unlabeled images (labeled ones for a supervised run), and views as the training step drew them."""
    indices = trainer.batches.unlabeled if trainer.method.uses_unlabeled else trainer.batches.labeled
    chosen = indices[:: max(1, len(indices) // MAX_VIEWS)][:MAX_VIEWS]
    # Of the dataset: a run on cached features has no images in its batches, and its views are others of the same kind.
    images = trainer.dataset.pool()[chosen.cpu()].to(trainer.device)
    seed, augment = trainer.config.seed, trainer.batches.augment
    weak = augment.weak(images, seed, 0, Stream.UNLABELED_WEAK)
    strong = augment.strong(images, seed, 0, Stream.STRONG_0)
    return tuple(t.cpu().numpy() for t in (augment.center(images), weak, strong))
