"""pytorch-metric-learning's SupConLoss, NTXentLoss and CrossBatchMemory on the fused contrastive family.

Drop-in subclasses: change the import, keep the code. Value and gradient equal pytorch-metric-learning 2.9's. A call
with labels builds no matrix of embeddings times references and no list of pairs (NTXentLoss: no matrix of positive
pairs times negative pairs), and does not wait for the device.

The parent class computes, at its own cost, what the family does not cover: an ``indices_tuple`` from a miner, a
distance other than plain CosineSimilarity, labels that are not integers, a temperature that is a tensor, statistics, a
subclass that overrides a method of the parent, and for NTXentLoss a reducer other than MeanReducer.

Differences, all in corners: half-precision embeddings are computed in float32, and so is the loss; NTXentLoss has no
floor at -log(smallest normal number), where its parent loses the gradient; a CrossBatchMemory that is fed a single
embedding does not compare it with its own copy in the memory; NaN in one embedding or reference makes the loss NaN,
also where the parent's reducer leaves its rows out. A second derivative, and `torch.func`, need backend="reference".
"""

import numbers

import torch
from torch import Tensor

try:
    from pytorch_metric_learning import losses
    from pytorch_metric_learning.distances import CosineSimilarity
    from pytorch_metric_learning.reducers import AvgNonZeroReducer, MeanReducer, MultipleReducers
except ImportError as error:
    raise ImportError(
        "bacon_fast.integrations.metric_learning needs pytorch-metric-learning, which cannot be imported here "
        f"({error}). Install it with: pip install 'pytorch-metric-learning>=2.9'"
    ) from error

from bacon_fast.ops.backends import choose_backend
from bacon_fast.reference.values import accumulator_dtype, normalize

EPS = 1e-12  # of the normalization, as in torch.nn.functional.normalize
TILE = 1 << 20  # entries of the largest temporary matrix


class _Pairs:
    """Which columns are positives and negatives of a row, by label: [R] against [C], without a matrix.

    A row's own column, where it has one, carries the row's label and is neither.
    """

    def __init__(self, labels: Tensor, ref_labels: Tensor, self_column: Tensor | None):
        labels, ref_labels = _sortable(labels), _sortable(ref_labels)
        # Dense codes without torch.unique, whose result has a shape that the host must wait for.
        distinct = torch.cat([labels, ref_labels]).sort().values
        self.row_code = torch.searchsorted(distinct, labels).to(torch.int32)
        self.column_code = torch.searchsorted(distinct, ref_labels).to(torch.int32)
        self.self_column = self_column
        ordered = ref_labels.sort().values
        same = torch.searchsorted(ordered, labels, right=True) - torch.searchsorted(ordered, labels)
        self.negatives = len(ref_labels) - same
        self.positives = same if self_column is None else same - 1

    @property
    def enough(self) -> Tensor:
        """0-d bool: False where the parent returns zero, because it lacks pairs of both kinds, or a second pair."""
        positives, negatives = self.positives.sum(), self.negatives.sum()
        return (positives > 0) & (negatives > 0) & ((positives > 1) | (negatives > 1))


def _sortable(labels: Tensor) -> Tensor:
    """int64 labels, equal where the given ones are: torch sorts neither bool nor wide unsigned numbers everywhere."""
    return labels.view(torch.int64) if labels.dtype == torch.uint64 else labels.long()


class _DropIn:
    """Finds out which methods of its parent a user has replaced, by inheritance or assignment."""

    replaceable: frozenset[str]
    """Names of the parent's methods, without those that only serve the constructor."""
    replaced: frozenset[str] = frozenset()
    """Those that a subclass has other versions of."""

    def __init_subclass__(cls, parent: type | None = None, **kwargs):
        super().__init_subclass__(**kwargs)
        if parent is not None:
            own = [c for c in parent.__mro__ if c not in torch.nn.Module.__mro__]
            methods = {name for c in own for name, value in vars(c).items() if callable(value)}
            cls.original = cls
            cls.replaceable = frozenset(methods - {"__init__", "get_default_distance", "get_default_reducer"})
        elif hasattr(cls, "original"):
            changed = (name for name in cls.replaceable if getattr(cls, name) is not getattr(cls.original, name))
            cls.replaced = frozenset(changed)

    def replaces(self, *but: str) -> bool:
        """Whether any of the parent's methods is replaced, except for those named."""
        return not (self.replaced <= set(but) and self.replaceable.isdisjoint(vars(self)))


def _is_hooked(module: torch.nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks or module._backward_hooks)


