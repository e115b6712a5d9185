"""FixMatch, ABC and BaCon as algorithms of USB."""

from functools import cached_property
from inspect import signature

import numpy as np
import torch
import torch.nn.functional as F
from semilearn.algorithms.fixmatch import FixMatch as USBFixMatch
from semilearn.algorithms.utils import SSL_Argument
from semilearn.core import ImbAlgorithmBase
from sklearn.metrics import (
    accuracy_score,
    balanced_accuracy_score,
    confusion_matrix,
    f1_score,
    precision_score,
    recall_score,
)
from torch import nn

from bacon_fast.integrations.usb.hooks import use_fast_hooks
from bacon_fast.losses import BaConLoss


class SyncFree:
    """Shared by the algorithms below: fast hooks, and batches and evaluation on the model's device, whichever it is."""

    def set_hooks(self):
        super().set_hooks()
        use_fast_hooks(self)

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    def process_batch(self, input_args=None, **kwargs):
        wanted = signature(self.train_step).parameters if input_args is None else input_args
        return {k: self._to_device(v) for k, v in kwargs.items() if k in wanted and v is not None}

    def _to_device(self, value):
        if isinstance(value, dict):
            return {name: self._to_device(item) for name, item in value.items()}
        return value.to(self.device, non_blocking=True)

    def evaluate(self, eval_dest="eval", out_key="logits", return_logits=False):
        """USB's evaluation, with one transfer to the host for the whole set instead of three a batch."""
        self.model.eval()
        self.ema.apply_shadow()
        logits, targets = [], []
        with torch.no_grad():
            for data in self.loader_dict[eval_dest]:
                logits.append(self.model(self._to_device(data["x_lb"]))[out_key])
                targets.append(self._to_device(data["y_lb"]))
        self.ema.restore()
        self.model.train()
        logits, targets = torch.cat(logits).cpu(), torch.cat(targets).cpu()
        loss = F.cross_entropy(logits.float(), targets, ignore_index=-1)
        truth, predicted = targets.numpy(), logits.argmax(dim=1).numpy()
        self.print_fn("confusion matrix:\n" + np.array_str(confusion_matrix(truth, predicted, normalize="true")))
        scores = {
            "loss": loss,
            "top-1-acc": accuracy_score(truth, predicted),
            "balanced_acc": balanced_accuracy_score(truth, predicted),
            "precision": precision_score(truth, predicted, average="macro", zero_division=0),
            "recall": recall_score(truth, predicted, average="macro", zero_division=0),
            "F1": f1_score(truth, predicted, average="macro", zero_division=0),
        }
        # Plain floats: the best of them goes into the checkpoint, which torch loads with weights_only.
        result = {f"{eval_dest}/{name}": float(value) for name, value in scores.items()}
        if return_logits:
            result[f"{eval_dest}/logits"] = logits.numpy()
        return result


class FixMatch(SyncFree, USBFixMatch):
    """USB's FixMatch (arXiv 2001.07685); its logged values stay on the device until a hook prints them."""

    def train_step(self, x_lb, y_lb, x_ulb_w, x_ulb_s):
        labeled, unlabeled = len(y_lb), len(x_ulb_w)
        with self.amp_cm():
            if self.use_cat:
                out = self.model(torch.cat((x_lb, x_ulb_w, x_ulb_s)))
                sizes = [labeled, unlabeled, unlabeled]
                (logits, logits_w, logits_s), features = (out[key].split(sizes) for key in ("logits", "feat"))
            else:
                out, out_s = self.model(x_lb), self.model(x_ulb_s)
                with torch.no_grad():
                    out_w = self.model(x_ulb_w)
                logits, logits_w, logits_s = (each["logits"] for each in (out, out_w, out_s))
                features = [each["feat"] for each in (out, out_w, out_s)]
            sup_loss = self.ce_loss(logits, y_lb, reduction="mean")
            probs = self.compute_prob(logits_w.detach())
            if self.registered_hook("DistAlignHook"):
                probs = self.call_hook("dist_align", "DistAlignHook", probs_x_ulb=probs)
            mask = self.call_hook("masking", "MaskingHook", logits_x_ulb=probs, softmax_x_ulb=False)
            pseudo_label = self.call_hook(
                "gen_ulb_targets",
                "PseudoLabelingHook",
                logits=probs,
                use_hard_label=self.use_hard_label,
                T=self.T,
                softmax=False,
            )
            unsup_loss = self.consistency_loss(logits_s, pseudo_label, "ce", mask=mask)
            total_loss = sup_loss + self.lambda_u * unsup_loss
        names = ("x_lb", "x_ulb_w", "x_ulb_s")
        out_dict = self.process_out_dict(loss=total_loss, feat=dict(zip(names, features)))
        log_dict = self.process_log_dict(
            sup_loss=sup_loss.detach(),
            unsup_loss=unsup_loss.detach(),
            total_loss=total_loss.detach(),
            util_ratio=mask.float().mean(),
        )
        return out_dict, log_dict


