"""Memory bank and class centers in plain PyTorch, recomputed in full at every call (the native code is incremental).

One slot a training sample. A slot holds the sample's latest reliable feature and the class it was last selected as; the
center of a class is the mean over its slots that hold a feature (methods.md E.1, E.6). A batch names slots; the last
row wins where one is named twice.

Sums are exact. A feature enters them as a 64-bit fixed-point number, so they depend neither on the order of the writes
nor on their number: 30 bits behind the point, values within ±4096, and room for 2^21 slots in one class.
"""

import torch
from torch import Tensor

from .values import check_values

LIMIT = 4096.0  # features are clamped to ±LIMIT when they are written
SCALE = 2.0**30  # steps of the fixed-point grid per unit; float32 values of 2^-6 and more lie on the grid


def fixed_point(features: Tensor) -> Tensor:
    """Features on the grid of the sums, int64: clamped to ±LIMIT, NaN as 0."""
    return (features.double().nan_to_num(0.0).clamp(-LIMIT, LIMIT) * SCALE).round().long()


def class_sums_and_sizes(
    bank: Tensor, written: Tensor, selected_label: Tensor, num_classes: int
) -> tuple[Tensor, Tensor]:
    """Sum [K,D] of the features (int64, fixed point) and number [K] of the slots that count for each class.

    Slots of classes that do not exist count for none; where a batch touches one, `_check_classes` says so.
    """
    counted = written & (selected_label >= 0) & (selected_label < num_classes)
    label = torch.where(counted, selected_label, 0)
    sums = torch.zeros(num_classes, bank.shape[1], dtype=torch.int64, device=bank.device)
    sums.index_add_(0, label, torch.where(counted[:, None], fixed_point(bank), 0))
    sizes = torch.zeros(num_classes, dtype=torch.int64, device=bank.device)
    return sums, sizes.index_add_(0, label, counted.long())


def class_centers(class_sums: Tensor, class_sizes: Tensor) -> tuple[Tensor, Tensor]:
    """Centers [K,D] float32, zero where there is none, and has_center [K] bool."""
    mean = class_sums.double() / (class_sizes.clamp_min(1).double() * SCALE)[:, None]
    return mean.float(), class_sizes > 0


def last_row_of_slots(slots: Tensor, gate: Tensor, num_slots: int) -> Tensor:
    """For every slot [n] the last gated row of the batch that names it, or -1."""
    check_values("slots", slots, f"values in 0..{num_slots - 1}", 0, num_slots - 1)
    row = torch.arange(slots.shape[0], device=slots.device)
    last = torch.full((num_slots,), -1, device=slots.device)
    return last.scatter_reduce(0, slots, torch.where(gate, row, -1), "amax")


def _exists(selected_label: Tensor, num_classes: int) -> Tensor:
    """bool, whether a slot has a class in 0..K-1 or none; a damaged checkpoint may have others."""
    return (selected_label >= -1) & (selected_label < num_classes)


def _check_classes(selected_label: Tensor, slots: Tensor, num_classes: int) -> None:
    """Raises ValueError unless the slots of the batch have a class that exists, or none; not on a GPU."""
    last = num_classes - 1
    check_values("selected_label", selected_label[slots], f"classes in -1..{last}", -1, last)


def _pick_rows(rows: Tensor, index: Tensor) -> Tensor:
    """rows[index], of any content where the index is -1; an empty batch has nothing to pick from."""
    if rows.shape[0] == 0:
        return rows.new_zeros(index.shape[0], *rows.shape[1:])
    return rows[index.clamp_min(0)]


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
) -> None:
    """Select the gated rows as their labels; see `bacon_fast.functional.bank_select_`."""
    num_classes = class_counts.shape[0]
    gated = torch.where(gate, labels, 0)
    check_values("labels", gated, f"classes in 0..{num_classes - 1}", 0, num_classes - 1)
    last = last_row_of_slots(slots, gate, selected_label.shape[0])
    _check_classes(selected_label, slots, num_classes)
    new_label = torch.where(
        (last >= 0) & _exists(selected_label, num_classes), _pick_rows(labels, last), selected_label
    )
    is_selected = (new_label >= 0) & (new_label < num_classes)
    counts = torch.zeros_like(class_counts).index_add_(0, torch.where(is_selected, new_label, 0), is_selected.long())
    sums, sizes = class_sums_and_sizes(bank, written, new_label, num_classes)
    selected_label.copy_(new_label)
    class_counts.copy_(counts)
    class_sums.copy_(sums)
    class_sizes.copy_(sizes)


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
) -> None:
    """Write the gated rows and set the centers; see `bacon_fast.functional.bank_write_`."""
    num_classes = class_sizes.shape[0]
    last = last_row_of_slots(slots, gate & features.isfinite().all(dim=1), selected_label.shape[0])
    _check_classes(selected_label, slots, num_classes)
    exists = _exists(selected_label, num_classes)
    last = torch.where(exists, last, -1)
    new = _pick_rows(features.clamp(-LIMIT, LIMIT), last)
    bank.copy_(torch.where(last[:, None] >= 0, new, bank))
    written.copy_(written | (last >= 0))
    sums, sizes = class_sums_and_sizes(bank, written, selected_label, num_classes)
    class_sums.copy_(sums)
    class_sizes.copy_(sizes)
    new_centers, new_has_center = class_centers(sums, sizes)
    centers.copy_(torch.where(exists[slots].all(), new_centers, torch.nan))
    has_center.copy_(new_has_center)
