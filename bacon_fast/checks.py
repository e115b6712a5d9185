"""Checks of arguments: each raises an error that names the argument, what was expected and what was found."""

import math

import torch
from torch import Tensor


def check_shape(name: str, tensor: Tensor, *expected: int | str) -> None:
    """Raises unless ``tensor`` has the shape ``expected``, where a string stands for any size and is its name."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name}: expected a tensor, found {type(tensor).__name__}")
    fits = tensor.dim() == len(expected) and all(
        isinstance(size, str) or size == found for size, found in zip(expected, tensor.shape)
    )
    if not fits:
        wanted = ", ".join(str(size) for size in expected)
        raise ValueError(f"{name}: expected shape [{wanted}], found {list(tensor.shape)}")


def check_kind(name: str, tensor: Tensor, kind: str) -> None:
    if kind == "float":
        fits = tensor.dtype.is_floating_point
    elif kind == "bool":
        fits = tensor.dtype == torch.bool
    elif kind == "int64":
        fits = tensor.dtype == torch.int64
    else:
        fits = not tensor.dtype.is_complex and tensor.dtype != torch.bool
    if not fits:
        raise TypeError(f"{name}: expected dtype {kind}, found {tensor.dtype}")


def check_number(name: str, value: float, *, low: float, low_allowed: bool = False) -> None:
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        raise TypeError(f"{name}: expected a number, found {type(value).__name__}")
    if not math.isfinite(value) or value < low or (value == low and not low_allowed):
        raise ValueError(f"{name}: expected a number {'>=' if low_allowed else '>'} {low}, found {value}")


def check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name}: expected one of {', '.join(choices)}, found {value!r}")


def check_devices(reference_name: str, reference: Tensor, **tensors: Tensor | None) -> None:
    for name, tensor in tensors.items():
        if tensor is not None and tensor.device != reference.device:
            raise ValueError(
                f"{name}: expected device {reference.device}, that of {reference_name}, found {tensor.device}"
            )
