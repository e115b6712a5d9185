"""The captured training step on a GPU: equal to the eager one, one launch, no wait; and several runs at once."""

from collections import Counter
from pathlib import Path

import pytest
import torch
from run_cases import assert_equal_states, final_state, tiny
from torch.profiler import ProfilerActivity, profile

from bacon_fast.engine import several
from bacon_fast.engine.config import Config
from bacon_fast.engine.graph import WARM_UP
from bacon_fast.engine.step import TrainStep
from bacon_fast.engine.trainer import Trainer
from bacon_fast.methods import METHODS

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
LAUNCHES = ("cudaLaunch", "cuLaunch", "cudaMemcpy", "cudaMemset")
WAITS = ("cudaStreamSynchronize", "cudaEventSynchronize", "cuStreamSynchronize", "cuEventSynchronize")


@pytest.fixture
def deterministic(monkeypatch):
    """Every convolution by one algorithm, from the first step on, although a trainer asks for the fastest one."""
    flags, start = torch.backends.cudnn, Trainer._start

    def started(trainer: Trainer) -> None:
        flags.benchmark, flags.deterministic = False, True
        start(trainer)

    monkeypatch.setattr(Trainer, "_start", started)
    before = flags.benchmark, flags.deterministic
    yield
    flags.benchmark, flags.deterministic = before


def run(folder: Path, graph: str, **changes) -> Config:
    return tiny(folder / graph, graph=graph, **changes)


def assert_same_end(one: Config, two: Config, rows: bool = True) -> None:
    states = final_state(one.run.run_dir), final_state(two.run.run_dir)
    for state in states:
        del state["config"]["engine"]["graph"]
        if not rows:
            del state["rows"]
    assert_equal_states(*states)


@pytest.mark.parametrize("precision", ["fp32", "tf32", "bf16", "fp16"])
def test_200_graphed_steps_end_bit_for_bit_as_200_eager_ones(tmp_path, deterministic, precision):
    """Over epoch borders, the start of the contrastive loss, evaluations and checkpoints."""
    changes = {"precision": precision, "steps": 200, "eval_every": 60, "checkpoint_every": 70}
    changes["parts"] = {"bacon.contrast_start": 0.5}
    configs = [run(tmp_path, graph, **changes) for graph in ("on", "off")]
    for config in configs:
        trainer = Trainer(config)
        trainer.fit()
        assert trainer.graphed is None or len(trainer.graphed._graphs) == 2
    assert_same_end(*configs)


@pytest.mark.parametrize(("optimizer", "ema_buffers"), [("adam", "average"), ("adam", "copy"), ("sgd", "average")])
def test_other_recipes(tmp_path, deterministic, optimizer, ema_buffers):
    changes = {"optimizer": optimizer, "ema_buffers": ema_buffers, "precision": "fp16", "lr_schedule": "cosine"}
    configs = [run(tmp_path, graph, steps=40, lr=0.003, **changes) for graph in ("on", "off")]
    for config in configs:
        Trainer(config).fit()
    assert_same_end(*configs)


@pytest.mark.parametrize("method", METHODS)
def test_every_method_waits_for_nothing_and_agrees_with_its_graph(tmp_path, deterministic, method, monkeypatch):
    """Sums of floating-point atomics may differ in their last bits."""
    means, take = {}, TrainStep.run
    once = dict.fromkeys(("steps", "log_every", "eval_every", "checkpoint_every"), 24)

    def watched(program: TrainStep, phase):
        if torch.cuda.is_current_stream_capturing():
            return take(program, phase)
        torch.cuda.set_sync_debug_mode("error")
        try:
            return take(program, phase)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    monkeypatch.setattr(TrainStep, "run", watched)
    for graph in ("on", "off"):
        trainer = Trainer(run(tmp_path, graph, method=method, **once))
        trainer.fit()
        (row,) = trainer.logger.train_rows()
        means[graph] = {k: v for k, v in row.items() if k.startswith(("loss/", "stats/"))}
    assert means["on"].keys() == means["off"].keys()
    for name, value in means["off"].items():
        assert means["on"][name] == pytest.approx(value, rel=2e-2, abs=2e-2), name


def test_with_the_fastest_algorithms_the_first_steps_agree(tmp_path):
    losses = []
    for graph in ("on", "off"):
        trainer = Trainer(run(tmp_path, graph, parts={"bacon.contrast_start": 1.0}, precision="fp32"))
        losses.append([trainer.train_step()[0]["total"].item() for _ in range(WARM_UP + 4)])
        trainer.logger.close()
    assert losses[0] == pytest.approx(losses[1], rel=2e-3)