class _FromLabels(_DropIn):
    """Shared by the losses below: when to use the family, and what the reducer gets."""

    loss_method_name: str
    """The parent's method that makes a loss of distances."""

    def __init__(self, *args, backend: str | None = None, **kwargs):
        super().__init__(*args, **kwargs)
        self.backend = backend

    def compute_loss(self, embeddings, labels, indices_tuple, ref_emb, ref_labels):
        if not self.covers(embeddings, labels, indices_tuple, ref_emb, ref_labels):
            return super().compute_loss(embeddings, labels, indices_tuple, ref_emb, ref_labels)
        # The parent leaves out pairs (i, i) if and only if both sides have the same labels object.
        own = torch.arange(len(labels), device=labels.device) if ref_labels is labels else None
        return self.loss_from_labels(embeddings, labels, ref_emb, ref_labels, own)

    def covers(self, embeddings, labels, indices_tuple, ref_emb, ref_labels) -> bool:
        """Whether the family computes this call. The host decides without reading the device."""
        distance = self.distance
        return (
            indices_tuple is None
            and type(distance) is CosineSimilarity
            and (distance.p, distance.power) == (2, 1)
            and distance.normalize_embeddings
            and distance.is_inverted
            and not (self.collect_stats or distance.collect_stats or _is_hooked(distance))
            and isinstance(self.temperature, numbers.Real)
            and all(y is not None and not (y.is_floating_point() or y.is_complex()) for y in (labels, ref_labels))
            and (labels.dtype == ref_labels.dtype or torch.uint64 not in (labels.dtype, ref_labels.dtype))
            and embeddings.dim() == ref_emb.dim() == 2
            and len(embeddings) > 0
            and len(ref_emb) > 0
            and not self.replaces("forward", "compute_loss")
        )

    def replaces(self, *but: str) -> bool:
        own = getattr(self.original, self.loss_method_name)
        return super().replaces(*but) or getattr(self.loss_method, "__func__", None) is not own

    @property
    def loss_reducer(self):
        """The reducer of the loss itself; regularizers have others."""
        return self.reducer.reducers["loss"] if isinstance(self.reducer, MultipleReducers) else self.reducer

    def loss_from_labels(
        self, embeddings: Tensor, labels: Tensor, ref_emb: Tensor, ref_labels: Tensor, self_column: Tensor | None
    ) -> dict:
        """The parent's dictionary of losses. ``self_column`` [R] names the row of ref_emb that is a row's own copy."""
        if torch._C._are_functorch_transforms_active() and self.backend != "reference":
            raise RuntimeError(
                f"{type(self).__name__}: torch.func transforms plain PyTorch only; backend='reference' is, "
                f"found backend={self.backend!r}"
            )
        pairs = _Pairs(labels, ref_labels, self_column)
        with torch.autocast(embeddings.device.type, enabled=False):
            return {"loss": self.losses_of(embeddings, None if ref_emb is embeddings else ref_emb, pairs)}

    def family(
        self, embeddings: Tensor, ref_emb: Tensor | None, pairs: _Pairs, own: Tensor | None, **options
    ) -> Tensor:
        """Row losses [R] of the contrastive family at this temperature."""
        dtype = accumulator_dtype(embeddings.dtype)
        scale = torch.full((len(embeddings),), 1 / self.temperature, dtype=dtype, device=embeddings.device)
        run = choose_backend("contrastive", self.backend, embeddings)
        return run(
            embeddings,
            ref_emb if ref_emb is None else ref_emb.to(embeddings.dtype),
            own,
            pairs.row_code,
            pairs.column_code[:, None],
            pairs.self_column,
            scale,
            None if own is None else torch.zeros_like(scale)[:, None],
            scale,
            None,
            None if own is None else scale,
            None,
            0,
            eps=EPS,
            **options,
        )


class SupConLoss(_FromLabels, losses.SupConLoss, parent=losses.SupConLoss):
    """Supervised contrastive loss (Khosla et al. 2020, arXiv 2004.11362).

    Args:
        temperature: of the cosine similarities.
        backend: None for the best one, "reference", "cpp" or "triton".
        **kwargs: reducer, distance, embedding_regularizer, ... of the parent.
    """

    loss_method_name = "mat_based_loss"

    def losses_of(self, embeddings: Tensor, ref_emb: Tensor | None, pairs: _Pairs) -> dict:
        rows = self.family(embeddings, ref_emb, pairs, None, form="mean", match="positive")
        # A positive without any other column has a loss of zero; rounding must not make it count as one above zero.
        rows = torch.where(pairs.enough & (pairs.positives + pairs.negatives > 1), rows, 0)
        rows = rows + _zeros_of(embeddings, rows.dtype)
        if type(self.loss_reducer) is not AvgNonZeroReducer or self.loss_reducer.collect_stats:
            return {"losses": rows, "indices": torch.arange(len(rows), device=rows.device), "reduction_type": "element"}
        # The reducer would select by a mask, and wait for its size.
        above = ~(rows <= 0)  # NaN is not left out
        mean = torch.where(above, rows, 0).sum() / above.sum().clamp(min=1)
        return {"losses": mean, "indices": None, "reduction_type": "already_reduced"}


