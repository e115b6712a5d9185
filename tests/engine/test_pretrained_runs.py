"""Runs on a pretrained backbone: what is trained, at which rates, resumed, and refused where it has no effect."""

import hashlib
import json
from pathlib import Path

import pytest
import torch
from run_cases import assert_equal_states, final_state, tiny
from test_static_step import StaticProgram, addresses

from bacon_fast.engine import build
from bacon_fast.engine.trainer import Trainer
from bacon_fast.models.lora import LoRALinear
from bacon_fast.run import open_run

timm = pytest.importorskip("timm", reason="needs timm: pip install 'bacon_fast[timm]'")
param_groups_layer_decay = pytest.importorskip("timm.optim").param_groups_layer_decay

RECIPE = {"optimizer": "adamw", "lr": 1e-3, "layer_decay": 0.65, "warmup": 0.25, "ema_warmup": True}


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> str:
    """A file of "pretrained" weights of the smallest ViT in timm."""
    torch.manual_seed(5)
    path = tmp_path_factory.mktemp("weights") / "vit.pt"
    torch.save(timm.create_model("test_vit", img_size=32).state_dict(), path)
    return str(path)


def vit(run_dir, weights_file: str, **changes):
    own = {"backbone": "timm/test_vit", "image_size": 32, "bn_momentum": None, "weights": weights_file, "batch_size": 4}
    return tiny(run_dir, **{"method": "fixmatch+abc+bacon", "steps": 8, **own, **changes})


def test_a_resumed_lora_run_ends_bit_for_bit_where_an_uninterrupted_one_ends(tmp_path, weights):
    config = vit(tmp_path / "whole", weights, train="lora", lora_rank=2, eval_every=8, **RECIPE)
    Trainer(config).fit()
    first = Trainer(config.replace(run_dir=tmp_path / "parts"))
    for _ in range(5):
        first.train_step()
    first.save()
    first.train_step()  # lost with the process
    first.logger.close()
    second = Trainer(config.replace(run_dir=tmp_path / "parts", resume=True))
    assert second.step == 5
    second.fit()
    one, two = final_state(tmp_path / "whole"), final_state(tmp_path / "parts")
    del one["rows"], two["rows"]
    assert_equal_states(one, two)
    original = torch.load(weights)
    for key, value in one["method"].items():
        if key.startswith("network.backbone.net.") and "lora" not in key:
            assert torch.equal(value, original[key.removeprefix("network.backbone.net.")]), f"{key} is frozen"
    assert one["method"]["network.backbone.net.blocks.0.attn.qkv.lora_b"].abs().max() > 0
    assert one["inference"]["weights"]["sha256"] == hashlib.sha256(Path(weights).read_bytes()).hexdigest()

    run = open_run(tmp_path / "parts", "cpu")
    assert sum(isinstance(m, LoRALinear) for m in run.network.modules()) == 12
    assert one["inference"]["mean"] == [0.5] * 3
    summary = json.loads((tmp_path / "parts" / "summary.json").read_text())
    assert run.evaluate()["bacc"] == summary["bacc"]


def test_first_changes_are_the_rates_of_timms_layers(tmp_path, weights):
    """Adam's first step changes a parameter by its rate, up or down, wherever its gradient is not tiny."""
    config = vit(tmp_path, weights, method="supervised", optimizer="adamw", lr=1e-3, layer_decay=0.65, weight_decay=0.0)
    trainer = Trainer(config)
    before = {n: p.detach().clone() for n, p in trainer.method.named_parameters()}
    trainer.train_step()
    trainer.logger.close()
    whole = timm.create_model("test_vit", img_size=32)  # with its classifier, whose rate is the largest
    names = {id(p): f"network.backbone.net.{name}" for name, p in whole.named_parameters()}
    groups = param_groups_layer_decay(whole, layer_decay=0.65)
    scale = {names[id(p)]: group["lr_scale"] for group in groups for p in group["params"]}
    assert sorted(set(scale.values())) == pytest.approx([0.65**d for d in range(7, -1, -1)])  # patches, blocks, head
    for name, parameter in trainer.method.named_parameters():
        if parameter.grad.abs().max() > 1e-5:
            change = (parameter.detach() - before[name]).abs().max().item()
            assert change == pytest.approx(1e-3 * scale.get(name, 1.0), rel=0.02), name


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_the_step_is_static_with_a_rate_for_each_layer(tmp_path, weights, optimizer):
    trainer = Trainer(vit(tmp_path, weights, train="lora", **RECIPE | {"optimizer": optimizer}))
    trainer.train_step()  # creates AdamW's state
    trainer.logger.close()
    known = addresses(trainer) | {"rates": trainer.program.rates.data_ptr()}
    for step in (1, 2):
        phase = trainer.program.prepare(step)
        with StaticProgram():
            trainer.program.run(phase)
    assert addresses(trainer) | {"rates": trainer.program.rates.data_ptr()} == known
    rates = sorted({group["lr"].item() for group in trainer.optimizer.param_groups}, reverse=True)
    assert rates == pytest.approx([1e-3 * 0.65**d for d in range(7)])  # the heads, and LoRA in six blocks


