"""The public, stateless operations of bacon_fast.

Every function validates its arguments, then hands them to a backend: "reference" is plain PyTorch (bacon_fast.reference),
"cpp" the native CPU code, "triton" the GPU kernels. ``backend=None`` takes the best one usable for the tensors at hand;
asking by name for one that is not usable raises RuntimeError with the reason.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from . import reference

NEG_MODES = ("authors", "paper")


class Backend(NamedTuple):
    """One implementation of an operation. ``why_not(tensor)`` is None, or the reason why it cannot serve this tensor."""

    run: Callable[..., Tensor]
    why_not: Callable[[Tensor], str | None]


def _always(tensor: Tensor) -> str | None:
    return None


# Operation -> backends, the preferred one first.
BACKENDS: dict[str, dict[str, Backend]] = {
    "bacon_loss": {
        "reference": Backend(reference.bacon_loss, _always),
    },
}
_BACKEND_NAMES = ("reference", "cpp", "triton")


def _choose_backend(operation: str, name: str | None, tensor: Tensor) -> Callable[..., Tensor]:
    table = BACKENDS[operation]
    if name is None:
        return next(backend.run for backend in table.values() if backend.why_not(tensor) is None)
    if name not in _BACKEND_NAMES:
        raise ValueError(f"backend: expected None or one of {', '.join(_BACKEND_NAMES)}, found {name!r}")
    if name not in table:
        raise RuntimeError(f"backend {name!r} does not implement {operation}; it has {', '.join(table)}")
    if (reason := table[name].why_not(tensor)) is not None:
        raise RuntimeError(f"backend {name!r} cannot run {operation} here: {reason}")
    return table[name].run


def _check_shape(name: str, tensor: Tensor, *expected: int | str) -> None:
    """Raises unless ``tensor`` has the shape ``expected``, where a string stands for any size and is its name."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name}: expected a tensor, found {type(tensor).__name__}")
    fits = tensor.dim() == len(expected) and all(
        isinstance(size, str) or size == found for size, found in zip(expected, tensor.shape)
    )
    if not fits:
        wanted = ", ".join(str(size) for size in expected)
        raise ValueError(f"{name}: expected shape [{wanted}], found {list(tensor.shape)}")


def _check_kind(name: str, tensor: Tensor, kind: str) -> None:
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


def _check_number(name: str, value: float, *, low: float, low_allowed: bool = False) -> None:
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        raise TypeError(f"{name}: expected a number, found {type(value).__name__}")
    if not math.isfinite(value) or value < low or (value == low and not low_allowed):
        raise ValueError(f"{name}: expected a number {'>=' if low_allowed else '>'} {low}, found {value}")


