"""The momentum encoder against its update rule, parameter by parameter."""

import copy

import pytest
import torch
from torch import nn

from bacon_fast.models.heads import projection_head
from bacon_fast.models.momentum import MomentumEncoder
from bacon_fast.models.wrn import wrn


def parts() -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    backbone = wrn(10, 1)
    return backbone, projection_head(backbone.num_features, 8, 2)


def test_parameters_follow_and_statistics_do_not():
    backbone, projection = parts()
    encoder = MomentumEncoder(backbone, projection, 0.9)
    expected = {name: value.double() for name, value in encoder.named_parameters()}
    addresses = {name: value.data_ptr() for name, value in encoder.state_dict().items()}
    buffers = {name: value.clone() for name, value in encoder.named_buffers()}
    online = nn.ModuleDict({"backbone": backbone, "projection": projection})
    for _ in range(3):
        for value in online.parameters():
            nn.init.normal_(value)
        online["backbone"](torch.randn(4, 3, 8, 8))  # moves the online statistics
        encoder.update(backbone, projection)
        for name, value in online.named_parameters():
            expected[name] = 0.9 * expected[name] + 0.1 * value.double()
    for name, value in encoder.named_parameters():
        torch.testing.assert_close(value, expected[name].float(), rtol=1e-5, atol=1e-6)
        assert not value.requires_grad
    assert all(torch.equal(value, buffers[name]) for name, value in encoder.named_buffers())
    assert {name: value.data_ptr() for name, value in encoder.state_dict().items()} == addresses


def test_keys_are_unit_vectors_of_the_batchs_own_statistics_without_gradient():
    backbone, projection = parts()
    encoder = MomentumEncoder(backbone, projection, 0.999)
    images = torch.randn(6, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    expected = projection(copy.deepcopy(backbone).train()(images))
    keys = encoder.train()(images)
    assert not keys.requires_grad and keys.dtype == torch.float32
    torch.testing.assert_close(keys, expected / expected.norm(dim=1, keepdim=True), rtol=1e-4, atol=1e-6)
    features, again = encoder.eval().predict(images)
    assert features.shape == (6, backbone.num_features) and not torch.allclose(again, keys, atol=1e-3)


@pytest.mark.parametrize("momentum", [-0.1, 1.5])
def test_momentum_out_of_range(momentum):
    backbone, projection = parts()
    with pytest.raises(ValueError, match=f"momentum: expected a number between 0 and 1, found {momentum}"):
        MomentumEncoder(backbone, projection, momentum)