@pytest.mark.parametrize("train", ["bias", "head"])
def test_a_frozen_network_trains_its_biases_or_its_heads(tmp_path, weights, train):
    trainer = Trainer(vit(tmp_path, weights, method="fixmatch+cossl", train=train, steps=10))
    trainer.fit()
    trained = {n for n, p in trainer.method.network.backbone.named_parameters() if p.requires_grad}
    assert trained == (set() if train == "head" else {n for n in trained if n.endswith(".bias")})
    ema, own = trainer.ema.network, trainer.method.network
    assert ema.backbone.net.pos_embed is own.backbone.net.pos_embed
    assert not torch.equal(ema.balanced_head.weight, own.balanced_head.weight), "CoSSL's teacher moves"


def test_frozen_features_are_the_files(tmp_path, weights):
    trainer = Trainer(vit(tmp_path, weights, method="fixmatch", train="head", steps=4))
    trainer.fit()
    original = timm.create_model("test_vit", img_size=32, num_classes=0).eval()
    original.load_state_dict({k: v for k, v in torch.load(weights).items() if not k.startswith("head.")})
    images = torch.randn(3, 3, 32, 32)
    torch.testing.assert_close(trainer.ema.network.predict(images)[0], original(images), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train": "head"}, "train: expected all, lora or bias beside bacon, whose gradient would reach"),
        (
            {"method": "remixmatch", "train": "head"},
            "train: expected all, lora or bias beside remixmatch, whose rotation",
        ),
        ({"train": "lora", "weights": "none"}, "train: expected all with --weights none"),
        ({"bn_momentum": 0.1}, "bn_momentum: expected None for backbone timm/test_vit, which has no BatchNorm"),
        ({"ema_buffers": "average"}, "ema_buffers: expected copy for backbone timm/test_vit"),
        ({"sync_batchnorm": True}, "sync_batchnorm: expected False for backbone timm/test_vit"),
        ({"backbone": "wrn-10-1", "weights": "none", "layer_decay": 0.5}, "layer_decay: expected 1 where no layers of"),
        ({"optimizer": "adam", "layer_decay": 0.5}, "layer_decay: expected 1 for adam"),
        ({"method": "fixmatch", "train": "head", "layer_decay": 0.5}, "layer_decay: expected 1 where no layers of"),
    ],
)
def test_what_would_have_no_effect_is_refused_with_the_reason(tmp_path, weights, changes, message):
    with pytest.raises(ValueError) as refusal:
        Trainer(vit(tmp_path / "run", weights, **changes))
    assert str(refusal.value).startswith(message)


def test_a_frozen_batchnorm_refuses_its_momentum(tmp_path):
    torch.save(timm.create_model("test_resnet").state_dict(), tmp_path / "resnet.pt")
    words = {"backbone": "timm/test_resnet", "method": "fixmatch", "train": "head", "bn_momentum": 0.1}
    with pytest.raises(ValueError, match="bn_momentum: expected None for train head, where BatchNorm keeps"):
        Trainer(vit(tmp_path / "run", str(tmp_path / "resnet.pt"), **words))


def test_size_and_normalization_come_with_the_backbone(tmp_path):
    config = tiny(tmp_path, backbone="timm/test_vit", bn_momentum=None)
    assert build.image_size(config) == 160 and build.image_size(config.replace(image_size=32)) == 32
    assert build.image_size(tiny(tmp_path)) is None
    assert build.network_spec(config, 10).image_size == 160
