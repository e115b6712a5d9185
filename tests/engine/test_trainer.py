"""The training loop: files of a run, resume, kill, refusals, and what one step computes."""

import copy
import csv
import errno
import json
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from run_cases import assert_equal_states, final_state, tiny
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from bacon_fast.engine.checkpoint import CheckpointError, list_checkpoints
from bacon_fast.engine.config import Config
from bacon_fast.engine.trainer import DivergedError, StoppedError, Trainer
from bacon_fast.files import read_record
from bacon_fast.methods import METHODS

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("method", METHODS)
def test_every_method_trains_and_writes_the_files_of_a_run(tmp_path, method):
    trainer = Trainer(tiny(tmp_path / "run", method=method))
    before = copy.deepcopy(trainer.method.network.state_dict())
    summary = trainer.fit()
    run = tmp_path / "run"
    assert read_record(run / "summary.json") == summary
    assert {"dataset", "method", "steps", "top1", "bacc", "gm", "per_class", "steps_per_second"} <= summary.keys()
    assert summary["method"] == method and 0 <= summary["bacc"] <= 1 and len(summary["per_class"]) == 10
    for name in ("last", "mean_last_20", "best_on_test"):
        assert {"top1", "bacc", "gm", "many", "medium", "few", "per_class"} <= summary[name].keys()
    assert Config.read(run / "config.json") == trainer.config
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in rows if r["kind"] == "eval"] == [4, 8, 12]
    assert [r["step"] for r in rows if r["kind"] == "train"] == [3, 4, 6, 8, 9, 12]
    with open(run / "metrics.csv") as file:
        table = list(csv.DictReader(file))
    assert [int(r["step"]) for r in table] == [4, 8, 12]
    assert float(table[-1]["bacc"]) == summary["bacc"]
    assert list((run / "tensorboard").glob("events.*"))
    assert [p.name for p in list_checkpoints(run / "checkpoints")] == ["step-00000008.pt", "step-00000012.pt"]
    changed = trainer.method.network.state_dict()
    parameters = [name for name, _ in trainer.method.network.named_parameters()]
    assert all(not torch.equal(before[name], changed[name]) for name in parameters)


def test_the_contrastive_loss_starts_when_it_should_and_trains_the_projection(tmp_path):
    trainer = Trainer(tiny(tmp_path / "run", parts={"bacon.contrast_start": 0.5}))
    projection = trainer.method.regularizer.projection.weight
    start = projection.detach().clone()
    for _ in range(7):  # t = 0..6: active only for t > 0.5 * 12
        losses, _ = trainer.train_step()
        assert losses["contrastive"].item() == 0
    assert projection.grad is None and torch.equal(projection, start), "neither gradient nor decay before the start"
    losses, stats = trainer.train_step()
    assert losses["contrastive"].item() > 0 and stats["reliable"].item() > 0
    assert not torch.equal(projection, start)


def test_the_contrastive_loss_reaches_the_backbone(tmp_path):
    gradients = []
    for weight in (0.0, 1.0):
        trainer = Trainer(tiny(tmp_path / str(weight), parts={"bacon.contrast_start": 0.0, "bacon.lambda_con": weight}))
        for _ in range(3):
            trainer.train_step()
        gradients.append(trainer.method.network.backbone.stem.weight.grad.clone())
        trainer.logger.close()
    difference = (gradients[1] - gradients[0]).norm() / gradients[0].norm()
    assert difference > 0.05


def test_resumed_run_ends_bit_for_bit_where_an_uninterrupted_one_ends(tmp_path):
    Trainer(tiny(tmp_path / "whole")).fit()
    first = Trainer(tiny(tmp_path / "parts"))
    for _ in range(4):
        first.train_step()
    first._evaluate()  # as the loop does before it saves at this step
    first.save()
    for _ in range(2):  # steps after the checkpoint, lost with the process
        first.train_step()
    first.logger.close()
    second = Trainer(tiny(tmp_path / "parts", resume=True))
    assert second.step == 4
    second.fit()
    one, two = final_state(tmp_path / "whole"), final_state(tmp_path / "parts")
    rows = [[r for r in state.pop("rows") if r["kind"] == "eval"] for state in (one, two)]
    assert_equal_states(one, two)
    assert_equal_states(*rows)


