"""Backbones and heads against the published counts, torchvision, and a second forward written from the definition."""

import math

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from bacon_fast.models import auxiliary_head, build_backbone, main_head, projection_head, wrn


def count(*modules):
    return sum(p.numel() for module in modules for p in module.parameters())


def test_wrn_28_2_has_the_published_number_of_parameters():
    backbone = wrn(28, 2)
    assert backbone.num_features == 128
    stem_biases = 16
    assert count(backbone, main_head(128, 10)) == 1_467_610 + stem_biases
    assert count(backbone, main_head(128, 10), auxiliary_head(128, 10)) == 1_468_916  # speed.md, both heads


def test_wrn_28_2_has_the_published_number_of_operations():
    backbone = wrn(28, 2).to("meta").eval()
    with FlopCounterMode(display=False) as counter:
        backbone(torch.empty(1, 3, 32, 32, device="meta"))
    assert counter.get_total_flops() / 1e6 == pytest.approx(428.7, abs=0.1)  # speed.md, section 2


@pytest.mark.parametrize("name, features", [("wrn-28-2", 128), ("wrn-28-8", 512), ("wrn-40-4", 256), ("wrn-37-2", 256)])
def test_names(name, features):
    with torch.device("meta"):
        assert build_backbone(name).num_features == features


@pytest.mark.parametrize("name", ["wrn-4-2", "wrn-5-2", "wrn-27-2"])
def test_depths_that_do_not_divide_into_blocks_are_refused(name):
    with pytest.raises(ValueError, match=r"depth: expected 6n\+4.* or 8n\+5"):
        build_backbone(name)


@pytest.mark.parametrize("name", ["wrn-28", "wrn-28-2-1", "WRN-28-2", "resnet34", "", "wrn-28-0"])
def test_unknown_names_are_refused_with_the_allowed_ones(name):
    with pytest.raises(ValueError, match=r"(wrn-28-2.*resnet18.*resnet50)|(width: expected a positive integer)"):
        build_backbone(name)


def test_wrn_normalization_convolutions_and_strides():
    backbone = wrn(16, 2)
    norms = {name: m for name, m in backbone.named_modules() if isinstance(m, nn.BatchNorm2d)}
    assert all(m.momentum == 0.001 for m in norms.values())
    last = norms.pop("bn")
    assert last.eps == 1e-3 and all(m.eps == 1e-5 for m in norms.values())
    convolutions = [m for m in backbone.modules() if isinstance(m, nn.Conv2d)]
    assert [m.bias is not None for m in convolutions] == [True] + [False] * (len(convolutions) - 1)
    assert [group[0].conv1.stride for group in backbone.groups] == [(1, 1), (2, 2), (2, 2)]
    assert all(m.negative_slope == 0.1 for m in (last, *norms.values()))


def test_wrn_convolutions_are_kaiming_normal_over_the_outputs():
    torch.manual_seed(0)
    for module in wrn(28, 2).modules():
        if isinstance(module, nn.Conv2d) and module.weight.numel() > 9000:
            expected = math.sqrt(2 / (module.out_channels * module.kernel_size[0] ** 2))
            assert module.weight.std().item() == pytest.approx(expected, rel=0.03)
            assert abs(module.weight.mean().item()) < 4 * expected / math.sqrt(module.weight.numel())


def wrn_from_its_definition(state, images, blocks, strides, training, usb=False):
    """Pre-activation wide residual network, straight from a state dict; batch statistics when ``training``. ``usb``:
    the input of the first block of every group but the first is not activated."""

    def norm(x, name, eps):
        mean, var = state[f"{name}.running_mean"].clone(), state[f"{name}.running_var"].clone()
        return F.batch_norm(x, mean, var, state[f"{name}.weight"], state[f"{name}.bias"], training, 0.001, eps)

    def act(x):
        return torch.where(x > 0, x, 0.1 * x)

    x = F.conv2d(images, state["stem.weight"], state["stem.bias"], padding=1)
    for group, stride in enumerate(strides):
        for block in range(blocks):
            name, step = f"groups.{group}.{block}", stride if block == 0 else 1
            pre = x if usb and group > 0 and block == 0 else act(norm(x, f"{name}.bn1", 1e-5))
            out = F.conv2d(pre, state[f"{name}.conv1.weight"], stride=step, padding=1)
            out = F.conv2d(act(norm(out, f"{name}.bn2", 1e-5)), state[f"{name}.conv2.weight"], padding=1)
            shortcut = state.get(f"{name}.shortcut.weight")
            x = out + (x if shortcut is None else F.conv2d(pre, shortcut, stride=step))
    return act(norm(x, "bn", 1e-3)).flatten(2).mean(2)


