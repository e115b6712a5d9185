"""Arm F: bacon_fast's own trainer, one run or several at once."""

from contextlib import ExitStack, nullcontext

import torch

from bacon_fast.engine.trainer import Trainer

from .problem import State
from .step import Flags, StepArm


class TrainerStep(StepArm):
    """The steps of `Trainer.fit`, without evaluations, logs and checkpoints (--full-run has those too).

    Args:
        trainer: just built: the flags that its constructor set are those of its steps.
        state: to begin from.
    """

    def __init__(self, trainer: Trainer, state: State) -> None:
        self.trainer, self.device, self.flags = trainer, trainer.device, Flags.present()
        self.compiled = trainer.config.engine.compile
        state.load(trainer)
        self.stack = ExitStack()

    def start(self) -> None:
        self.stack.enter_context(self.trainer.on_stream())

    def stop(self) -> None:
        self.stack.close()

    def step(self) -> None:
        self.trainer.train_step()


class SeveralTrainersStep(StepArm):
    """A step of each of several runs, which share the GPU, taking turns as `engine.several.fit_together` lets them."""

    def __init__(self, trainers: list[Trainer], state: State) -> None:
        self.trainers, self.device, self.flags = trainers, trainers[0].device, Flags.present()
        self.runs, self.stack = len(trainers), ExitStack()
        for trainer in trainers:
            state.load(trainer)

    def start(self) -> None:
        for trainer in self.trainers:
            self.stack.enter_context(trainer.on_stream())

    def stop(self) -> None:
        self.stack.close()

    def step(self) -> None:
        for trainer in self.trainers:
            # Its own stream, so that it waits for no other run.
            with nullcontext() if trainer.stream is None else torch.cuda.stream(trainer.stream):
                trainer.train_step()
