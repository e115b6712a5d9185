"""The typed configuration of a run: one frozen dataclass, from which the command line is generated."""

import dataclasses
import json
import re
import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import UnionType
from typing import Annotated, Literal, Union, get_args, get_origin, get_type_hints

import tyro

from bacon_fast.data.datasets import DATASETS
from bacon_fast.data.longtail import PROTOCOLS

MethodName = Literal[
    "supervised",
    "fixmatch",
    "fixmatch+abc",
    "fixmatch+bacon",
    "fixmatch+abc+bacon",
    "fixmatch+debiaspl",
    "fixmatch+saw",
    "fixmatch+daso",
    "fixmatch+darp",
    "fixmatch+crest",
    "fixmatch+crest+pda",
    "fixmatch+cossl",
    "remixmatch",
    "remixmatch+abc",
    "remixmatch+bacon",
    "remixmatch+abc+bacon",
    "remixmatch+daso",
    "remixmatch+darp",
    "remixmatch+crest",
    "remixmatch+crest+pda",
    "remixmatch+cossl",
    "sscl",
    "ssc",
]
METHODS: tuple[str, ...] = get_args(MethodName)

# What a field left at None stands for, by family, the first part of a method's name (methods.md B, D, E.2, F.2).
DEFAULTS = {"unlabeled_ratio": 2, "lambda_u": 1.0, "contrast_start": 0.5, "proj_dim": 32, "proj_layers": 1}
FAMILY_DEFAULTS = {
    "remixmatch": {"unlabeled_ratio": 1, "lambda_u": 1.5, "contrast_start": 1 / 30},
    "sscl": {"proj_dim": 64, "proj_layers": 2},
}
Precision = Literal["auto", "fp32", "tf32", "bf16", "fp16"]

BACKBONE_FORMS = "wrn-DEPTH-WIDTH, wrn-DEPTH-WIDTH-usb, resnet18 or resnet50"

# Fields that say where a run happens and how it talks, not what it computes: a resumed run may change them.
RESUME_MAY_CHANGE = frozenset(
    {
        "run_dir",
        "resume",
        "data_dir",
        "download",
        "log_every",
        "checkpoint_every",
        "keep_checkpoints",
        "graph",
        "report",
        "split",
        "rank_timeout",
        "images",
    }
)


