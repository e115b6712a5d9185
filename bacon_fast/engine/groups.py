"""The groups of a configuration: options of every run, whatever its method. Each stands alone: --lr, --batch-size."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from bacon_fast.data.datasets import DATASETS, MAX_IMAGE_SIZE
from bacon_fast.data.listing import OtherLabels
from bacon_fast.data.longtail import PROTOCOLS
from bacon_fast.methods.options import Options
from bacon_fast.models.tuning import Trained

Precision = Literal["auto", "fp32", "tf32", "bf16", "fp16"]

BACKBONE_FORMS = "wrn-DEPTH-WIDTH, wrn-DEPTH-WIDTH-usb, resnet18, resnet50 or timm/NAME"

_PATH = tyro.conf.arg(metavar="PATH")
_WORD = tyro.conf.arg(metavar="WORD")
_PATHS = tyro.conf.arg(metavar="PATH...")


@dataclass(frozen=True)
class RunOptions(Options):
    """Where a run happens. `run_dir` must not hold another run, unless `resume` continues it."""

    run_dir: Annotated[Path | None, _PATH] = None
    """Default: runs/PRESET-METHOD-seedSEED-TIME. Under torchrun on several machines all must see it."""
    resume: bool = False
    """Continue the run in --run-dir; its preset need not be named."""
    device: str = "auto"
    """auto (cuda when there is one), cpu, cuda or cuda:N."""


@dataclass(frozen=True)
class DataOptions(Options):
    """Images and split.

    data_dir: of dataset folder an image folder (train/<class>/, maybe test/<class>/ and unlabeled/), a CSV file with
    the columns image_path and label, or an .npz file.
    images: "memory" decodes all images into memory, and keeps them on the device. "mapped" (image files, with an image
    size) decodes them once into a file beside them, in .bacon_fast, 3 bytes a pixel; each step's images are sent from
    there. You may delete files there that belong to another size, or to images that have changed since. "auto" maps
    what needs more than a quarter of the memory, or than half of the GPU's.
    """

    dataset: Annotated[str, tyro.conf.arg(metavar="{" + ",".join(DATASETS) + "}")] = "digits"
    """Source of the images."""
    data_dir: Annotated[Path | None, _PATH] = None
    """Where the dataset lies: a folder, a .csv or an .npz file."""
    unlabeled: Annotated[tuple[Path, ...], _PATHS] = ()
    """Further unlabeled images: folders and CSV files."""
    test: Annotated[tuple[Path, ...], _PATHS] = ()
    """Further test images: folders of class folders, CSV files."""
    val: Annotated[tuple[Path, ...], _PATHS] = ()
    """Validation images, likewise."""
    download: bool = False
    """Let torchvision download the dataset into --data-dir."""
    image_size: Annotated[int | None, tyro.conf.arg(metavar="INT")] = None
    """Side in pixels to resize to; None: the dataset's, or timm/NAME's."""
    classes: Annotated[tuple[str, ...] | None, tyro.conf.arg(metavar="NAME...")] = None
    """Classes, the most frequent first; default: classes.txt, or sorted."""
    other_labels: Annotated[OtherLabels, _WORD] = "error"
    """Images of other classes than --classes: error, drop or unlabeled."""
    unreadable: Annotated[Literal["skip", "error"], _WORD] = "skip"
    """Unlabeled files that cannot be read: skip or error."""
    images: Annotated[Literal["auto", "memory", "mapped"], _WORD] = "auto"
    """memory, mapped (decoded once into a file), or auto: by size."""
    follow_links: bool = False
    """Follow links in a class folder that lead out of it."""
    protocol: str = "digits"
    """Long-tailed split; the next five options override values of it."""
    labeled_head: Annotated[int | None, tyro.conf.arg(metavar="INT")] = None
    """N_1, labeled images of the head class."""
    unlabeled_head: Annotated[int | None, tyro.conf.arg(metavar="INT")] = None
    """M_1, unlabeled images of the head class."""
    gamma_l: Annotated[float | None, tyro.conf.arg(metavar="FLOAT")] = None
    """Imbalance of the labeled set; negative: reversed, 1: uniform."""
    gamma_u: Annotated[float | None, tyro.conf.arg(metavar="FLOAT")] = None
    """Imbalance of the unlabeled set, likewise."""
    lb_in_ulb: Annotated[bool | None, tyro.conf.arg(metavar="{True,False}")] = None
    """Put the labeled images into the unlabeled set too."""
    validation: Annotated[float | None, tyro.conf.arg(metavar="FLOAT")] = 0.0
    """Share of each class's labeled images to hold out (or --val). None: 0.2 of at least 100, else 0."""
    split: Annotated[Path | None, _PATH] = None
    """Reuse this split.json of another run instead of drawing one."""

    def check(self) -> None:
        self.require(self.dataset in DATASETS, "dataset", f"one of {', '.join(DATASETS)}")
        fits = self.image_size is None or 1 <= self.image_size <= MAX_IMAGE_SIZE
        self.require(fits, "image_size", f"1 to {MAX_IMAGE_SIZE} pixels")
        self.require(not self.follow_links or self.dataset == "folder", "follow_links", "False, but for dataset folder")
        for name in ("unlabeled", "test", "val"):
            self.require(self.dataset == "folder" or not getattr(self, name), name, "none, but for dataset folder")
        share = self.validation
        self.require(share is None or 0 <= share < 1, "validation", "None or a number from 0 to below 1")
        self.require(not (self.val and self.validation), "validation", "0 beside --val, which gives the images")
        if self.images == "mapped":
            self.require(self.dataset == "folder", "images", "auto or memory, except for dataset folder")
            self.require(self.image_size is not None, "image_size", "a side in pixels for --images mapped")
        self.require(self.protocol in PROTOCOLS, "protocol", f"one of {', '.join(PROTOCOLS)}")
        for name in ("gamma_l", "gamma_u"):
            value = getattr(self, name)
            self.require(value is None or abs(value) >= 1, name, "at least 1, or at most -1 to reverse the classes")