class NTXentLoss(_FromLabels, losses.NTXentLoss, parent=losses.NTXentLoss):
    """Normalized temperature-scaled cross entropy (SimCLR, arXiv 2002.05709).

    The mean over all positive pairs (a, p) of log(1 + Σ_n exp(v_an) / exp(x_ap)) = softplus(N_a - x_ap), with N_a the
    log of the sum over the negatives n of a. N_a comes from the contrastive family: with one extra positive of logit 0,
    its form "sum" is softplus(N_a), shifted by 1/temperature so that its inverse is well-conditioned. The terms of the
    pairs are no form of the family, which gives a row a single term; they are summed tile by tile.

    Args:
        temperature: of the cosine similarities.
        backend: None for the best one, "reference", "cpp" or "triton".
        **kwargs: reducer, distance, embedding_regularizer, ... of the parent.
    """

    loss_method_name = "pair_based_loss"

    def covers(self, *args) -> bool:
        reducer = self.loss_reducer
        return type(reducer) is MeanReducer and not reducer.collect_stats and super().covers(*args)

    def losses_of(self, embeddings: Tensor, ref_emb: Tensor | None, pairs: _Pairs) -> dict:
        own = embeddings.detach()[:, None]
        soft = self.family(embeddings, ref_emb, pairs, own, form="sum", match="ignore")
        soft = torch.where(pairs.negatives > 0, soft, 1)
        log_sum = soft + torch.log1p(-torch.exp(-soft)) - 1 / self.temperature
        log_sum = torch.where(pairs.negatives > 0, log_sum, torch.finfo(soft.dtype).min / 2)
        unit = normalize(embeddings.to(soft.dtype), EPS)
        columns = unit if ref_emb is None else normalize(ref_emb.to(soft.dtype), EPS)
        codes = (pairs.row_code, pairs.column_code, pairs.self_column)
        total = _sum_over_pairs if self.backend == "reference" else _positive_pairs
        total = total(unit, columns, log_sum, *codes, float(self.temperature))
        mean = torch.where(pairs.enough, total, 0) / pairs.positives.sum().clamp(min=1)
        mean = mean + _zeros_of(embeddings, mean.dtype).sum()
        return {"losses": mean, "indices": None, "reduction_type": "already_reduced"}


def _zeros_of(embeddings: Tensor, dtype: torch.dtype) -> Tensor:
    """0 for each row, NaN for one that is not finite: the parent's loss without pairs."""
    return (embeddings.to(dtype) * 0).sum(dim=1)


def _sum_over_pairs(
    rows: Tensor,
    columns: Tensor,
    log_sum: Tensor,
    row_code: Tensor,
    column_code: Tensor,
    self_column: Tensor | None,
    temperature: float,
) -> Tensor:
    """Σ softplus(N_r - û_r·ŵ_j / temperature) over the positive pairs (r, j), a block of columns at a time."""
    zero = total = rows.new_zeros(())
    for _, difference, positive in _blocks(rows, columns, log_sum, row_code, column_code, self_column, temperature):
        total = total + torch.where(positive, torch.logaddexp(difference, zero), 0).sum()
    return total


# An op, which keeps no block for the backward. Dynamo (torch 2.11) would look inside an autograd.Function, and silently
# return a wrong gradient: zero for a sum in place, something else for a sum out of place.
_positive_pairs = torch.library.custom_op("bacon_fast::positive_pairs", _sum_over_pairs, mutates_args=())


@torch.library.custom_op("bacon_fast::positive_pairs_backward", mutates_args=())
def _positive_pairs_backward(
    grad: Tensor,
    rows: Tensor,
    columns: Tensor,
    log_sum: Tensor,
    row_code: Tensor,
    column_code: Tensor,
    self_column: Tensor | None,
    temperature: float,
) -> tuple[Tensor, Tensor, Tensor]:
    grad_rows, grad_columns, grad_log_sum = map(torch.zeros_like, (rows, columns, log_sum))
    for block, difference, positive in _blocks(rows, columns, log_sum, row_code, column_code, self_column, temperature):
        slope = torch.where(positive, grad * torch.sigmoid(difference), 0)
        grad_log_sum += slope.sum(dim=1)
        slope /= -temperature
        grad_rows += slope @ columns[block]
        grad_columns[block] = slope.t() @ rows
    return grad_rows, grad_columns, grad_log_sum