@dataclass(frozen=True)
class Config:
    """Everything that defines a run. Presets fill it (engine/presets.py); the command line overrides single fields.

    Raises ValueError, which names the field, for a value that is not of the field's type or out of its range.
    """

    preset: tyro.conf.Suppress[str] = "digits"
    """Name of the preset this configuration started from."""

    # --- what to train -------------------------------------------------------------------------------------------
    method: MethodName = "fixmatch+abc+bacon"
    """Base learner, class balancer and contrastive regularizer."""
    steps: int = 300_000
    """Optimizer steps T. Schedules, ABC's annealing and BaCon's temperature run on t/T."""
    seed: int = 0
    """Seeds the split, the initialization, the sampling order and every augmentation draw."""

    # --- where -----------------------------------------------------------------------------------------------------
    run_dir: Path | None = None
    """Directory of this run's files; default runs/<preset>-<method>-seed<seed>-<time>. It must not hold another run.
    Several machines have to share it."""
    resume: bool = False
    """Continue the run in --run-dir from its newest readable checkpoint."""
    device: str = "auto"
    """auto (cuda when there is one), cpu, cuda or cuda:N."""

    # --- data ------------------------------------------------------------------------------------------------------
    dataset: Annotated[str, tyro.conf.arg(metavar="{" + ",".join(DATASETS) + "}")] = "digits"
    """Source of the images."""
    data_dir: Path | None = None
    """Where the dataset lies (digits needs none)."""
    download: bool = False
    """Let torchvision download the dataset into --data-dir."""
    image_size: int | None = None
    """Side in pixels that images are resized to; default: the dataset's own."""
    classes: tuple[str, ...] | None = None
    """Class order of an image folder (class 0 is the head); default: classes.txt in the folder, else sorted names."""
    images: Literal["memory", "mapped"] = "memory"
    """memory: all images decoded in memory, resident on the device. mapped (dataset folder with an image size): decoded
    once into a file in --data-dir/.bacon_fast, 3 bytes a pixel, from which each step's images are sent. Files there of
    another size or of images that have changed since may be deleted."""
    protocol: Annotated[str, tyro.conf.arg(metavar="{" + ",".join(PROTOCOLS) + "}")] = "digits"
    """Long-tailed split by name; the five fields below override single values of it."""
    labeled_head: int | None = None
    """N_1, labeled images of the head class."""
    unlabeled_head: int | None = None
    """M_1, unlabeled images of the head class."""
    gamma_l: float | None = None
    """Imbalance ratio of the labeled set; negative reverses the class order, 1 is uniform."""
    gamma_u: float | None = None
    """Imbalance ratio of the unlabeled set; negative reverses the class order (inverse), 1 is uniform."""
    lb_in_ulb: bool | None = None
    """Put the labeled images into the unlabeled set too."""
    split: Path | None = None
    """Reuse this split file (split.json of another run) instead of drawing one."""

    # --- model -----------------------------------------------------------------------------------------------------
    backbone: str = "wrn-28-2"
    """wrn-DEPTH-WIDTH (depth 6n+4, or 8n+5 for 96x96 pixels), resnet18 or resnet50. wrn-DEPTH-WIDTH-usb: as in USB's
    code, where the first block of each group but the first reads its input without BatchNorm and LeakyReLU.
    """
    bn_momentum: float = 0.001
    """Weight of the newest batch in BatchNorm's running statistics (methods.md 0.3)."""

    # --- batch and augmentation ------------------------------------------------------------------------------------
    batch_size: int = 64
    """B, labeled images a step; under torchrun, of all processes together."""
    unlabeled_ratio: int | None = None
    """mu: unlabeled images a step are mu*B. Default: 2, and 1 for ReMixMatch, which takes nothing else."""
    hflip: bool = True
    """Random horizontal flips (also of digits, where they change the meaning: the digits preset turns them off)."""
    randaugment_ops: int = 3
    """Operations drawn per strong view."""
    cutout: bool = True
    """One Cutout per strong view."""

    # --- optimizer -------------------------------------------------------------------------------------------------
    optimizer: Literal["sgd", "adam"] = "sgd"
    """sgd: momentum 0.9, Nesterov, weight decay on tensors of two or more dimensions. adam: ABC's recipe, with
    parameters shrunk by (1 - weight_decay*lr) after each step."""
    lr: float = 0.03
    """Learning rate."""
    weight_decay: float = 5e-4
    """Weight decay (adam: 0.02 in ABC's recipe)."""
    lr_schedule: Literal["constant", "cosine", "cosine_to_zero"] = "constant"
    """constant (every imbalanced method of USB and BaCon), cosine: lr*max(0, cos(7*pi*t/(16*T))) (FixMatch), or
    cosine_to_zero: lr*(1 + cos(pi*t/T))/2 (MoCo v2)."""
    ema: float = 0.999
    """Momentum of the parameter average that evaluation uses."""
    ema_buffers: Literal["copy", "average"] = "copy"
    """BatchNorm statistics of the averaged model: copied from the online model (USB), or averaged too (ABC, CoSSL)."""
    precision: Precision = "fp32"
    """Arithmetic of the network: fp32, tf32 (convolutions, on CUDA), bf16 or fp16 autocast. Losses are fp32 always.
    auto: bf16 where the device computes it natively, else fp32; the run records which."""
    channels_last: bool = True
    """Memory format of the convolutions."""
    compile: bool = False
    """Compile network and losses with torch.compile."""
    graph: Literal["auto", "on", "off"] = "auto"
    """The whole step as one CUDA graph launch: auto (on a single GPU, unless the capture fails), on (an error where it
    is impossible), or off (the same step, launch by launch)."""
    threads: int = 0
    """CPU threads; 0: the cores this process may use."""
    sync_batchnorm: bool = False
    """Under torchrun: normalize with the statistics of the whole batch, so that the run is that of a single process.
    Without, each process normalizes its own rows, and the running statistics of the first are evaluated and saved."""
    rank_timeout: float = 600.0
    """Under torchrun: seconds a process waits for the others before it gives up."""

    # --- FixMatch and ABC ------------------------------------------------------------------------------------------
    threshold: float = 0.95
    """Confidence from which a pseudo-label counts (FixMatch, ABC, SSC, and BaCon's class counts)."""
    lambda_u: float | None = None
    """Weight of the unlabeled loss. Default: 1, and 1.5 for ReMixMatch."""
    lambda_abc: float = 1.0
    """Weight of ABC's losses."""
    epochs: int = 1000
    """E: ABC's keep probability anneals in E stages over the run; SAW counts pseudo-labels at the start of each."""

    # --- ReMixMatch (methods.md D) ---------------------------------------------------------------------------------
    lambda_kl: float = 0.5
    """Weight of the first strong view's loss against the weak view's targets."""
    lambda_rot: float = 0.5
    """Weight of the rotation task."""
    rampup: float = 1 / 64
    """Fraction of the run in which --lambda-u and --lambda-kl rise from 0."""
    sharpening: float = 0.5
    """Temperature of the targets."""
    mixup_alpha: float = 0.75
    """MixUp's coefficient is drawn from Beta(alpha, alpha)."""

    # --- SSC (methods.md G) ----------------------------------------------------------------------------------------
    ssc_temperature: float = 0.1
    """T of the contrastive loss."""
    ssc_pl_temperature: float = 0.08
    """T_pl, temperature of the similarities to the prototypes that pseudo-labels and predictions are made of."""
    ssc_lambda_proto: float = 1.0
    """Weight of the prototypes' rows in the loss."""
    ssc_lambda_up: float = 1.0
    """Weight of the confident unlabeled rows."""
    ssc_lambda_down: float = 0.2
    """Weight of the unconfident unlabeled rows."""
    ssc_reduction: Literal["wmean", "pml"] = "wmean"
    """Weighted mean over the rows with a positive, or what the released code gets from pytorch-metric-learning."""

    # --- BaCon -----------------------------------------------------------------------------------------------------
    lambda_con: float = 1.0
    """Weight of the contrastive loss (BaCon; lambda_ctr of SsCL)."""
    contrast_start: float | None = None
    """Fraction of the run after which the contrastive loss is added. Default: 1/2, and 1/30 for ReMixMatch."""
    variant: Literal["fixed", "official", "blog"] = "fixed"
    """fixed: the specification; official: the released code's oddities; blog: the widely copied listing, corrected."""
    neg_mode: Literal["authors", "paper"] | None = None
    """Denominator shared by the anchors of a class (authors: released code), or one per anchor (paper). Default of this
    and of the next three: the variant's (fixed: authors, 0.1, 0.005, 64)."""
    proj_dim: int | None = None
    """D, width of the contrastive space. Default: 32, and 64 for SsCL."""
    proj_layers: int | None = None
    """Linear layers of the projection head; 0: none. Default: 1, and 2 for SsCL."""
    temperature: float | None = None
    """tau of the negatives, and upper bound of the class temperatures."""
    bta: float | None = None
    """eta, strength of the balanced temperature adjustment; 0 turns it off. Below 1, but for the blog variant: the
    temperatures have to stay positive."""
    negative_weight: float | None = None
    """Lambda: how many negatives the mean negative stands for."""
    top_k: int = 3
    """An unlabeled image is a negative of the classes outside its top k; 1: no reliable negative selection."""
    reliable_threshold: float = 0.98
    """Confidence from which a feature enters the memory bank."""
    centers: Literal["bank", "batch"] = "bank"
    """Class centers: means over the memory bank or, for an ablation, over the reliable images of the batch."""
    count_gate: Literal["prob", "logit"] | None = None
    """What --threshold selects a class by in BaCon's counts: the largest probability or logit. Default of this and of
    the next two: the variant's (fixed: prob, always, written)."""
    labeled_counts: Literal["always", "with_pseudo"] | None = None
    """Count labeled images always, or only in a batch with a selected unlabeled one."""
    center_slots: Literal["written", "selected"] | None = None
    """A center is the mean over the slots of its class that hold a feature, or over all, which start as ones."""
    loss_backend: Literal["auto", "reference", "cpp", "triton"] = "auto"
    """Implementation of the fused losses."""

    # --- other class balancers (methods.md H) ------------------------------------------------------------------------
    debiaspl_tau: float = 0.4
    """DebiasPL: strength of the debiasing and of the margin; 0.4 in USB, 1 in the authors' ImageNet runs."""
    distribution_momentum: float = 0.999
    """Momentum of the running mean of the predictions (ReMixMatch, CReST+, DebiasPL)."""
    daso_start: float = 0.02
    """DASO: fraction of the run after which it acts (its authors: 5,000 of 250,000 steps)."""
    daso_t_dist: float = 1.5
    """DASO: T_dist; 1.5 where the unlabeled classes are distributed as the labeled ones, else 0.3 (CIFAR-10)."""
    darp_start: float = 0.4
    """DARP: fraction of the run after which pseudo-labels are refined (its authors: 200 of 500 epochs)."""
    crest_generations: int = 6
    """CReST: G; each generation has steps/G steps from a fresh network (its authors: 65,536 each)."""
    crest_alpha: float = 3.0
    """CReST: the fraction of pseudo-labels taken from a class is a ratio of counts to the power 1/alpha."""
    crest_t_min: float = 0.5
    """CReST+: exponent of the aligned distribution in the last generation; 1 in the first."""
    cossl_start: float = 0.8
    """CoSSL: fraction of the run after which the teacher head labels; 0.8 (its authors), 0.2 (BaCon's runs)."""
    cossl_lambda: float = 0.6
    """CoSSL: lambda_0, the least share of the labeled image's feature in a blend."""
    usb_compat: bool = False
    """Reproduce the errors of USB's code that published numbers contain, in DebiasPL, DASO and CoSSL, and CReST's,
    which acts where the labeled counts do not fall from class to class."""

    # --- SsCL (methods.md F; arXiv 2105.07387) -----------------------------------------------------------------------
    sscl_queue: int = 4096
    """K_q, keys in the queue (CIFAR-10; 65,536 on ImageNet)."""
    sscl_momentum: float = 0.999
    """Momentum of the key encoder (MoCo)."""
    sscl_extra_keys: int = 3
    """Keys of labeled images that are positives of each query, beside its own; 0: MoCo with a margin."""
    sscl_gamma: float = 5.0
    """gamma, one over the temperature of the contrastive loss (5 on CIFAR-10, 10 on ImageNet)."""
    sscl_margin: float = -0.25
    """m, added to the similarities of the negatives."""
    sscl_form: Literal["prod", "sum"] = "prod"
    """Equation (5) by its third line, where all positives must be close, or by its second, where one suffices."""
    sscl_mask_queue: bool = False
    """Keys of the query's own class in the queue are no negatives."""
    sscl_calibration: Literal["ratio", "literal"] = "ratio"
    """Pseudo-labels are multiplied by an image's similarities to the classes over their average, or, the wording of the
    paper, by the average."""
    sscl_temperature: float = 0.1
    """T_s of the softmax over the similarities to the class prototypes."""
    sscl_soft: bool = False
    """Train towards the calibrated distribution instead of its largest class."""
    sscl_refresh_epochs: int = 5
    """Epochs, of --steps/--epochs steps, between refreshes of prototypes and assignments."""

    # --- logging ---------------------------------------------------------------------------------------------------
    eval_every: int = 1000
    """Steps between evaluations of the averaged model on the test part."""
    log_every: int = 100
    """Steps between log rows; the only moments at which the host waits for the device."""
    checkpoint_every: int = 1000
    """Steps between checkpoints."""
    keep_checkpoints: int = 2
    """Newest checkpoints kept."""
    report: bool = True
    """Write report.html at the end."""

    def __post_init__(self) -> None:
        for name, kind in _kinds(type(self)).items():
            _require(_is_of(kind, getattr(self, name)), name, _words(kind), getattr(self, name))
        self._check_balancers()
        for name in ("steps", "batch_size", "eval_every", "log_every", "checkpoint_every", "epochs"):
            _require(getattr(self, name) >= 1, name, "an integer of at least 1", getattr(self, name))
        _require(
            self.keep_checkpoints >= 2, "keep_checkpoints", "at least 2 (one may be damaged)", self.keep_checkpoints
        )
        for name, lowest in (("unlabeled_ratio", 1), ("randaugment_ops", 0), ("threads", 0), ("sscl_extra_keys", 0)):
            value = getattr(self, name)
            _require(value is None or value >= lowest, name, f"an integer of at least {lowest}", value)
        for name in ("proj_dim", "top_k", "sscl_queue", "sscl_refresh_epochs"):
            value = getattr(self, name)
            _require(value is None or value >= 1, name, "an integer of at least 1", value)
        above_zero = ("lr", "temperature", "negative_weight", "rank_timeout")
        above_zero += ("rampup", "sharpening", "mixup_alpha", "sscl_gamma", "sscl_temperature")
        for name in (*above_zero, "ssc_temperature", "ssc_pl_temperature"):
            value = getattr(self, name)
            _require(value is None or value > 0, name, "a number above 0", value)
        weights = ("lambda_u", "lambda_abc", "lambda_con", "lambda_kl", "lambda_rot")
        weights += ("ssc_lambda_proto", "ssc_lambda_up", "ssc_lambda_down")
        for name in (*weights, "weight_decay", "bta", "debiaspl_tau"):
            value = getattr(self, name)
            _require(value is None or value >= 0, name, "a number of at least 0", value)
        if self.variant != "blog":  # which bounds the class temperatures from below; others reach tau·(1 - bta)
            _require(self.bta is None or self.bta < 1, "bta", "a number below 1, except for variant blog", self.bta)
        for name in ("threshold", "reliable_threshold", "contrast_start", "ema", "distribution_momentum"):
            value = getattr(self, name)
            _require(value is None or 0 <= value <= 1, name, "a number between 0 and 1", value)
        _require(self.proj_layers in (None, 0, 1, 2), "proj_layers", "0, 1 or 2", self.proj_layers)
        _require(0 <= self.sscl_momentum <= 1, "sscl_momentum", "a number between 0 and 1", self.sscl_momentum)
        _require(0 <= self.seed < 2**64, "seed", "an integer in 0..2^64-1", self.seed)
        backbones = r"wrn-\d+-\d+(-usb)?|resnet18|resnet50"
        _require(bool(re.fullmatch(backbones, self.backbone)), "backbone", BACKBONE_FORMS, self.backbone)
        if self.backbone.startswith("wrn"):
            depth = int(self.backbone.split("-")[1])
            expected = "a WRN depth of 6n+4 (10, 16, 22, 28, ...) or 8n+5 (13, 21, 29, 37, ...)"
            _require(depth >= 10 and (depth % 6 == 4 or depth % 8 == 5), "backbone", expected, depth)
        _require(0 < self.bn_momentum <= 1, "bn_momentum", "a number above 0 and up to 1", self.bn_momentum)
        _require(self.dataset in DATASETS, "dataset", f"one of {', '.join(DATASETS)}", self.dataset)
        if self.images == "mapped":
            _require(self.dataset == "folder", "images", "memory, except for dataset folder", self.images)
            _require(self.image_size is not None, "image_size", "a side in pixels for --images mapped", None)
        _require(self.protocol in PROTOCOLS, "protocol", f"one of {', '.join(PROTOCOLS)}", self.protocol)
        if self.method.startswith("remixmatch"):  # it mixes blocks of B rows with each other (methods.md D)
            _require(self.unlabeled_ratio in (None, 1), "unlabeled_ratio", "1 for ReMixMatch", self.unlabeled_ratio)
        for name in ("gamma_l", "gamma_u"):
            value = getattr(self, name)
            _require(value is None or abs(value) >= 1, name, "at least 1, or at most -1 to reverse the classes", value)

    def resolved(self) -> "Config":
        """The same with the method's default in each field of `DEFAULTS` that is None. Trainers do this first."""
        defaults = DEFAULTS | FAMILY_DEFAULTS.get(self.method.split("+")[0], {})
        unset = {name: value for name, value in defaults.items() if getattr(self, name) is None}
        return dataclasses.replace(self, **unset)

    def _check_balancers(self) -> None:
        """Settings of methods.md H."""
        for name in ("daso_start", "darp_start", "cossl_start"):
            _require(0 <= getattr(self, name) < 1, name, "a number from 0 to below 1", getattr(self, name))
        _require(self.crest_generations >= 1, "crest_generations", "an integer of at least 1", self.crest_generations)
        for name in ("crest_t_min", "cossl_lambda"):
            _require(0 <= getattr(self, name) <= 1, name, "a number between 0 and 1", getattr(self, name))
        for name in ("daso_t_dist", "crest_alpha"):
            _require(getattr(self, name) > 0, name, "a number above 0", getattr(self, name))

    def to_dict(self) -> dict:
        """JSON-ready values, paths as strings."""
        values = dataclasses.asdict(self)
        return {k: str(v) if isinstance(v, Path) else list(v) if isinstance(v, tuple) else v for k, v in values.items()}

    @classmethod
    def from_dict(cls, values: dict) -> "Config":
        """Inverse of `to_dict`. Raises ValueError for names this version does not know and values that do not fit."""
        fields = {f.name for f in dataclasses.fields(cls)}
        if unknown := sorted(set(values) - fields):
            raise ValueError(f"config: unknown fields {unknown}; written by another version of bacon_fast?")
        paths = {"run_dir", "data_dir", "split"}
        values = {k: Path(v) if k in paths and isinstance(v, str) else v for k, v in values.items()}
        return cls(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})

    def differences(self, other: dict) -> list[str]:
        """Fields in which `other` (a saved `to_dict`) would compute something else, as readable lines.

        A run records what "auto" became on its device, so "auto" agrees with whatever it was.
        """
        mine = self.resolved().to_dict()
        if self.precision == "auto":
            mine["precision"] = other.get("precision", "auto")
        names = [n for n in mine if n not in RESUME_MAY_CHANGE and (n not in other or other[n] != mine[n])]
        lines = [f"{n}: checkpoint {other.get(n, '<missing>')!r}, now {mine[n]!r}" for n in names]
        return lines + [f"{n}: checkpoint {other[n]!r}, unknown to this version" for n in other if n not in mine]

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), indent=2) + "\n"


