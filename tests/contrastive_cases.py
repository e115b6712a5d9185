"""Random problems of the contrastive family, and the rule by which a backend's answer is judged."""

from dataclasses import dataclass

import torch
from torch import Tensor

from bacon_fast import reference


@dataclass(frozen=True)
class Case:
    """Sizes and features of one problem; ``columns=None``: the rows are the columns."""

    name: str
    rows: int
    columns: int | None
    dim: int
    own: int = 0
    codes: int = 0
    match: str = "positive"
    groups: int = 0
    self_column: bool = False
    bias: bool = False
    floor: float = 0.0
    strided: bool = False
    columns_need_gradient: bool = True

    def __str__(self) -> str:
        return self.name


CASES = [
    Case("one", 1, 1, 1, codes=1),
    Case("odd", 7, 13, 5, own=2, codes=2, bias=True, strided=True),
    Case("no-columns", 5, 0, 6, own=2),
    Case("no-rows", 0, 9, 6, codes=1),
    Case("bacon", 67, None, 40, own=1, codes=3, match="ignore", groups=5, floor=1e-3),
    Case("bacon-paper", 35, None, 16, own=1, codes=3, match="ignore", floor=1e-3, bias=True),
    Case("ssc", 70, None, 33, codes=1, self_column=True, strided=True),
    Case("queue", 35, 150, 20, own=3, bias=True, columns_need_gradient=False),
    Case("queue-in-groups", 40, 100, 65, own=1, codes=1, match="ignore", groups=3, columns_need_gradient=False),
    Case("memory", 33, 70, 130, codes=1, self_column=True, strided=True),
    Case("long", 3, 300, 8, own=1, codes=1, groups=2, bias=True),
]


def problem(case: Case, dtype: torch.dtype, device: str = "cpu", seed: int = 0) -> tuple[list, dict]:
    """Arguments and options of `reference.contrastive`, except the form."""
    g = torch.Generator().manual_seed(seed)
    scalar_dtype = torch.promote_types(dtype, torch.float32)

    def vectors(*shape: int) -> Tensor:
        values = torch.randn(*shape, generator=g, dtype=torch.float64).to(device, dtype)
        if not case.strided:
            return values
        # The same values with gaps between elements and with the axes stored the other way round.
        wide = values.new_full((*shape[:-1], 2 * shape[-1]), torch.nan).transpose(0, -1).contiguous().transpose(0, -1)
        wide[..., ::2] = values
        return wide[..., ::2]

    def uniform(*shape: int, low: float, high: float) -> Tensor:
        return (torch.rand(*shape, generator=g, dtype=torch.float64) * (high - low) + low).to(device, scalar_dtype)

    def integers(*shape: int, low: int, high: int) -> Tensor:
        return torch.randint(low, high, shape, generator=g).to(device)

    num_rows, num_columns = case.rows, case.rows if case.columns is None else case.columns
    columns = None if case.columns is None else vectors(num_columns, case.dim)
    own_scale = uniform(num_rows, case.own, low=0, high=8) if case.own else None
    if case.own > 1:
        own_scale[::3, 1] = torch.nan  # no such positive
        own_scale[1::4] = torch.nan  # no own positive at all
        own_scale[::5, 0] = 0.0
    if not case.self_column:
        self_column = None
    elif columns is None:
        self_column = torch.arange(num_rows, device=device)
    else:
        self_column = integers(num_rows, low=-1, high=num_columns)
    arguments = [
        vectors(num_rows, case.dim),
        columns,
        vectors(num_rows, case.own, case.dim) if case.own else None,
        integers(num_rows, low=0, high=5),
        integers(num_columns, case.codes, low=-1, high=6) if case.codes else None,
        self_column,
        uniform(num_rows, low=2, high=8),
        own_scale,
        uniform(num_rows, low=2, high=8),
        uniform(num_rows, low=-2, high=2) if case.bias else None,
        uniform(num_rows, low=-2, high=2) if case.bias or case.groups else None,
        integers(num_rows, low=0, high=max(case.groups - 1, 1)) if case.groups else None,  # the last group is empty
        case.groups,
    ]
    options = {
        "match": case.match,
        "floor": case.floor,
        "eps": 1e-8,
    }
    return arguments, options


def upstream(case: Case, dtype: torch.dtype, device: str = "cpu") -> Tensor:
    """A gradient for the row losses that differs from row to row, with zeros and both signs."""
    g = torch.Generator().manual_seed(1)
    grad = torch.randn(case.rows, generator=g, dtype=torch.float64).to(
        device, torch.promote_types(dtype, torch.float32)
    )
    grad[::4] = 0
    return grad


def loss_and_gradients(run, case: Case, arguments: list, grad: Tensor, **options) -> tuple[Tensor, list[Tensor]]:
    """Row losses, and the gradients of rows, columns and own, where the case has them and asks for them."""
    arguments = list(arguments)
    needed = [0, 1, 2] if case.columns_need_gradient else [0, 2]
    leaves = []
    for index in needed:
        if arguments[index] is not None:
            arguments[index] = arguments[index].detach().requires_grad_()
            leaves.append(arguments[index])
    loss = run(*arguments, **options)
    return loss.detach(), list(torch.autograd.grad(loss, leaves, grad, materialize_grads=True))


def exact(case: Case, arguments: list, grad: Tensor, **options) -> tuple[Tensor, list[Tensor]]:
    """The reference in float64, on the CPU."""

    def up(value):
        if not isinstance(value, Tensor):
            return value
        return value.cpu().double() if value.is_floating_point() else value.cpu()

    return loss_and_gradients(reference.contrastive, case, [up(a) for a in arguments], up(grad), **options)


def assert_as_accurate_as_torch(run, case: Case, form: str, dtype: torch.dtype, device: str = "cpu", **extra) -> None:
    """The backend's error is no worse than that of plain PyTorch in the same dtype, plus a small epsilon."""
    arguments, options = problem(case, dtype, device)
    options["form"] = form
    grad = upstream(case, dtype, device)
    loss, gradients = loss_and_gradients(run, case, arguments, grad, **options, **extra)
    torch_loss, torch_gradients = loss_and_gradients(reference.contrastive, case, arguments, grad, **options)
    true_loss, true_gradients = exact(case, arguments, grad, **options)
    assert loss.dtype == torch.promote_types(dtype, torch.float32)
    assert len(gradients) == len(true_gradients)
    for name, found, by_torch, truth, slack in [
        ("loss", loss, torch_loss, true_loss, 8),
        *(("gradient", *values, 16) for values in zip(gradients, torch_gradients, true_gradients)),
    ]:
        assert found.shape == truth.shape and found.dtype == by_torch.dtype
        if truth.numel() == 0:
            continue
        # Gradients of half-precision vectors are rounded to them, once.
        epsilon = torch.finfo(found.dtype).eps * (1 if found.dtype.itemsize == 2 else slack)
        allowed = (by_torch.cpu().double() - truth).abs().max() + epsilon * truth.abs().max()
        error = (found.cpu().double() - truth).abs().max()
        assert error <= allowed, f"{name}: error {error:.2e}, of which {allowed:.2e} is allowed"
