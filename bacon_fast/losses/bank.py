"""BaCon's memory bank: one feature a training sample, and the class centers that follow from them."""

import torch
from torch import Tensor, nn

from .. import functional
from ..ops.checks import check_integer
from ..ops.snapshot import snapshot


def _check_classes(bank: "MemoryBank", incompatible: object) -> None:
    """Refuses a loaded state whose slots have classes that do not exist: on a GPU nothing looks at them later."""
    last = len(bank.class_counts) - 1
    low, high = (value.tolist() for value in bank.selected_label.aminmax())
    if low < -1 or high > last:
        raise ValueError(f"selected_label: expected classes in -1..{last}, found {low if low < -1 else high}")


class MemoryBank(nn.Module):
    """Latest reliable feature and selected class of every training sample, class counts and centers (methods.md E.1).

    A step calls `select_` before the loss and `write_` after it, so the loss sees the new counts and the old centers.

    Buffers:
        features [n,D] float32, written [n] bool: the latest reliable feature of a slot, and whether there is one.
        selected_label [n] int64: the class a slot was last selected as, -1 for never.
        class_counts [K] int64: the number of slots selected as each class.
        class_sums [K,D] int64 (fixed point), class_sizes [K] int64: over the slots that are selected and written.
        centers [K,D] float32, has_center [K] bool: the mean of those slots.

    Args:
        num_slots: n, labeled plus unlabeled training samples.
        num_classes: K.
        dim: D, the width of a feature.
        start_with_ones: every slot starts with a vector of ones that counts as written, as in the authors' code; such
            vectors pull the centers toward (1, ..., 1) until they are replaced.
        backend: None for the best one, "reference", "cpp" or "cuda".

        >>> bank = MemoryBank(num_slots=5, num_classes=3, dim=2)
        >>> slots, everyone = torch.tensor([0, 4]), torch.tensor([True, True])
        >>> bank.select_(slots, torch.tensor([2, 2]), everyone)
        >>> bank.write_(slots, torch.tensor([[1.0, 0.0], [3.0, 0.0]]), everyone)
        >>> bank.centers[2], bank.class_counts
        (tensor([2., 0.]), tensor([0, 0, 2]))
    """

    def __init__(
        self,
        num_slots: int,
        num_classes: int,
        dim: int,
        *,
        start_with_ones: bool = False,
        backend: str | None = None,
    ):
        super().__init__()
        for name, value in (("num_slots", num_slots), ("num_classes", num_classes), ("dim", dim)):
            check_integer(name, value, low=1)
        self.backend = backend
        self.register_buffer("features", torch.full((num_slots, dim), float(start_with_ones)))
        self.register_buffer("written", torch.full((num_slots,), start_with_ones))
        self.register_buffer("selected_label", torch.full((num_slots,), -1))
        self.register_buffer("class_counts", torch.zeros(num_classes, dtype=torch.int64))
        self.register_buffer("class_sums", torch.zeros(num_classes, dim, dtype=torch.int64))
        self.register_buffer("class_sizes", torch.zeros(num_classes, dtype=torch.int64))
        self.register_buffer("centers", torch.zeros(num_classes, dim))
        self.register_buffer("has_center", torch.zeros(num_classes, dtype=torch.bool))
        self.register_load_state_dict_post_hook(_check_classes)

    def _apply(self, fn, recurse=True):
        """Moves with the model but keeps its dtypes: the sums belong to the float32 features, bit for bit."""

        def keep_dtype(tensor: Tensor) -> Tensor:
            result = fn(tensor)
            return result if result.dtype == tensor.dtype else tensor.to(result.device)

        return super()._apply(keep_dtype, recurse)

    def current_centers(self) -> tuple[Tensor, Tensor]:
        """Centers [K,D] and has_center [K] for a loss, whose backward pass may come after the next `write_`."""
        return snapshot(self.centers), snapshot(self.has_center)

    @torch.no_grad()
    def select_(self, slots: Tensor, labels: Tensor, gate: Tensor) -> None:
        """Selects the gated rows of a batch as their labels: slots, labels [R] int64, gate [R] bool."""
        functional.bank_select_(
            self.selected_label,
            self.class_counts,
            self.class_sums,
            self.class_sizes,
            self.features,
            self.written,
            slots,
            labels,
            gate,
            backend=self.backend,
        )

    @torch.no_grad()
    def write_(self, slots: Tensor, features: Tensor, gate: Tensor) -> None:
        """Writes the gated rows of a batch and updates the centers: features [R,D], any float dtype."""
        functional.bank_write_(
            self.features,
            self.written,
            self.class_sums,
            self.class_sizes,
            self.centers,
            self.has_center,
            self.selected_label,
            slots,
            features.float(),
            gate,
            backend=self.backend,
        )