@dataclass(frozen=True)
class ViewOptions(Options):
    """Batch and augmentation.

    strong_crop: "window" is the crop of weak views, which moves only. "resized" is torchvision's RandomResizedCrop: a
    random part of 8 to 100 % of the image's area, resized. cached_views: the frozen backbone sees every image once, in
    fixed augmentations, not fresh ones. Its features are cached in a file in .bacon_fast beside the images.
    """

    batch_size: int = 64
    """B, labeled images a step, of all processes together."""
    unlabeled_ratio: int = 2
    """mu: unlabeled images a step are mu*B."""
    stored_size: Annotated[int | None, tyro.conf.arg(metavar="INT")] = None
    """Side in pixels of stored images; views are crops of --image-size (USB: 256, 224).
    None: --image-size, and the crops reach into a reflected border."""
    strong_crop: Literal["window", "resized"] = "window"
    """Crop of strong views: a window, or a random part, resized."""
    hflip: bool = True
    """Random horizontal flips."""
    randaugment_ops: int = 3
    """Operations drawn per strong view."""
    cutout: bool = True
    """One Cutout per strong view."""
    cached_views: int = 0
    """With --train head: weak, and as many strong, views of each image whose features are cached; 0: fresh views."""

    def check(self) -> None:
        self.require_integers(1, "batch_size", "unlabeled_ratio")
        self.require_integers(0, "randaugment_ops", "cached_views")
        fits = self.stored_size is None or 1 <= self.stored_size <= MAX_IMAGE_SIZE
        self.require(fits, "stored_size", f"1 to {MAX_IMAGE_SIZE} pixels")


@dataclass(frozen=True)
class ModelOptions(Options):
    """The backbone, its weights at the start, and what of it is trained.

    timm/NAME needs the extra timm; its image size (at most 224) and its normalization come with it. weights: "none",
    "pretrained" (timm's own, which are downloaded) or a .safetensors or .pt file. train: "all"; "lora", matrices of
    lora_rank beside the attention's (Hu et al., ICLR 2022); "bias"; or "head", the classifiers alone. A frozen
    backbone's BatchNorm keeps its statistics. A WRN's depth is 6n+4, or 8n+5 for 96x96 pixels. With -usb it is USB's,
    where the first block of each group but the first reads its input without BatchNorm and LeakyReLU.
    """

    backbone: str = "wrn-28-2"
    """wrn-DEPTH-WIDTH[-usb], resnet18, resnet50 or timm/NAME."""
    weights: Annotated[str, tyro.conf.arg(metavar="FILE")] = "none"
    """Weights to start from: none, pretrained or a file."""
    train: Trained = "all"
    """What of the backbone is trained."""
    lora_rank: int = 4
    """Rank of LoRA's matrices."""
    bn_momentum: Annotated[float | None, tyro.conf.arg(metavar="FLOAT")] = None
    """Weight of the newest batch in BatchNorm; None: the backbone's own."""

    def check(self) -> None:
        backbones = r"wrn-\d+-\d+(-usb)?|resnet18|resnet50|timm/[\w.-]+"
        self.require(bool(re.fullmatch(backbones, self.backbone)), "backbone", BACKBONE_FORMS)
        if self.backbone.startswith("wrn"):
            depth = int(self.backbone.split("-")[1])
            expected = "a WRN depth of 6n+4 (10, 16, 22, 28, ...) or 8n+5 (13, 21, 29, 37, ...)"
            self.require(depth >= 10 and (depth % 6 == 4 or depth % 8 == 5), "backbone", expected)
        fits = self.bn_momentum is None or 0 < self.bn_momentum <= 1
        self.require(fits, "bn_momentum", "a number above 0 and up to 1")
        self.require(self.weights != "", "weights", "none, pretrained or a file")
        starts = self.train == "all" or self.weights != "none"
        self.require(starts, "train", "all with --weights none, as what is frozen would stay random")
        self.require_integers(1, "lora_rank")


