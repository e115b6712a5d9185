"""Weights of a backbone from a file or from the Hugging Face hub, with the SHA-256 of the file."""

import hashlib
import pickle
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from bacon_fast.models.timm_backbone import PREFIX, pretrained_input

_NESTED = ("ema", "state_dict", "model")  # where checkpoints, ours among them, keep the weights


@dataclass(frozen=True)
class Weights:
    """Tensors by name, and the file that they come from.

    Attributes:
        tensors: as in the file.
        source: the file's path, or repository and file on the hub.
        sha256: of the file, hex.
        licence: as timm says, or None.
    """

    tensors: dict[str, Tensor]
    source: str
    sha256: str
    licence: str | None = None

    def info(self) -> dict[str, str | None]:
        """What a checkpoint says of them."""
        return {"source": self.source, "sha256": self.sha256, "licence": self.licence}


def find_weights(choice: str, backbone: str) -> Weights | None:
    """The weights of `--weights`: "none", "pretrained" (timm's own, from the hub or its cache) or a file.

    Raises:
        ValueError: they cannot be had, or the file is not as `read_weights` wants it.
        FileNotFoundError: there is no such file.
    """
    if choice == "none":
        return None
    if choice != "pretrained":
        return read_weights(Path(choice))
    if not backbone.startswith(PREFIX):
        raise ValueError(
            f"weights: expected none or a file for backbone {backbone}, found 'pretrained' (timm/NAME has it)"
        )
    known = pretrained_input(backbone)
    if known.hub is None:
        raise ValueError(f"weights: timm knows no pretrained weights of {backbone}; expected none or a file")
    read = read_weights(_download(backbone, *known.hub))
    return Weights(read.tensors, "/".join(known.hub), read.sha256, known.licence)


def _download(backbone: str, repository: str, file: str) -> Path:
    from huggingface_hub import hf_hub_download  # timm needs it, and it takes a second to load

    repository, _, revision = repository.partition("@")
    try:
        return Path(hf_hub_download(repository, file, revision=revision or None))
    except Exception as error:  # of many types: no network, no such file, terms to accept
        reason = (str(error).splitlines() or [""])[0][:200]
        raise ValueError(
            f"weights: the pretrained weights of {backbone} could not be had from huggingface.co/{repository} "
            f"({type(error).__name__}: {reason}); where there is no network, give a file: --weights FILE"
        ) from error


def read_weights(path: Path) -> Weights:
    """The tensors in a .safetensors file, or in a file that `torch.save` wrote.

    Raises:
        ValueError: it holds something else. Of pickled objects only tensors are read, as others could run code.
        FileNotFoundError: there is no such file.
    """
    if not path.is_file():
        raise FileNotFoundError(f"weights: expected none, pretrained or a file, found nothing at {path}")
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    values = _safetensors(path) if path.suffix == ".safetensors" else _saved_by_torch(path)
    for name in _NESTED:
        if isinstance(values, dict) and isinstance(values.get(name), dict):
            values = values[name]
            break
    if not isinstance(values, dict) or not values or not all(isinstance(v, Tensor) for v in values.values()):
        raise ValueError(f"weights: expected tensors by name, a state_dict, in {path}, found {type(values).__name__}")
    return Weights(values, str(path), digest)


def _safetensors(path: Path) -> dict[str, Tensor]:
    try:
        from safetensors import SafetensorError
        from safetensors.torch import load_file
    except ImportError as error:
        raise ValueError(f"weights: {path} needs the extra timm: pip install 'bacon_fast[timm]' ({error})") from error
    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(f"weights: {path} is no safetensors file, or damaged: {error}") from error


def _saved_by_torch(path: Path) -> object:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"weights: {path} was refused: it holds other objects than tensors, which could run code when "
            "they are read. Save the state_dict() of the network, best as .safetensors"
        ) from error
    except (RuntimeError, EOFError) as error:
        reason = (str(error).splitlines() or ["empty file"])[0][:200]
        raise ValueError(f"weights: {path} is no file of torch.save, or damaged: {reason}") from error
