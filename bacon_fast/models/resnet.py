"""torchvision's residual networks as backbones, for images larger than CIFAR's."""

import torchvision
from torch import Tensor, nn

from bacon_fast.models.backbone import Backbone
from bacon_fast.models.batchnorm import convert_batchnorm
from bacon_fast.models.convolution import convert_convolutions


class ResNet(Backbone):
    """torchvision ResNet-18 or ResNet-50 without its classifier: images [N,C,H,W] to features [N, num_features].

    ``num_features`` is 512 for ResNet-18 and 2048 for ResNet-50. The first convolution is rebuilt when ``in_channels``
    is not 3, with torchvision's own initialization.
    """

    def __init__(self, depth: int, in_channels: int = 3):
        super().__init__()
        builders = {18: torchvision.models.resnet18, 50: torchvision.models.resnet50}
        if depth not in builders:
            raise ValueError(f"depth: expected one of {sorted(builders)}, found {depth}")
        self.net = builders[depth](weights=None)
        self.num_features = self.net.fc.in_features
        self.net.fc = nn.Identity()
        convert_batchnorm(self.net)
        if in_channels != 3:
            self.net.conv1 = nn.Conv2d(in_channels, 64, 7, stride=2, padding=3, bias=False)
            nn.init.kaiming_normal_(self.net.conv1.weight, mode="fan_out", nonlinearity="relu")
        convert_convolutions(self.net)

    @property
    def body(self) -> nn.Module:
        return self.net

    def forward(self, images: Tensor) -> Tensor:
        return self.net(images)


def resnet18(in_channels: int = 3) -> ResNet:
    """ResNet-18 backbone with 512 features."""
    return ResNet(18, in_channels)


def resnet50(in_channels: int = 3) -> ResNet:
    """ResNet-50 backbone with 2048 features."""
    return ResNet(50, in_channels)