def bacon_loss(
    features: Tensor,
    labels: Tensor,
    logits: Tensor,
    centers: Tensor,
    selected: Tensor,
    class_counts: Tensor,
    *,
    progress: float | Tensor,
    temperature: float = 0.1,
    bta: float = 0.005,
    negative_weight: float | None = 64.0,
    top_k: int = 3,
    neg_mode: str = "authors",
    has_center: Tensor | None = None,
    min_temperature: float = 0.0,
    backend: str | None = None,
) -> Tensor:
    """Balanced feature-level contrastive loss of BaCon (AAAI 2024, arXiv 2403.12986), a 0-d tensor.

    Each selected row is pulled to the center of its class, at a temperature that depends on how often the class was
    selected (balanced temperature adjusting), and pushed from the rows of the batch that surely are of another class
    (reliable negative selection). Only ``features`` receives a gradient. The formula is in `reference.bacon.bacon_loss`.

    Args:
        features: [R,D] float, projections, the B labeled rows first, then R-B weakly augmented unlabeled rows. Need not
            be normalized. float16 and bfloat16 are computed in float32.
        labels: [B] int64, classes of the labeled rows, 0..K-1.
        logits: [R-B,K] float, auxiliary head's logits of the unlabeled rows: the largest gives a row's class, the
            ``top_k`` largest the classes that it is no negative of.
        centers: [K,D] float, class centers.
        selected: [R] bool, the reliable rows; the others have no term of their own but still serve as negatives.
        class_counts: [K] number, how many samples are selected as each class; sets the temperatures.
        progress: t/T in 0..1, a number or a 0-d tensor.
        temperature: tau, of the negatives, and of the positives up to the adjustment.
        bta: strength of the temperature adjustment, 0 turns it off.
        negative_weight: the mean over the negatives counts as this many negatives; None takes the plain sum instead.
        top_k: of how many classes, its likeliest, an unlabeled row is no negative. With top_k >= K unlabeled rows are
            nobody's negatives; `losses.BaConLoss` therefore lowers it to K-1.
        neg_mode: "authors" averages exp(similarity) over all rows of the class and all its negatives, as the released
            code does; "paper" averages over the negatives of the row alone.
        has_center: [K] bool, False for classes without a center; None means that all have one. Rows of classes without
            a center, and of classes without a negative in the batch, have no term.
        min_temperature: lower bound of the positives' temperatures.
        backend: None, "reference", "cpp" or "triton".

    Returns:
        Mean over the selected rows; exactly 0 with zero gradient where no row has a term.

    Raises:
        TypeError, ValueError: an argument does not fit; the message names it.
        RuntimeError: the named backend is not available here.
    """
    _check_shape("features", features, "R", "D")
    _check_shape("labels", labels, "B")
    rows, dim, batch = features.shape[0], features.shape[1], labels.shape[0]
    if batch > rows:
        raise ValueError(f"labels: expected at most {rows} entries, one a row of features, found {batch}")
    _check_shape("centers", centers, "K", dim)
    num_classes = centers.shape[0]
    if num_classes < 1:
        raise ValueError("centers: expected at least one class, found shape [0, D]")
    _check_shape("logits", logits, rows - batch, num_classes)
    _check_shape("selected", selected, rows)
    _check_shape("class_counts", class_counts, num_classes)
    _check_kind("features", features, "float")
    _check_kind("labels", labels, "int64")
    _check_kind("logits", logits, "float")
    _check_kind("centers", centers, "float")
    _check_kind("selected", selected, "bool")
    _check_kind("class_counts", class_counts, "number")
    if has_center is not None:
        _check_shape("has_center", has_center, num_classes)
        _check_kind("has_center", has_center, "bool")
    for name, tensor in (
        ("labels", labels),
        ("logits", logits),
        ("centers", centers),
        ("selected", selected),
        ("class_counts", class_counts),
        ("has_center", has_center),
    ):
        if tensor is not None and tensor.device != features.device:
            raise ValueError(f"{name}: expected device {features.device}, that of features, found {tensor.device}")
    if isinstance(progress, Tensor):
        _check_shape("progress", progress)
    else:
        _check_number("progress", progress, low=0, low_allowed=True)
    _check_number("temperature", temperature, low=0)
    _check_number("bta", bta, low=0, low_allowed=True)
    if negative_weight is not None:
        _check_number("negative_weight", negative_weight, low=0)
    _check_number("min_temperature", min_temperature, low=0, low_allowed=True)
    if not isinstance(top_k, int) or top_k < 1:
        raise ValueError(f"top_k: expected a positive integer, found {top_k!r}")
    if neg_mode not in NEG_MODES:
        raise ValueError(f"neg_mode: expected one of {', '.join(NEG_MODES)}, found {neg_mode!r}")
    run = _choose_backend("bacon_loss", backend, features)
    return run(
        features,
        labels,
        logits,
        centers,
        selected,
        class_counts,
        progress=progress,
        temperature=temperature,
        bta=bta,
        negative_weight=negative_weight,
        top_k=top_k,
        neg_mode=neg_mode,
        has_center=has_center,
        min_temperature=min_temperature,
    )