def test_a_compiled_step_is_captured(tmp_path, deterministic):
    losses = []
    for compiled in (True, False):
        trainer = Trainer(run(tmp_path / str(compiled), "on", compile=compiled, precision="fp32"))
        losses.append([trainer.train_step()[0]["total"].item() for _ in range(12)])
        assert len(trainer.graphed._graphs) == 2
        trainer.logger.close()
    assert losses[0] == pytest.approx(losses[1], rel=1e-2)


def test_a_resumed_run_ends_as_an_uninterrupted_one(tmp_path, deterministic):
    whole, parts = run(tmp_path / "whole", "on", steps=40), run(tmp_path / "parts", "on", steps=40)
    Trainer(whole).fit()
    first = Trainer(parts)
    for _ in range(22):
        first.train_step()
    first.save()
    first.train_step()  # lost with the process
    first.logger.close()
    second = Trainer(parts.replace(resume=True))
    assert second.step == 22
    second.fit()
    assert_same_end(whole, parts, rows=False)


def reading_when_captured(trainer: Trainer) -> None:
    forward = trainer.program.forward

    def reads(batch, step, phase):
        if torch.cuda.is_current_stream_capturing():
            step.item()
        return forward(batch, step, phase)

    trainer.program.forward = reads


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_a_step_that_cannot_be_captured_runs_eagerly(tmp_path, deterministic, capsys, precision):
    configs = [run(tmp_path, graph, steps=24, precision=precision, lr=0.003) for graph in ("auto", "off")]
    for config in configs:
        trainer = Trainer(config)
        reading_when_captured(trainer)
        trainer.fit()
    assert_same_end(*configs)
    (message,) = [line for line in capsys.readouterr().err.splitlines() if "CUDA graph" in line]
    assert "runs eagerly" in message and "captur" in message.split("slowly: ")[1]
    # Nothing of the broken capture is left: torch draws, and memory is given back.
    torch.cuda.empty_cache()
    held = torch.cuda.memory_reserved()
    numbers = torch.rand(2**24, device="cuda")
    assert 0 < numbers.mean().item() < 1 and torch.cuda.memory_reserved() > held
    del numbers
    torch.cuda.empty_cache()
    assert torch.cuda.memory_reserved() == held


def test_a_step_that_must_be_captured_says_why_it_cannot(tmp_path):
    trainer = Trainer(run(tmp_path, "on"))
    reading_when_captured(trainer)
    with pytest.raises(RuntimeError, match="graph: the step could not be captured"):
        trainer.fit()


def steady(trainer: Trainer, steps: int) -> None:
    """Takes steps until the phase is captured and the next `steps` steps cross no epoch border."""

    def epochs(step: int) -> list[int]:
        samplers = (trainer.batches.labeled_sampler, trainer.batches.unlabeled_sampler)
        return [step * s.batch_size // s.num_samples for s in samplers]

    while trainer.step < 2 * WARM_UP or epochs(trainer.step - 1) != epochs(trainer.step + steps):
        trainer.train_step()
    torch.cuda.synchronize()


def test_a_step_is_one_launch_and_no_wait(tmp_path):
    trainer = Trainer(run(tmp_path, "on", batch_size=2, steps=1000, parts={"bacon.contrast_start": 0.0}))
    steady(trainer, 10)
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        with trainer.on_stream():  # as in `fit`
            for _ in range(10):
                trainer.train_step()
        torch.cuda.synchronize()
    trainer.logger.close()
    calls = Counter(event.name for event in profiler.events())
    assert calls["cudaGraphLaunch"] == 10, calls
    assert not [name for name in calls if name.startswith(LAUNCHES)], calls
    assert not [name for name in calls if name in WAITS], calls
    assert calls["cudaDeviceSynchronize"] <= 2, calls  # above, and the profiler's own


def test_nothing_waits_over_epoch_borders_and_no_memory_is_lost(tmp_path):
    trainer = Trainer(run(tmp_path, "on", steps=1000, parts={"bacon.contrast_start": 0.0}))
    steady(trainer, 1)
    used = torch.cuda.memory_allocated()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(100):
            trainer.train_step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    with trainer.on_stream():
        trainer.evaluation()
        trainer.save()
        trainer.train_step()
    torch.cuda.synchronize()
    assert torch.cuda.memory_allocated() == used
    trainer.logger.close()


def test_seeds_at_once_end_bit_for_bit_as_alone(tmp_path, deterministic):
    def configs(folder: Path) -> list[Config]:
        return [tiny(folder / str(seed), seed=seed, steps=60, graph="on") for seed in range(3)]

    alone, together = configs(tmp_path / "alone"), configs(tmp_path / "together")
    for config in alone:
        Trainer(config).fit()
    outcomes = several.fit_together(together)
    assert len({outcome.trainer.stream for outcome in outcomes}) == 3
    for one, two in zip(alone, together):
        assert_same_end(one, two)