def test_killed_run_resumes_from_its_last_checkpoint_to_the_same_end(tmp_path):
    run = tmp_path / "killed"
    command = [sys.executable, str(ROOT / "train.py"), "digits", "--run-dir", str(run), "--steps", "60"]
    command += ["--batch-size", "8", "--threads", "1", "--checkpoint-every", "5", "--eval-every", "60", "--no-report"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        command, cwd=tmp_path, env=environment, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL
    )
    deadline = time.time() + 120
    while not list_checkpoints(run / "checkpoints") and process.poll() is None and time.time() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert process.returncode == -signal.SIGKILL, "the run must be killed, not finished"
    saved = torch.load(list_checkpoints(run / "checkpoints")[-1], weights_only=True)["step"]
    assert saved >= 5 and saved % 5 == 0
    subprocess.run([*command, "--resume"], cwd=tmp_path, env=environment, check=True, capture_output=True)

    whole = [str(tmp_path / "whole") if word == str(run) else word for word in command]
    subprocess.run(whole, cwd=tmp_path, env=environment, check=True, capture_output=True)
    assert_equal_states(final_state(run)["method"], final_state(tmp_path / "whole")["method"])
    assert_equal_states(final_state(run)["ema"], final_state(tmp_path / "whole")["ema"])
    steps = [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert steps == sorted(steps)


def test_sigterm_saves_the_present_step_and_says_how_to_go_on(tmp_path):
    run = tmp_path / "run"
    command = [sys.executable, str(ROOT / "train.py"), "digits", "--run-dir", str(run), "--checkpoint-every", "100000"]
    command += ["--batch-size", "8", "--threads", "1", "--log-every", "1"]
    process = subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
    for line in process.stderr:
        if line.startswith("step "):
            break
    process.send_signal(signal.SIGTERM)
    rest = process.stderr.read()
    assert process.wait() == 128 + signal.SIGTERM
    assert "continue with --resume" in rest and "Traceback" not in rest
    assert len(list_checkpoints(run / "checkpoints")) == 1


def test_a_signal_during_the_evaluation_saves_what_it_says_it_saved(tmp_path, monkeypatch):
    trainer = Trainer(tiny(tmp_path / "run", checkpoint_every=100))
    evaluate = trainer._evaluate

    def interrupted() -> None:
        evaluate()
        os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(trainer, "_evaluate", interrupted)
    with pytest.raises(StoppedError, match=r"stopped at step 4: saved .*step-00000004\.pt"):
        trainer.fit()
    assert final_state(tmp_path / "run")["step"] == 4


def test_an_overflow_in_the_first_half_precision_step_is_skipped_without_a_trace(tmp_path):
    trainer = Trainer(tiny(tmp_path / "run", precision="fp16", method="supervised"))
    trainer.logger.close()
    before = [p.detach().clone() for p in trainer.method.parameters()]
    trainer.program.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**120)  # every gradient overflows
    trainer.train_step()
    for parameter, old in zip(trainer.method.parameters(), before):
        assert torch.equal(parameter, old)
        assert not trainer.optimizer.state[parameter]["momentum_buffer"].any()


def test_run_without_a_checkpoint_restarts_only_under_its_own_configuration(tmp_path):
    first = Trainer(tiny(tmp_path / "run"))
    first.logger.close()
    with pytest.raises(CheckpointError, match=r"config\.json was written.*\n.*seed: checkpoint 0, now 9"):
        Trainer(tiny(tmp_path / "run", seed=9, resume=True))
    again = Trainer(tiny(tmp_path / "run", resume=True))
    again.fit()
    assert json.loads((tmp_path / "run" / "split.json").read_text())["hash"] == again.split.hash


def test_run_without_a_checkpoint_restarts_on_the_split_it_was_given(tmp_path):
    Trainer(tiny(tmp_path / "other", seed=5)).logger.close()
    first = Trainer(tiny(tmp_path / "run", split=tmp_path / "other" / "split.json"))
    first.logger.close()
    again = Trainer(tiny(tmp_path / "run", resume=True))
    again.logger.close()
    assert again.split.hash == first.split.hash


def test_leftovers_of_a_crash_are_cleared_on_resume(tmp_path):
    Trainer(tiny(tmp_path / "run")).fit()
    folder = tmp_path / "run" / "checkpoints"
    list_checkpoints(folder)[-1].write_bytes(b"damaged")
    (folder / ".step-00000016.pt.1.tmp").write_bytes(b"half")
    with pytest.warns(UserWarning, match="refused"), pytest.warns(UserWarning, match=r"00012\.pt renamed to .*damaged"):
        Trainer(tiny(tmp_path / "run", resume=True)).logger.close()
    assert sorted(p.name for p in folder.iterdir()) == ["step-00000008.pt", "step-00000012.pt.damaged"]
    assert (folder / "step-00000012.pt.damaged").read_bytes() == b"damaged"