class Network(nn.Module):
    """A USB backbone with ABC's auxiliary classifier and, for BaCon, a projection; names as in USB's checkpoints."""

    def __init__(self, backbone: nn.Module, num_classes: int, proj_dim: int | None = None):
        super().__init__()
        self.backbone, self.num_features = backbone, backbone.num_features
        self.aux_classifier = nn.Linear(self.num_features, num_classes)
        if proj_dim is not None:
            self.projection = nn.Linear(self.num_features, proj_dim)

    def forward(self, x, **kwargs):
        results = self.backbone(x, **kwargs)
        results["logits_aux"] = self.aux_classifier(results["feat"])
        # The losses project features themselves; DistributedDataParallel must see every parameter used in forward.
        if hasattr(self, "projection"):
            results["projection"] = self.projection(results["feat"])
        return results

    def group_matcher(self, coarse=False):
        """Layers for USB's layer-wise learning rates."""
        inner, prefix = self.backbone, "backbone."
        while hasattr(inner, "backbone"):
            inner, prefix = inner.backbone, prefix + "backbone."
        return inner.group_matcher(coarse, prefix=prefix)


class ABC(SyncFree, ImbAlgorithmBase):
    """ABC (arXiv 2110.10368) on top of any core algorithm of USB, as USB computes it.

    Raises:
        ValueError: if a class has no labeled image, since its sampling probability is undefined.
    """

    proj_dim: int | None = None

    def __init__(self, args, net_builder, tb_log=None, logger=None, **kwargs):
        self.abc_p_cutoff, self.abc_loss_ratio = args.abc_p_cutoff, args.abc_loss_ratio
        super().__init__(args, net_builder, tb_log, logger, **kwargs)
        counts = np.bincount(self.dataset_dict["train_lb"].targets, minlength=self.num_classes)
        if not counts.all():
            raise ValueError(f"class {int(counts.argmin())} has no labeled image, but ABC needs one of every class")
        self.lb_class_dist = torch.from_numpy(counts.min() / counts)
        self.model = Network(self.model, self.num_classes, self.proj_dim)
        self.ema_model = Network(self.ema_model, self.num_classes, self.proj_dim)
        self.ema_model.load_state_dict(self.model.state_dict())
        self.optimizer, self.scheduler = self.set_optimizer()

    @cached_property
    def core_inputs(self) -> frozenset[str]:
        """Names of the batch entries that the core algorithm takes."""
        return frozenset(signature(super().train_step).parameters)

    def process_batch(self, input_args=None, **kwargs):
        wanted = self.core_inputs | {"idx_lb", "idx_ulb"} if input_args is None else input_args
        return super().process_batch(input_args=wanted, **kwargs)

    @property
    def network(self) -> Network:
        """The model without the wrapper of DistributedDataParallel or DataParallel."""
        return self.model if isinstance(self.model, Network) else self.model.module

    def train_step(self, **batch):
        out_dict, log_dict = super().train_step(**{k: v for k, v in batch.items() if k in self.core_inputs})
        strong = out_dict["feat"]["x_ulb_s"]
        strong = strong[0] if isinstance(strong, (list, tuple)) else strong
        with self.amp_cm():
            classifier = self.network.aux_classifier
            logits, logits_s = classifier(out_dict["feat"]["x_lb"]), classifier(strong)
            with torch.no_grad():
                logits_w = classifier(out_dict["feat"]["x_ulb_w"])
            loss = self.compute_abc_loss(logits, batch["y_lb"], logits_w, logits_s)
        out_dict["loss"] = out_dict["loss"] + self.abc_loss_ratio * loss
        out_dict["logits_aux"] = {"x_lb": logits.detach(), "x_ulb_w": logits_w}
        log_dict["train/abc_loss"] = loss.detach()
        return out_dict, log_dict

    def compute_abc_loss(self, logits_x_lb, y_lb, logits_x_ulb_w, logits_x_ulb_s):
        """0-d loss of the auxiliary head; the masks are drawn anew (methods.md C, USB's column)."""
        self.lb_class_dist = self.lb_class_dist.to(y_lb.device)
        mask = torch.bernoulli(self.lb_class_dist[y_lb]).float()
        labeled = (self.ce_loss(logits_x_lb, y_lb, reduction="none") * mask).mean()
        with torch.no_grad():
            confidence, pseudo_label = self.compute_prob(logits_x_ulb_w).max(dim=1)
            keep = 1 - (self.epoch / self.epochs) * (1 - self.lb_class_dist)
            mask = (confidence >= self.abc_p_cutoff).float() * torch.bernoulli(keep[pseudo_label]).float()
        return labeled + (self.ce_loss(logits_x_ulb_s, pseudo_label, reduction="none") * mask).mean()

    def evaluate(self, eval_dest="eval", out_key="logits", return_logits=False):
        return super().evaluate(eval_dest=eval_dest, out_key="logits_aux", return_logits=return_logits)

    @staticmethod
    def get_argument():
        return [
            SSL_Argument(
                "--abc_p_cutoff", float, 0.95, "confidence from which the auxiliary head takes a pseudo-label"
            ),
            SSL_Argument("--abc_loss_ratio", float, 1.0, "weight of ABC's loss"),
        ]


