"""BatchNorm layers of the backbones: against torch's own modules bit for bit, frozen, and over two processes."""

import copy

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
import torchvision
from torch import nn

from bacon_fast.models import build_backbone, wrn
from bacon_fast.models.batchnorm import (
    BatchNorm2d,
    BatchNormAct2d,
    convert_batchnorm,
    frozen_statistics,
    synchronize,
)


class PlainBlock(nn.Module):
    """The wide residual network's block out of torch's modules."""

    def __init__(self, block):
        super().__init__()
        self.bn1, self.conv1 = plain_norm(block.bn1), block.conv1
        self.bn2, self.conv2 = plain_norm(block.bn2), block.conv2
        self.shortcut = block.shortcut

    def forward(self, x):
        activated = F.leaky_relu(self.bn1(x), 0.1)
        residual = self.conv2(F.leaky_relu(self.bn2(self.conv1(activated)), 0.1))
        return residual + (x if self.shortcut is None else self.shortcut(activated))


class PlainWideResNet(nn.Module):
    def __init__(self, backbone):
        super().__init__()
        self.stem = backbone.stem
        self.groups = nn.Sequential(
            *(nn.Sequential(*(PlainBlock(block) for block in group)) for group in backbone.groups)
        )
        self.bn = plain_norm(backbone.bn)

    def forward(self, images):
        return F.leaky_relu(self.bn(self.groups(self.stem(images))), 0.1).mean((2, 3))


def plain_norm(norm):
    plain = nn.BatchNorm2d(norm.num_features, norm.eps, norm.momentum)
    plain.load_state_dict(norm.state_dict())
    return plain


def assert_same_state(module, other):
    state, expected = module.state_dict(), other.state_dict()
    assert list(state) == list(expected)
    for name, value in state.items():
        assert value.dtype == expected[name].dtype and torch.equal(value, expected[name]), name


