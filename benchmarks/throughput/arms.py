"""The arms of benchmarks/throughput, from USB itself to bacon_fast, each a step further than the one before it."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch

from bacon_fast.engine.trainer import Trainer
from bacon_fast.methods.outputs import Batch
from bacon_fast.models.batchnorm import BatchNormAct2d
from bacon_fast.ops.backends import BACKENDS

from .gate import Truth, check_timed, check_trainer, check_usb_style, check_vectorized, split
from .loaders import AS_SHIPPED, Loaders, ample_workers
from .ours import SeveralTrainersStep, TrainerStep
from .peers import UsbStyleStep
from .problem import Problem, State, make_trainer
from .step import StepArm
from .usb import UsbArm
from .usb import why_not as why_not_usb
from .vectorized import NAMES, DeviceBatches, VectorizedStep

OURS = "F"
ONE_LAUNCH = "cuda"  # the backend of BatchNorm that a GPU has yet to choose or drop (docs/gpu_design.md)


@dataclass
class Bench:
    """What the arms are built from."""

    problem: Problem
    state: State
    truth: Truth | None  # None: nothing is gated, since no speed is wanted
    scratch: Path
    precision: str  # of the arms from C on
    compile: bool
    passed: set[Callable] = field(default_factory=set)  # gates of arms that share their code

    @property
    def cuda(self) -> bool:
        return self.problem.device.type == "cuda"

    def trainer(self, **changes: str | int) -> Trainer:
        """A trainer of the problem."""
        return make_trainer(self.problem.config, self.scratch, self.problem.dataset, **changes)

    def gate(self, check: Callable[[Problem, Truth], None]) -> None:
        """Checks code that arms share, once. Raises RedGateError."""
        if self.truth is not None and check not in self.passed:
            check(self.problem, self.truth)
            self.passed.add(check)

    def gate_timed(self, arm: StepArm, first_losses: Callable[[Batch], dict[str, float]], precision: str) -> None:
        """Checks the first step of the arm that is to be timed. Raises RedGateError."""
        if self.truth is not None:
            with arm.flags.applied():
                losses = first_losses(self.truth.whole_batch)
            check_timed(losses, self.truth, precision)


@dataclass(frozen=True)
class Arm:
    """A row of the table.

    Attributes:
        name: for tables and the picture; its key in `ARMS` says its place on the ladder.
        build: makes it ready to run, or raises RedGateError.
        precision: of its network.
        why_not: reason it is left out on this machine, or None.
        workers: loader processes for labeled and unlabeled images.
    """

    name: str
    build: Callable[[Bench], StepArm]
    precision: Callable[[Bench], str]
    why_not: Callable[[Bench], str | None] = lambda bench: None
    workers: Callable[[], tuple[int, int]] = lambda: (0, 0)


def _usb_style(bench: Bench, workers: tuple[int, int]) -> StepArm:
    bench.gate(check_usb_style)
    arm = UsbStyleStep(bench.problem, bench.state, workers)
    bench.gate_timed(arm, lambda batch: arm.update(split(batch)), "tf32" if bench.cuda else "fp32")
    return arm


def _vectorized(bench: Bench, batches: Loaders | DeviceBatches, compiled: bool = False) -> StepArm:
    bench.gate(check_vectorized)
    arm = VectorizedStep(bench.problem, bench.state, bench.precision, batches, compiled)
    bench.gate_timed(arm, lambda batch: dict(zip(NAMES, arm.update(split(batch)).tolist())), bench.precision)
    return arm


def _trainer(bench: Bench, precision: str, *, compiled: bool = False, norm: str | None = None) -> StepArm:
    """Our trainer; ``norm``: the backend of its BatchNorm layers, None for the default one."""

    def arm(**changes: str | bool) -> TrainerStep:
        return TrainerStep(bench.trainer(**changes), bench.state)

    def timed(precision: str) -> TrainerStep:
        ours = arm(precision=precision, compile=compiled)
        for layer in ours.trainer.method.network.modules():
            if isinstance(layer, BatchNormAct2d):
                layer.backend = norm
        return ours

    ours = timed(precision)
    if bench.truth is not None:
        # To compile takes a minute a precision.
        for name in dict.fromkeys((precision,) if compiled else ("fp32", precision)):
            reference = arm(loss_backend="reference", precision="fp32", graph="off")
            check_trainer(ours if name == precision else timed(name), reference, bench.state, name)
    return ours


def _several(bench: Bench, runs: int) -> StepArm:
    trainers = [bench.trainer(precision=bench.precision, seed=seed) for seed in range(runs)]
    return SeveralTrainersStep(trainers, bench.state)


def _why_not_ample(bench: Bench) -> str | None:
    if sum(ample_workers()) > sum(AS_SHIPPED):
        return None
    return f"no more cores here than the {sum(AS_SHIPPED)} workers of A occupy"


def _why_not_compiled(bench: Bench) -> str | None:
    return None if bench.cuda or bench.compile else "takes a minute to compile; ask for it by --compile"


def _why_not_one_launch(bench: Bench) -> str | None:
    probe = torch.empty(0, 16, 1, 1, device=bench.problem.device)  # WRN's fewest channels
    return BACKENDS["batch_norm_act"][ONE_LAUNCH].why_not(probe)


def _plain(bench: Bench) -> str:
    return "fp32 (TF32 convolutions)" if bench.cuda else "fp32"


def _same(bench: Bench) -> str:
    return bench.precision


def _ample() -> tuple[int, int]:
    return max(AS_SHIPPED, ample_workers(), key=sum)


ARMS: dict[str, Arm] = {
    "USB": Arm(
        "USB 0.3.2 itself: FixMatch + ABC, without BaCon",
        lambda bench: UsbArm(bench.problem, bench.scratch),
        _plain,
        lambda bench: why_not_usb(bench.problem),
        lambda: AS_SHIPPED,
    ),
    "A": Arm(
        "USB-style reference, as shipped",
        lambda bench: _usb_style(bench, AS_SHIPPED),
        _plain,
        workers=lambda: AS_SHIPPED,
    ),
    "B": Arm("A with workers on all cores", lambda bench: _usb_style(bench, _ample()), _plain, _why_not_ample, _ample),
    "C": Arm(
        "B vectorized, channels_last (on a GPU with AMP)",
        lambda bench: _vectorized(bench, Loaders(bench.problem, _ample(), pin_memory=bench.cuda)),
        _same,
        workers=_ample,
    ),
    "D": Arm("C + our augmentation, no loader", lambda bench: _vectorized(bench, DeviceBatches(bench.problem)), _same),
    "E": Arm(
        "D + torch.compile (on a GPU with CUDA graphs)",
        lambda bench: _vectorized(bench, DeviceBatches(bench.problem), compiled=True),
        _same,
        _why_not_compiled,
    ),
    OURS: Arm("bacon_fast", lambda bench: _trainer(bench, bench.precision), _same),
    f"{OURS}-tf32": Arm(
        "bacon_fast in TF32",
        lambda bench: _trainer(bench, "tf32"),
        lambda bench: "tf32",
        lambda bench: None if bench.cuda else "TF32 is a precision of GPUs",
    ),
    f"{OURS}-norm": Arm(
        "bacon_fast, BatchNorm in one launch a direction",
        lambda bench: _trainer(bench, bench.precision, norm=ONE_LAUNCH),
        _same,
        _why_not_one_launch,
    ),
    f"{OURS}-compile": Arm(
        "bacon_fast with --compile",
        lambda bench: _trainer(bench, bench.precision, compiled=True),
        _same,
        _why_not_compiled,
    ),
}


def with_several(runs: int) -> dict[str, Arm]:
    """`ARMS`, and the arm of so many runs at once, if it is more than one."""
    several = Arm(
        f"bacon_fast, {runs} runs at once, steps of all",
        lambda bench: _several(bench, runs),
        _same,
        lambda bench: None if bench.cuda else "runs share a GPU, not a CPU",
    )
    return ARMS | ({f"{OURS}x{runs}": several} if runs > 1 else {})
