"""The computations of the tests of several processes: in this process, and on two by `python rank_cases.py FOLDER`."""

import functools
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

from bacon_fast.data.datasets import ImageDataset, load_dataset
from bacon_fast.engine import distributed
from bacon_fast.engine.config import Config
from bacon_fast.engine.evaluation import predict_together
from bacon_fast.engine.interrupt import StopRequest
from bacon_fast.engine.presets import PRESETS
from bacon_fast.engine.trainer import DivergedError, Trainer
from bacon_fast.methods import METHODS
from bacon_fast.methods.gather import gather_views, own_views
from bacon_fast.methods.method import NewGeneration
from bacon_fast.models.backbone import Backbone
from bacon_fast.reproduce.matrix import command_words

ROOT = Path(__file__).resolve().parents[2]
RANKS = 2
STEPS = 3
CPU = torch.device("cpu")
PREDICTED = (1, 5, 8)
"""Numbers of images that are predicted together: fewer than ranks, not a multiple, a multiple."""
LAYOUTS = ((2, 3, 2), (2, 0, 0), (0, 3, 1), (1, 2, 3))
"""Labeled rows and unlabeled rows of a rank, and views."""


def tiny(run_dir: Path, *, method: str = "fixmatch+abc+bacon", **changes) -> Config:
    values = {
        "run_dir": run_dir,
        "steps": 12,
        "epochs": 12,
        "batch_size": 8,
        "backbone": "wrn-10-1",
        "image_size": 16,
        "threshold": 0.15,
        "eval_every": 4,
        "log_every": 3,
        "checkpoint_every": 4,
        "report": False,
        "threads": 1,
        "precision": "fp32",  # whatever the machine
        "sync_batchnorm": True,
        "rank_timeout": 60.0,
    }
    parts = {
        # The first steps are without, the next with what begins later.
        **dict.fromkeys(("bacon.contrast_start", "daso.start", "darp.start", "cossl.start", "cdmad.start"), 0.1),
        "crest.generations": 6,
        "simpro.threshold": 0.15,
        "simpro.estimates": 6,  # after every second step, so that the last of `STEPS` leaves sums in the state
        "bacon.reliable_threshold": 0.15,  # ten classes: reliable rows, and so a contrastive loss, from the first steps
    }
    config = PRESETS["digits"].config(method).replace(**(values | changes))
    return config.replace(**{name: value for name, value in parts.items() if name.split(".")[0] in config.parts})


@functools.cache
def digits() -> ImageDataset:
    return load_dataset("digits", image_size=16)


def in_float64(trainer: Trainer) -> None:
    """Makes the backbones compute in float64, from and to float32.

    In float32 two orders of summation soon part: BatchNorm divides by the spread of channels that hardly vary.
    """
    for module in trainer.method.modules():
        if isinstance(module, Backbone):
            module.double()
            module.register_forward_pre_hook(lambda module, arguments: (arguments[0].double(),))
            module.register_forward_hook(lambda module, arguments, features: features.float())
    trainer._start()  # optimizer and average of the new parameters


def trajectory(config: Config, *, float64: bool = True, prepare: Callable[[Trainer], None] | None = None) -> dict:
    """Losses of the first steps, which parameters had no gradient, and the state after them."""
    trainer = Trainer(config, dataset=digits())
    if float64:
        in_float64(trainer)
    if prepare is not None:
        prepare(trainer)
    losses, without_gradient = [], []
    for _ in range(STEPS):
        losses.append({name: value.item() for name, value in trainer.train_step()[0].items()})
        without_gradient.append(sorted(n for n, p in trainer.method.named_parameters() if p.grad is None))
    trainer.logger.close()
    return {"losses": losses, "without_gradient": without_gradient, "state": state_of(trainer)}


def state_of(trainer: Trainer) -> dict[str, torch.Tensor]:
    """Parameters and buffers of method and average, and the optimizer's state."""
    optimizer = {f"{i}.{k}": v for i, s in trainer.optimizer.state_dict()["state"].items() for k, v in s.items()}
    state = trainer.method.state_dict() | {f"ema.{k}": v for k, v in trainer.ema.state_dict().items()} | optimizer
    return {name: value.detach().clone() for name, value in state.items()}


def new_generation(trainer: Trainer) -> None:
    """Before the second step the run starts again from a fresh network on a part of the labeled images."""
    trainer.method.refresh_due = lambda step: step == 1
    trainer.method.refresh = lambda context: NewGeneration(context.labeled[3:], context.labels[3:])


def tagged(num_labeled: int, num_unlabeled: int, views: int, rank: int) -> torch.Tensor:
    """Rows [b + v*u, 2] of a rank, each with its number in the global batch, and half of that number."""
    labeled = rank * num_labeled + torch.arange(num_labeled)
    start = RANKS * num_labeled
    unlabeled = [
        start + view * RANKS * num_unlabeled + rank * num_unlabeled + torch.arange(num_unlabeled)
        for view in range(views)
    ]
    rows = torch.cat([labeled, *unlabeled]).double()
    return torch.stack([rows, rows / 2], dim=1)