@pytest.mark.parametrize("channels_last", [False, True])
def test_a_wide_residual_network_trains_as_with_torchs_modules_bit_for_bit(channels_last):
    torch.manual_seed(0)
    ours = wrn(10, 2)
    for layer in ours.modules():
        if isinstance(layer, BatchNormAct2d):
            layer.backend = "reference"
    plain = copy.deepcopy(PlainWideResNet(ours))
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    for network in (ours, plain):
        network.to(memory_format=memory_format)
    optimizers = [torch.optim.SGD(n.parameters(), 0.1, momentum=0.9) for n in (ours, plain)]
    images = torch.randn(3, 6, 3, 16, 16).to(memory_format=torch.contiguous_format)
    for batch in images:
        features = []
        for network, optimizer in zip((ours, plain), optimizers):
            features.append(network(batch.to(memory_format=memory_format)))
            optimizer.zero_grad()
            features[-1].square().mean().backward()
            optimizer.step()
        assert torch.equal(*features)
        assert_same_state(ours, plain)
    assert ours.bn.num_batches_tracked == 3
    ours.eval(), plain.eval()
    assert torch.equal(ours(images[0]), plain(images[0]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_native_layers_give_the_gradient_of_torchs_modules(dtype):
    torch.manual_seed(0)
    ours = wrn(16, 2).to(memory_format=torch.channels_last)
    plain = copy.deepcopy(PlainWideResNet(ours))
    exact = copy.deepcopy(plain).double()
    images = torch.randn(9, 3, 16, 16).to(memory_format=torch.channels_last)
    for network in (ours, plain, exact):
        with torch.autocast("cpu", dtype=dtype, enabled=dtype != torch.float32 and network is not exact):
            features = network(images.double() if network is exact else images)
        features.double().square().sum().backward()
    for (name, own), torchs, true in zip(ours.named_parameters(), plain.parameters(), exact.parameters(), strict=True):
        error, allowed = ((p.grad.double() - true.grad).norm() / true.grad.norm() for p in (own, torchs))
        assert error <= 1.5 * allowed + 1e-6, f"{name}: {error:.2e}, torch's {allowed:.2e}"
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    for own, true in zip(ours.buffers(), exact.buffers(), strict=True):
        torch.testing.assert_close(own.double(), true.double(), rtol=tolerance, atol=1e-5)


def test_the_keys_of_a_checkpoint_are_those_of_torchs_modules():
    expected = {
        f"{norm}.{key}"
        for norm in ("bn", *(f"groups.{g}.0.bn{i}" for g in range(3) for i in (1, 2)))
        for key in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    }
    assert {key for key in wrn(10, 1).state_dict() if "bn" in key} == expected


@pytest.mark.parametrize("depth", [18, 50])
def test_a_resnet_trains_as_torchvisions_bit_for_bit(depth):
    torch.manual_seed(0)
    ours = build_backbone(f"resnet{depth}")
    assert all(type(m) is BatchNorm2d for m in ours.modules() if isinstance(m, nn.BatchNorm2d))
    plain = getattr(torchvision.models, f"resnet{depth}")(weights=None)
    plain.fc = nn.Identity()
    plain.load_state_dict(ours.net.state_dict())
    images = torch.randn(2, 3, 32, 32)
    for network in (ours, plain):
        network(images).square().mean().backward()
    assert_same_state(ours.net, plain)
    for (name, own), other in zip(ours.net.named_parameters(), plain.parameters(), strict=True):
        assert torch.equal(own.grad, other.grad), name


def test_converting_keeps_mode_parameters_and_buffers():
    net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Sequential(nn.BatchNorm2d(4, 1e-3, 0.2)), BatchNormAct2d(4)).eval()
    before = dict(net.named_parameters()) | dict(net.named_buffers())
    kept = net[2]
    convert_batchnorm(net)
    norm = net[1][0]
    assert type(norm) is BatchNorm2d and (norm.eps, norm.momentum, norm.training) == (1e-3, 0.2, False)
    after = dict(net.named_parameters()) | dict(net.named_buffers())
    assert list(after) == list(before) and all(after[name] is value for name, value in before.items())
    assert net[2] is kept


@pytest.mark.parametrize("options", [{"affine": False}, {"track_running_stats": False}, {"momentum": None}], ids=str)
def test_layers_that_cannot_be_converted_are_refused(options):
    with pytest.raises(ValueError, match="module: expected BatchNorm2d with parameters, statistics and momentum"):
        convert_batchnorm(nn.Sequential(nn.BatchNorm2d(4, **options)))


def test_frozen_statistics_normalize_with_the_batch_and_update_nothing():
    torch.manual_seed(0)
    net = nn.ModuleList([BatchNorm2d(3), nn.Sequential(BatchNormAct2d(3))])
    first, last = net[0], net[1][0]
    images = torch.randn(5, 3, 8, 8)

    def forward():
        return last(first(images), images)[0]

    before = copy.deepcopy(net.state_dict())
    last.update_statistics = False
    with pytest.raises(KeyError), frozen_statistics(net):
        frozen = forward()
        frozen.sum().backward()
        with frozen_statistics(net):
            forward()
        assert not first.update_statistics
        raise KeyError
    for name, value in net.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert first.update_statistics and not last.update_statistics  # as before
    last.update_statistics = True
    assert torch.equal(forward(), frozen)
    assert first.num_batches_tracked == last.num_batches_tracked == 1
    net.eval()
    moved = forward()
    with frozen_statistics(net):  # no training mode: nothing to freeze, the running statistics normalize
        assert torch.equal(forward(), moved) and not torch.equal(moved, frozen)


def test_a_compiled_block_follows_the_freezing():
    torch.manual_seed(0)
    block, images = wrn(10, 1).groups[0][0], (torch.randn(2, 16, 4, 4), None)
    eager = copy.deepcopy(block)
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    for _ in range(2):
        assert torch.equal(compiled(images)[0], eager(images)[0])
        with frozen_statistics(block), frozen_statistics(eager):
            assert torch.equal(compiled(images)[0], eager(images)[0])
    assert_same_state(block, eager)
    assert block.bn2.num_batches_tracked == 2
    torch.compiler.reset()


def test_a_single_value_per_channel_is_refused_in_training_only():
    for norm in (BatchNorm2d(4), BatchNormAct2d(4)):
        with pytest.raises(ValueError, match=r"more than (1|one) value per channel"):
            norm(torch.randn(1, 4, 1, 1))
        norm.eval()(torch.randn(1, 4, 1, 1))
        with pytest.raises(ValueError, match="4D"):
            norm(torch.randn(4, 4))


# --- statistics over processes ---------------------------------------------------------------------------------------

SPLITS = {"halves": (4, 8), "unequal": (1, 8), "empty": (0, 8), "one row each": (1, 2)}


def small_network():
    torch.manual_seed(0)
    net = nn.ModuleList([nn.Conv2d(3, 5, 3, padding=1), BatchNormAct2d(5, momentum=0.3, negative_slope=0.1)])
    net.extend([nn.Conv2d(5, 5, 3, padding=1), BatchNorm2d(5, momentum=0.3)])
    for norm in (net[1], net[3]):
        nn.init.normal_(norm.weight), nn.init.normal_(norm.bias)
    return net.double()


def pass_of(net, images, upstream):
    """Outputs and gradient of the images of one forward and backward pass."""
    images = images.clone().requires_grad_()
    hidden = net[0](images)
    activated, total = net[1](hidden, 0.5 * hidden)
    out = net[3](net[2](activated)) + total
    (out * upstream).sum().backward()
    return out.detach(), images.grad


def shifted_images(rows):
    generator = torch.Generator().manual_seed(rows)
    images = 1e4 + torch.randn(rows, 3, 3, 2, generator=generator, dtype=torch.float64)
    return images, torch.randn(rows, 5, 3, 2, generator=generator, dtype=torch.float64)


def work(rank, folder):
    """One of two processes: its part of each batch, saved with what it made of it."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    alone = [dist.new_group([r]) for r in range(2)][rank]
    results = {}
    for name, (cut, rows) in SPLITS.items():
        net = small_network()
        synchronize(net)
        part = slice(0, cut) if rank == 0 else slice(cut, rows)
        images, upstream = (tensor[part] for tensor in shifted_images(rows))
        out, gradient = pass_of(net, images, upstream)
        with frozen_statistics(net):
            pass_of(copy.deepcopy(net), images, upstream)
        results[name] = {
            "out": out,
            "gradient": gradient,
            "parameters": {name: p.grad for name, p in net.named_parameters()},
            "buffers": dict(net.named_buffers()),
        }
    net = small_network()
    synchronize(net, alone)
    images, upstream = shifted_images(4 + rank)
    results["alone"] = pass_of(net, images, upstream)
    synchronize(net, None)
    results["unsynchronized"] = pass_of(net, images, upstream)
    net.eval()
    synchronize(net)
    results["eval"] = pass_of(net, images, upstream)[0]  # ranks need not meet in it: of other shapes here
    torch.save(results, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    mp.spawn(work, (str(folder),), nprocs=2)
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(2)]


@pytest.mark.parametrize("name", SPLITS)
def test_two_processes_with_parts_of_a_batch_equal_one_with_the_whole(ranks, name):
    net = small_network()
    images, upstream = shifted_images(SPLITS[name][1])
    out, gradient = pass_of(net, images, upstream)
    parts = [rank[name] for rank in ranks]
    close = {"rtol": 1e-12, "atol": 1e-10}
    torch.testing.assert_close(torch.cat([part["out"] for part in parts]), out, **close)
    torch.testing.assert_close(torch.cat([part["gradient"] for part in parts]), gradient, **close)
    for key, parameter in net.named_parameters():
        total = sum(part["parameters"][key] for part in parts)
        torch.testing.assert_close(total, parameter.grad, rtol=1e-12, atol=1e-8, msg=lambda m, k=key: f"{k}: {m}")
    for key, buffer in net.named_buffers():
        assert torch.equal(parts[0]["buffers"][key], parts[1]["buffers"][key])
        torch.testing.assert_close(parts[0]["buffers"][key], buffer, rtol=1e-12, atol=1e-12)


def test_a_group_of_one_process_is_that_process_alone(ranks):
    for rank, results in enumerate(ranks):
        for found, unsynchronized in zip(results["alone"], results["unsynchronized"]):
            torch.testing.assert_close(found, unsynchronized, rtol=1e-12, atol=1e-10)
        images, upstream = shifted_images(4 + rank)
        for found, expected in zip(results["unsynchronized"], pass_of(small_network(), images, upstream)):
            torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-10)
        assert results["eval"].shape == results["alone"][0].shape


def test_compiled_synchronized_layers_have_the_gradient_of_eager_ones(tmp_path):
    """torch.compile 2.11 can lose the gradient of an autograd function without a word."""
    images, upstream = shifted_images(4)
    eager, network = small_network(), small_network()
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    try:
        for net in (eager, network):
            synchronize(net)
        compiled = torch.compile(pass_of, backend="aot_eager")
        found, expected = compiled(network, images, upstream), pass_of(eager, images, upstream)
    finally:
        dist.destroy_process_group()
        torch.compiler.reset()
    assert eager[1].weight.grad.abs().min() > 1e-3
    for a, b in zip(found, expected):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-10)
    for (name, a), b in zip(network.named_parameters(), eager.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-12, atol=1e-8, msg=lambda m, k=name: f"{k}: {m}")


def test_synchronizing_without_process_group_is_refused():
    net = small_network()
    synchronize(net)
    with pytest.raises(RuntimeError, match=r"sync_group: torch\.distributed is not initialized"):
        net[1](torch.randn(2, 5, 3, 3, dtype=torch.float64))
