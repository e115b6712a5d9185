"""A network for use elsewhere: model.safetensors, model.onnx, and model.json, which describes them."""

import copy
import hashlib
import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import bacon_fast
from bacon_fast.data.augment import Augment
from bacon_fast.data.names import shown
from bacon_fast.files import write_atomically, write_record
from bacon_fast.models.lora import merge_lora

OPSET = 20
"""Of ONNX."""
RECORD = "model.json"


class ImageClassifier(nn.Module):
    """All between pixels and probabilities: uint8 [N,H,W,3], at the stored size, to float32 [N,K].

    Center window, normalization, the network's own prediction (balanced head, debiased, prototypes), temperature.
    """

    def __init__(self, network: nn.Module, normalize: Augment, info: Mapping[str, Any]) -> None:
        super().__init__()
        self.network, self.window, self.temperature = network, normalize, info["temperature"] or 1.0
        for name in ("mean", "std"):
            self.register_buffer(name, torch.tensor(info[name], dtype=torch.float32)[:, None, None])

    def forward(self, images: Tensor) -> Tensor:
        images = self.window.center(images).permute(0, 3, 1, 2).float() / 255
        _, logits = self.network.predict((images - self.mean) / self.std)
        return (logits.float() / self.temperature).softmax(1)


def export_model(
    out: Path,
    network: nn.Module,
    normalize: Augment,
    info: Mapping[str, Any],
    described: Mapping[str, Any],
    *,
    onnx: bool = False,
) -> list[Path]:
    """Writes the model's files, each whole or not at all, model.json last. Returns their paths.

    Args:
        out: folder, which may exist, but not with a model in it.
        network: in evaluation mode; it is copied, and LoRA's matrices are merged into its weights.
        info: the inference block of a checkpoint.
        described: further entries of model.json: what is known of the run.
        onnx: write model.onnx too.

    Raises:
        ValueError: the extra `export` is missing, or `out` holds a model.
    """
    save_file = _safetensors()
    if onnx:
        _require_onnx()
    if os.path.lexists(out / RECORD):
        raise ValueError(f"out: expected a folder without a model, found {shown(out / RECORD)}")
    network = copy.deepcopy(network).cpu().eval()
    merge_lora(network)
    tensors = {name: tensor.detach().clone().contiguous() for name, tensor in network.state_dict().items()}
    paths = [out / "model.safetensors"]
    write_atomically(paths[0], lambda path: save_file(tensors, path))
    if onnx:
        paths.append(out / "model.onnx")
        normalize = copy.deepcopy(normalize).cpu()
        model = ImageClassifier(network, normalize, info)
        write_atomically(paths[1], lambda path: write_onnx(path, model, tuple(info["stored_size"])))
    stored, window = info["stored_size"], info["image_size"]
    interpolation = info.get("interpolation", "bilinear")
    values = {
        "bacon_fast": bacon_fast.__version__,
        # Merged, LoRA's network is the plain one; what was trained of it no longer matters.
        "architecture": info["network"] | {"train": "all"},
        "class_names": info["class_names"],
        "input": f"RGB images resized to {stored[0]} x {stored[1]} pixels, {interpolation}, whatever their sides; the "
        f"network sees the middle {window[0]} x {window[1]}; (pixel / 255 - mean) / std",
        "stored_size": stored,
        "image_size": window,
        "interpolation": interpolation,
        "mean": info["mean"],
        "std": info["std"],
        "temperature": info["temperature"],
        "pretrained": info["weights"],
        **described,
        "files": {path.name: _digest(path) for path in paths},
    }
    write_record(out / RECORD, values)
    return [*paths, out / RECORD]


def write_onnx(path: Path, model: ImageClassifier, stored_size: tuple[int, int]) -> None:
    """The model as one ONNX file: input `images`, uint8 [N,H,W,3] for any N; output `probabilities`, float32 [N,K].

    Operators are ONNX's own, opset 20. Raises ValueError when the extra `export` is missing.
    """
    _require_onnx()
    example = torch.zeros(2, *stored_size, 3, dtype=torch.uint8)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch about itself
        program = torch.onnx.export(
            model.eval(),
            (example,),
            dynamo=True,
            dynamic_shapes=({0: torch.export.Dim.DYNAMIC},),
            input_names=["images"],
            output_names=["probabilities"],
            opset_version=OPSET,
            verbose=False,
        )
    program.save(path, external_data=False)


def _safetensors():
    try:
        from safetensors.torch import save_file
    except ImportError as error:
        raise ValueError(f"export: needs the extra export: pip install 'bacon_fast[export]' ({error})") from error
    return save_file


def _require_onnx() -> None:
    try:
        import onnx  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise ValueError(f"onnx: needs the extra export: pip install 'bacon_fast[export]' ({error})") from error


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
