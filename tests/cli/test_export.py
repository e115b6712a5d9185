"""`export`: the files answer as `predict` does, and model.json says how to use them."""

import dataclasses
import hashlib
import json
import sys

import numpy as np
import pytest
import torch
from run_cases import tiny
from safetensors.torch import load_file

from bacon_fast.data.augment import Augment
from bacon_fast.data.longtail import Split
from bacon_fast.engine.trainer import Trainer
from bacon_fast.export import main
from bacon_fast.exporting import ImageClassifier, export_model, write_onnx
from bacon_fast.files import read_record
from bacon_fast.models.lora import LoRALinear
from bacon_fast.models.spec import NetworkSpec, build_network
from bacon_fast.run import open_run


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished run with a temperature, of images of 16 pixels and a window of 12."""
    folder = tmp_path_factory.mktemp("export") / "run"
    changes = {"validation": 0.3, "image_size": 12, "stored_size": 16, "backbone": "wrn-10-1", "bn_momentum": 0.5}
    Trainer(tiny(folder, method="fixmatch+abc", steps=4, **changes)).fit()
    return open_run(folder, "cpu")


def pixels(*shape: int) -> torch.Tensor:
    return torch.randint(256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def test_the_weights_and_the_description_are_enough_to_predict(run, tmp_path, capsys):
    main([str(run.directory), "--out", str(tmp_path / "model")])
    assert capsys.readouterr().err.split() == [
        str(tmp_path / "model" / name) for name in ("model.safetensors", "model.json")
    ]
    model = read_record(tmp_path / "model" / "model.json")
    assert model["stored_size"] == [16, 16] and model["image_size"] == [12, 12]

    network = build_network(NetworkSpec(**model["architecture"])).eval()
    network.load_state_dict(load_file(tmp_path / "model" / "model.safetensors"))
    images = pixels(5, 16, 16, 3)
    window = images[:, 2:14, 2:14].permute(0, 3, 1, 2).double() / 255
    mean, std = (torch.tensor(model[name], dtype=torch.float64)[:, None, None] for name in ("mean", "std"))
    _, logits = network.predict(((window - mean) / std).float())
    expected = (logits.double() / model["temperature"]).softmax(1)
    torch.testing.assert_close(run.probabilities(images), expected, rtol=0, atol=1e-5)

    split, summary = Split.load(run.directory / "split.json"), json.loads((run.directory / "summary.json").read_text())
    assert model["split"] == split.hash and model["labeled_counts"] == list(split.labeled_counts)
    assert model["class_names"] == list(run.class_names) and model["temperature"] == run.temperature > 0
    assert model["metrics"]["bacc"] == summary["bacc"] and model["metrics"]["choice"] == summary["choice"]
    assert model["metrics"]["calibration"].startswith("temperature ") and model["pretrained"] is None
    weights = (tmp_path / "model" / "model.safetensors").read_bytes()
    assert model["files"] == {"model.safetensors": hashlib.sha256(weights).hexdigest()}
    with pytest.raises(ValueError, match="out: expected a folder without a model"):
        run.export(tmp_path / "model")


def test_metrics_of_other_weights_are_left_out(run, tmp_path):
    dataclasses.replace(run, step=3).export(tmp_path / "model")
    assert read_record(tmp_path / "model" / "model.json")["metrics"] is None


def test_lora_is_merged(run, tmp_path):
    timm = pytest.importorskip("timm", reason="LoRA needs the extra timm")
    assert timm
    spec = NetworkSpec("timm/vit_tiny_patch16_224", num_classes=3, image_size=32, train="lora", lora_rank=2)
    network = build_network(spec).eval()
    for module in network.modules():
        if isinstance(module, LoRALinear):
            torch.nn.init.normal_(module.lora_b, std=0.1)
    info = run.info | {"network": dataclasses.asdict(spec)}
    export_model(tmp_path, network, run.normalize, info, {})
    model = read_record(tmp_path / "model.json")
    plain = build_network(NetworkSpec(**model["architecture"])).eval()
    tensors = load_file(tmp_path / "model.safetensors")
    assert not [name for name in tensors if "lora" in name]
    plain.load_state_dict(tensors)
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(plain.predict(images)[1], network.predict(images)[1], rtol=1e-4, atol=1e-5)


@pytest.fixture
def onnxruntime():
    for package in ("onnx", "onnxscript"):
        pytest.importorskip(package, reason=f"ONNX needs {package} (the extra export)")
    return pytest.importorskip("onnxruntime", reason="the round trip needs onnxruntime (the extra export)")


def answer(onnxruntime, path, images) -> np.ndarray:
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    (given,), (result,) = session.get_inputs(), session.get_outputs()
    assert given.name == "images" and given.type == "tensor(uint8)" and result.name == "probabilities"
    return session.run(None, {"images": images.numpy()})[0]


@pytest.mark.slow
def test_onnx_answers_as_predict(run, tmp_path, onnxruntime):
    """The temperature, the window and the balanced head are inside, for any number of images."""
    paths = run.export(tmp_path / "model", onnx=True)
    assert [path.name for path in paths] == ["model.safetensors", "model.onnx", "model.json"]
    for count in (1, 5):
        images = pixels(count, 16, 16, 3)
        found = answer(onnxruntime, paths[1], images)
        assert np.abs(found - run.probabilities(images).numpy()).max() < 1e-4
    digest = hashlib.sha256(paths[1].read_bytes()).hexdigest()
    assert read_record(paths[2])["files"]["model.onnx"] == digest
    assert not [path for path in (tmp_path / "model").iterdir() if path not in paths]


@pytest.mark.slow
@pytest.mark.parametrize("heads", ["debiased", "teacher", "prototypes"])
def test_onnx_of_networks_that_predict_in_another_way(run, tmp_path, onnxruntime, heads):
    """CDMAD's subtracts its answer to an empty image, CoSSL's teacher takes over, SSC's compares with prototypes."""
    torch.manual_seed(0)
    network = build_network(NetworkSpec("wrn-10-1", 4, 0.1, heads, temperature=0.2)).eval()
    if heads == "teacher":
        network.teacher_ready.fill_(True)
    if heads == "debiased":
        network.empty_image.copy_(torch.tensor([1.0, -2.0, 0.5]))
    write_onnx(
        tmp_path / "one.onnx", ImageClassifier(network, run.normalize, run.info | {"temperature": 1.7}), (16, 16)
    )
    images = pixels(3, 16, 16, 3)
    own = dataclasses.replace(run, network=network, temperature=1.7)
    expected = own.probabilities(images).numpy()
    assert np.abs(answer(onnxruntime, tmp_path / "one.onnx", images) - expected).max() < 1e-4
    if heads == "debiased":
        _, plain, _ = network(run.normalize.normalize(run.normalize.center(images)))
        assert np.abs((plain.double() / 1.7).softmax(1).detach().numpy() - expected).max() > 1e-3


