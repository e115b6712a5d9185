"""When a step is warmed up, captured, replayed, dropped and given up: with a recorder in place of CUDA's."""

import pytest
import torch
from run_cases import assert_equal_states, final_state, tiny
from torch import Tensor

from bacon_fast.engine import trainer as trainer_module
from bacon_fast.engine.config import Config
from bacon_fast.engine.graph import WARM_UP, GraphedStep, use_graph
from bacon_fast.engine.trainer import Trainer
from bacon_fast.methods.method import NewGeneration


def device_state(trainer: Trainer) -> list[Tensor]:
    """Every tensor that a step changes."""
    program = trainer.program
    tensors = [program.counter, program.rate, *(t for _, *sums in trainer.meter._sums.values() for t in sums)]
    for module in (trainer.method, trainer.ema, trainer.diagnostics):
        tensors += [*module.parameters(), *module.buffers()]
    tensors += [v for state in trainer.optimizer.state.values() for v in state.values() if isinstance(v, Tensor)]
    if program.scaler.is_enabled() and program.scaler._scale is not None:
        tensors += [program.scaler._scale, program.scaler._growth_tracker]
    return tensors


class Recorder:
    """Stands for CUDA's capture: recording leaves the device's state as it was, replaying runs the step and writes its
    results to the tensors that the recording returned.
    """

    trainer: Trainer
    events: list[str]  # of all recorders of a test

    def __call__(self, run):
        tensors = device_state(self.trainer)
        before = [t.detach().clone() for t in tensors]
        self.events.append("capture")
        try:
            result = run()
        finally:
            with torch.no_grad():
                for tensor, old in zip(tensors, before, strict=True):
                    tensor.copy_(old)

        def replay() -> None:
            self.events.append("replay")
            for kept, new in zip(result, run(), strict=True):
                for name in kept:
                    kept[name].copy_(new[name].detach())

        return replay, result

    def reset(self) -> None:
        self.events.append("reset")


@pytest.fixture
def graphed(monkeypatch):
    """Builds trainers that take graphed steps on a CPU, and remember what happened in `trainer.events`."""

    def build(config: Config) -> Trainer:
        Recorder.events = []
        monkeypatch.setattr(trainer_module, "use_graph", lambda *_: True)
        monkeypatch.setattr(trainer_module, "CudaCapture", Recorder)
        trainer = Recorder.trainer = Trainer(config)
        trainer.events = Recorder.events
        run = trainer.program.run
        trainer.program.run = lambda phase: trainer.events.append("run") or run(phase)
        return trainer

    return build


@pytest.mark.parametrize(("optimizer", "precision"), [("sgd", "fp32"), ("adam", "fp32"), ("adam", "fp16")])
def test_graphed_run_ends_bit_for_bit_as_the_eager_one(tmp_path, graphed, optimizer, precision):
    """Over the start of the contrastive loss, a phase of its own, with evaluations and checkpoints in between."""
    config = {"optimizer": optimizer, "precision": precision, "lr_schedule": "cosine", "lr": 0.003, "batch_size": 4}
    Trainer(tiny(tmp_path / "eager", **config)).fit()
    trainer = graphed(tiny(tmp_path / "graphed", **config))
    trainer.fit()
    one, two = final_state(tmp_path / "eager"), final_state(tmp_path / "graphed")
    assert_equal_states(one, two)
    # 5 steps before the start, 7 after it.
    replayed = ["replay", "run"]
    first, second = 5 - WARM_UP, 7 - WARM_UP
    expected = ["run"] * WARM_UP + ["capture", "run"] + replayed * first
    expected += ["run"] * WARM_UP + ["capture", "run"] + replayed * second
    assert trainer.events == expected


def test_a_resumed_run_captures_after_it_was_restored(tmp_path, graphed):
    Trainer(tiny(tmp_path / "eager")).fit()
    first = graphed(tiny(tmp_path / "graphed"))
    for _ in range(5):
        first.train_step()
    first.save()
    first.logger.close()
    second = graphed(tiny(tmp_path / "graphed", resume=True))
    assert second.events == []
    second.fit()
    one, two = final_state(tmp_path / "eager"), final_state(tmp_path / "graphed")
    del one["rows"], two["rows"]
    assert_equal_states(one, two)


def test_results_of_a_phase_come_back_in_the_same_tensors(tmp_path, graphed):
    trainer = graphed(tiny(tmp_path, parts={"bacon.contrast_start": 1.0}))
    seen = [trainer.train_step()[0]["total"] for _ in range(WARM_UP + 3)]
    trainer.logger.close()
    assert len({value.data_ptr() for value in seen[WARM_UP:]}) == 1
    assert len({value.data_ptr() for value in seen[: WARM_UP + 1]}) == WARM_UP + 1


