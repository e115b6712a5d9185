"""torch's convolution without its wrong gradient on images one pixel wide."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Conv2d(nn.Conv2d):
    """`torch.nn.Conv2d` whose stride along a side of one pixel is 1.

    Where the padding is half of an odd kernel, the output is one pixel there whatever the stride. But on a CPU torch
    2.11 gives the weights of a strided bfloat16 convolution over one column a gradient of garbage (up to 1e35, or NaN).

    Attribute ``half``: weight and bias (or None) as autocast would cast them, which take their place under autocast;
    None: autocast casts. See `models.half`.
    """

    half: tuple[Tensor, Tensor | None] | None = None

    def _conv_forward(self, images: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if self.half is not None and torch.is_autocast_enabled(images.device.type):
            weight, bias = self.half
        stride, sizes = self.stride, zip(self.kernel_size, self.dilation)
        if self.padding == tuple(dilation * (kernel - 1) / 2 for kernel, dilation in sizes):
            stride = tuple(1 if side == 1 else step for side, step in zip(images.shape[-2:], stride))
        return F.conv2d(images, weight, bias, stride, self.padding, self.dilation, self.groups)


def convert_convolutions(module: nn.Module) -> None:
    """Makes every plain `torch.nn.Conv2d` inside ``module`` a `Conv2d` with the same parameters.

    Raises ValueError for a padding that is not of zeros, which `Conv2d` always has.
    """
    for name, child in module.named_children():
        if type(child) is not nn.Conv2d:
            convert_convolutions(child)
            continue
        if child.padding_mode != "zeros":
            raise ValueError(f"module: expected convolutions padded with zeros, found {child}")
        sizes = child.in_channels, child.out_channels, child.kernel_size, child.stride, child.padding, child.dilation
        converted = Conv2d(*sizes, child.groups, child.bias is not None, device="meta").train(child.training)
        converted.weight, converted.bias = child.weight, child.bias
        setattr(module, name, converted)
