"""The base of the arms of benchmarks/throughput: an arm makes training steps, a slice of them at a time."""

import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Flags:
    """The switches of torch that hold for the whole process, so every arm sets its own."""

    deterministic: bool = False
    benchmark: bool = True
    tf32_convolutions: bool = False
    tf32_matmul: bool = False

    @staticmethod
    def present() -> "Flags":
        """As they are now."""
        cudnn = torch.backends.cudnn
        return Flags(cudnn.deterministic, cudnn.benchmark, cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32)

    def set(self) -> None:
        cudnn = torch.backends.cudnn
        cudnn.deterministic, cudnn.benchmark = self.deterministic, self.benchmark
        cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = self.tf32_convolutions, self.tf32_matmul

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Sets these flags inside, and the earlier ones afterwards."""
        before = Flags.present()
        self.set()
        try:
            yield
        finally:
            before.set()

    def __str__(self) -> str:
        names = [f"cudnn.{name}" for name in ("deterministic", "benchmark") if getattr(self, name)]
        names += ["TF32 convolutions"] if self.tf32_convolutions else []
        names += ["TF32 matmul"] if self.tf32_matmul else []
        return "; ".join(names) or "none"


class StepArm:
    """One way to make training steps.

    Attributes:
        device: where the network is.
        flags: torch's switches while it runs.
        warmup: untimed steps at the start of a slice; at least the batches that its loaders hold ready.
        compiled: by torch.compile.
        runs: training runs that a step serves.
    """

    device: torch.device
    flags: Flags = Flags()
    warmup: int = 3
    compiled: bool = False
    runs: int = 1

    def start(self) -> None:
        """Before the first step of a slice."""

    def step(self) -> object:
        """One training step, from the images to the averaged parameters."""
        raise NotImplementedError

    def stop(self) -> None:
        """After the last step of a slice: no work of this arm may go on while another one is measured."""

    def run(self, steps: int, measure: AbstractContextManager) -> None:
        """A slice: untimed steps, then ``steps`` of them inside ``measure``."""
        with self.flags.applied():
            self.start()
            try:
                for _ in range(self.warmup):
                    self.step()
                with measure:
                    for _ in range(steps):
                        self.step()
            finally:
                self.stop()


def synchronize(device: torch.device) -> None:
    """Waits until the device is idle."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class Stopwatch(AbstractContextManager):
    """Seconds between entering and leaving, with the device idle at both."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.seconds = device, 0.0

    def __enter__(self) -> "Stopwatch":
        synchronize(self.device)
        self.began = time.perf_counter()
        return self

    def __exit__(self, *_) -> None:
        synchronize(self.device)
        self.seconds = time.perf_counter() - self.began
