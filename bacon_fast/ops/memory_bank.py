"""BaCon's memory bank: `bank_select_`, `bank_write_` and `class_centers`."""

from typing import Any

import torch
from torch import Tensor

from .. import reference
from .backends import BACKENDS, Backend, always, choose_backend, why_not_cpp, why_not_cuda
from .checks import check_devices, check_integer, check_kind, check_shape, check_values


def bank_select_(
    selected_label: Tensor,
    class_counts: Tensor,
    class_sums: Tensor,
    class_sizes: Tensor,
    bank: Tensor,
    written: Tensor,
    slots: Tensor,
    labels: Tensor,
    gate: Tensor,
    *,
    backend: str | None = None,
) -> None:
    """Marks the gated rows' slots as selected for a class, in place: the first half of a step of BaCon's memory bank.

    A slot that changes class takes its feature along. If gated rows name a slot twice, the last row wins. A row that is
    not gated changes nothing. `losses.MemoryBank` owns the buffers.

    Args:
        selected_label: [n] int64, the class of every slot, -1 for none; changed.
        class_counts: [K] int64, the number of slots of every class; changed.
        class_sums, class_sizes: [K,D] and [K] int64, sum (fixed point, see `reference.memory_bank`) and number of the
            features of every class; changed.
        bank, written: [n,D] float32 and [n] bool, the features, and which slots hold one.
        slots, labels, gate: [R] int64, [R] int64, [R] bool, the batch: slots in 0..n-1, classes in 0..K-1.
        backend: None for the best one, "reference", "cpp" or "cuda".

    Raises:
        TypeError, ValueError: an argument does not fit, or a slot of the batch has a class that does not exist, as a
            damaged checkpoint may have it; the message names it. On a GPU such a slot is left as it is.

    Example:
        >>> from bacon_fast.losses import MemoryBank
        >>> bank = MemoryBank(num_slots=3, num_classes=2, dim=2)  # owns the buffers and calls this
        >>> bank.select_(torch.tensor([0, 2]), torch.tensor([1, 0]), torch.tensor([True, False]))
        >>> bank.class_counts
        tensor([0, 1])
    """
    _check_bank_arguments(
        selected_label=selected_label,
        class_counts=class_counts,
        class_sums=class_sums,
        class_sizes=class_sizes,
        bank=bank,
        written=written,
        slots=slots,
        labels=labels,
        gate=gate,
    )
    run = choose_backend("bank_select_", backend, bank)
    run(selected_label, class_counts, class_sums, class_sizes, bank, written, slots, labels, gate)


def bank_write_(
    bank: Tensor,
    written: Tensor,
    class_sums: Tensor,
    class_sizes: Tensor,
    centers: Tensor,
    has_center: Tensor,
    selected_label: Tensor,
    slots: Tensor,
    features: Tensor,
    gate: Tensor,
    *,
    backend: str | None = None,
) -> None:
    """Writes the gated rows' features and sets the centers, in place: the second half of a step of BaCon's memory bank.

    The center of a class is the mean over the slots that are selected as the class and hold a feature. Features are
    clamped to ±4096; a row with a component that is not finite is not written. If gated rows name a slot twice, the
    last row wins. Sums are exact: they do not drift, however many writes there are, and in whatever order.

    Args:
        bank, written, class_sums, class_sizes, selected_label: as in `bank_select_`; all but the last are changed.
        centers, has_center: [K,D] float32 and [K] bool, the means, and which classes have one; changed.
        slots, features, gate: [R] int64, [R,D] float32, [R] bool, the batch.
        backend: None for the best one, "reference", "cpp" or "cuda".

    Raises:
        TypeError, ValueError: as in `bank_select_`. On a GPU a slot of a class that does not exist makes all centers
            NaN, and so the next loss.

    Example:
        >>> from bacon_fast.losses import MemoryBank
        >>> bank = MemoryBank(num_slots=3, num_classes=2, dim=2)  # owns the buffers and calls this
        >>> slots, gate = torch.tensor([0, 2]), torch.tensor([True, True])
        >>> bank.select_(slots, torch.tensor([1, 1]), gate)
        >>> bank.write_(slots, torch.tensor([[1.0, 2.0], [3.0, 4.0]]), gate)
        >>> bank.centers
        tensor([[0., 0.],
                [2., 3.]])
    """
    _check_bank_arguments(
        bank=bank,
        written=written,
        class_sums=class_sums,
        class_sizes=class_sizes,
        centers=centers,
        has_center=has_center,
        selected_label=selected_label,
        slots=slots,
        features=features,
        gate=gate,
    )
    run = choose_backend("bank_write_", backend, bank)
    run(
        bank,
        written,
        class_sums,
        class_sizes,
        centers,
        has_center,
        selected_label,
        slots,
        features.detach(),
        gate,
    )


