"""timm's networks as backbones: the features, sizes and normalizations are timm's own."""

import subprocess
import sys

import pytest
import torch
from torch import nn

from bacon_fast.models import build_backbone
from bacon_fast.models.batchnorm import batchnorms, frozen_statistics, statistics_momentum, synchronize
from bacon_fast.models.timm_backbone import pretrained_input

timm = pytest.importorskip("timm", reason="needs timm: pip install 'bacon_fast[timm]'")

VIT = "timm/test_vit"


def images(size: int, rows: int = 4) -> torch.Tensor:
    return torch.randn(rows, 3, size, size, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("name", "size", "features"),
    [(VIT, 32, 64), ("timm/test_efficientnet", 33, 256), ("timm/test_convnext", 32, 64), ("timm/test_resnet", 32, 96)],
)
def test_features_are_timms_and_their_number_is_counted(name, size, features):
    backbone = build_backbone(name, image_size=size).eval()
    given = {"img_size": size} if "vit" in name else {}
    original = timm.create_model(name.removeprefix("timm/"), num_classes=0, **given).eval()
    original.load_state_dict(backbone.body.state_dict())
    assert backbone.num_features == features
    torch.testing.assert_close(backbone(images(size)), original(images(size)), rtol=1e-5, atol=1e-6)


def test_the_number_of_features_is_of_the_output_where_timms_attribute_is_wrong():
    backbone = build_backbone("timm/mobilenetv4_conv_small_035", image_size=32)
    assert backbone.num_features == backbone.eval()(images(32)).shape[1] != backbone.net.num_features


def test_normalization_and_size_are_of_the_weights():
    """The numbers of the model cards: DINOv2 518 pixels and ImageNet's mean, augreg's ViT 0.5."""
    dino, augreg = (pretrained_input(f"timm/vit_small_patch{x}") for x in ("14_dinov2.lvd142m", "16_224"))
    assert (dino.native_size, dino.default_size, augreg.default_size) == (518, 224, 224)
    assert dino.mean == (0.485, 0.456, 0.406) and augreg.mean == augreg.std == (0.5, 0.5, 0.5)
    assert dino.licence == "apache-2.0" and dino.hub[0] == "timm/vit_small_patch14_dinov2.lvd142m"
    assert pretrained_input("timm/vit_small_patch16_dinov3").licence == "dinov3-license"
    assert pretrained_input(VIT).default_size == 160


@pytest.mark.parametrize("name", ["timm/vit_smal_patch16_224", "timm/vit_small_patch16_224.augreg_in2k", "timm/x"])
def test_an_unknown_name_is_refused_with_similar_ones(name):
    with pytest.raises(ValueError, match=r"backbone: expected a network of timm .*similar: ") as refusal:
        build_backbone(name)
    assert name == "timm/x" or "timm/vit_small_patch16_224" in str(refusal.value)


def test_a_size_between_two_patches_is_refused():
    with pytest.raises(ValueError, match=r"image_size: expected a multiple of the patch \(16, 16\) .*found 40"):
        build_backbone(VIT, image_size=40)


def test_a_pass_in_training_draws_nothing():
    """Stochastic depth and dropout would: the step is a function of (seed, step)."""
    for name in (VIT, "timm/test_efficientnet"):
        backbone = build_backbone(name, image_size=32).train()
        state = torch.get_rng_state()
        one = backbone(images(32))
        assert torch.equal(torch.get_rng_state(), state) and torch.equal(one, backbone(images(32)))


def test_without_timm_the_error_says_how_to_get_it():
    code = (
        "import sys; sys.modules['timm'] = None\nfrom bacon_fast.models import build_backbone\nbuild_backbone('timm/a')"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "ValueError: backbone: timm/NAME needs the extra timm: pip install 'bacon_fast[timm]'" in result.stderr


def statistics(backbone: nn.Module) -> list[torch.Tensor]:
    return [t.clone() for layer in batchnorms(backbone) for t in (layer.running_mean, layer.running_var)]


@pytest.mark.parametrize("name", ["timm/test_efficientnet", "timm/test_resnet"])
def test_statistics_of_batchnorms_of_any_class_can_be_frozen(name):
    """timm's BatchNormAct2d is a subclass of torch's, and no layer of ours."""
    backbone = build_backbone(name, image_size=32, bn_momentum=0.5).train()
    before = statistics(backbone)
    with frozen_statistics(backbone):
        frozen = backbone(images(32))
    assert before and all(map(torch.equal, before, statistics(backbone)))
    torch.testing.assert_close(backbone(images(32)), frozen, msg="of its own batch")
    assert not any(map(torch.equal, before, statistics(backbone))), "momentum is back"
    assert {layer.momentum for layer in batchnorms(backbone)} == {0.5}
    with statistics_momentum(backbone, 0.25):
        assert {layer.momentum for layer in batchnorms(backbone)} == {0.25}


def test_what_cannot_be_synchronized_is_refused():
    with pytest.raises(ValueError, match=r"sync_batchnorm: expected False .* class BatchNormAct2d"):
        synchronize(build_backbone("timm/test_efficientnet", image_size=32))
    synchronize(backbone := build_backbone("resnet18"))
    assert all(layer.sync_group is True for layer in batchnorms(backbone))