@pytest.mark.parametrize("moves", [False, True])
def test_work_between_steps_keeps_the_graphs_unless_a_buffer_moves(tmp_path, graphed, moves):
    """At 5 the probabilities of ABC's masks change, in place or not."""

    def fit(trainer: Trainer) -> Trainer:
        def refresh(context) -> None:
            new = trainer.method.base.abc.keep / 2
            if moves:
                trainer.method.base.abc.keep = new
            else:
                trainer.method.base.abc.keep.copy_(new)

        trainer.method.refresh_due, trainer.method.refresh = (lambda step: step == 5), refresh
        for _ in range(8):
            trainer.train_step()
        trainer.save()
        trainer.logger.close()
        return trainer

    fit(Trainer(tiny(tmp_path / "eager", method="fixmatch+abc")))
    events = fit(graphed(tiny(tmp_path / "graphed", method="fixmatch+abc"))).events
    assert_equal_states(final_state(tmp_path / "eager"), final_state(tmp_path / "graphed"))
    expected = ["run"] * WARM_UP + ["capture", "run"] + ["replay", "run"] * 2
    expected += ["reset", "capture", "run"] if moves else []
    assert events == expected + ["replay", "run"] * 3


def test_a_new_generation_warms_up_again(tmp_path, graphed):
    """At 6 training starts again on half of the labeled images."""

    def fit(trainer: Trainer) -> Trainer:
        def refresh(context) -> NewGeneration:
            half = len(context.labels) // 2
            return NewGeneration(context.labeled[:half], context.labels[:half])

        trainer.method.refresh_due, trainer.method.refresh = (lambda step: step == 6), refresh
        for _ in range(12):
            trainer.train_step()
        trainer.save()
        trainer.logger.close()
        return trainer

    fit(Trainer(tiny(tmp_path / "eager", method="fixmatch+abc")))
    events = fit(graphed(tiny(tmp_path / "graphed", method="fixmatch+abc"))).events
    assert_equal_states(final_state(tmp_path / "eager"), final_state(tmp_path / "graphed"))
    # The second program is another object, whose runs are not recorded: three to warm up and one to capture.
    assert events == [*["run"] * WARM_UP, "capture", "run", *["replay", "run"] * 3, "capture", *["replay"] * 3]


def break_a_step(trainer: Trainer, owner: object, name: str) -> None:
    """The first captured step breaks off when it reads `name` of `owner`."""
    whole = getattr(owner, name)

    def broken(*arguments, **named):
        if "capture" in trainer.events:
            setattr(owner, name, whole)
            raise RuntimeError("operation not permitted when stream is capturing\nand more")
        return whole(*arguments, **named)

    setattr(owner, name, broken)


@pytest.mark.parametrize("place", ["within the update", "after the update"])
def test_a_capture_that_fails_is_reported_and_leaves_no_trace(tmp_path, graphed, capsys, place):
    config = {"precision": "fp16", "lr": 0.003, "method": "supervised", "steps": 6, "eval_every": 6}
    Trainer(tiny(tmp_path / "eager", **config)).fit()
    trainer = graphed(tiny(tmp_path / "graphed", **config))
    parts = {"within the update": (trainer.optimizer, "_step"), "after the update": (trainer.program.scaler, "update")}
    break_a_step(trainer, *parts[place])
    trainer.fit()
    assert trainer.events == ["run"] * WARM_UP + ["capture", "run"] + ["run"] * (6 - WARM_UP)
    assert_equal_states(final_state(tmp_path / "eager"), final_state(tmp_path / "graphed"))
    message = [line for line in capsys.readouterr().err.splitlines() if "CUDA graph" in line]
    assert len(message) == 1 and message[0].endswith(
        "runs eagerly, more slowly: RuntimeError: operation not permitted when stream is capturing"
    )


def test_a_capture_that_must_not_fail_raises(tmp_path, graphed):
    trainer = graphed(tiny(tmp_path, graph="on"))
    break_a_step(trainer, trainer.optimizer, "_step")
    with pytest.raises(RuntimeError, match="could not be captured: RuntimeError: operation not permitted"):
        trainer.fit()


def test_the_reason_is_that_of_the_step_and_not_of_the_end_of_the_capture(tmp_path):
    trainer, messages = Trainer(tiny(tmp_path)), []

    class Masking:
        def __call__(self, run):
            try:
                return None, run()
            finally:
                raise RuntimeError("operation failed due to a previous error during capture")

    step = GraphedStep(trainer.program, Masking(), report=messages.append)
    for t in range(WARM_UP):
        step(t)
    trainer.program.run = None  # calling it is a TypeError
    with pytest.raises(TypeError):  # of the eager step that follows
        step(WARM_UP)
    trainer.logger.close()
    assert len(messages) == 1 and "TypeError" in messages[0] and "previous error" not in messages[0]


def test_where_a_graph_cannot_be_used(tmp_path):
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    assert [use_graph(choice, cpu) for choice in ("auto", "off")] == [False, False]
    assert [use_graph(choice, cuda) for choice in ("auto", "on", "off")] == [True, True, False]
    with pytest.raises(ValueError, match=r"graph: .*needs a CUDA device, and this run is on cpu"):
        Trainer(tiny(tmp_path / "run", graph="on"))
    assert not (tmp_path / "run").exists()
