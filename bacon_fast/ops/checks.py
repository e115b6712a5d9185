"""Checks of arguments: each raises an error that names the argument, what was expected and what was found."""

import math

import torch
from torch import Tensor

from ..reference.values import check_values as check_values  # what the references check themselves
from ..reference.values import trusted_values as trusted_values


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


def check_number(name: str, value: float, *, low: float, low_allowed: bool = False, high: float | None = None) -> None:
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        raise TypeError(f"{name}: expected a number, found {type(value).__name__}")
    too_low = value < low or (value == low and not low_allowed)
    if not math.isfinite(value) or too_low or (high is not None and value > high):
        wanted = f"{'>=' if low_allowed else '>'} {low}" + ("" if high is None else f" and <= {high}")
        raise ValueError(f"{name}: expected a number {wanted}, found {value}")


def check_integer(name: str, value: int, *, low: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < low:
        wanted = "a positive integer" if low == 1 else f"an integer >= {low}"
        raise ValueError(f"{name}: expected {wanted}, found {value!r}")


def check_progress(progress: float | Tensor) -> None:
    """Raises unless it is a 0-d tensor or a number in 0..1. A tensor's value is checked where it is read."""
    if isinstance(progress, Tensor):
        check_shape("progress", progress)
        check_kind("progress", progress, "number")
    else:
        check_number("progress", progress, low=0, low_allowed=True, high=1)


def check_temperatures(temperature: float, bta: float, min_temperature: float) -> None:
    """Raises unless BaCon's balanced temperatures, of which the smallest may be temperature·(1 - bta), are positive."""
    check_number("temperature", temperature, low=0)
    check_number("bta", bta, low=0, low_allowed=True)
    check_number("min_temperature", min_temperature, low=0, low_allowed=True)
    if bta >= 1 and min_temperature == 0:
        raise ValueError(f"bta: expected a number below 1 where min_temperature is 0, found {bta}")


def check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name}: expected one of {', '.join(choices)}, found {value!r}")


def check_devices(reference_name: str, reference: Tensor, **tensors: Tensor | None) -> None:
    for name, tensor in tensors.items():
        if tensor is not None and tensor.device != reference.device:
            raise ValueError(
                f"{name}: expected device {reference.device}, that of {reference_name}, found {tensor.device}"
            )


def check_seed(seed: int) -> None:
    """Raises ValueError or TypeError unless `seed` is an integer in [0, 2^64)."""
    if not isinstance(seed, int):
        raise TypeError(f"seed: expected an integer, found {type(seed).__name__}")
    if not 0 <= seed < 2**64:
        raise ValueError(f"seed: expected an integer in [0, 2^64), found {seed}")


def check_stream(stream: int) -> None:
    """Raises ValueError or TypeError unless `stream` is an integer in [0, 2^32)."""
    if not isinstance(stream, int):
        raise TypeError(f"stream: expected an integer, found {type(stream).__name__}")
    if not 0 <= int(stream) < 2**32:  # torch.compile does not compare members of an enumeration
        raise ValueError(f"stream: expected an integer in [0, 2^32), found {stream}")


def as_step_tensor(step: int | Tensor, device: torch.device) -> Tensor:
    """A step counter as a 0-d int64 tensor on `device`; a tensor that is one already comes back as it is."""
    if not isinstance(step, Tensor):
        if not 0 <= step < 2**32:
            raise ValueError(f"step: expected an integer in [0, 2^32), found {step}")
        return torch.full((), step, dtype=torch.int64, device=device)  # a fill: no copy from the host
    if step.dim() != 0 or step.dtype != torch.int64 or step.device != device:
        raise ValueError(
            f"step: expected a 0-d int64 tensor on {device}, found {step.dtype} {list(step.shape)} on {step.device}"
        )
    return step


def check_images(name: str, images: Tensor) -> None:
    if images.dtype != torch.uint8:
        raise TypeError(f"{name}: expected torch.uint8, found {images.dtype}")
    if images.dim() != 4 or images.shape[3] != 3:
        raise ValueError(f"{name}: expected [N, H, W, 3], found {list(images.shape)}")
