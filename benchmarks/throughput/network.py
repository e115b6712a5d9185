"""The network of the peers' arms: ours, written with torch's own layers only.

Parameters and buffers have the names of `bacon_fast.models.network.Network`, so that its state fits.
"""

from torch import Tensor, nn

from bacon_fast.models.wrn import BN_EPS_BLOCK, BN_EPS_LAST, BN_MOMENTUM, NEGATIVE_SLOPE


class Block(nn.Module):
    def __init__(self, in_channels: int, out_channels: int, stride: int, momentum: float) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_channels, BN_EPS_BLOCK, momentum)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride=stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels, BN_EPS_BLOCK, momentum)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.activation = nn.LeakyReLU(NEGATIVE_SLOPE)
        self.shortcut = None
        if in_channels != out_channels or stride != 1:
            self.shortcut = nn.Conv2d(in_channels, out_channels, 1, stride=stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        activated = self.activation(self.bn1(x))
        y = self.conv2(self.activation(self.bn2(self.conv1(activated))))
        return y + (x if self.shortcut is None else self.shortcut(activated))


class Backbone(nn.Module):
    def __init__(self, depth: int, width: int, momentum: float) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        groups, channels = [], 16
        for out_channels, stride in ((16 * width, 1), (32 * width, 2), (64 * width, 2)):
            blocks = [Block(channels, out_channels, stride, momentum)]
            blocks += [Block(out_channels, out_channels, 1, momentum) for _ in range((depth - 4) // 6 - 1)]
            groups.append(nn.Sequential(*blocks))
            channels = out_channels
        self.groups = nn.Sequential(*groups)
        self.bn = nn.BatchNorm2d(channels, BN_EPS_LAST, momentum)
        self.activation = nn.LeakyReLU(NEGATIVE_SLOPE)
        self.num_features = channels

    def forward(self, images: Tensor) -> Tensor:
        return self.activation(self.bn(self.groups(self.stem(images)))).mean(dim=(2, 3))


class PlainNetwork(nn.Module):
    """A wide residual network, FixMatch's head and ABC's.

    Args:
        name: wrn-DEPTH-WIDTH.
        num_classes: K.
        momentum: weight of the newest batch in BatchNorm's running statistics; None: 0.001, as in models.wrn.
    """

    def __init__(self, name: str, num_classes: int, momentum: float | None) -> None:
        super().__init__()
        momentum = BN_MOMENTUM if momentum is None else momentum
        kind, depth, width = name.split("-") if name.count("-") == 2 else (name, "0", "0")
        if kind != "wrn":
            raise ValueError(f"name: expected wrn-DEPTH-WIDTH, found {name!r}")
        self.backbone = Backbone(int(depth), int(width), momentum)
        self.head = nn.Linear(self.backbone.num_features, num_classes)
        self.balanced_head = nn.Linear(self.backbone.num_features, num_classes)
