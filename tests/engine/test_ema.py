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


def test_with_a_warm_up_the_first_updates_weigh_more():
    """Momentum min(0.5, (1+t)/(10+t)): 1/10, 2/11, ..., 8/17, then 1/2 from t = 8 on."""
    online = network()
    ema = EMA(online, 0.5, warmup=True)
    expected = {k: v.double().clone() for k, v in online.state_dict().items()}
    for step in range(11):
        drift(online, step)
        ema.set_step(torch.tensor(step))
        ema.update(online)
        momentum = [1 / 10, 2 / 11, 3 / 12, 4 / 13, 5 / 14, 6 / 15, 7 / 16, 8 / 17, 0.5, 0.5, 0.5][step]
        for name, value in online.named_parameters():
            expected[name] = momentum * expected[name] + (1 - momentum) * value.detach().double()
    for name, value in ema.network.named_parameters():
        torch.testing.assert_close(value.double(), expected[name], rtol=1e-5, atol=1e-6)
    assert "_momentum" not in ema.state_dict(), "it follows from the step"


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
