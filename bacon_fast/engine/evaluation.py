"""Running the averaged network over images."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bacon_fast.data.augment import Augment
from bacon_fast.data.datasets import ImageDataset
from bacon_fast.data.longtail import Split
from bacon_fast.engine.distributed import gather_rows, num_ranks, rank
from bacon_fast.engine.metrics import confusion_matrix

EVALUATION_BATCH = 500
EVALUATION_PIXELS = 1 << 21
"""Most images, and pixels, that are predicted at once: a network's memory grows with both."""
CALIBRATION_BINS = 15
SUM_ROWS = 8192  # rows a product: its one-hot matrix has as many


class Part(NamedTuple):
    """Images to measure on, of which nothing is trained on: name, test or validation; uint8 [N,H,W,3]; int64 [N].

    In a run on cached features, `images` are features [N,F].
    """

    name: str
    images: Tensor
    labels: Tensor


def parts_of(dataset: ImageDataset, split: Split | None) -> list[Part]:
    """The test part and the validation part, those that there are, in this order.

    Validation images are the dataset's own, else those that the split holds out; without a split none.
    """
    parts = []
    if dataset.test_images is not None:
        parts.append(Part("test", dataset.test_images, dataset.test_labels))
    if dataset.val_images is not None:
        parts.append(Part("validation", dataset.val_images, dataset.val_labels))
    elif split is not None and len(split.validation):
        held_out = torch.as_tensor(split.validation)
        parts.append(Part("validation", dataset.train_images[held_out], dataset.train_labels[held_out]))
    return parts


@dataclass(frozen=True)
class Evaluation:
    """A network on a part of the data.

    Attributes:
        confusion: int64 [K,K], rows = truth.
        calibration: float64 [15, 3], for equal bins of confidence: images, sum of confidences, right predictions.
        intra_class_variance: mean over classes of the mean squared distance of unit features to their class mean, 0-d.
        log_loss: class-balanced, see `balanced_log_loss`, 0-d.
        logits: float32 [N,K], of all images.
    """

    confusion: Tensor
    calibration: Tensor
    intra_class_variance: Tensor
    log_loss: Tensor
    logits: Tensor


@torch.inference_mode()
def predict(network: nn.Module, normalize: Augment, images: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
    """Features float32 [N,F] and logits float32 [N,K] of uint8 images [N,H,W,3] as they are stored, in batches, in
    evaluation mode: of their center crops; or of features [N,F] that a frozen backbone gave for these. A batch has at
    most EVALUATION_BATCH images, and at most EVALUATION_PIXELS pixels if that is one image or more.

    `network` has a method `predict(images) -> (features, logits)`. Its mode, training or evaluation, is left as it was.
    """
    was_training = network.training
    network.eval()
    features, logits = [], []
    pixels = 1 if images.dim() == 2 else normalize.height * normalize.width
    for chunk in images.split(max(1, min(EVALUATION_BATCH, EVALUATION_PIXELS // pixels))):
        if chunk.dim() == 2:
            f, z = network.predict(chunk.to(device).float())
        else:
            f, z = network.predict(normalize.normalize(normalize.center(chunk).to(device)))
        features.append(f.float())
        logits.append(z.float())
    network.train(was_training)
    return torch.cat(features), torch.cat(logits)


def predict_together(
    network: nn.Module, normalize: Augment, images: Tensor, device: torch.device
) -> tuple[Tensor, Tensor]:
    """`predict` with the images divided over the ranks. All ranks return the same results, bit for bit.

    If each rank has its own running statistics, make them equal first (`copy_statistics_from_main`).
    """
    part = -(-len(images) // num_ranks())
    own = images[rank() * part : (rank() + 1) * part]
    # A rank without images predicts one, for the shapes of its rows; `gather_rows` drops it.
    features, logits = predict(network, normalize, own if len(own) else images[:1], device)
    missing = (0, 0, 0, part - len(features))
    return gather_rows(F.pad(features, missing), len(images)), gather_rows(F.pad(logits, missing), len(images))


def evaluate(network: nn.Module, normalize: Augment, part: Part, num_classes: int, device: torch.device) -> Evaluation:
    """The whole part, on the device; divided over the ranks."""
    features, logits = predict_together(network, normalize, part.images, device)
    labels = part.labels.to(device)
    return Evaluation(
        confusion_matrix(labels, logits.argmax(1), num_classes),
        calibration_bins(logits, labels),
        intra_class_variance(features, labels, num_classes),
        balanced_log_loss(logits, labels, num_classes),
        logits,
    )


def balanced_log_loss(logits: Tensor, labels: Tensor, num_classes: int) -> Tensor:
    """Mean over the classes that occur of the mean of -log p(label): 0-d float64.

    Arguments: logits float [N,K], labels int64 [N].
    """
    losses = F.cross_entropy(logits.double(), labels, reduction="none")
    sums = _sums(torch.stack([losses, torch.ones_like(losses)], dim=1), labels, num_classes)
    means = sums[:, 0] / sums[:, 1].clamp(min=1)
    return means.sum() / (sums[:, 1] > 0).sum()


def calibration_bins(logits: Tensor, labels: Tensor) -> Tensor:
    """Images, sum of confidences and right predictions in 15 equal bins of confidence: float64 [15, 3].

    The bins of Guo et al. (On calibration of modern neural networks, ICML 2017): bin m holds confidences in
    ((m-1)/15, m/15]. Arguments: logits float [N,K], labels int64 [N].
    """
    confidence, predicted = logits.double().softmax(1).max(1)
    bins = (confidence * CALIBRATION_BINS).ceil().long().clamp(1, CALIBRATION_BINS) - 1
    rows = torch.stack([torch.ones_like(confidence), confidence, (predicted == labels).double()], dim=1)
    return _sums(rows, bins, CALIBRATION_BINS)


def _sums(rows: Tensor, group: Tensor, num_groups: int) -> Tensor:
    """Sums [num_groups,F] of the rows [N,F] of each group [N].

    By products: `index_add_` adds on a GPU in any order, and float64 sums then differ from run to run.
    """
    total = rows.new_zeros(num_groups, rows.shape[1])
    for part, groups in zip(rows.split(SUM_ROWS), group.split(SUM_ROWS)):
        total += F.one_hot(groups, num_groups).to(rows.dtype).T @ part
    return total


def calibration_error(bins: Tensor) -> float:
    """Expected calibration error: sum over bins of their share times |accuracy - confidence| (Guo et al., eq. 3)."""
    images, confidence, right = bins.unbind(1)
    return float((right - confidence).abs().sum() / images.sum())


def intra_class_variance(features: Tensor, labels: Tensor, num_classes: int) -> Tensor:
    """Mean squared distance of unit features to their class mean, averaged over the classes that occur: 0-d float64.

    For unit vectors that is 1 - |mean|^2: 0 when a class is one direction, near 1 when it is spread over all.
    Arguments: features float [N,F], labels int64 [N].
    """
    unit = F.normalize(features.double(), dim=1)
    sums = _sums(unit, labels, num_classes)
    images = _sums(unit.new_ones(len(labels), 1), labels, num_classes)[:, 0]
    variance = 1 - (sums / images.clamp(min=1)[:, None]).square().sum(1)
    return torch.where(images > 0, variance, 0).sum() / (images > 0).sum()