def test_a_passing_read_error_ends_the_resumption_and_costs_no_checkpoint(tmp_path, monkeypatch):
    Trainer(tiny(tmp_path / "run")).fit()
    folder = tmp_path / "run" / "checkpoints"
    before = {path.name: path.read_bytes() for path in folder.iterdir()}

    def fail(*arguments, **options):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with monkeypatch.context() as broken, pytest.raises(OSError, match=r"Input/output error: .*step-00000012\.pt"):
        broken.setattr(torch, "load", fail)
        Trainer(tiny(tmp_path / "run", resume=True))
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    resumed = Trainer(tiny(tmp_path / "run", resume=True))
    resumed.logger.close()
    assert resumed.step == 12


def test_overrides_of_a_protocol_change_its_name_and_do_not_fit_a_split_file(tmp_path):
    trainer = Trainer(tiny(tmp_path / "one", gamma_u=-5.0))
    trainer.logger.close()
    assert trainer.split.protocol.name == "digits with gamma_u=-5.0"
    with pytest.raises(ValueError, match="split: expected no gamma_u"):
        Trainer(tiny(tmp_path / "two", gamma_u=-5.0, split=tmp_path / "one" / "split.json"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lb_in_ulb": False}, "lb_in_ulb: expected none for protocol as-is, in which every image is in the unlabeled"),
        ({"gamma_u": 10.0, "labeled_head": 3}, "gamma_u: expected none for protocol as-is, .*; found 10.0"),
        ({"gamma_l": 10.0}, "gamma_l: expected none for protocol as-is, .*--labeled-head makes it so; found 10.0"),
    ],
)
def test_an_override_that_would_be_recorded_without_effect_is_refused(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        Trainer(tiny(tmp_path / "run", protocol="as-is", **changes))
    assert not (tmp_path / "run").exists()


def test_a_run_begins_with_a_line_about_its_images(tmp_path, capsys):
    Trainer(tiny(tmp_path / "run")).logger.close()
    assert "labeled 159, unlabeled 240, of which 240 are other training images\n" in capsys.readouterr().err


def test_adam_shrinks_only_what_it_trains(tmp_path):
    trainer = Trainer(tiny(tmp_path / "run", optimizer="adam", lr=0.002, weight_decay=0.02))
    trainer.logger.close()
    projection = trainer.method.regularizer.projection.weight.detach().clone()
    stem = trainer.method.network.backbone.stem.weight.detach().clone()
    trainer.train_step()
    assert torch.equal(trainer.method.regularizer.projection.weight, projection)
    # Adam's first step moves every element by lr (up to its eps), then all shrink by 1 - decay * lr.
    moved = trainer.method.network.backbone.stem.weight / (1 - 0.02 * 0.002) - stem
    torch.testing.assert_close(moved.abs(), torch.full_like(moved, 0.002), rtol=1e-2, atol=1e-5)


def test_checkpoint_of_another_configuration_is_refused_with_the_differences(tmp_path):
    Trainer(tiny(tmp_path / "run")).fit()
    with pytest.raises(CheckpointError, match=r"lr: checkpoint 0\.03, now 0\.1") as refusal:
        Trainer(tiny(tmp_path / "run", lr=0.1, seed=1, log_every=7, resume=True))
    assert "seed: checkpoint 0, now 1" in str(refusal.value) and "log_every" not in str(refusal.value)


def test_truncated_checkpoint_is_passed_over_on_resume(tmp_path):
    Trainer(tiny(tmp_path / "run")).fit()
    newest = list_checkpoints(tmp_path / "run" / "checkpoints")[-1]
    newest.write_bytes(newest.read_bytes()[:5000])
    with pytest.warns(UserWarning, match=newest.name):
        resumed = Trainer(tiny(tmp_path / "run", resume=True))
    assert resumed.step == 8
    resumed.logger.close()


def test_a_run_is_never_overwritten(tmp_path):
    Trainer(tiny(tmp_path / "run", steps=1)).fit()
    with pytest.raises(ValueError, match="holds a run already"):
        Trainer(tiny(tmp_path / "run", steps=1))
    with pytest.raises(CheckpointError, match="nothing to resume"):
        Trainer(tiny(tmp_path / "other", resume=True))


def test_split_can_be_given_back(tmp_path):
    first = Trainer(tiny(tmp_path / "one", steps=1))
    first.fit()
    again = Trainer(tiny(tmp_path / "two", steps=1, seed=5, split=tmp_path / "one" / "split.json"))
    again.logger.close()
    assert again.split.hash == first.split.hash
    other = Trainer(tiny(tmp_path / "three", steps=1, seed=5))
    other.logger.close()
    assert other.split.hash != first.split.hash


def test_a_resumed_run_refuses_another_split(tmp_path):
    for seed in (0, 5):
        Trainer(tiny(tmp_path / str(seed), steps=1, seed=seed)).fit()
    own, other = (tmp_path / str(seed) / "split.json" for seed in (0, 5))
    with pytest.raises(ValueError, match=r"split: expected the run's own, .*, found hash "):
        Trainer(tiny(tmp_path / "0", steps=1, resume=True, split=other))
    (tmp_path / "moved.json").write_text(own.read_text())
    Trainer(tiny(tmp_path / "0", steps=1, resume=True, split=tmp_path / "moved.json")).fit()


def test_more_threads_than_the_machine_can_use_are_refused(tmp_path):
    most = 4 * os.cpu_count()
    with pytest.raises(ValueError, match=f"threads: expected at most {most} .*, found {most + 1}"):
        Trainer(tiny(tmp_path / "run", threads=most + 1))
    assert list(tmp_path.iterdir()) == []


def test_a_diverging_run_stops_with_advice_and_leaves_only_finite_checkpoints(tmp_path):
    trainer = Trainer(tiny(tmp_path / "run", lr=1e25, method="supervised", checkpoint_every=1))
    with pytest.raises(DivergedError, match=r"try a smaller --lr.* in a new run directory") as stop:
        trainer.fit()
    newest = list_checkpoints(tmp_path / "run" / "checkpoints")[-1]
    assert f"{newest} is from before" in str(stop.value)
    for path in list_checkpoints(tmp_path / "run" / "checkpoints"):
        state = torch.load(path, weights_only=True)
        for part in ("method", "ema"):
            assert all(value.isfinite().all() for value in state[part].values())


@pytest.mark.parametrize("part", ["buffer", "average", "momentum"])
def test_nothing_that_is_not_finite_is_saved(tmp_path, part):
    trainer = Trainer(tiny(tmp_path / "run", method="supervised", checkpoint_every=2, log_every=2))
    step = trainer.train_step

    def broken() -> object:
        result = step()
        if trainer.step == 4:
            network = trainer.ema.network if part == "average" else trainer.method.network
            buffers = dict(network.named_buffers())
            name = next(name for name in buffers if name.endswith("running_var"))
            momentum = next(iter(trainer.optimizer.state.values()))["momentum_buffer"]
            tensor = momentum if part == "momentum" else buffers[name]
            tensor[(0,) * tensor.dim()] = float("inf")
        return result

    trainer.train_step = broken
    expected = {"buffer": "running_var", "average": "average of .*running_var", "momentum": "momentum_buffer"}[part]
    with pytest.raises(DivergedError, match=f"not finite after step 4: .*{expected}.* is from before"):
        trainer.fit()
    assert [path.name for path in list_checkpoints(tmp_path / "run" / "checkpoints")] == ["step-00000002.pt"]


def test_a_diverged_run_says_when_it_began(tmp_path):
    trainer = Trainer(tiny(tmp_path / "run", method="supervised", log_every=100, eval_every=100, steps=50))
    forward, calls = trainer.program.forward, []

    def broken(batch, step, phase):
        output = forward(batch, step, phase)
        calls.append(step)
        if len(calls) != 7:
            return output
        nan = output.total * float("nan")
        return output._replace(total=nan, losses=output.losses | {"total": nan.detach()})

    trainer.program.forward = broken
    with pytest.raises(DivergedError, match="the loss is not finite since step 7;"):
        trainer.fit()


def test_a_stop_by_signal_adds_no_log_row(tmp_path):
    """A run that is stopped between two log rows and continued writes the rows of an uninterrupted one."""
    rows = {}
    for name, signals in (("whole", ()), ("stopped", (5,))):
        config = tiny(tmp_path / name, log_every=4, eval_every=8, checkpoint_every=8, method="fixmatch+abc+bacon")
        trainer = Trainer(config)
        step = trainer.train_step

        def stopping(trainer=trainer, step=step, signals=signals) -> object:
            result = step()
            if trainer.step in signals:
                os.kill(os.getpid(), signal.SIGTERM)
            return result

        trainer.train_step = stopping
        if signals:
            with pytest.raises(StoppedError, match="stopped at step 5"):
                trainer.fit()
            trainer = Trainer(config.replace(resume=True))
        trainer.fit()
        rows[name] = [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
    assert_equal_states(rows["stopped"], rows["whole"])


def test_generations_of_the_largest_seed(tmp_path):
    summary = Trainer(tiny(tmp_path / "run", method="fixmatch+crest", steps=4, seed=2**64 - 1)).fit()
    assert summary["seed"] == 2**64 - 1 and final_state(tmp_path / "run")["generation"] == 1


def board_steps(run_dir: Path, tag: str) -> list[int]:
    """Steps of a tag, as TensorBoard reads them."""
    events = EventAccumulator(str(run_dir / "tensorboard"), size_guidance={"scalars": 0})
    events.Reload()
    return [event.step for event in events.Scalars(tag)]


@pytest.mark.parametrize("checkpoint_every", [4, 100])  # killed after the first checkpoint, or before
@pytest.mark.parametrize("clock", [3600, -3600])
def test_tensorboard_shows_every_step_once_after_a_kill(tmp_path, monkeypatch, checkpoint_every, clock):
    config = tiny(tmp_path / "run", method="supervised", log_every=1, checkpoint_every=checkpoint_every)
    killed = Trainer(config)
    for _ in range(7):
        killed.train_step()
        killed._window = killed._window or (0, 0.0)
        killed._log_train()
        if killed.step % checkpoint_every == 0:
            killed.save()
    killed.logger.close()
    now = time.time
    monkeypatch.setattr(time, "time", lambda: now() + clock)
    Trainer(config.replace(resume=True)).fit()
    assert board_steps(tmp_path / "run", "train/loss/total") == list(range(1, 13))


def test_a_full_disk_is_named_wherever_it_is_met(tmp_path, monkeypatch, capfd):
    trainer = Trainer(tiny(tmp_path / "run", method="supervised", log_every=1, eval_every=100, checkpoint_every=100))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1500, hard))  # bytes: less than the log of twelve steps
    try:
        with pytest.raises(OSError) as refusal:
            trainer.fit()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert refusal.value.errno == errno.EFBIG and str(tmp_path / "run") in refusal.value.filename
    assert "Traceback" not in capfd.readouterr().err


