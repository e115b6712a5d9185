"""The rules by which a backend's answer is judged against that of the reference in float64.

Finite in: finite out, and the right value. Not finite in, where it matters: not finite out.
"""

import torch
from torch import Tensor


class Wrong(AssertionError):
    """An answer that breaks a rule."""


def check_value(name: str, found: Tensor, exact: Tensor, tolerance: float) -> None:
    """Losses: not finite in the same places, and else within tolerance, absolutely below 1 and relatively above."""
    found, exact = found.double(), exact.double()
    if found.shape != exact.shape:
        raise Wrong(f"{name}: shape {list(found.shape)} for {list(exact.shape)}")
    finite = exact.isfinite()
    if not torch.equal(found.isfinite(), finite):
        raise Wrong(f"{name}: {found} is not finite elsewhere than {exact}")
    error = torch.where(finite, (found - exact).abs() / exact.abs().clamp_min(1), 0)
    if error.numel() and error.max() > tolerance:
        raise Wrong(f"{name}: {found} for {exact}, an error of {error.max():.1e} where {tolerance:.1e} is allowed")


def check_gradient(name: str, found: Tensor, exact: Tensor, tolerance: float, slack: Tensor | float = 0) -> None:
    """Gradients of rows [..., D], each judged by its own size: their sizes differ by those of the vectors.

    ``slack``, [..., 1] or a number, is allowed beside: rounding of what cancels.
    """
    if found.shape != exact.shape:
        raise Wrong(f"{name}: shape {list(found.shape)} for {list(exact.shape)}")
    info = torch.finfo(found.dtype)
    exact = exact.double()
    if not found.numel() or not exact.isfinite().all() or exact.abs().max() > 0.1 * info.max:
        return
    size = exact.abs().amax(dim=-1, keepdim=True)
    allowed = tolerance * size + 16 * info.smallest_normal * info.eps + slack
    error = (found.double() - exact).abs()
    if not (error <= allowed).all():
        worst = (error - allowed).nan_to_num(torch.inf).flatten().argmax()
        raise Wrong(
            f"{name}: {found.flatten()[worst]} for {exact.flatten()[worst]}, beside a largest one of "
            f"{size.expand_as(exact).flatten()[worst]}"
        )


def check_equal(name: str, found: Tensor, expected: Tensor) -> None:
    """Bit for bit, NaN being NaN."""
    torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True, msg=lambda m: f"{name}: {m}")
