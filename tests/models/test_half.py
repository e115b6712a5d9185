"""Half-precision copies of the parameters against autocast's own casts, bit for bit."""

import copy
from contextlib import nullcontext

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from bacon_fast.models.batchnorm import BatchNormAct2d
from bacon_fast.models.convolution import Conv2d
from bacon_fast.models.half import HalfCopies
from bacon_fast.models.heads import projection_head
from bacon_fast.models.network import Network


class Casts(TorchDispatchMode):
    """Counts the casts, each of a tensor or all at once."""

    def __init__(self) -> None:
        super().__init__()
        self.single = self.joint = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.single += func.overloadpacket.__name__ == "_to_copy"
        self.joint += func.overloadpacket.__name__ == "_foreach_copy_"
        return func(*args, **(kwargs or {}))


def network() -> Network:
    torch.manual_seed(0)
    made = Network("wrn-10-1", 5, balanced_head=True, bn_momentum=0.1)
    return made.to(memory_format=torch.channels_last)


def step(net: nn.Module, dtype: torch.dtype, half: HalfCopies | None) -> tuple[Tensor, list[Tensor | None]]:
    """A loss of two passes of the network, and the gradients of the parameters."""
    images = torch.randn(2, 6, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    with torch.autocast("cpu", dtype=dtype), half or nullcontext():
        outputs = [output for part in images for output in net(part.to(memory_format=torch.channels_last))]
    loss = sum((output.float() ** 2).mean() for output in outputs)
    loss.backward()
    return loss.detach(), [p.grad for p in net.parameters()]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_losses_and_gradients_are_those_of_autocast(dtype):
    one, two = network(), network()
    copies = HalfCopies(two, dtype)
    for _ in range(2):  # the second time with parameters that have moved
        expected, found = step(one, dtype, None), step(two, dtype, copies)
        assert found[0].equal(expected[0])
        for parameter, gradient, wanted in zip(two.parameters(), found[1], expected[1], strict=True):
            assert gradient.dtype == torch.float32 and gradient.equal(wanted)
            assert gradient.stride() == parameter.stride()
        for net in (one, two):
            with torch.no_grad():
                for parameter in net.parameters():
                    parameter.sub_(parameter.grad, alpha=0.1)
                    parameter.grad = None


def test_all_casts_are_two_operations():
    net = network()
    copies = HalfCopies(net, torch.bfloat16)
    with Casts() as with_copies:
        step(net, torch.bfloat16, copies)
    with Casts() as without:
        step(net, torch.bfloat16, None)
    layers = sum(len(list(m.parameters(recurse=False))) for m in net.modules() if isinstance(m, Conv2d | nn.Linear))
    assert with_copies.joint == 2 and without.joint == 0
    assert without.single - with_copies.single == 2 * layers


def test_a_layer_without_gradient_keeps_none_and_a_frozen_one_is_autocasts():
    used, unused, frozen = (projection_head(4, 3) for _ in range(3))
    frozen.requires_grad_(False)
    net = nn.ModuleList([used, unused, frozen])
    with torch.autocast("cpu", dtype=torch.bfloat16), HalfCopies(net, torch.bfloat16):
        assert frozen.half is None
        unused(torch.ones(2, 4))
        frozen(used(torch.ones(2, 4))[:, :1].expand(2, 4)).sum().backward()
    assert used.weight.grad is not None and unused.weight.grad is None and frozen.weight.grad is None


def test_outside_of_autocast_the_parameters_themselves_are_used():
    layer, rows = projection_head(4, 3), torch.randn(2, 4)
    with HalfCopies(layer, torch.bfloat16):
        assert layer(rows).dtype == torch.float32 and layer(rows).equal(rows @ layer.weight.T + layer.bias)


def test_nothing_is_left_behind_even_by_an_error():
    net = network()
    with pytest.raises(ZeroDivisionError), HalfCopies(net, torch.bfloat16):
        raise ZeroDivisionError
    assert all(vars(module).get("half") is None for module in net.modules())
    copy.deepcopy(net)  # which a tensor with a graph would forbid
    with torch.autocast("cpu", dtype=torch.bfloat16), HalfCopies(nn.ModuleList([BatchNormAct2d(3)]), torch.bfloat16):
        pass  # no layer that autocast would cast for
