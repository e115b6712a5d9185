"""Running the averaged network over images."""

import torch
from torch import Tensor, nn

from bacon_fast.data.augment import Augment
from bacon_fast.data.datasets import ImageDataset
from bacon_fast.engine.metrics import confusion_matrix

EVALUATION_BATCH = 500


@torch.inference_mode()
def predict(network: nn.Module, normalize: Augment, images: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
    """Features float32 [N,F] and logits float32 [N,K] of uint8 images [N,H,W,3], in batches, in evaluation mode.

    `network` has a method `predict(images) -> (features, logits)` and is left in the mode it came in.
    """
    was_training = network.training
    network.eval()
    features, logits = [], []
    for chunk in images.split(EVALUATION_BATCH):
        f, z = network.predict(normalize.normalize(chunk.to(device)))
        features.append(f.float())
        logits.append(z.float())
    network.train(was_training)
    return torch.cat(features), torch.cat(logits)


def evaluate(network: nn.Module, normalize: Augment, dataset: ImageDataset, device: torch.device) -> Tensor:
    """Confusion matrix int64 [K,K] (rows = truth) on the whole test part."""
    _, logits = predict(network, normalize, dataset.test_images, device)
    return confusion_matrix(dataset.test_labels.to(device), logits.argmax(1), dataset.num_classes)