@pytest.mark.parametrize("size", [16, 17, 32, 96])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("usb", [False, True])
@pytest.mark.parametrize("depth, blocks, strides", [(16, 2, (1, 2, 2)), (21, 2, (2, 2, 2, 2))])
def test_wrn_forward(depth, blocks, strides, usb, size, training):
    torch.manual_seed(size)
    backbone = build_backbone(f"wrn-{depth}-1" + "-usb" * usb).double().train(training)
    for name, buffer in backbone.named_buffers():
        if buffer.is_floating_point():
            buffer.copy_(torch.rand_like(buffer) + (0.5 if "var" in name else -0.5))
    for module in backbone.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.weight, 1, 0.2), nn.init.normal_(module.bias)
    images = torch.randn(3, 3, size, size, dtype=torch.float64)
    state = {k: v.clone() for k, v in backbone.state_dict().items()}
    expected = wrn_from_its_definition(state, images, blocks, strides, training, usb)
    assert expected.shape == (3, 16 * 2 ** (len(strides) - 1))
    torch.testing.assert_close(backbone(images), expected, rtol=1e-12, atol=1e-12)


def test_channels_last_gives_the_same_features():
    torch.manual_seed(0)
    backbone, images = wrn(10, 2).eval(), torch.randn(2, 3, 32, 32)
    expected = backbone(images)
    found = backbone.to(memory_format=torch.channels_last)(images.to(memory_format=torch.channels_last))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name, features", [("resnet18", 512), ("resnet50", 2048)])
def test_resnet_is_torchvisions_without_the_classifier(name, features):
    torch.manual_seed(0)
    backbone = build_backbone(name).eval()
    assert backbone.num_features == features
    whole = getattr(torchvision.models, name)(weights=None, num_classes=7).eval()
    missing, unexpected = whole.load_state_dict(backbone.net.state_dict(), strict=False)
    assert set(missing) == {"fc.weight", "fc.bias"} and not unexpected
    images = torch.randn(2, 3, 64, 64)
    with torch.inference_mode():
        torch.testing.assert_close(whole.fc(backbone(images)), whole(images))


@pytest.mark.parametrize("name", ["wrn-10-1", "resnet18"])
def test_other_numbers_of_channels(name):
    backbone = build_backbone(name, in_channels=1).eval()
    assert backbone(torch.randn(2, 1, 32, 32)).shape == (2, backbone.num_features)


def test_heads_are_initialized_as_specified():
    torch.manual_seed(0)
    main = main_head(512, 100)
    assert not main.bias.any()
    assert main.weight.std().item() == pytest.approx(math.sqrt(2 / 612), rel=0.02)  # Xavier-normal
    torch.manual_seed(1)
    auxiliary = auxiliary_head(512, 100)
    torch.manual_seed(1)
    torch.testing.assert_close(auxiliary.weight, nn.Linear(512, 100).weight, rtol=0, atol=0)


def test_projection_heads():
    features = torch.randn(4, 128)
    assert projection_head(128, 32, 0)(features) is features
    one = projection_head(128, 32)
    torch.testing.assert_close(one(features), features @ one.weight.T + one.bias)
    two = projection_head(128, 32, 2)
    hidden = (features @ two[0].weight.T + two[0].bias).clamp_min(0)
    assert hidden.shape == (4, 128)
    torch.testing.assert_close(two(features), hidden @ two[2].weight.T + two[2].bias)
    with pytest.raises(ValueError, match="num_layers: expected 0, 1 or 2, found 3"):
        projection_head(128, 32, 3)