@dataclass(frozen=True)
class OptimizerOptions(Options):
    """The update of the parameters, and their average.

    optimizer: "sgd" and "adamw" decay tensors of two or more dimensions; under "adam" parameters shrink by
    (1 - weight_decay*lr) after each step. layer_decay: a layer of a timm backbone has the rate lr*layer_decay^d, d its
    distance from the heads. warmup: the rate rises from 0 in this fraction of T, and lr_schedule runs over the rest.
    lr_schedule: "constant" (every imbalanced method of USB and BaCon), "cosine",
    lr*max(0, cos(7*pi*t/(16*T))) (FixMatch), or "cosine_to_zero", lr*(1 + cos(pi*t/T))/2 (MoCo v2).
    """

    optimizer: Literal["sgd", "adam", "adamw"] = "sgd"
    """sgd: Nesterov momentum 0.9; adam: ABC's recipe; adamw: torch's."""
    lr: float = 0.03
    """Learning rate."""
    weight_decay: float = 5e-4
    """Weight decay (adam: 0.02 in ABC's recipe)."""
    lr_schedule: Literal["constant", "cosine", "cosine_to_zero"] = "constant"
    """cosine: FixMatch's, 7/16 of a period; cosine_to_zero: MoCo's."""
    warmup: float = 0.0
    """Fraction of the run in which the learning rate rises from 0."""
    layer_decay: float = 1.0
    """Factor of the learning rate from layer to layer (timm/NAME)."""
    ema: float = 0.999
    """Momentum of the parameter average that evaluation uses."""
    ema_buffers: Literal["copy", "average"] = "copy"
    """Its BatchNorm statistics: copied (USB), averaged (ABC, CoSSL)."""
    ema_warmup: bool = False
    """Average with momentum min(ema, (1+t)/(10+t)), for short runs."""

    def check(self) -> None:
        self.require_positive("lr")
        self.require_weights("weight_decay")
        self.require_fractions("ema")
        self.require_starts("warmup")
        self.require(0 < self.layer_decay <= 1, "layer_decay", "a number above 0 and up to 1")
        fits = self.layer_decay == 1 or self.optimizer != "adam"
        self.require(fits, "layer_decay", "1 for adam, which shrinks all parameters by one rate")


@dataclass(frozen=True)
class EngineOptions(Options):
    """How steps are computed."""

    precision: Precision = "fp32"
    """Arithmetic of the network: fp32, tf32 (convolutions, on CUDA), bf16 or fp16 autocast. Losses are fp32 always.
    auto: bf16 where the device computes it natively, else fp32; the run records which."""
    channels_last: bool = True
    """Memory format of the convolutions."""
    compile: bool = False
    """Compile network and losses with torch.compile."""
    graph: Literal["auto", "on", "off"] = "auto"
    """The whole step as one CUDA graph launch: auto (on a single GPU, unless the capture fails), on (an error if it is
    impossible), or off (the same step, launch by launch)."""
    threads: int = 0
    """CPU threads; 0: the cores this process may use."""
    sync_batchnorm: bool = False
    """Under torchrun: normalize with the statistics of the whole batch, so that the run equals one in a single process.
    Without, each process normalizes its own rows, and the first one's running statistics are evaluated and saved."""
    rank_timeout: float = 600.0
    """Under torchrun: seconds a process waits for the others before it gives up."""

    def check(self) -> None:
        self.require_integers(0, "threads")
        self.require_positive("rank_timeout")


@dataclass(frozen=True)
class LogOptions(Options):
    """What a run measures and writes, and when.

    select: "validation" keeps, beside the newest weights, the averaged ones of the evaluation with the least
    class-balanced log-loss on the validation images; evaluate and predict use them, and summary and report show them.
    """

    eval_every: int = 1000
    """Steps between evaluations of the averaged model."""
    log_every: int = 100
    """Steps between log rows; the only moments at which the host waits for the device."""
    checkpoint_every: int = 1000
    """Steps between checkpoints."""
    keep_checkpoints: int = 2
    """Newest checkpoints kept."""
    select: Literal["last", "validation"] = "last"
    """The averaged weights to report and use: last, or best on validation."""
    patience: int = 0
    """Stop after so many evaluations without a better validation log-loss; 0: never."""
    report: bool = True
    """Write report.html at the end."""

    def check(self) -> None:
        self.require_integers(1, "eval_every", "log_every", "checkpoint_every")
        self.require_integers(0, "patience")
        self.require(self.keep_checkpoints >= 2, "keep_checkpoints", "at least 2 (one may be damaged)")
