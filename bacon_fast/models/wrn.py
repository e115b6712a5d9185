"""Wide residual networks (Zagoruyko and Komodakis, arXiv 1605.07146), the backbones for CIFAR, SVHN and STL-10."""

import torch
from torch import Tensor, nn

from bacon_fast.models.backbone import Backbone
from bacon_fast.models.batchnorm import BatchNormAct2d
from bacon_fast.models.convolution import Conv2d

# The normalization constants of the semi-supervised literature: slow running statistics, a larger epsilon at the end.
BN_MOMENTUM = 0.001
BN_EPS_BLOCK = 1e-5
BN_EPS_LAST = 1e-3
NEGATIVE_SLOPE = 0.1


def _norm(channels: int, eps: float) -> BatchNormAct2d:
    return BatchNormAct2d(channels, eps, BN_MOMENTUM, negative_slope=NEGATIVE_SLOPE)


class BasicBlock(nn.Module):
    """Pre-activation block: BN, LeakyReLU, 3x3 convolution, twice, added to the input.

    Where the width changes, the 1x1 shortcut convolution reads the activated input; elsewhere the raw input passes.
    The BN of the next block computes the sum at the end of a block: a block returns its two terms. Without
    ``activated``, the block has no first BN and LeakyReLU: convolution and shortcut read the raw input.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int, activated: bool = True):
        super().__init__()
        self.bn1 = _norm(in_channels, BN_EPS_BLOCK) if activated else None
        self.conv1 = Conv2d(in_channels, out_channels, 3, stride=stride, padding=1, bias=False)
        self.bn2 = _norm(out_channels, BN_EPS_BLOCK)
        self.conv2 = Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.shortcut = None
        if in_channels != out_channels or stride != 1:
            self.shortcut = Conv2d(in_channels, out_channels, 1, stride=stride, bias=False)

    def forward(self, terms: tuple[Tensor, Tensor | None]) -> tuple[Tensor, Tensor]:
        """(x, residual) with the input x + residual, or x -> (y, residual) with the output y + residual."""
        if self.bn1 is None:
            x, residual = terms
            activated = x = x if residual is None else x + residual
        else:
            activated, x = self.bn1(*terms)
        hidden, _ = self.bn2(self.conv1(activated))
        return self.conv2(hidden), x if self.shortcut is None else self.shortcut(activated)


class WideResNet(Backbone):
    """Backbone that maps images [N,C,H,W] to globally averaged features [N, num_features].

    A depth of 6n+4 is the network of the paper, for 32x32 pixels: three groups of n blocks at 16·width, 32·width and
    64·width channels with strides 1, 2, 2. A depth of 8n+5 is the literature's variant for 96x96 (STL-10): a fourth
    group at 128·width channels, and stride 2 in all four. num_features is the last number of channels. Any input size
    works. There is no classifier: heads live outside (models.heads).

    ``usb``: as in USB 0.3.2, on which BaCon's code is built. In the first block of every group but the first,
    convolution and shortcut read the raw input; its BN and LeakyReLU have no effect.
    """

    def __init__(self, depth: int, width: int, in_channels: int = 3, *, usb: bool = False):
        super().__init__()
        if depth < 10 or (depth % 6 != 4 and depth % 8 != 5):
            raise ValueError(
                f"depth: expected 6n+4 (10, 16, 22, 28, ...) or 8n+5 (13, 21, 29, 37, ...) with n >= 1, found {depth}"
            )
        if width < 1:
            raise ValueError(f"width: expected a positive integer, found {width}")
        strides = (1, 2, 2) if depth % 6 == 4 else (2, 2, 2, 2)
        blocks = (depth - 1 - len(strides)) // (2 * len(strides))
        self.num_features = 2 ** (3 + len(strides)) * width
        self.stem = Conv2d(in_channels, 16, 3, padding=1)
        groups, channels = [], 16
        for group, stride in enumerate(strides):
            out_channels = 2 ** (4 + group) * width
            layers = [BasicBlock(channels, out_channels, stride, activated=group == 0 or not usb)]
            layers += [BasicBlock(out_channels, out_channels, 1) for _ in range(blocks - 1)]
            groups.append(nn.Sequential(*layers))
            channels = out_channels
        self.groups = nn.Sequential(*groups)
        self.bn = _norm(channels, BN_EPS_LAST)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                # The slope argument keeps its default of 0: a gain of sqrt(2), as in the published runs.
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="leaky_relu")

    def forward(self, images: Tensor) -> Tensor:
        features, _ = self.bn(*self.groups((self.stem(images), None)))
        return torch.mean(features, dim=(2, 3))


def wrn(depth: int, width: int, in_channels: int = 3, *, usb: bool = False) -> WideResNet:
    """Wide residual network backbone; ``wrn(28, 2)`` is WRN-28-2. See `WideResNet` for the contract."""
    return WideResNet(depth, width, in_channels, usb=usb)
