"""Arm USB: semilearn 0.3.2 itself, unmodified, where it can run.

Its FixMatch and ABC (it has no BaCon), network, dataset class, RandAugment, loaders, hooks and training loop, on our
images and split. Two things are ours: a hook that watches the steps, and the dataset, handed over through
`set_dataset`, as USB's own reads and downloads CIFAR's original files. One GPU without torch.distributed, where USB
wraps its model in DataParallel; ABC needs one wrapper or the other.
"""

import random
from contextlib import AbstractContextManager, ExitStack, redirect_stdout
from io import StringIO
from pathlib import Path

import numpy as np
from torchvision import transforms

from .loaders import AS_SHIPPED, PREFETCH
from .problem import Problem
from .step import Flags, StepArm

NETS = {"wrn-28-2": "wrn_28_2", "wrn-28-8": "wrn_28_8"}


def why_not(problem: Problem) -> str | None:
    """Why USB cannot run here; None if it can."""
    try:
        import semilearn  # noqa: F401
    except Exception as error:  # what a missing or unfitting dependency raises is up to that dependency
        return f"import semilearn: {type(error).__name__}: {error}"
    if problem.device.type != "cuda":
        return "USB trains on CUDA devices only"
    if problem.config.model.backbone not in NETS:
        return f"USB has no {problem.config.model.backbone}"
    return None


class SliceOverError(Exception):
    """The steps that were asked for are done."""


class UsbArm(StepArm):
    """USB's training loop, a slice at a time.

    Args:
        problem: what to train; USB begins from its own initialization.
        scratch: folder for the files that USB writes.
    """

    def __init__(self, problem: Problem, scratch: Path) -> None:
        self.device = problem.device
        self.flags = Flags(deterministic=True, tf32_convolutions=self.device.type == "cuda")
        self.warmup = PREFETCH * max(AS_SHIPPED) + 1
        self.algorithm = build(problem, scratch)

    def run(self, steps: int, measure: AbstractContextManager) -> None:
        """A slice of USB's own loop, watched by a hook."""
        self.algorithm.register_hook(_watch(self.warmup, steps, measure), "Watch", "LOWEST")
        self.algorithm.it = 0
        with self.flags.applied(), redirect_stdout(StringIO()):
            try:
                self.algorithm.train()
            except SliceOverError:
                return
        raise RuntimeError("USB's loop ended before the slice was over")


def _watch(warmup: int, steps: int, measure: AbstractContextManager):
    """A hook of USB that enters ``measure`` after some steps and leaves both it and the loop after some more."""
    from semilearn.core.hooks import Hook

    class Watch(Hook):
        def before_run(self, algorithm) -> None:
            self.done, self.stack = 0, ExitStack()

        def after_train_step(self, algorithm) -> None:
            self.done += 1
            if self.done == warmup:
                self.stack.enter_context(measure)
            elif self.done == warmup + steps:
                self.stack.close()
                raise SliceOverError

    return Watch()


def build(problem: Problem, scratch: Path):
    """USB's FixMatch with ABC, as its builders compose it from a configuration."""
    from semilearn.algorithms.fixmatch import FixMatch
    from semilearn.core.utils import get_net_builder
    from semilearn.core.utils.misc import send_model_cuda
    from semilearn.datasets.augmentation import RandAugment
    from semilearn.datasets.cv_datasets.datasetbase import BasicDataset
    from semilearn.imb_algorithms.abc.abc import ABC
    from semilearn.lighting import get_config

    recipe, size = problem.config, problem.config.data.image_size
    args = get_config(
        {
            "algorithm": "fixmatch",
            "imb_algorithm": "abc",
            "net": NETS[recipe.model.backbone],
            "num_classes": problem.num_classes,
            "batch_size": recipe.views.batch_size,
            "uratio": recipe.views.unlabeled_ratio,
            "eval_batch_size": 256,
            "epoch": recipe.shared.epochs,
            "num_train_iter": recipe.steps,
            "num_eval_iter": recipe.steps,
            "num_log_iter": 256,
            "num_workers": AS_SHIPPED[0],
            "img_size": size,
            "lr": recipe.optimizer.lr,
            "weight_decay": recipe.optimizer.weight_decay,
            "ema_m": recipe.optimizer.ema,
            "use_cat": True,
            "amp": False,
            "p_cutoff": recipe.shared.threshold,
            "hard_label": True,
            "save_dir": str(scratch),
            "save_name": "usb",
            "gpu": None,
            "seed": 0,
        }
    )
    args.distributed = args.multiprocessing_distributed = False
    args.rank, args.world_size = 0, 1
    crop = [transforms.RandomCrop(size, padding=size // 8, padding_mode="reflect"), transforms.RandomHorizontalFlip()]
    tensor = [transforms.ToTensor(), transforms.Normalize(problem.mean, problem.std)]
    weak = transforms.Compose([transforms.Resize(size), *crop, *tensor])
    strong = transforms.Compose([transforms.Resize(size), *crop, RandAugment(3, 5), *tensor])

    def images(rows: np.ndarray, labels: np.ndarray, unlabeled: bool) -> BasicDataset:
        pictures, classes = problem.images[rows], labels.tolist()
        return BasicDataset("fixmatch", pictures, classes, problem.num_classes, weak, unlabeled, strong, False)

    def set_dataset(self) -> dict:
        nothing = np.zeros(len(problem.unlabeled), dtype=np.int64)  # FixMatch reads no label of an unlabeled image
        labeled = images(problem.labeled, problem.labels, unlabeled=False)
        parts = {"train_lb": labeled, "train_ulb": images(problem.unlabeled, nothing, unlabeled=True)}
        args.lb_dest_len, args.ulb_dest_len = len(problem.labeled), len(problem.unlabeled)
        return parts | {"eval": labeled, "test": None}

    random.seed(args.seed)
    np.random.seed(args.seed)
    # Its own classes, whatever is registered under their names by now (bacon_fast.integrations.usb).
    with redirect_stdout(StringIO()):
        algorithm = type("FixMatchABC", (ABC, FixMatch), {"set_dataset": set_dataset})(
            args, get_net_builder(args.net, False), None, None
        )
    algorithm.model = send_model_cuda(args, algorithm.model)
    algorithm.ema_model = send_model_cuda(args, algorithm.ema_model, clip_batch=False)
    return algorithm