def gathering(layout: tuple[int, int, int]) -> dict:
    """Rows of all ranks, the gradient of this rank's, and this rank's share of the gathered ones."""
    rows = tagged(*layout, distributed.rank()).requires_grad_()
    gathered = gather_views(rows, *layout[:2])
    (gathered.square().sum() / 2).backward()  # whose gradient by a row is the row
    return {"gathered": gathered.detach(), "gradient": rows.grad, "own": own_views(gathered.detach(), *layout[:2])}


def written_by(work: Callable[[], object], folder: Path) -> list[str]:
    """Files and folders below `folder` that this process opens for writing, makes, renames or removes during `work`."""
    found, watching = set(), True

    def watch(event: str, arguments: tuple) -> None:
        writes = event in ("os.mkdir", "os.rename", "os.remove") or (
            event == "open" and isinstance(arguments[1], str) and set("wax+") & set(arguments[1])
        )
        if watching and writes and str(arguments[0]).startswith(str(folder)):
            found.add(str(arguments[0]))

    sys.addaudithook(watch)
    work()
    watching = False
    return sorted(found)


def refusal(work: Callable[[], object], kind: type[Exception] = ValueError) -> str:
    """The message of the error that `work` raises."""
    try:
        work()
    except kind as error:
        return str(error)
    return "nothing was refused"


def stop_on_one_rank() -> tuple[int, int]:
    """Signal and step on which the ranks agree when only the second one is told to stop."""
    stop = StopRequest()
    for step in range(1, 10_000_000):
        if step == 5 and distributed.rank() == 1:
            stop.signum = signal.SIGTERM
        if (signum := stop.agreed(step)) is not None:
            return signum, step
    raise AssertionError("the ranks never asked each other")


def predictions(trainer: Trainer) -> list[tuple[torch.Tensor, torch.Tensor]]:
    images = trainer.dataset.test_images
    trainer._share_statistics()
    return [predict_together(trainer.ema.network, trainer.batches.augment, images[:n], CPU) for n in PREDICTED]


def on_two_ranks(folder: Path) -> dict:
    rank, results = distributed.rank(), {}
    results["gathering"] = [gathering(layout) for layout in LAYOUTS]
    results["methods"] = {m: trajectory(tiny(folder / m, method=m)) for m in METHODS}
    results["adam"] = trajectory(tiny(folder / "adam", **ADAM))
    results["generation"] = trajectory(tiny(folder / "generation", method="fixmatch+bacon"), prepare=new_generation)
    for precision in ("bf16", "fp16"):
        config = tiny(folder / precision, precision=precision, method="fixmatch+abc", threshold=0.0)
        results[precision] = trajectory(config, float64=False)

    own = Trainer(tiny(folder / "own_statistics", sync_batchnorm=False))
    results["written"] = written_by(own.fit, folder)
    results["fitted"] = state_of(own)
    own.train_step()
    results["own_statistics"] = state_of(own)
    own._share_statistics()
    results["shared_statistics"] = state_of(own)
    results["predictions"] = predictions(own)

    whole = Trainer(tiny(folder / "whole", **RESTARTED))
    whole.fit()
    results["whole"] = state_of(whole)

    results["odd_batch"] = refusal(lambda: Trainer(tiny(folder / "odd", batch_size=7)))
    results["two_seeds"] = refusal(lambda: Trainer(tiny(folder / "seeds", seed=rank)))
    results["run_exists"] = refusal(lambda: Trainer(tiny(folder / "own_statistics")))
    results["diverged"] = refusal(Trainer(tiny(folder / "diverged", lr=1e25)).fit, DivergedError)
    results["stopped"] = stop_on_one_rank()
    return results


# The run that test_torchrun.py interrupts, by its command line.
RESTARTED = {"steps": 60, "checkpoint_every": 5, "eval_every": 60, "log_every": 1, "threads": 1}
ADAM = {"optimizer": "adam", "lr": 0.002, "weight_decay": 0.02}


def start(rank: int, port: int, command: list[str], **options) -> subprocess.Popen:
    """One of two processes, with the environment that torchrun would give it."""
    environment = {
        "RANK": rank,
        "WORLD_SIZE": RANKS,
        "LOCAL_RANK": rank,
        "LOCAL_WORLD_SIZE": RANKS,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
    }
    environment = quiet_environment() | {name: str(value) for name, value in environment.items()}
    return subprocess.Popen([sys.executable, *command], env=environment, text=True, **options)


def quiet_environment() -> dict[str, str]:
    """One thread a process, no GPU, this checkout."""
    return os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}


def train_command(config: Config) -> list[str]:
    """The command that trains `config`, a change of the digits preset."""
    return [str(ROOT / "train.py"), *command_words(config)]


def wait_until(condition: Callable[[], object], seconds: float = 300.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"nothing happened for {seconds} s"
        time.sleep(0.05)


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


if __name__ == "__main__":
    torch.set_num_threads(1)
    with distributed.process_group(CPU, 60.0):
        output = Path(sys.argv[1]) / f"rank{distributed.rank()}.pt"
        torch.save(on_two_ranks(Path(sys.argv[1])), output)
