"""The moving average against the closed form, computed by hand in float64."""

import pytest
import torch
from torch import nn

from bacon_fast.engine.ema import EMA


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))


def drift(module: nn.Module, step: int) -> None:
    generator = torch.Generator().manual_seed(step)
    with torch.no_grad():
        for tensor in [*module.parameters(), *module.buffers()]:
            if tensor.is_floating_point():
                tensor.add_(torch.randn(tensor.shape, generator=generator))
            else:
                tensor.add_(1)


@pytest.mark.parametrize("mode", ["copy", "average"])
def test_average_follows_its_recurrence(mode):
    online = network()
    ema = EMA(online, 0.9, mode)
    expected = {k: v.double().clone() for k, v in online.state_dict().items()}
    for step in range(5):
        drift(online, step)
        ema.update(online)
        for name, value in online.state_dict().items():
            is_parameter = name in dict(online.named_parameters())
            if is_parameter or (mode == "average" and value.is_floating_point()):
                expected[name] = 0.9 * expected[name] + 0.1 * value.double()
            else:
                expected[name] = value.double().clone()
    for name, value in ema.network.state_dict().items():
        torch.testing.assert_close(value.double(), expected[name], rtol=1e-5, atol=1e-6)


def test_average_needs_no_gradient_and_shares_no_storage():
    online = network()
    ema = EMA(online, 0.999)
    assert not any(p.requires_grad for p in ema.parameters())
    addresses = {p.data_ptr() for p in online.parameters()}
    assert not addresses & {p.data_ptr() for p in ema.parameters()}
    before = [p.data_ptr() for p in ema.parameters()]
    ema.update(online)
    assert before == [p.data_ptr() for p in ema.parameters()], "a captured graph needs fixed addresses"


@pytest.mark.parametrize(("momentum", "buffers", "name"), [(1.5, "copy", "momentum"), (0.9, "both", "buffers")])
def test_wrong_arguments_are_named(momentum, buffers, name):
    with pytest.raises(ValueError, match=name):
        EMA(network(), momentum, buffers)
