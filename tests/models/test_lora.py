"""LoRA, biases or heads alone: what is trained, and what stays."""

import copy

import pytest
import torch
from torch import nn

from bacon_fast.engine.ema import EMA
from bacon_fast.models import build_backbone
from bacon_fast.models.batchnorm import batchnorms
from bacon_fast.models.lora import LoRALinear, add_lora, merge_lora
from bacon_fast.models.spec import NetworkSpec, build_network
from bacon_fast.models.tuning import train_only


def images() -> torch.Tensor:
    return torch.randn(5, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def vit(train: str = "all", rank: int = 8) -> nn.Module:
    pytest.importorskip("timm")
    torch.manual_seed(0)
    return build_network(NetworkSpec("timm/test_vit", 4, image_size=32, train=train, lora_rank=rank))


def moved(network: nn.Module) -> nn.Module:
    """With LoRA's product no longer 0."""
    with torch.no_grad():
        for layer in network.modules():
            if isinstance(layer, LoRALinear):
                layer.lora_b.normal_(std=0.1, generator=torch.Generator().manual_seed(3))
    return network


def test_lora_starts_as_the_network_bit_for_bit_and_trains_its_matrices_alone():
    plain, network = vit().eval(), vit("lora").eval()
    network.load_state_dict(plain.state_dict(), strict=False)
    assert torch.equal(network.backbone(images()), plain.backbone(images()))
    trained = {n: p.shape for n, p in network.backbone.named_parameters() if p.requires_grad}
    depth, width = 6, 64
    assert len(trained) == 4 * depth and {n.rpartition(".")[2] for n in trained} == {"lora_a", "lora_b"}
    assert sum(map(torch.Size.numel, trained.values())) == depth * 8 * ((width + 3 * width) + (width + width))


def test_merged_it_computes_the_same_with_timms_names():
    network = moved(vit("lora")).eval()
    before = network.backbone(images())
    merged = copy.deepcopy(network)
    merge_lora(merged)
    assert (
        (before - merged.backbone(images())).abs().max() < 3e-6 < (before - vit().eval().backbone(images())).abs().max()
    )
    assert merged.state_dict().keys() == vit().state_dict().keys()


def test_its_gradient_is_that_of_the_paper():
    """y = W x + B A x, by hand in float64."""
    torch.manual_seed(0)
    layer = LoRALinear(nn.Linear(5, 3).double(), 2)
    nn.init.normal_(layer.lora_b)
    x, g = torch.randn(7, 5).double(), torch.randn(7, 3).double()
    layer(x).backward(g)
    torch.testing.assert_close(layer.lora_b.grad, g.T @ (x @ layer.lora_a.T))
    torch.testing.assert_close(layer.lora_a.grad, (g @ layer.lora_b).T @ x)


@pytest.mark.parametrize("name", ["wrn-10-1", "timm/test_efficientnet", "timm/test_resnet"])
def test_a_network_without_attention_is_refused(name):
    if name.startswith("timm"):
        pytest.importorskip("timm")
    with pytest.raises(ValueError, match="train: expected all, bias or head for a backbone without attention"):
        train_only(build_backbone(name, image_size=32), "lora", 4)


def test_layers_that_the_network_passes_by_are_refused():
    """Some of timm's attentions read qkv.weight and never call qkv."""
    backbone = build_backbone("wrn-10-1")
    backbone.image_size, backbone.qkv = 32, nn.Linear(4, 4)
    with pytest.raises(ValueError, match="that it calls, found 'lora'"):
        train_only(backbone, "lora", 4)
    assert len(add_lora(nn.Sequential(nn.ModuleDict({"proj": nn.Linear(2, 2), "fc": nn.Linear(2, 2)})), 1)) == 1


@pytest.mark.parametrize("name", ["resnet18", "timm/test_efficientnet"])
def test_a_frozen_backbone_keeps_its_statistics(name):
    if name.startswith("timm"):
        pytest.importorskip("timm")
    for train in ("head", "bias"):
        network = build_network(NetworkSpec(name, 4, image_size=32, train=train)).train()
        assert network.training and not network.backbone.training
        before = [layer.running_mean.clone() for layer in batchnorms(network)]
        features, _, _ = network(images())
        assert torch.equal(features, copy.deepcopy(network).eval()(images())[0])
        assert all(torch.equal(a, layer.running_mean) for a, layer in zip(before, batchnorms(network)))
        trained = {n for n, p in network.named_parameters() if p.requires_grad}
        assert {n for n in trained if n.startswith("head.")} == {"head.weight", "head.bias"}
        assert all(n.endswith("bias") for n in trained - {"head.weight"}) and (len(trained) > 2) == (train == "bias")


def test_the_average_shares_what_is_frozen(tmp_path):
    network = moved(vit("lora"))
    ema = EMA(network, 0.9)
    own, averaged = dict(network.named_parameters()), dict(ema.network.named_parameters())
    shared = {name for name in own if own[name] is averaged[name]}
    assert shared == {n for n, p in network.backbone.named_parameters(prefix="backbone") if not p.requires_grad}
    assert len(ema.pairs(network).averages) == len(own) - len(shared)
    torch.save({"network": network.state_dict()}, tmp_path / "one.pt")
    torch.save({"network": network.state_dict(), "ema": ema.state_dict()}, tmp_path / "both.pt")
    added = (tmp_path / "both.pt").stat().st_size - (tmp_path / "one.pt").stat().st_size
    trained = 4 * sum(p.numel() for n, p in own.items() if n not in shared)
    assert trained < added < trained + 40_000 < (tmp_path / "one.pt").stat().st_size / 2
    assert not [p for p in EMA(vit(), 0.9).network.parameters() if p.requires_grad]
    before = averaged["head.weight"].clone()
    with torch.no_grad():
        own["head.weight"].add_(1)
    ema.update(network)
    torch.testing.assert_close(averaged["head.weight"], before + 0.1)