def _require(condition: bool, name: str, expected: str, found: object) -> None:
    if not condition:
        raise ValueError(f"{name}: expected {expected}, found {found!r}")


@cache
def _kinds(config: type) -> dict[str, object]:
    """What each field may hold, as annotated."""
    return get_type_hints(config)


def _is_of(kind: object, value: object) -> bool:
    """Whether a value is what an annotation says. An integer may stand for a float, True and False for no number."""
    origin, of = get_origin(kind), get_args(kind)
    if origin in (Union, UnionType):
        return any(_is_of(one, value) for one in of)
    if origin is Literal:
        return isinstance(value, str) and value in of
    if origin is tuple:
        return isinstance(value, tuple) and all(_is_of(of[0], entry) for entry in value)
    if kind is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= sys.float_info.max
    return isinstance(value, kind) and (kind is bool or not isinstance(value, bool))


_WORDS = {int: "an integer", float: "a finite number", bool: "True or False", str: "a string", Path: "a pathlib.Path"}


def _words(kind: object) -> str:
    """An annotation in words."""
    origin, of = get_origin(kind), get_args(kind)
    if origin in (Union, UnionType):
        return " or ".join(_words(one) for one in of)
    if origin is Literal:
        return f"one of {', '.join(of)}"
    if origin is tuple:
        return "a tuple of strings"
    return _WORDS.get(kind, "None")