def class_centers(
    bank: Tensor, labels: Tensor, num_classes: int, written: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Mean feature of each class over a whole memory bank: what `bank_select_` and `bank_write_` keep up to date.

    Args:
        bank: [n,D] float, one feature a slot. Not normalized. Clamped to ±4096, as `bank_write_` does.
        labels: [n] int64, class of each slot, 0..K-1, or -1 for none.
        num_classes: K.
        written: [n] bool, the slots that hold a feature; None: all do. The others are not read, so they may hold NaN.

    Returns:
        centers [K,D] float32, 0 where a class has no slot, NaN where a slot that counts for it is not finite, and
        has_center [K] bool. The sums are exact, so the order of the slots does not matter.

    Raises:
        TypeError, ValueError: an argument does not fit; the message names it.

    Example:
        >>> bank = torch.tensor([[1.0, 0.0], [3.0, 0.0], [0.0, 9.0]])
        >>> class_centers(bank, torch.tensor([0, 0, -1]), num_classes=2)
        (tensor([[2., 0.],
                [0., 0.]]), tensor([ True, False]))
    """
    check_shape("bank", bank, "n", "D")
    check_kind("bank", bank, "float")
    check_shape("labels", labels, bank.shape[0])
    check_kind("labels", labels, "int64")
    check_integer("num_classes", num_classes, low=1)
    if written is None:
        written = torch.ones_like(labels, dtype=torch.bool)
    check_shape("written", written, bank.shape[0])
    check_kind("written", written, "bool")
    check_devices("bank", bank, labels=labels, written=written)
    check_values("labels", labels, f"classes in 0..{num_classes - 1}, or -1", -1, num_classes - 1)
    bank = bank.detach()
    sums, sizes = reference.memory_bank.class_sums_and_sizes(bank, written, labels, num_classes)
    centers, has_center = reference.memory_bank.class_centers(sums, sizes)
    broken = written & (labels >= 0) & ~bank.isfinite().all(dim=1)
    num_broken = torch.zeros_like(sizes).index_add_(0, labels.clamp_min(0), broken.long())
    return torch.where((num_broken > 0)[:, None], torch.nan, centers), has_center


def _check_bank_arguments(**tensors: Tensor) -> None:
    """Raises unless the buffers of a memory bank and a batch for it fit each other."""
    check_shape("bank", tensors["bank"], "n", "D")
    check_shape("slots", tensors["slots"], "R")
    check_shape("class_sizes", tensors["class_sizes"], "K")
    (num_slots, dim), rows, num_classes = tensors["bank"].shape, tensors["slots"].shape[0], len(tensors["class_sizes"])
    expected = {
        "selected_label": ((num_slots,), torch.int64),
        "class_counts": ((num_classes,), torch.int64),
        "class_sums": ((num_classes, dim), torch.int64),
        "class_sizes": ((num_classes,), torch.int64),
        "bank": ((num_slots, dim), torch.float32),
        "written": ((num_slots,), torch.bool),
        "centers": ((num_classes, dim), torch.float32),
        "has_center": ((num_classes,), torch.bool),
        "slots": ((rows,), torch.int64),
        "labels": ((rows,), torch.int64),
        "features": ((rows, dim), torch.float32),
        "gate": ((rows,), torch.bool),
    }
    for name, tensor in tensors.items():
        shape, dtype = expected[name]
        check_shape(name, tensor, *shape)
        if tensor.dtype != dtype:
            raise TypeError(f"{name}: expected dtype {dtype}, found {tensor.dtype}")
        if tensor.device != tensors["bank"].device:
            raise ValueError(f"{name}: expected device {tensors['bank'].device}, found {tensor.device}")


torch.library.define(
    "bacon_fast::bank_select_",
    "(Tensor(a!) selected_label, Tensor(b!) class_counts, Tensor(c!) class_sums, Tensor(d!) class_sizes, Tensor bank, "
    "Tensor written, Tensor slots, Tensor labels, Tensor gate) -> ()",
)
torch.library.define(
    "bacon_fast::bank_write_",
    "(Tensor(a!) bank, Tensor(b!) written, Tensor(c!) class_sums, Tensor(d!) class_sizes, Tensor(e!) centers, "
    "Tensor(f!) has_center, Tensor selected_label, Tensor slots, Tensor features, Tensor gate) -> ()",
)


@torch.library.register_fake("bacon_fast::bank_select_")
@torch.library.register_fake("bacon_fast::bank_write_")
def _(*arguments: Any) -> None:
    """Returns nothing; the schema says which tensors change."""


def _select(*arguments: Tensor) -> None:
    torch.ops.bacon_fast.bank_select_(*arguments)


def _write(*arguments: Tensor) -> None:
    torch.ops.bacon_fast.bank_write_(*arguments)


BACKENDS["bank_select_"] = {
    "cpp": Backend(_select, why_not_cpp),
    "cuda": Backend(_select, why_not_cuda),
    "reference": Backend(reference.bank_select_, always),
}
BACKENDS["bank_write_"] = {
    "cpp": Backend(_write, why_not_cpp),
    "cuda": Backend(_write, why_not_cuda),
    "reference": Backend(reference.bank_write_, always),
}