def test_a_run_that_diverges_at_once_promises_no_checkpoint(tmp_path):
    trainer = Trainer(tiny(tmp_path / "run", lr=1e30, steps=4, method="supervised"))
    with pytest.raises(DivergedError, match="No checkpoint was saved before; try a smaller --lr"):
        trainer.fit()
    assert list_checkpoints(tmp_path / "run" / "checkpoints") == []


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_steps_follow_full_precision(tmp_path, precision):
    losses = {}
    for name in ("fp32", precision):
        trainer = Trainer(tiny(tmp_path / name, precision=name, method="fixmatch+abc", threshold=0.0))
        losses[name] = torch.stack([trainer.train_step()[0]["total"] for _ in range(3)])
        trainer.logger.close()
    # Three steps from the same start and the same views: only rounding differs (8 bits of mantissa in bf16).
    torch.testing.assert_close(losses[precision], losses["fp32"], rtol=0.05, atol=0.05)
    assert not torch.equal(losses[precision], losses["fp32"])


def test_one_step_is_the_specified_sgd_update(tmp_path):
    """Nesterov SGD with weight decay on matrices only, written out, from the gradient the step left behind."""
    trainer = Trainer(tiny(tmp_path / "run", method="supervised", ema=0.9))
    before = {n: p.detach().clone() for n, p in trainer.method.named_parameters()}
    averages = {n: p.clone() for n, p in trainer.ema.network.named_parameters()}
    trainer.train_step()
    trainer.logger.close()
    for name, parameter in trainer.method.named_parameters():
        gradient = parameter.grad + (5e-4 * before[name] if parameter.dim() > 1 else 0)
        expected = before[name] - 0.03 * (gradient + 0.9 * gradient)
        torch.testing.assert_close(parameter, expected, rtol=1e-5, atol=1e-7)
        network_name = name.removeprefix("network.")
        torch.testing.assert_close(
            trainer.ema.network.get_parameter(network_name), 0.9 * averages[network_name] + 0.1 * parameter
        )


def test_compiled_step_computes_the_same_losses(tmp_path):
    results = []
    for compiled in (False, True):
        trainer = Trainer(
            tiny(tmp_path / str(compiled), steps=4, parts={"bacon.contrast_start": 0.2}, compile=compiled)
        )
        results.append(torch.stack([trainer.train_step()[0]["total"] for _ in range(3)]))
        trainer.logger.close()
    torch.testing.assert_close(results[0], results[1], rtol=1e-4, atol=1e-5)
