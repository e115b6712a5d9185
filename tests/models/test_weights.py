"""Weights from files: whole, strict, without code."""

import hashlib
import os
import pickle
from pathlib import Path

import pytest
import torch

from bacon_fast.models import build_backbone
from bacon_fast.models.network import Network
from bacon_fast.models.spec import NetworkSpec, build_network
from bacon_fast.models.weights import find_weights, read_weights

SIZE = {"timm/test_vit": 32}


def other(name: str) -> torch.nn.Module:
    torch.manual_seed(1)
    return build_backbone(name, image_size=SIZE.get(name))


def variants(name: str) -> dict[str, dict]:
    """The same weights as other programs save them."""
    weights = other(name).body.state_dict()
    classifier = "fc" if name == "resnet18" else "head"
    return {
        "plain": weights,
        "with a classifier": weights
        | {f"{classifier}.weight": torch.zeros(7, 3), f"{classifier}.bias": torch.zeros(7)},
        "parallel": {f"module.{k}": v for k, v in weights.items()},
        "nested": {"state_dict": {f"module.{k}": v for k, v in weights.items()}, "epoch": 3},
        "our checkpoint": {"ema": {f"network.backbone.{k}": v for k, v in other(name).state_dict().items()}, "step": 1},
    }


@pytest.mark.parametrize("name", ["wrn-10-1", "resnet18", "timm/test_vit"])
def test_weights_of_every_origin_are_taken_whole(tmp_path, name):
    if name.startswith("timm"):
        pytest.importorskip("timm")
    expected = other(name).state_dict()
    for origin, values in variants(name).items():
        torch.save(values, path := tmp_path / f"{origin}.pt")
        found = read_weights(path)
        assert found.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
        network = build_network(NetworkSpec(name, 4, image_size=SIZE.get(name)), found.tensors)
        for key, value in network.backbone.state_dict().items():
            assert torch.equal(value, expected[key]), f"{origin}: {key}"


def test_safetensors_are_read(tmp_path):
    save_file = pytest.importorskip("safetensors.torch").save_file
    weights = {k: v.contiguous() for k, v in other("wrn-10-1").state_dict().items()}
    save_file(weights, tmp_path / "a.safetensors")
    assert find_weights(str(tmp_path / "a.safetensors"), "wrn-10-1").tensors.keys() == weights.keys()
    (tmp_path / "a.safetensors").write_bytes(b"no such file")
    with pytest.raises(ValueError, match=r"weights: .*a\.safetensors is no safetensors file, or damaged"):
        read_weights(tmp_path / "a.safetensors")


def test_the_grid_of_positions_is_resized(tmp_path):
    timm = pytest.importorskip("timm")
    large = timm.create_model("test_vit", num_classes=10)  # 160 pixels, 10 x 10 patches
    torch.save(large.state_dict(), tmp_path / "large.pt")
    backbone = build_backbone("timm/test_vit", image_size=32)
    backbone.load(read_weights(tmp_path / "large.pt").tensors)
    assert large.pos_embed.shape == (1, 101, 64) and backbone.net.pos_embed.shape == (1, 5, 64)
    assert torch.equal(backbone.net.pos_embed[:, 0], large.pos_embed[:, 0])
    assert torch.equal(backbone.net.blocks[0].attn.qkv.weight, large.blocks[0].attn.qkv.weight)


@pytest.mark.parametrize("name", ["wrn-10-1", "timm/test_vit"])
def test_what_does_not_fit_is_named(name):
    if name.startswith("timm"):
        pytest.importorskip("timm")
    backbone = build_backbone(name, image_size=SIZE.get(name))
    weights = dict(backbone.body.state_dict())
    _, second, *_, last = (name for name in weights if name.endswith("weight"))
    before = {k: v.clone() for k, v in backbone.state_dict().items()}
    with pytest.raises(ValueError, match=rf"^weights: .*{last}.*strange"):
        backbone.load({k: v + 1 for k, v in weights.items() if k != last} | {"strange": torch.zeros(1)})
    with pytest.raises(ValueError, match=rf"^weights: .*{second}"):
        backbone.load(weights | {second: torch.zeros(3)})
    if name.startswith("timm"):
        assert all(torch.equal(v, before[k]) for k, v in backbone.state_dict().items())


class Harmful:
    def __reduce__(self):
        return os.system, ("touch was_run",)


def test_files_that_could_run_code_or_hold_no_tensors_are_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"a": Harmful()}, "harmful.pt")
    Path("pickle.pkl").write_bytes(pickle.dumps(Harmful()))
    for name in ("harmful.pt", "pickle.pkl"):
        with pytest.raises(ValueError, match=rf"weights: {name} was refused: .* could run code"):
            read_weights(Path(name))
    assert not Path("was_run").exists()
    torch.save([1, 2], "list.pt")
    with pytest.raises(ValueError, match=r"weights: expected tensors by name, a state_dict, in list\.pt, found list"):
        read_weights(Path("list.pt"))
    Path("cut.pt").write_bytes(Path("list.pt").read_bytes()[:50])
    with pytest.raises(ValueError, match=r"weights: cut\.pt"):
        read_weights(Path("cut.pt"))
    with pytest.raises(FileNotFoundError, match="weights: expected none, pretrained or a file"):
        find_weights("nowhere.pt", "wrn-10-1")


def test_pretrained_weights_come_from_the_hub_or_the_error_says_what_to_do(tmp_path, monkeypatch):
    hub, timm = pytest.importorskip("huggingface_hub"), pytest.importorskip("timm")
    save_file = pytest.importorskip("safetensors.torch").save_file
    with pytest.raises(ValueError, match="weights: expected none or a file for backbone resnet18"):
        find_weights("pretrained", "resnet18")

    def offline(*asked, **more):
        raise ConnectionError("no route to host")

    monkeypatch.setattr(hub, "hf_hub_download", offline)
    with pytest.raises(
        ValueError, match=r"huggingface\.co/timm/test_vit\.r160_in1k .*no route.*give a file: --weights"
    ):
        find_weights("pretrained", "timm/test_vit")

    save_file(timm.create_model("test_vit").state_dict(), tmp_path / "model.safetensors")
    asked = []
    monkeypatch.setattr(
        hub, "hf_hub_download", lambda *names, **more: asked.append(names) or str(tmp_path / "model.safetensors")
    )
    found = find_weights("pretrained", "timm/test_vit")
    assert asked == [("timm/test_vit.r160_in1k", "model.safetensors")]
    assert found.info() == {
        "source": "timm/test_vit.r160_in1k/model.safetensors",
        "sha256": hashlib.sha256((tmp_path / "model.safetensors").read_bytes()).hexdigest(),
        "licence": "apache-2.0",
    }
    build_backbone("timm/test_vit", image_size=32).load(found.tensors)


def test_no_weights_is_no_file():
    assert find_weights("none", "wrn-10-1") is None
    assert isinstance(build_network(NetworkSpec("wrn-10-1", 4)), Network)
