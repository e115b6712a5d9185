"""The run's optimizers are torch's: same parameters, same checkpoints; and the average moves along."""

import copy

import pytest
import torch
from torch import nn

from bacon_fast.engine.ema import EMA
from bacon_fast.engine.optimizers import SGD, Adam, AdamW

STEPS = 4


class Net(nn.Module):
    """A frozen part, a part without a gradient in the first steps, one-dimensional parameters, statistics."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.norm = nn.BatchNorm2d(4)
        self.frozen = nn.Linear(4, 4).requires_grad_(False)
        self.late = nn.Linear(4, 2)

    def forward(self, x, late: bool):
        y = self.frozen(self.norm(self.conv(x)).mean(dim=(2, 3)))
        return self.late(y).square().sum() if late else y.square().sum()


def groups(net: nn.Module) -> list[dict]:
    parameters = [p for p in net.parameters() if p.requires_grad]
    return [
        {"params": [p for p in parameters if p.dim() > 1], "weight_decay": 0.05},
        {"params": [p for p in parameters if p.dim() <= 1], "weight_decay": 0.0},
    ]


def network() -> Net:
    torch.manual_seed(0)
    return Net().to(memory_format=torch.channels_last)


def batches(dtype=torch.float32) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(6, 3, 5, 5, generator=generator, dtype=torch.float64).to(dtype) for _ in range(STEPS)]


def expected_run(mode: str, starts: int = 2) -> tuple[nn.Module, nn.Module, torch.optim.SGD]:
    """torch's own optimizer and the average's recurrence, in float64."""
    net = network().double()
    average = copy.deepcopy(net)
    optimizer = torch.optim.SGD(groups(net), 0.1, 0.9, nesterov=True)
    for step, x in enumerate(batches(torch.float64)):
        optimizer.zero_grad()
        net(x, step >= starts).backward()
        optimizer.step()
        for own, other in zip(average.parameters(), net.parameters()):
            own.data = 0.75 * own.data + 0.25 * other.data
        for own, other in zip(average.buffers(), net.buffers()):
            averaged = mode == "average" and own.is_floating_point()
            own.data = 0.75 * own.data + 0.25 * other.data if averaged else other.data.clone()
    return net, average, optimizer


def assert_same(found: nn.Module, expected: nn.Module) -> None:
    for name, value in expected.state_dict().items():
        torch.testing.assert_close(found.state_dict()[name].double(), value.double(), rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize("native", [True, False], ids=["native", "torch"])
@pytest.mark.parametrize("mode", ["copy", "average"])
def test_sgd_and_average_follow_torch_in_float64(mode, native, monkeypatch):
    if not native:
        monkeypatch.setattr("bacon_fast.engine.optimizers.is_native", lambda *_: False)
    net = network()
    ema, optimizer, rate = EMA(net, 0.75, mode), SGD(groups(net), 0.1), torch.tensor(0.1)
    for step, x in enumerate(batches()):
        for group in optimizer.param_groups:
            group["lr"] = rate if step % 2 else 0.1  # a tensor or a number
        optimizer.zero_grad()
        net(x, step >= 2).backward()
        optimizer.step(average=ema.pairs(net))
    expected, average, _ = expected_run(mode)
    assert_same(net, expected)
    assert_same(ema.network, average)


def test_a_step_without_an_average_is_torch_s_and_so_is_the_checkpoint():
    """Halfway the state goes to the other optimizer and comes back."""
    net = network()
    optimizer = SGD(groups(net), 0.1)
    for step, x in enumerate(batches()):
        if step == 2:
            other = torch.optim.SGD(groups(net), 0.1, 0.9, nesterov=True)
            other.load_state_dict(optimizer.state_dict())
            assert other.state_dict().keys() == optimizer.state_dict().keys()
            optimizer = other
        if step == 3:
            optimizer = SGD(groups(net), 0.1)
            optimizer.load_state_dict(other.state_dict())
        optimizer.zero_grad()
        net(x, step >= 3).backward()
        optimizer.step()
    expected, _, exact = expected_run("copy", starts=3)
    assert_same(net, expected)
    for parameter, like in zip(net.parameters(), expected.parameters()):
        if parameter.requires_grad:
            torch.testing.assert_close(
                optimizer.state[parameter]["momentum_buffer"].double(),
                exact.state[like]["momentum_buffer"],
                rtol=1e-4,
                atol=1e-5,
            )


def test_momentum_of_another_memory_order_is_put_in_order():
    net = network()
    state = SGD(groups(net), 0.1).state_dict()
    state["state"][0]["momentum_buffer"] = torch.arange(108.0).view(4, 3, 3, 3)
    optimizer = SGD(groups(net), 0.1)
    optimizer.load_state_dict(state)
    momentum = optimizer.state[net.conv.weight]["momentum_buffer"]
    assert momentum.stride() == net.conv.weight.stride() and torch.equal(momentum, torch.arange(108.0).view(4, 3, 3, 3))


@pytest.mark.parametrize("kind", [SGD, Adam, AdamW])
def test_the_gradient_scaler_takes_its_fused_path_and_skips_an_overflow(kind):
    net, scaled_net = network(), network()
    optimizers = kind(groups(net), 0.1), kind(groups(scaled_net), 0.1)
    ema, scaler = EMA(scaled_net, 0.75), torch.amp.GradScaler("cpu", init_scale=64.0, growth_interval=1)
    for step, x in enumerate(batches()):
        for optimizer in optimizers:
            optimizer.zero_grad()
        net(x, True).backward()
        optimizers[0].step()
        scaler.scale(scaled_net(x, True)).backward()
        scaler.step(optimizers[1], average=ema.pairs(scaled_net))
        scaler.update()
        assert scaler.get_scale() == 64.0 * 2 ** (step + 1)
    assert_same(scaled_net, net)
    before, average = copy.deepcopy(scaled_net.state_dict()), copy.deepcopy(ema.network)
    for p in scaled_net.parameters():
        if p.requires_grad:
            p.grad = torch.full_like(p, float("nan"))
    scaler.step(optimizers[1], average=ema.pairs(scaled_net))
    scaler.update()
    assert scaler.get_scale() == 64.0 * 2 ** (STEPS - 1)
    for name, value in scaled_net.state_dict().items():
        assert torch.equal(value, before[name]), name
    expected = 0.75 * average.conv.weight + 0.25 * net.conv.weight
    torch.testing.assert_close(ema.network.conv.weight, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("rate", [0.1, torch.tensor(0.1)], ids=["number", "tensor"])
def test_adam_shrinks_what_it_trained_unless_a_gradient_overflowed(rate):
    net, plain = network(), network()
    optimizer, expected = Adam(groups(net), 0.1, shrink=0.5), torch.optim.Adam(plain.parameters(), 0.1)
    for group in optimizer.param_groups:
        group["lr"], group["weight_decay"] = rate, 0.0
    x = batches()[0]
    for model, taken in ((net, optimizer), (plain, expected)):
        model(x, False).backward()
        taken.step()
    torch.testing.assert_close(net.conv.weight, plain.conv.weight * (1 - 0.05))
    assert torch.equal(net.late.weight, plain.late.weight), "not trained, not shrunk"
    optimizer.found_inf, optimizer.grad_scale = torch.ones(()), torch.ones(())
    before = net.conv.weight.clone()
    optimizer.step()
    assert torch.equal(net.conv.weight, before)


@pytest.mark.parametrize("as_tensor", [True, False], ids=["tensors", "numbers"])
@pytest.mark.parametrize("native", [True, False], ids=["native", "torch"])
def test_groups_have_rates_of_their_own(native, as_tensor, monkeypatch):
    """Matrices at 0.1, vectors at 0.02; what is frozen and the statistics are averaged once."""
    if not native:
        monkeypatch.setattr("bacon_fast.engine.optimizers.is_native", lambda *_: False)
    net, expected = network(), network().double()
    ema, optimizer = EMA(net, 0.75, "average"), SGD(groups(net), 0.1)
    average, exact = copy.deepcopy(expected), torch.optim.SGD(groups(expected), 0.1, 0.9, nesterov=True)
    exact.param_groups[1]["lr"] = 0.02
    views = torch.tensor([0.1, 0.02]).unbind() if as_tensor else (0.1, 0.02)
    for x in batches():
        for group, rate in zip(optimizer.param_groups, views):
            group["lr"] = rate
        for model, taken, images in ((net, optimizer, x), (expected, exact, x.double())):
            taken.zero_grad()
            model(images, True).backward()
        optimizer.step(average=ema.pairs(net))
        exact.step()
        for own, other in zip(
            (*average.parameters(), *average.buffers()), (*expected.parameters(), *expected.buffers())
        ):
            own.data = 0.75 * own.data + 0.25 * other.data if own.is_floating_point() else other.data.clone()
    assert_same(net, expected)
    assert_same(ema.network, average)


def test_adamw_is_torchs_and_moves_the_average():
    net, plain = network(), network()
    optimizer, ema, rate = AdamW(groups(net), 0.01), EMA(net, 0.75), torch.tensor(0.01)
    expected, average = torch.optim.AdamW(groups(plain), rate, fused=True), copy.deepcopy(plain)
    for group in optimizer.param_groups:
        group["lr"] = rate
    for x in batches():
        for model, taken in ((net, optimizer), (plain, expected)):
            taken.zero_grad()
            model(x, True).backward()
        optimizer.step(average=ema.pairs(net))
        expected.step()
        for own, other in zip(average.parameters(), plain.parameters()):
            own.data.lerp_(other.data, 0.25)
    assert_same(net, plain)
    torch.testing.assert_close(ema.network.conv.weight, average.conv.weight, rtol=1e-4, atol=1e-5)