@_positive_pairs.register_fake
def _(rows, *others):
    return rows.new_empty(())


@_positive_pairs_backward.register_fake
def _(grad, rows, columns, log_sum, *others):
    return tuple(map(torch.empty_like, (rows, columns, log_sum)))


def _save(ctx, inputs, output):
    *tensors, ctx.temperature = inputs
    ctx.save_for_backward(*tensors)


def _differentiate(ctx, grad):
    return *_positive_pairs_backward(grad, *ctx.saved_tensors, ctx.temperature), None, None, None, None


def _refuse(ctx, *grads):
    raise RuntimeError("NTXentLoss has no second derivative; with backend='reference' it has")


_positive_pairs.register_autograd(_differentiate, setup_context=_save)
_positive_pairs_backward.register_autograd(_refuse)


def _blocks(rows, columns, log_sum, row_code, column_code, self_column, temperature):
    """For each block of columns: its slice, N_r - x_rj, and which entries are positive pairs."""
    width = max(16, TILE // len(rows))
    for start in range(0, len(columns), width):
        block = slice(start, min(start + width, len(columns)))
        positive = row_code[:, None] == column_code[block]
        if self_column is not None:
            index = torch.arange(block.start, block.stop, device=rows.device)
            positive &= self_column[:, None] != index
        yield block, log_sum[:, None] - rows @ columns[block].t() / temperature, positive


class CrossBatchMemory(_DropIn, losses.CrossBatchMemory, parent=losses.CrossBatchMemory):
    """A first-in-first-out memory of embeddings as references (arXiv 1912.06798) around one of the losses above.

    With these losses it goes from labels straight to the loss. With a miner, an ``indices_tuple``, another loss, or one
    of these with methods or hooks of its own, it works like its parent. ``enqueue_mask`` selects rows by a mask, which
    waits for the device, as in the parent.
    """

    def forward(self, embeddings, labels, indices_tuple=None, enqueue_mask=None):
        loss = self.loss
        if (
            self.miner is not None
            or indices_tuple is not None
            or not isinstance(loss, _FromLabels)
            or loss.replaces()
            or _is_hooked(loss)
            or self.replaces("forward")
        ):
            return super().forward(embeddings, labels, indices_tuple, enqueue_mask)
        queued = len(embeddings) if enqueue_mask is None else int(enqueue_mask.sum())
        if queued > self.memory_size or (enqueue_mask is not None and len(enqueue_mask) != len(embeddings)):
            mask = "no mask" if enqueue_mask is None else f"a mask of {len(enqueue_mask)}"
            raise ValueError(
                f"embeddings: expected at most memory_size = {self.memory_size} rows to keep, and an enqueue_mask of "
                f"the number of all rows; found {len(embeddings)} rows, {mask}, {queued} to keep"
            )
        self.reset_stats()
        labels = labels.to(embeddings.device)
        self.embedding_memory = self.embedding_memory.to(embeddings)
        self.label_memory = self.label_memory.to(labels)
        new, new_labels = embeddings, labels
        if enqueue_mask is not None:
            new, new_labels = embeddings[enqueue_mask], labels[enqueue_mask]
            embeddings, labels = embeddings[~enqueue_mask], labels[~enqueue_mask]
        self.add_to_memory(new, new_labels, len(new))
        filled = self.memory_size if self.has_been_filled else self.queue_idx
        memory, memory_labels = self.embedding_memory[:filled], self.label_memory[:filled]
        own = self.curr_batch_idx if enqueue_mask is None else None
        if not self.loss.covers(embeddings, labels, None, memory, memory_labels):
            pairs = self.create_indices_tuple(embeddings, labels, memory, memory_labels, None, own is not None)
            return self.loss(embeddings, labels, pairs, memory, memory_labels)
        # The next call changes the memory, maybe before this call's backward pass.
        losses_of_batch = self.loss.loss_from_labels(embeddings, labels, memory.clone(), memory_labels, own)
        self.loss.add_embedding_regularization_to_loss_dict(losses_of_batch, embeddings)
        return self.loss.reducer(losses_of_batch, embeddings, labels)
