"""The public, stateless operations of bacon_fast.

Every function validates its arguments, then hands them to a backend: "reference" is plain PyTorch, "cpp" the native CPU
code, "triton" and "cuda" the GPU code. ``backend=None`` takes the best one usable for the tensors at hand; asking by
name for one that is not usable raises RuntimeError with the reason.

On a CPU the values in tensors are checked too: a class, slot or count out of range raises ValueError. On a GPU, where
the host would have to wait for them, they are not.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from . import ops, reference
from .batch_norm import batch_norm_act
from .checks import (
    check_devices,
    check_integer,
    check_kind,
    check_number,
    check_progress,
    check_shape,
    check_temperatures,
)
from .contrastive_losses import info_nce, sscl_loss, sup_con_loss
from .reference.values import check_values
from .sgd_ema import sgd_ema_

__all__ = [
    "bacon_loss",
    "balanced_temperatures",
    "bank_select_",
    "bank_write_",
    "batch_norm_act",
    "class_centers",
    "fixmatch_abc_loss",
    "info_nce",
    "sgd_ema_",
    "sscl_loss",
    "sup_con_loss",
]

NEG_MODES = ("authors", "paper")


def balanced_temperatures(
    class_counts: Tensor,
    *,
    progress: float | Tensor,
    temperature: float = 0.1,
    bta: float = 0.005,
    min_temperature: float = 0.0,
) -> Tensor:
    """BaCon's temperature of each class's positive logit, [K] float32 (float64 where the counts are).

    tau_c = temperature · (1 - bta · (1 - progress)² · sqrt(class_counts_c / max class_counts)), at least
    ``min_temperature``. Arguments as in `bacon_loss`.
    """
    check_shape("class_counts", class_counts, "K")
    check_kind("class_counts", class_counts, "number")
    if class_counts.shape[0] < 1:
        raise ValueError("class_counts: expected at least one class, found shape [0]")
    check_progress(progress)
    check_temperatures(temperature, bta, min_temperature)
    return reference.balanced_temperatures(class_counts, progress, temperature, bta, min_temperature)


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
    (reliable negative selection). Only ``features`` receives a gradient. Formula: `reference.bacon.bacon_loss`.

    Args:
        features: [R,D] float, projections, the B labeled rows first, then R-B weakly augmented unlabeled rows. Need not
            be normalized. float16 and bfloat16 are computed in float32.
        labels: [B] int64, classes of the labeled rows, 0..K-1.
        logits: [R-B,K] float, auxiliary head's logits of the unlabeled rows: the largest gives a row's class, the
            ``top_k`` largest the classes that it is no negative of.
        centers: [K,D] float, class centers.
        selected: [R] bool, the reliable rows; the others have no term of their own but still serve as negatives.
        class_counts: [K] number, >= 0, how many samples are selected as each class; sets the temperatures.
        progress: t/T in 0..1, a number or a 0-d tensor.
        temperature: tau, of the negatives, and of the positives up to the adjustment.
        bta: strength of the temperature adjustment, 0 turns it off; below 1 unless ``min_temperature`` is above 0, so
            that all temperatures are positive.
        negative_weight: the mean over the negatives counts as this many negatives; None takes the plain sum instead.
        top_k: of how many classes, its likeliest, an unlabeled row is no negative. With top_k >= K unlabeled rows are
            nobody's negatives; `losses.BaConLoss` therefore lowers it to K-1.
        neg_mode: "authors" averages exp(similarity) over all rows of the class and all its negatives, as the released
            code does; "paper" averages over the negatives of the row alone.
        has_center: [K] bool, False for classes without a center; None means that all have one. Rows of classes without
            a center, and of classes without a negative in the batch, have no term.
        min_temperature: lower bound of the positives' temperatures.
        backend: None for the best one, "reference", "cpp" or "triton".

    Returns:
        Mean over the selected rows; exactly 0 with zero gradient where no row has a term.

    Raises:
        TypeError, ValueError: an argument does not fit; the message names it.
        RuntimeError: the named backend is not available here.
    """
    check_shape("features", features, "R", "D")
    check_shape("labels", labels, "B")
    rows, dim, batch = features.shape[0], features.shape[1], labels.shape[0]
    if batch > rows:
        raise ValueError(f"labels: expected at most {rows} entries, one a row of features, found {batch}")
    check_shape("centers", centers, "K", dim)
    num_classes = centers.shape[0]
    if num_classes < 1:
        raise ValueError("centers: expected at least one class, found shape [0, D]")
    check_shape("logits", logits, rows - batch, num_classes)
    check_shape("selected", selected, rows)
    check_shape("class_counts", class_counts, num_classes)
    check_kind("features", features, "float")
    check_kind("labels", labels, "int64")
    check_kind("logits", logits, "float")
    check_kind("centers", centers, "float")
    check_kind("selected", selected, "bool")
    check_kind("class_counts", class_counts, "number")
    if has_center is not None:
        check_shape("has_center", has_center, num_classes)
        check_kind("has_center", has_center, "bool")
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
    check_progress(progress)
    check_temperatures(temperature, bta, min_temperature)
    if negative_weight is not None:
        check_number("negative_weight", negative_weight, low=0)
    check_integer("top_k", top_k, low=1)
    if neg_mode not in NEG_MODES:
        raise ValueError(f"neg_mode: expected one of {', '.join(NEG_MODES)}, found {neg_mode!r}")
    run = ops.choose_backend("bacon_loss", backend, features)
    # Under autocast the similarities would be rounded to half precision.
    with torch.autocast(features.device.type, enabled=False):
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

    A slot that changes class takes the feature it holds along. Where gated rows name one slot twice, the last row wins.
    A non-gated row changes nothing. `losses.MemoryBank` owns the buffers.

    Args:
        selected_label: [n] int64, the class of every slot, -1 for none; changed.
        class_counts: [K] int64, the number of slots of every class; changed.
        class_sums, class_sizes: [K,D] and [K] int64, sum (fixed point, see `reference.bank`) and number of the features
            of every class; changed.
        bank, written: [n,D] float32 and [n] bool, the features, and which slots hold one.
        slots, labels, gate: [R] int64, [R] int64, [R] bool, the batch: slots in 0..n-1, classes in 0..K-1.
        backend: None for the best one, "reference", "cpp" or "cuda".

    Raises:
        TypeError, ValueError: an argument does not fit, or a slot of the batch has a class that does not exist, as a
            damaged checkpoint may have it; the message names it. On a GPU such a slot is left as it is.
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
    run = ops.choose_backend("bank_select_", backend, bank)
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
    clamped to ±4096; a row with a component that is not finite is not written. Where gated rows name one slot twice,
    the last row wins. Sums are exact: no number of writes, in whatever order, makes them drift.

    Args:
        bank, written, class_sums, class_sizes, selected_label: as in `bank_select_`; all but the last are changed.
        centers, has_center: [K,D] float32 and [K] bool, the means, and which classes have one; changed.
        slots, features, gate: [R] int64, [R,D] float32, [R] bool, the batch.
        backend: None for the best one, "reference", "cpp" or "cuda".

    Raises:
        TypeError, ValueError: as in `bank_select_`. On a GPU a slot of a class that does not exist makes all centers
            NaN, and so the next loss.
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
    run = ops.choose_backend("bank_write_", backend, bank)
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
        bank: [n,D] float, one feature a slot, within ±4096. Not normalized.
        labels: [n] int64, class of each slot, 0..K-1, or -1 for none.
        num_classes: K.
        written: [n] bool, the slots that hold a feature; None: all do. What the others hold, NaN included, is not read.

    Returns:
        centers [K,D] float32, 0 where a class has no slot, and has_center [K] bool. The sums are exact, so the order of
        the slots does not matter.

    Raises:
        TypeError, ValueError: an argument does not fit; the message names it.
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
    return reference.bank.class_centers(
        *reference.bank.class_sums_and_sizes(bank.detach(), written, labels, num_classes)
    )


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