@pytest.mark.slow
@pytest.mark.parametrize(
    "spec",
    [
        NetworkSpec("timm/tf_efficientnet_lite0", num_classes=3, image_size=64),
        NetworkSpec("timm/vit_tiny_patch16_224", num_classes=3, image_size=64, train="lora", lora_rank=2),
    ],
    ids=lambda spec: spec.backbone,
)
def test_onnx_of_networks_of_timm(run, tmp_path, onnxruntime, spec):
    """A convolutional one and a transformer with LoRA, which is merged: as `predict`, whatever the number of images."""
    pytest.importorskip("timm", reason="timm/NAME needs the extra timm")
    torch.manual_seed(0)
    network = build_network(spec)
    for module in network.modules():
        if isinstance(module, LoRALinear):
            torch.nn.init.normal_(module.lora_b, std=0.1)
    network.eval()
    mean, std = (0.5, 0.4, 0.3), (0.5, 0.4, 0.3)
    normalize = Augment((64, 64), source_size=(72, 72), mean=mean, std=std)
    _, logits = network.predict(normalize.normalize(normalize.center(pixels(3, 72, 72, 3))))
    temperature = float(logits.std(0).mean())  # answers that differ from image to image
    with torch.no_grad():
        network.head.bias -= logits.mean(0)
    info = run.info | {"network": dataclasses.asdict(spec), "stored_size": [72, 72], "image_size": [64, 64]}
    info |= {"mean": list(mean), "std": list(std), "temperature": temperature}
    export_model(tmp_path, network, normalize, info, {}, onnx=True)
    own = dataclasses.replace(run, network=network, normalize=normalize, temperature=temperature)
    for count in (1, 3):
        images = pixels(count, 72, 72, 3)
        expected = own.probabilities(images).numpy()
        assert np.abs(answer(onnxruntime, tmp_path / "model.onnx", images) - expected).max() < 1e-4
    assert expected.std(0).max() > 0.01
    names = {tensor.name for tensor in onnx_initializers(tmp_path / "model.onnx")}
    assert names and not [name for name in names if "lora" in name]


def onnx_initializers(path):
    import onnx

    return onnx.load(path).graph.initializer


def test_what_is_missing_is_named(run, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(ValueError, match=r"onnx: needs the extra export: pip install 'bacon_fast\[export\]'"):
        run.export(tmp_path / "model", onnx=True)
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    with pytest.raises(ValueError, match=r"export: needs the extra export: pip install 'bacon_fast\[export\]'"):
        run.export(tmp_path / "model")
    assert not (tmp_path / "model").exists()
