"""The convolution on images down to one pixel, in float32 and bfloat16, against torch in float64."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from bacon_fast.models import build_backbone
from bacon_fast.models.convolution import Conv2d, convert_convolutions


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kernel", [1, 3, 7])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("size", [(1, 1), (2, 1), (1, 2), (5, 1), (4, 4), (5, 3)], ids=str)
def test_outputs_and_gradients_are_those_of_torch_in_double(dtype, kernel, stride, size):
    torch.manual_seed(0)
    layer = Conv2d(16, 32, kernel, stride=stride, padding=kernel // 2)
    layer.to(dtype, memory_format=torch.channels_last)
    images = torch.randn(12, 16, *size).to(dtype, memory_format=torch.channels_last).requires_grad_()
    found = layer(images)
    upstream = torch.randn_like(found)
    found.backward(upstream)
    doubles = [t.detach().double().requires_grad_() for t in (images, layer.weight, layer.bias)]
    expected = F.conv2d(*doubles, stride=stride, padding=kernel // 2)
    expected.backward(upstream.double())
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    pairs = [(found, expected), *zip((images.grad, layer.weight.grad, layer.bias.grad), (t.grad for t in doubles))]
    for a, b in pairs:
        assert a.shape == b.shape and (a.double() - b).norm() <= tolerance * b.norm()


@pytest.mark.parametrize("name", ["wrn-10-1", "wrn-13-1", "resnet18", "resnet50"])
def test_every_backbone_is_made_of_them(name):
    convolutions = [m for m in build_backbone(name, 4).modules() if isinstance(m, nn.Conv2d)]
    assert len(convolutions) > 5 and {type(m) for m in convolutions} == {Conv2d}


def test_conversion_keeps_parameters_and_results():
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Conv2d(3, 8, 3, stride=2, padding=1), nn.Sequential(nn.Conv2d(8, 4, 2, bias=False)))
    images, state = torch.randn(2, 3, 9, 9), {k: v.clone() for k, v in plain.state_dict().items()}
    expected = plain(images)
    convert_convolutions(plain)
    assert [type(m) for m in plain.modules() if isinstance(m, nn.Conv2d)] == [Conv2d, Conv2d]
    assert torch.equal(plain(images), expected)
    assert plain.state_dict().keys() == state.keys() and all(
        torch.equal(plain.state_dict()[k], state[k]) for k in state
    )
    with pytest.raises(ValueError, match="padded with zeros"):
        convert_convolutions(nn.Sequential(nn.Conv2d(3, 3, 3, padding=1, padding_mode="reflect")))


def test_without_half_a_kernel_of_padding_the_stride_stays():
    layer = Conv2d(1, 1, 2, stride=2, padding=1)
    assert torch.equal(layer(torch.ones(1, 1, 1, 4)), F.conv2d(torch.ones(1, 1, 1, 4), layer.weight, layer.bias, 2, 1))
