"""Several runs at once in one process, such as the seeds of one recipe."""

from collections.abc import Sequence
from contextlib import ExitStack, nullcontext
from pathlib import Path
from typing import NamedTuple

import torch

from bacon_fast.engine.checkpoint import CheckpointError
from bacon_fast.engine.config import Config
from bacon_fast.engine.interrupt import StopRequest
from bacon_fast.engine.logger import Progress
from bacon_fast.engine.trainer import DivergedError, StoppedError, Trainer, refuse_used_run_dir

_OF_IMAGES = ("dataset", "data_dir", "unlabeled", "test", "val", "image_size", "stored_size", "classes", "follow_links")
_OF_IMAGES += ("other_labels", "unreadable", "backbone")  # a timm backbone says how images are resized and normalized


class Outcome(NamedTuple):
    """A run that came to its end: its summary, or why it has none."""

    trainer: Trainer
    summary: dict | None
    error: DivergedError | None


def with_resume(configs: Sequence[Config]) -> list[Config]:
    """The configurations, ready to run: under `resume`, a run without a directory starts from the beginning.

    Raises:
        ValueError: without `resume`, a directory holds a run.
        CheckpointError: with it, none does.
    """
    held = [(Path(config.run.run_dir) / "config.json").exists() for config in configs]
    for config in configs:
        if not config.run.resume:
            refuse_used_run_dir(Path(config.run.run_dir))
    if any(config.run.resume for config in configs) and not any(held):
        raise CheckpointError(
            f"nothing to resume: no run in {', '.join(str(config.run.run_dir) for config in configs)}"
        )
    return [config.replace(resume=config.run.resume and there) for config, there in zip(configs, held)]


def fit_together(configs: Sequence[Config]) -> list[Outcome]:
    """Trains all runs to their ends, step by step in turn, and returns how each ended, in order.

    Each run has its own directory and is what `Trainer(config).fit()` would give, on a CPU bit for bit. On a GPU each
    has its own stream and graphs, so that their work overlaps. All of them read one dataset. A run that diverges is
    reported and does not disturb the others.

    Raises:
        StoppedError: a signal asked to stop; every run has saved its state.
        ValueError, CheckpointError: see `with_resume` and `Trainer`; or the configurations name different datasets.
    """
    for name in _OF_IMAGES:
        if len(found := {config.flat()[name] for config in configs}) > 1:
            raise ValueError(f"{name}: expected the same in all runs, found {', '.join(map(repr, found))}")
    configs, progress, trainers = with_resume(configs), Progress(), []
    try:
        for config in configs:
            dataset = trainers[0].dataset if trainers else None
            trainers.append(Trainer(config, dataset=dataset, progress=progress, name=f"seed {config.seed}"))
            if len(found := {trainer.interpolation for trainer in trainers}) > 1:  # a checkpoint of an older version
                raise ValueError(
                    f"resume: expected runs whose images are resized alike, found {' and '.join(sorted(found))}"
                )
        errors = _take_turns(trainers)
        return [Outcome(t, None if t in errors else t.finish(), errors.get(t)) for t in trainers]
    finally:
        for trainer in trainers:
            trainer.logger.close()
        progress.close()


def _take_turns(trainers: list[Trainer]) -> dict[Trainer, DivergedError]:
    """Runs all trainers to their ends. Returns the errors of those that diverged."""
    running = [trainer for trainer in trainers if not trainer.ended]
    errors: dict[Trainer, DivergedError] = {}
    stopped: list[StoppedError] = []
    with StopRequest() as stop, ExitStack() as streams:
        for trainer in trainers:
            streams.enter_context(trainer.on_stream())
        while running:
            for trainer in tuple(running):
                # Its own stream, so that it waits for no other run.
                with nullcontext() if trainer.stream is None else torch.cuda.stream(trainer.stream):
                    try:
                        trainer.advance(stop)
                    except DivergedError as error:
                        errors[trainer] = error
                        trainer.logger.say(f"stopped: {error}")
                    except StoppedError as error:
                        stopped.append(error)
                    else:
                        if not trainer.ended:
                            continue
                running.remove(trainer)
    if stopped:
        raise StoppedError("\n".join(map(str, stopped)), stopped[0].signum)
    return errors
