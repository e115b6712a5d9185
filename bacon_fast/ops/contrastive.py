"""The contrastive family: `contrastive`. The losses of BaCon, SupCon, InfoNCE and SsCL are its instances.

The backward is an op too, so that torch.compile sees both. It has no derivative of its own.
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor

from .. import reference
from ..reference.values import accumulator_dtype
from .backends import BACKENDS, PREFERENCES, Backend, always, why_not_cpp, why_not_triton
from .contrastive_times import fastest_on_gpu


def contrastive(
    rows: Tensor,
    columns: Tensor | None,
    own: Tensor | None,
    row_code: Tensor,
    column_code: Tensor | None,
    self_column: Tensor | None,
    positive_scale: Tensor,
    own_scale: Tensor | None,
    negative_scale: Tensor,
    negative_bias: Tensor | None,
    negative_offset: Tensor | None,
    group: Tensor | None,
    num_groups: int,
    *,
    form: str,
    match: str,
    floor: float = 0.0,
    eps: float = 1e-12,
    backend: str,
) -> Tensor:
    """The family's loss of every row by the backend "cpp", "triton" or "chunks". Rows and columns must have one dtype.

    Arguments and formulas: `reference.contrastive.contrastive`. `choose_backend("contrastive", ...)` returns this
    function with its backend, or the reference.
    """
    dtype = accumulator_dtype(rows.dtype)
    if columns is not None and columns.dtype != rows.dtype:
        raise TypeError(f"columns: expected dtype {rows.dtype}, that of rows, found {columns.dtype}")

    def codes(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor.to(torch.int32).contiguous()

    def scalars(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor.detach().to(dtype).contiguous()

    # Columns that need no gradient and are nobody's positives act on the rows only through the mean of the negatives.
    keep_mean = (
        backend == "triton"
        and torch.is_grad_enabled()
        and rows.requires_grad
        and columns is not None
        and not columns.requires_grad
        and (column_code is None or match == "ignore")
    )
    inputs = (
        rows,
        columns,
        own,
        codes(row_code),
        codes(column_code),
        codes(self_column),
        scalars(positive_scale),
        scalars(own_scale),
        scalars(negative_scale),
        scalars(negative_bias),
        scalars(negative_offset),
        codes(group),
        num_groups,
    )
    options = {
        "form": form,
        "match": match,
        "floor": floor,
        "eps": eps,
        "backend": backend,
        "keep_mean": keep_mean,
    }
    if torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return torch.ops.bacon_fast.contrastive(*inputs, **options)[0]
    return _Contrastive.apply(*inputs, options)[0]


_TENSORS = (
    "rows",
    "columns",
    "own",
    "row_code",
    "column_code",
    "self_column",
    "positive_scale",
    "own_scale",
    "negative_scale",
    "negative_bias",
    "negative_offset",
    "group",
)


def _arguments(optional: set[str]) -> str:
    return ", ".join(f"Tensor{'?' if name in optional else ''} {name}" for name in _TENSORS)


_OPTIONAL = set(_TENSORS) - {"rows", "row_code", "positive_scale", "negative_scale"}
_ARGUMENTS = f"{_arguments(_OPTIONAL)}, SymInt num_groups"
_CPP_ARGUMENTS = f"{_arguments({'own', 'own_scale', 'group'})}, int num_groups"
_OPTIONS = "str form, str match, float floor, float eps"
_NEEDS = "bool needs_rows, bool needs_columns, bool needs_own"
_GRADIENTS = "(Tensor grad_rows, Tensor grad_columns, Tensor grad_own)"
# The forward saves these for the backward; the C++ code uses only the first.
_OPERANDS = "Tensor row_operands, Tensor row_operand_scale, Tensor column_operands, Tensor column_operand_scale"
_SAVED = f"Tensor stats, {_OPERANDS}, Tensor mean_column"
_CPP_STATS = 5  # kNumStats in csrc/contrastive/family.h
_TRITON_STATS = 7  # NUM_STATS in kernels/contrastive_math.py; the own logits follow

torch.library.define(
    "bacon_fast::contrastive",
    f"({_ARGUMENTS}, *, {_OPTIONS}, str backend, bool keep_mean) -> (Tensor row_loss, {_SAVED})",
)
torch.library.define(
    "bacon_fast::contrastive_backward",
    f"(Tensor grad_row_loss, {_SAVED}, {_ARGUMENTS}, *, {_OPTIONS}, str backend, {_NEEDS}) -> {_GRADIENTS}",
)
torch.library.define(
    "bacon_fast::contrastive_cpp", f"({_CPP_ARGUMENTS}, *, {_OPTIONS}) -> (Tensor row_loss, Tensor stats)"
)
torch.library.define(
    "bacon_fast::contrastive_backward_cpp",
    f"(Tensor grad_row_loss, Tensor stats, {_CPP_ARGUMENTS}, *, {_OPTIONS}, {_NEEDS}) -> {_GRADIENTS}",
)


def input_precision(dtype: torch.dtype) -> str:
    """How tensor cores multiply: float32 as torch.set_float32_matmul_precision says, gradients of float16 as tf32."""
    if dtype == torch.float64:
        return "ieee"
    # Unlike torch.get_float32_matmul_precision, this can be read however the precision was set.
    allowed = torch.backends.cuda.matmul.fp32_precision == "tf32"
    return "tf32x3" if dtype == torch.float32 and not allowed else "tf32"


def _native_arguments(arguments: tuple) -> tuple:
    """The arguments of the C++ ops, which take every vector: fills in those that are None."""
    named = dict(zip(_TENSORS, arguments))
    rows = named["rows"]
    count, zero = rows.shape[0], torch.zeros_like(named["negative_scale"])
    columns = rows if named["columns"] is None else named["columns"]
    named["columns"] = columns
    for name, default in (
        ("column_code", partial(named["row_code"].new_full, (columns.shape[0], 1), -1)),
        ("self_column", partial(named["row_code"].new_full, (count,), -1)),
        ("negative_bias", lambda: zero),
        ("negative_offset", lambda: zero),
    ):
        if named[name] is None:
            named[name] = default()
    return (*named.values(), arguments[-1])


@torch.library.impl("bacon_fast::contrastive", ("cpu", "cuda"))
def _forward(*arguments: Any, backend: str, keep_mean: bool, **options: Any) -> tuple[Tensor, ...]:
    rows = arguments[0]
    if backend == "cpp":
        row_loss, stats = torch.ops.bacon_fast.contrastive_cpp(*_native_arguments(arguments), **options)
        empty, no_scale = partial(rows.new_empty, (0, 0, 0)), partial(row_loss.new_empty, 0)
        return row_loss, stats, empty(), no_scale(), empty(), no_scale(), row_loss.new_empty(0, rows.shape[1])
    from ..kernels.contrastive_forward import contrastive_forward

    return contrastive_forward(
        *arguments,
        **options,
        keep_mean=keep_mean,
        input_precision=input_precision(rows.dtype),
        in_chunks=backend == "chunks",
    )


@torch.library.register_fake("bacon_fast::contrastive")
def _(rows, columns, own, *arguments, backend, keep_mean, **options):
    dtype = accumulator_dtype(rows.dtype)

    def operands(vectors: Tensor | None) -> tuple[Tensor, Tensor]:
        """What `kernels.contrastive_forward.prepare` makes, if the backward needs it."""
        shape, of = (0, 0, 0), rows.dtype
        if backend != "cpp":
            count = 0 if vectors is None else vectors.shape[0]
            precision = "ieee" if backend == "chunks" else input_precision(rows.dtype)
            full, of = operand_shape(count, rows.shape[1], rows.dtype, precision)
            if vectors is not None and not keep_mean:
                shape = full
        return rows.new_empty(shape, dtype=of), rows.new_empty(shape[1], dtype=dtype)

    if backend == "cpp":
        num_stats = _CPP_STATS
    else:
        from ..kernels.config import operand_shape

        num_stats = _TRITON_STATS + (0 if own is None else own.shape[1])
    return (
        rows.new_empty(rows.shape[0], dtype=dtype),
        rows.new_empty(num_stats, rows.shape[0], dtype=dtype),
        *operands(rows),
        *operands(columns),
        rows.new_empty(rows.shape[0] if keep_mean else 0, rows.shape[1], dtype=dtype),
    )


@torch.library.impl("bacon_fast::contrastive_backward", ("cpu", "cuda"))
def _backward(
    grad_row_loss: Tensor,
    stats: Tensor,
    *saved_and_arguments: Any,
    backend: str,
    needs_rows: bool,
    needs_columns: bool,
    needs_own: bool,
    **options: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    saved, arguments = saved_and_arguments[:5], saved_and_arguments[5:]
    rows, columns = arguments[:2]
    grad = grad_row_loss.to(stats.dtype).contiguous()
    if backend == "cpp":
        shared = columns is None
        grad_rows, grad_columns, grad_own = torch.ops.bacon_fast.contrastive_backward_cpp(
            grad,
            stats,
            *_native_arguments(arguments),
            needs_rows=needs_rows,
            needs_columns=needs_columns or (shared and needs_rows),
            needs_own=needs_own,
            **options,
        )
        if shared and needs_rows:
            return grad_rows.add_(grad_columns), rows.new_empty(0), grad_own
        return grad_rows, grad_columns, grad_own
    from ..kernels.contrastive_backward import contrastive_backward

    return contrastive_backward(
        grad,
        stats,
        *saved,
        *arguments,
        **options,
        needs_rows=needs_rows,
        needs_columns=needs_columns,
        needs_own=needs_own,
        input_precision=input_precision(rows.dtype),
        in_chunks=backend == "chunks",
    )


@torch.library.register_fake("bacon_fast::contrastive_backward")
def _(
    grad_row_loss, stats, row_operands, row_operand_scale, column_operands, column_operand_scale, mean_column,
    rows, columns, own, *arguments, needs_rows, needs_columns, needs_own, **options,
):  # fmt: skip
    def gradient(of: Tensor | None, needed: bool) -> Tensor:
        return of.new_empty(of.shape) if needed and of is not None else rows.new_empty(0)

    return gradient(rows, needs_rows), gradient(columns, needs_columns), gradient(own, needs_own)


def _setup(ctx: Any, inputs: tuple, keyword_only_inputs: dict, output: tuple[Tensor, ...]) -> None:
    *tensors, ctx.num_groups = inputs
    ctx.options = {name: value for name, value in keyword_only_inputs.items() if name != "keep_mean"}
    ctx.save_for_backward(*output[1:], *tensors)
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, grad_row_loss: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    needs = ctx.needs_input_grad[:3]
    grads: list[Tensor | None] = [None] * (len(_TENSORS) + 1)
    if grad_row_loss is not None and any(needs):
        gradients = torch.ops.bacon_fast.contrastive_backward(
            grad_row_loss,
            *ctx.saved_tensors,
            ctx.num_groups,
            **ctx.options,
            needs_rows=needs[0],
            needs_columns=needs[1],
            needs_own=needs[2],
        )
        grads[:3] = [gradient if needed else None for gradient, needed in zip(gradients, needs)]
    return tuple(grads)


def _refuse(ctx: Any, *grads: Tensor | None) -> None:
    raise RuntimeError('bacon_fast::contrastive has no second derivative; backend="reference" has')


torch.library.register_autograd("bacon_fast::contrastive", _differentiate, setup_context=_setup)
torch.library.register_autograd("bacon_fast::contrastive_backward", _refuse)


class _Contrastive(torch.autograd.Function):
    """The same as register_autograd with `_setup` and `_differentiate`, without its hundred microseconds a call."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[Tensor, ...]:
        *inputs, options = arguments
        output = torch.ops.bacon_fast.contrastive(*inputs, **options)
        _setup(ctx, inputs, options, output)
        return output

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        return (*_differentiate(ctx, *grads), None)


def why_not_triton_family(vectors: Tensor) -> str | None:
    """Why the family's kernels cannot serve the vectors."""
    if (reason := why_not_triton(vectors)) is None:
        from ..kernels.config import MAX_DIM

        if vectors.shape[1] > MAX_DIM:
            reason = f"it serves vectors of up to {MAX_DIM} elements, and these have {vectors.shape[1]}"
    return reason


BACKENDS["contrastive"] = {
    "cpp": Backend(partial(contrastive, backend="cpp"), why_not_cpp),
    "triton": Backend(partial(contrastive, backend="triton"), why_not_triton_family),
    "chunks": Backend(partial(contrastive, backend="chunks"), why_not_triton_family),
    "reference": Backend(reference.contrastive, always),
}
PREFERENCES["contrastive"] = fastest_on_gpu