class HeadsOutput(NamedTuple):
    """What `fixmatch_abc_loss` returns; the losses are 0-d and differentiable, the rest is for logs.

    supervised, unsupervised: FixMatch's losses of the main head.
    abc_labeled, abc_unlabeled: ABC's losses of the balanced head.
    pseudo_rate: 0-d, share of unlabeled rows whose pseudo-label by the main head is confident.
    abc_rate: 0-d, share of unlabeled rows that enter ``abc_unlabeled``.
    pseudo_known, pseudo_correct: 0-d, confident rows with a known true label, and those among them that are right.
    pseudo_counts, abc_counts: [K] int64, classes of the pseudo-labels in use, by the main and by the balanced head.
    """

    supervised: Tensor
    unsupervised: Tensor
    abc_labeled: Tensor
    abc_unlabeled: Tensor
    pseudo_rate: Tensor
    abc_rate: Tensor
    pseudo_known: Tensor
    pseudo_correct: Tensor
    pseudo_counts: Tensor
    abc_counts: Tensor


def fixmatch_abc_loss(
    logits: Tensor,
    balanced: Tensor,
    labels: Tensor,
    true_labels: Tensor,
    keep_labeled: Tensor,
    keep_unlabeled: Tensor,
    *,
    step: int | Tensor,
    seed: int | None,
    threshold: float = 0.95,
    num_views: int = 1,
    soft_targets: bool = False,
    backend: str | None = None,
) -> HeadsOutput:
    """FixMatch's loss of the main head and ABC's of the balanced head: masks, statistics and gradients in one pass.

    FixMatch (NeurIPS 2020): cross entropy on the labels, and of the strong views against the confident pseudo-labels of
    the weak views. ABC (NeurIPS 2021): the same on a second head, a row of class c being kept with a probability that
    falls with the size of the class. Formulas: `reference.heads.fixmatch_abc_loss`.

    Args:
        logits, balanced: [B+U+V·U,K] float, main and balanced head's logits of the B labeled rows, the U weak rows, and
            V blocks of U strong rows. float16 and bfloat16 are computed in float32.
        labels: [B] int64, classes of the labeled rows.
        true_labels: [U] int64, -1 where unknown; for the statistics alone.
        keep_labeled: [K] float, probability of keeping a labeled row of each class: N_min / N_c.
        keep_unlabeled: [K] float, the same for unlabeled rows, by their pseudo-label: 1 - (e/E)(1 - N_min / N_c).
        step: completed optimizer steps, an integer or a 0-d int64 tensor.
        seed: key of the draws, 0..2^64-1; they are the counter-based ones of `data.philox`. None draws nothing: rows
            are weighted by their probabilities, which gives the expected loss.
        threshold: least confidence of a pseudo-label that is used.
        num_views: V. FixMatch's loss is the mean over the views, ABC's the sum.
        soft_targets: ABC's unlabeled rows have the balanced head's probabilities as targets instead of its class.
        backend: None for the best one, "reference", "cpp" or "triton".

    Returns:
        HeadsOutput. A loss without rows is exactly 0. The weak rows have no gradient.

    Raises:
        TypeError, ValueError: an argument does not fit; the message names it.
        RuntimeError: the named backend is not available here; or the gradient is differentiated.
    """
    check_shape("logits", logits, "N", "K")
    check_shape("balanced", balanced, *logits.shape)
    check_shape("labels", labels, "B")
    check_shape("true_labels", true_labels, "U")
    num_classes = logits.shape[1]
    if num_classes < 1:
        raise ValueError("logits: expected at least one class, found shape [N, 0]")
    check_integer("num_views", num_views, low=1)
    rows = labels.shape[0] + (1 + num_views) * true_labels.shape[0]
    if logits.shape[0] != rows:
        raise ValueError(
            f"logits: expected {rows} rows, {labels.shape[0]} labeled and {1 + num_views} times "
            f"{true_labels.shape[0]} unlabeled ones, found {logits.shape[0]}"
        )
    check_kind("logits", logits, "float")
    if balanced.dtype != logits.dtype:
        raise TypeError(f"balanced: expected dtype {logits.dtype}, that of logits, found {balanced.dtype}")
    check_kind("labels", labels, "int64")
    check_kind("true_labels", true_labels, "int64")
    check_shape("keep_labeled", keep_labeled, num_classes)
    check_kind("keep_labeled", keep_labeled, "float")
    check_shape("keep_unlabeled", keep_unlabeled, num_classes)
    check_kind("keep_unlabeled", keep_unlabeled, "float")
    check_number("threshold", threshold, low=0, low_allowed=True)
    if seed is not None and not (isinstance(seed, int) and 0 <= seed < 2**64):
        raise ValueError(f"seed: expected None or an integer in 0..2^64-1, found {seed!r}")
    if not isinstance(step, Tensor):
        check_integer("step", step, low=0)
        step = torch.full((), step, dtype=torch.int64, device=logits.device)
    check_shape("step", step)
    check_kind("step", step, "int64")
    for name, tensor in (
        ("balanced", balanced),
        ("labels", labels),
        ("true_labels", true_labels),
        ("keep_labeled", keep_labeled),
        ("keep_unlabeled", keep_unlabeled),
        ("step", step),
    ):
        if tensor.device != logits.device:
            raise ValueError(f"{name}: expected device {logits.device}, that of logits, found {tensor.device}")
    run = ops.choose_backend("fixmatch_abc_loss", backend, logits)
    losses, stats, counts = run(
        logits,
        balanced,
        labels,
        true_labels,
        keep_labeled.detach().float(),
        keep_unlabeled.detach().float(),
        step,
        seed=seed,
        threshold=threshold,
        num_views=num_views,
        soft_targets=soft_targets,
    )
    return HeadsOutput(*losses.unbind(), *stats.unbind(), *counts.unbind())
