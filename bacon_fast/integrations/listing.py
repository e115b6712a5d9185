"""The `BaConLoss` that is widely copied from a blog post, with its signature kept and its mistakes corrected."""

import torch
from torch import Tensor, nn

from bacon_fast import functional
from bacon_fast.reference.values import accumulator_dtype, check_values

RELIABLE = 0.98
TOP_K = 3


class BaConLoss(nn.Module):
    """BaCon's contrastive loss as the listing calls it: ``loss(features, labels, confidences, class_counts, t, T)``.

    Like the listing it uses temperature ``tau`` for negatives and ``clamp(tau (1 - (1 - t/T)² sqrt(n_c / max n)),
    min=tau_min)`` for the positive of class c, sums over the negatives, and takes as center of a class the mean of all
    reliable features it has ever seen. Unlike the listing (its mistakes are numbered in the project's methods.md, E.9)
    it compares unit vectors, keeps the centers in buffers, chooses negatives by row, weighs each row by its reliability
    and never waits for the device.

    Formula. Rows are scaled to unit length; row r is reliable if its largest confidence is at least 0.98; its class y_r
    is its label or, if unlabeled, its most confident class. Row j is a negative of class c if j is labeled as another
    class, or is unlabeled and c is not among its three most confident classes. With x_r = cos(z_r, center of y_r) /
    tau_{y_r} and v_rj = cos(z_r, z_j) / tau, the loss is the mean over the reliable rows of
    log(1 + Σ_j exp(v_rj) / exp(x_r)); a row whose class has no center or no negative yet has no term. The centers come
    from the calls before; this call's reliable rows are added to them afterwards (in training mode only).

    Args:
        num_classes: K.
        tau: temperature of the negatives.
        tau_min: lower bound of the positives' temperatures.
        T: length of the training in steps, for calls that do not pass one.
        feature_dim: F; by default it is taken from the first batch. Give it where buffers must not appear later (CUDA
            graphs, torch.compile, DistributedDataParallel).

    Buffers:
        center_sums [K,F] float64 and center_counts [K] int64, over all reliable features so far.
    """

    def __init__(
        self,
        num_classes: int,
        tau: float = 0.5,
        tau_min: float = 0.1,
        T: int = 300_000,
        *,
        feature_dim: int | None = None,
    ):
        super().__init__()
        for name, value in (("num_classes", num_classes), ("tau", tau), ("tau_min", tau_min), ("T", T)):
            if not value > 0:
                raise ValueError(f"{name}: expected a positive number, found {value}")
        self.num_classes, self.tau, self.tau_min, self.T = num_classes, tau, tau_min, T
        self.register_buffer("center_sums", torch.zeros(num_classes, feature_dim or 0, dtype=torch.float64))
        self.register_buffer("center_counts", torch.zeros(num_classes, dtype=torch.int64))

    @property
    def centers(self) -> Tensor:
        """Mean of the reliable features of each class, [K,F] float64; zeros where there is none."""
        return self.center_sums / self.center_counts.clamp(min=1)[:, None]

    def forward(
        self,
        features: Tensor,
        labels: Tensor,
        confidences: Tensor,
        class_counts: Tensor,
        t: int | Tensor,
        T: int | None = None,
    ) -> Tensor:
        """The loss of a batch, a 0-d tensor with a gradient to ``features`` only; then the update of the centers.

        Args:
            features: [B,F] float, projections of the rows, labeled and weakly augmented unlabeled ones in any order.
            labels: [B] int64, 0..K-1 for labeled rows, -1 for unlabeled ones.
            confidences: [B,K] float, each row's class probabilities by the head whose predictions are trusted.
            class_counts: [K] numbers, images selected as each class so far (labels and confident pseudo-labels). Keep
                them on the device of the features: a copy from the host would be made at every step.
            t: steps since the start of training, a number or a 0-d tensor; must not restart at an epoch.
            T: length of the training in steps; default: the constructor's.

        Raises:
            TypeError, ValueError: an argument does not fit; the message names it. On a GPU, where the host would have
                to wait for them, labels out of range make the loss NaN instead, as confidences that are not finite do
                everywhere.
        """
        self._check(features, labels, confidences)
        if not self.center_sums.shape[1]:
            self.center_sums = self.center_sums.new_zeros(self.num_classes, features.shape[1], device=features.device)
        total = self.T if T is None else T
        progress = (t / total).clamp(max=1) if isinstance(t, Tensor) else min(t / total, 1.0)
        unit = nn.functional.normalize(features.to(accumulator_dtype(features.dtype)), dim=1, eps=1e-8)
        fits = (labels >= -1) & (labels < self.num_classes) & confidences.detach().isfinite().all(dim=1)
        labels = labels.clamp(-1, self.num_classes - 1)
        confidences, labeled = confidences.detach().to(unit.dtype), labels >= 0
        reliable = confidences.amax(dim=1) >= RELIABLE
        classes = torch.where(labeled, labels, confidences.argmax(dim=1))

        counts = torch.as_tensor(class_counts, dtype=unit.dtype, device=unit.device)

        # A labeled row is a negative of every class but its own. The fused loss sees only a row's top-k classes, so a
        # labeled row gets its label as the first of them, and classes that no row has as the others.
        top_k = max(1, min(TOP_K, self.num_classes - 1))
        padding = top_k - 1
        own = nn.functional.one_hot(classes, self.num_classes).to(unit.dtype)
        scores = torch.cat(
            [
                torch.where(labeled[:, None], 3 * own, confidences),
                torch.where(labeled[:, None], 2.0, -1.0).to(unit.dtype).expand(-1, padding),
            ],
            dim=1,
        )
        loss = functional.bacon_loss(
            unit,
            labels[:0],
            scores,
            nn.functional.pad(self.centers, (0, 0, 0, padding)).to(unit.dtype),
            reliable,
            nn.functional.pad(counts, (0, padding)),
            progress=progress,
            temperature=self.tau,
            bta=1.0,
            min_temperature=self.tau_min,
            negative_weight=None,
            neg_mode="paper",
            top_k=top_k,
            has_center=nn.functional.pad(self.center_counts > 0, (0, padding)),
        )
        loss = loss * torch.where(fits.all(), 1.0, torch.nan).to(loss.dtype)
        if self.training:
            self._add_to_centers(unit.detach().double(), own.double(), reliable & fits)
        return loss

    @torch.no_grad()
    def _add_to_centers(self, unit: Tensor, own: Tensor, reliable: Tensor) -> None:
        finite = unit.isfinite().all(dim=1)
        weight = own * (reliable & finite)[:, None]
        # A product with the class indicators adds rows in a fixed order, which scattering on a GPU does not.
        self.center_sums += weight.t() @ torch.where(finite[:, None], unit, 0.0)
        self.center_counts += weight.sum(dim=0).long()

    def _check(self, features: Tensor, labels: Tensor, confidences: Tensor) -> None:
        if features.dim() != 2 or not features.is_floating_point():
            raise ValueError(f"features: expected float [B, F], found {features.dtype} {list(features.shape)}")
        known = self.center_sums.shape[1]
        if known and known != features.shape[1]:
            raise ValueError(f"features: expected [B, {known}] as in the centers, found {list(features.shape)}")
        if labels.shape != features.shape[:1] or labels.dtype != torch.int64:
            raise ValueError(f"labels: expected int64 [{len(features)}], found {labels.dtype} {list(labels.shape)}")
        if confidences.shape != (len(features), self.num_classes):
            expected = [len(features), self.num_classes]
            raise ValueError(f"confidences: expected shape {expected}, found {list(confidences.shape)}")
        last = self.num_classes - 1
        check_values("labels", labels, f"classes in 0..{last}, or -1 for none", -1, last)

    def _load_from_state_dict(self, state_dict, prefix, *args, **kwargs):
        saved = state_dict.get(prefix + "center_sums")
        if saved is not None and not self.center_sums.shape[1]:
            self.center_sums = self.center_sums.new_zeros(self.num_classes, saved.shape[-1])
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