class BaCon(ABC):
    """BaCon (AAAI 2024, arXiv 2403.12986) on top of ABC on top of a core algorithm; see `losses.BaConLoss`.

    The bank, its counts and centers are part of USB's checkpoint under the key "bacon".
    """

    def __init__(self, args, net_builder, tb_log=None, logger=None, **kwargs):
        self.proj_dim, self.bacon_loss_ratio = args.bacon_proj_dim, args.bacon_loss_ratio
        super().__init__(args, net_builder, tb_log, logger, **kwargs)
        # The projection belongs to the network, so that the optimizer, the average and the checkpoint hold it.
        self.bacon = BaConLoss(
            self.proj_dim,
            self.num_classes,
            len(self.dataset_dict["train_lb"]),
            len(self.dataset_dict["train_ulb"]),
            proj_layers=0,
            variant=args.bacon_variant,
        )
        self.bacon_start = args.bacon_start * self.num_train_iter

    def train_step(self, **batch):
        out_dict, log_dict = super().train_step(**batch)
        features = torch.cat([out_dict["feat"]["x_lb"], out_dict["feat"]["x_ulb_w"]])
        logits = torch.cat([out_dict["logits_aux"]["x_lb"], out_dict["logits_aux"]["x_ulb_w"]])
        if self.bacon.bank.features.device != features.device:
            self.bacon.to(features.device)
        with self.amp_cm():
            projected = self.network.projection(features)
        loss, stats = self.bacon(
            projected,
            batch["y_lb"],
            logits,
            batch["idx_lb"],
            batch["idx_ulb"],
            progress=self.it / self.num_train_iter,
            active=self.it > self.bacon_start,
        )
        out_dict["loss"] = out_dict["loss"] + self.bacon_loss_ratio * loss
        log_dict["train/bacon_loss"] = loss.detach()
        log_dict |= {f"train/bacon_{name}": value for name, value in stats.items()}
        return out_dict, log_dict

    def get_save_dict(self):
        return super().get_save_dict() | {"bacon": self.bacon.state_dict()}

    def load_model(self, load_path):
        checkpoint = super().load_model(load_path)
        self.bacon.load_state_dict(checkpoint["bacon"])
        return checkpoint

    @staticmethod
    def get_argument():
        return [
            *ABC.get_argument(),
            SSL_Argument("--bacon_loss_ratio", float, 1.0, "weight of BaCon's loss"),
            SSL_Argument("--bacon_proj_dim", int, 32, "width of the contrastive space"),
            SSL_Argument("--bacon_start", float, 0.5, "fraction of the training after which the loss starts"),
            SSL_Argument("--bacon_variant", str, "fixed", "fixed, official or blog"),
        ]
