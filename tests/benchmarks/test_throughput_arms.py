"""The arms of benchmarks/throughput: what they compute, which mistakes their gates notice, and what is counted."""

import argparse
import csv
import dataclasses
import functools
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from bacon_fast.models.batchnorm import BatchNormAct2d
from bacon_fast.models.network import Network
from benchmarks.throughput import __main__ as throughput
from benchmarks.throughput import arms, gate, peers, vectorized
from benchmarks.throughput.arms import ARMS, Bench
from benchmarks.throughput.counters import RANGE, DispatchCounter, count_events
from benchmarks.throughput.gate import (
    RedGateError,
    check_steps,
    check_timed,
    check_trainer,
    check_usb_style,
    check_vectorized,
    truth_of,
)
from benchmarks.throughput.loaders import Loaders
from benchmarks.throughput.network import PlainNetwork
from benchmarks.throughput.ours import TrainerStep
from benchmarks.throughput.peers import UsbStyleStep
from benchmarks.throughput.problem import Problem, State, make_config, make_trainer, prime
from benchmarks.throughput.step import Flags, Stopwatch
from benchmarks.throughput.vectorized import NAMES, DeviceBatches, VectorizedStep

BATCH, UNLABELED = 24, 48


def small_config(threads=1):
    """The digits themselves, at their own size and with their own split, in small batches."""
    config = make_config(Path("unused"), "cpu", backbone="wrn-10-1", threads=threads)
    digits = {"dataset": "digits", "protocol": "digits", "data_dir": None, "image_size": 16}
    return config.replace(**digits, batch_size=BATCH)


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    scratch, config = tmp_path_factory.mktemp("bench"), small_config()
    reference = make_trainer(config, scratch, loss_backend="reference")
    state = prime(reference, steps=30)
    return Bench(Problem.of(config, reference), state, truth_of(reference, state), scratch, "fp32", compile=False)


# --- what the arms compute --------------------------------------------------------------------------------------------


def test_the_plain_network_is_ours():
    torch.manual_seed(0)
    ours = Network("wrn-10-2", 5, balanced_head=True, bn_momentum=0.1)
    plain = PlainNetwork("wrn-10-2", 5, momentum=0.1)
    plain.load_state_dict(ours.state_dict())
    images = torch.randn(6, 3, 16, 16)
    features, logits, balanced = ours(images)
    torch.testing.assert_close(plain.backbone(images), features)
    torch.testing.assert_close(plain.head(features), logits)
    torch.testing.assert_close(plain.balanced_head(features), balanced)
    for name, buffer in ours.named_buffers():
        torch.testing.assert_close(plain.get_buffer(name), buffer)
    with pytest.raises(ValueError, match="expected wrn-DEPTH-WIDTH, found 'resnet18'"):
        PlainNetwork("resnet18", 5, momentum=0.1)


def test_the_state_is_that_of_a_training_under_way(bench):
    for losses in bench.truth.losses:
        assert all(value > 0.01 for value in losses.values())
    bank = bench.state.bank
    assert bank["has_center"].all() and 0.2 < bank["written"].float().mean() < 0.9


@pytest.mark.parametrize("check", [check_usb_style, check_vectorized])
def test_the_arms_make_our_steps(bench, check):
    check(bench.problem, bench.truth)


@pytest.fixture(scope="module")
def truth_without_a_center(bench):
    """From a state in which class 2 is selected but has no feature in the bank."""
    bank = dict(bench.state.bank)
    bank["written"] = bank["written"] & (bank["selected_label"] != 2)
    for name in ("centers", "class_sums", "class_sizes", "has_center"):
        bank[name] = bank[name].clone()
        bank[name][2] = 0
    trainer = bench.trainer(loss_backend="reference")
    return truth_of(trainer, dataclasses.replace(bench.state, bank=bank))


@pytest.mark.parametrize("check", [check_usb_style, check_vectorized])
def test_the_arms_make_our_steps_where_a_class_has_no_center(bench, truth_without_a_center, check):
    contrastive = [truth.losses[0]["contrastive"] for truth in (bench.truth, truth_without_a_center)]
    assert contrastive[1] < 0.99 * contrastive[0]
    check(bench.problem, truth_without_a_center)


def test_our_trainer_makes_the_references_steps(bench):
    config = bench.problem.config
    assert config.shared.loss_backend == "auto"
    arms = [
        TrainerStep(make_trainer(config, bench.scratch, loss_backend=backend), bench.state)
        for backend in ("auto", "reference")
    ]
    check_trainer(*arms, bench.state, "fp32")
    arms[0].trainer.method.regularizer.lambda_con = 1.01
    with pytest.raises(RedGateError, match="total is"):
        check_trainer(*arms, bench.state, "fp32")


def test_a_timed_arm_may_draw_its_own_masks_but_not_lose_a_loss(bench):
    arm = VectorizedStep(bench.problem, bench.state, "fp32", batches=None)
    found = dict(zip(NAMES, arm.update(gate.split(bench.truth.whole_batch)).tolist()))
    check_timed(found | {"abc_labeled": 100.0}, bench.truth, "fp32")
    with pytest.raises(RedGateError, match="contrastive is 100"):
        check_timed(found | {"contrastive": 100.0}, bench.truth, "fp32")


def _scaled(function, factor):
    return lambda *args: function(*args) * factor


class _NoGradientThroughWeak(PlainNetwork):
    """The mistake that makes a step cheaper: the weak rows are in the batch but give the features no gradient."""

    def __init__(self, *args):
        super().__init__(*args)
        forward = self.backbone.forward

        def cut(images):
            features = forward(images)
            labeled, weak, strong = features.split([len(features) // 5 * k for k in (1, 2, 2)])
            return torch.cat([labeled, weak.detach(), strong])

        self.backbone.forward = cut


def _without_projection(group):
    return group | {"params": [p for p in group["params"] if p.shape != (32, 64)]}


BREAKS = {
    "loss": (peers, "bacon_class_loop", _scaled(peers.bacon_class_loop, 1.01)),
    "labels": (peers.LoopedBank, "count", lambda *_: None),
    "bank": (peers.LoopedBank, "write", lambda *_: None),
    "average": (peers.TensorwiseAverage, "update", lambda _: None),
    "momentum": (peers, "TensorwiseAverage", lambda *a: TensorwiseAverage(*a[:-1], 0.998)),
    "nesterov": (torch.optim, "SGD", lambda *a, **k: SGD(*a, **(k | {"nesterov": False}))),
    "decay": (torch.optim, "SGD", lambda groups, **k: SGD([g | {"weight_decay": 0.5} for g in groups], **k)),
    "projection": (torch.optim, "SGD", lambda groups, **k: SGD([_without_projection(g) for g in groups], **k)),
    "gradient": (peers, "PlainNetwork", _NoGradientThroughWeak),
    "annealing": (Problem, "epoch_share", lambda *_: 0.0),
}
SGD, TensorwiseAverage = torch.optim.SGD, peers.TensorwiseAverage


@pytest.mark.parametrize("what", BREAKS)
def test_the_gate_of_the_usb_style_arm_notices(bench, monkeypatch, what):
    monkeypatch.setattr(*BREAKS[what])
    with pytest.raises(RedGateError):
        check_usb_style(bench.problem, bench.truth)


@pytest.mark.parametrize("what", ["loss", "sums", "gradient", "average"])
def test_the_gate_of_the_vectorized_arm_notices(bench, monkeypatch, what):
    monkeypatch.setattr(
        *{
            "loss": (vectorized, "bacon_vectorized", _scaled(vectorized.bacon_vectorized, 1.01)),
            "sums": (vectorized, "_class_sums", _scaled(vectorized._class_sums, 2)),
            "gradient": (vectorized, "PlainNetwork", _NoGradientThroughWeak),
            "average": (VectorizedStep, "_average", lambda _: None),
        }[what]
    )
    with pytest.raises(RedGateError):
        check_vectorized(bench.problem, bench.truth)


PARTS = {
    "update of network": ("network", "head.weight"),
    "update of projection": ("projection", "bias"),
    "update of averaged": ("averaged", "backbone.stem.weight"),
    "bank centers": ("bank", "centers"),
    "bank class_counts": ("bank", "class_counts"),
    "bank selected_label": ("bank", "selected_label"),
    "bank written": ("bank", "written"),
}


@pytest.mark.parametrize("what", [None, *PARTS])
def test_the_gate_looks_at_what_the_steps_leave(bench, what):
    """Right losses, and at the end one tensor with one element that did not move, or moved too much."""
    truth, losses = bench.truth, iter(bench.truth.losses)
    end = {part: dict(value) for part, value in vars(truth.end).items()}
    if what is not None:
        part, name = PARTS[what]
        start, right = getattr(truth.state, part)[name].contiguous(), end[part][name].contiguous()
        wrong = right.clone()
        place = (right.double() - start.double()).abs().argmax()
        wrong.view(-1)[place] = start.view(-1)[place]
        end[part][name] = wrong

    def run():
        check_steps(truth, lambda batch, draw: next(losses), lambda: State(**end))

    if what is None:
        run()
    else:
        with pytest.raises(RedGateError, match=what):
            run()


def test_a_state_that_decides_nothing_is_no_gate(bench):
    trainer = bench.trainer(loss_backend="reference")
    blank = dataclasses.replace(
        bench.state, network=bench.state.network | {"balanced_head.weight": torch.zeros(10, 64)}
    )
    with pytest.raises(RedGateError, match="decides nothing"):
        truth_of(trainer, blank)


def test_the_loaders_give_every_image_its_own_slot_and_stop(bench):
    problem = bench.problem
    loaders = Loaders(problem, workers=(1, 1))
    loaders.start()
    batches = [loaders.next() for _ in range(3)]
    processes = [worker for iterator in loaders.iterators for worker in iterator._workers]
    loaders.stop()
    assert len(processes) == 2 and not any(process.is_alive() for process in processes)
    for batch in batches:
        assert batch.labels.tolist() == problem.labels[batch.labeled_slots].tolist()
        assert batch.labeled.shape == (BATCH, 3, 16, 16) and batch.labeled.dtype == torch.float32
        assert batch.weak.shape == batch.strong.shape == (UNLABELED, 3, 16, 16)
        assert not torch.equal(batch.weak, batch.strong)
    # The views are of the image in the slot: in the middle, which a crop moves by 2 pixels at most, they are as bright.
    pixels = torch.from_numpy(problem.images[problem.unlabeled][batches[0].unlabeled_slots]).float() / 255
    brightness = (pixels.mean(dim=(1, 2, 3)) - problem.mean[0]) / problem.std[0]
    seen = batches[0].weak.mean(dim=(1, 2, 3))
    assert torch.corrcoef(torch.stack([brightness, seen]))[0, 1] > 0.8
    slots = torch.cat([batch.unlabeled_slots for batch in batches])
    assert len(set(slots.tolist())) == len(slots)  # 144 of 239, none twice


# --- what is counted --------------------------------------------------------------------------------------------------


def in_backward(x):
    y = x * 2
    y.register_hook(lambda grad: grad if grad.sum().item() else None)
    y.sum().backward()


WAITS = {
    "item": lambda x: x.sum().item(),
    "truth": lambda x: bool(x.sum() > 0),
    "int": lambda x: int(x.sum()),
    "tolist": lambda x: x.tolist(),
    "numpy": lambda x: x.detach().numpy(),
    "cpu": lambda x: x.cpu(),
    "nonzero": lambda x: torch.nonzero(x),
    "where": lambda x: torch.where(x > 0),
    "masked_select": lambda x: torch.masked_select(x, x > 0),
    "index by a mask": lambda x: x[x > 0],
    "assignment by a mask": lambda x: x.detach().clone().__setitem__(x > 0, torch.ones(3)),
    "backward": in_backward,
}


@pytest.mark.parametrize("what", WAITS)
def test_a_wait_is_counted(what):
    x = torch.tensor([1.0, -1.0, 2.0, 3.0], requires_grad=True)
    with DispatchCounter() as counter:
        WAITS[what](x)
    assert counter.counts.syncs == 1, counter.counts.waiting


def test_what_does_not_wait_is_not_counted():
    x, index = torch.randn(4, 4, requires_grad=True), torch.tensor([2, 0])
    with DispatchCounter() as counter:
        y = torch.where(x > 0, x, 0)[index]
        (y.t().reshape(-1) * 2).sum().backward()
        x.detach()[index] = torch.zeros(2, 4)
    assert counter.counts.syncs == 0 and not counter.counts.waiting


def test_operations_are_counted_once_views_not_at_all():
    x, y = torch.randn(3, 4, requires_grad=True), torch.randn(4, 5)
    with DispatchCounter() as counter:
        (x @ y).t()[:3].transpose(0, 1).unsqueeze(0)
    assert counter.counts.operations == 1
    with DispatchCounter() as counter:
        (x @ y).sum().backward()
    assert counter.counts.operations >= 4  # product, sum, ones, product of the backward


def test_the_usb_style_step_waits_and_ours_does_not(bench):
    batch = gate.split(bench.truth.whole_batch)
    theirs, vectorized = (
        UsbStyleStep(bench.problem, bench.state, workers=None),
        VectorizedStep(bench.problem, bench.state, "fp32", batches=DeviceBatches(bench.problem)),
    )
    counts = {}
    for name, call in (("A", functools.partial(theirs.update, batch)), ("D", vectorized.step)):
        with DispatchCounter() as counter:
            call()
        counts[name] = counter.counts
    ours = TrainerStep(bench.trainer(), bench.state)
    counter = DispatchCounter()
    ours.run(2, counter)
    assert counts["A"].waiting["_local_scalar_dense"] == 7
    # For every class that is present: anchors, two kinds of negatives, weights, and the rows of the bank.
    assert counts["A"].syncs >= 7 + 3 * 5
    assert counts["D"].syncs == 0 and counter.counts.syncs == 0
    assert counts["A"].operations > counts["D"].operations > counter.counts.operations / 2 > 20


def test_a_profile_is_counted_inside_its_range():
    host, device = torch.autograd.DeviceType.CPU, torch.autograd.DeviceType.CUDA

    def event(name, kind, start, end, annotation=False):
        interval = SimpleNamespace(start=start, end=end)
        return SimpleNamespace(name=name, device_type=kind, time_range=interval, is_user_annotation=annotation)

    counts = count_events(
        [
            event("cudaDeviceSynchronize", host, 0, 5),  # the profiler's own
            event(RANGE, host, 10, 100),
            event(RANGE, device, 12, 110, annotation=True),
            event("Optimizer.step", device, 12, 110, annotation=True),
            event("cudaLaunchKernel", host, 11, 12),
            event("cudaGraphLaunch", host, 13, 14),
            event("cudaMemcpyAsync", host, 15, 16),
            event("cudaStreamSynchronize", host, 16, 18),
            event("aten::item", host, 15, 18),
            event("gemm", device, 20, 30),
            event("Memcpy DtoH (Device -> Pageable)", device, 105, 106),
            event("cudaDeviceSynchronize", host, 101, 120),
        ]
    )
    assert (counts.launches, counts.kernels, counts.syncs) == (3, 2, 1)
    assert counts.waiting == {"cudaStreamSynchronize": 1} and counts.device_seconds == pytest.approx(11e-6)


def test_a_profile_of_torch_can_be_counted():
    profiling = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], acc_events=True)
    with profiling as profile, torch.profiler.record_function(RANGE):
        torch.ones(3).sum().item()
    counts = count_events(profile.events())
    assert (counts.launches, counts.kernels, counts.syncs, counts.device_seconds) == (0, 0, 0, 0.0)


# --- the runner -------------------------------------------------------------------------------------------------------


def options(tmp_path, **changes):
    values = {"device": "cpu", "data_dir": None, "backbone": "wrn-10-1", "precision": "fp32", "arms": ["A", "D", "F"]}
    values |= {"compile": False, "rounds": 2, "slice": 0.01, "seconds": float("inf"), "prime": 30, "threads": 1}
    values |= {"memory": False, "note": "test", "out": tmp_path / "throughput.csv", "memory_of": None, "full_run": None}
    values |= {"concurrent": 0}
    return argparse.Namespace(**(values | changes))


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(throughput, "config_of", lambda *_: small_config())


@pytest.fixture
def built(monkeypatch, bench):
    monkeypatch.setattr(throughput, "build_bench", lambda *_: dataclasses.replace(bench, passed=set()))


def read(path):
    with open(path, newline="") as file:
        return {row["arm"]: row for row in csv.DictReader(file)}


def test_a_run_gives_rows_ratios_and_a_picture(tmp_path, small, monkeypatch, capsys):
    monkeypatch.setattr(peers.TensorwiseAverage, "update", lambda _: None)
    throughput.measure(options(tmp_path, arms=["USB", "A", "D", "F", "F-tf32"], concurrent=3), tmp_path)
    rows = read(tmp_path / "throughput.csv")
    assert list(rows) == ["D", "F", "USB", "A", "F-tf32", "Fx3"]
    assert rows["A"]["status"].startswith("RED GATE, no speed: update of averaged") and not rows["A"]["steps_per_s"]
    assert rows["USB"]["status"].startswith("skipped: ") and rows["F-tf32"]["status"].startswith("skipped: TF32")
    assert (rows["F"]["host_syncs_a_step"], rows["F"]["ours_over_arm"], rows["F"]["rounds"]) == ("0.0", "1.0", "2")
    d = rows["D"]
    assert float(d["slowest"]) <= float(d["steps_per_s"]) <= float(d["fastest"])
    assert float(d["minutes_for_262144_steps"]) == pytest.approx(262_144 / 60 / float(d["steps_per_s"]), rel=0.02)
    assert d["batch"] == "24+48+48" and d["note"] == "test" and d["commit"] and d["machine"]
    assert (tmp_path / "throughput.png").read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr().out
    assert "A: RED GATE" in printed and "computed from the median, not measured" in printed


def test_a_run_fails_when_our_step_waits(tmp_path, built, monkeypatch):
    step = TrainerStep.step

    def waiting(self):
        step(self)
        self.trainer.program.counter.item()

    monkeypatch.setattr(TrainerStep, "step", waiting)
    with pytest.raises(throughput.HostWaitedError, match="'_local_scalar_dense': 4"):
        throughput.measure(options(tmp_path, arms=["F"], rounds=1), tmp_path)
    assert read(tmp_path / "throughput.csv")["F"]["host_syncs_a_step"] == "1.0"


def test_a_run_fails_when_our_step_is_wrong(tmp_path, built, monkeypatch):
    def red(*_):
        raise RedGateError("loss is off")

    monkeypatch.setattr(arms, "check_trainer", red)
    with pytest.raises(RedGateError, match="loss is off"):
        throughput.measure(options(tmp_path, arms=["F"], rounds=1), tmp_path)
    assert read(tmp_path / "throughput.csv")["F"]["steps_per_s"] == ""


def test_a_whole_run_is_measured(tmp_path, small):
    throughput.full_run(options(tmp_path, full_run=12), tmp_path)
    with open(tmp_path / "throughput.csv", newline="") as file:
        (row,) = csv.DictReader(file)
    assert (row["steps"], row["evaluations"], row["checkpoints"]) == ("6", "1", "1")
    assert float(row["steps_per_s"]) == pytest.approx(6 / float(row["seconds"]), rel=0.02)


class Recorder(throughput.StepArm):
    """An arm that records its calls."""

    device, warmup = torch.device("cpu"), 2

    def __init__(self, name, log):
        self.name, self.log = name, log

    def start(self):
        self.log.append(f"start {self.name}")

    def step(self):
        self.log.append(self.name)

    def stop(self):
        self.log.append(f"stop {self.name}")


def test_the_arms_take_turns_and_none_works_beside_another():
    log = []
    ready = {name: throughput.Ready(Recorder(name, log), 3, 0.0, None, None) for name in "XY"}
    throughput.run_rounds(ready, 2, deadline=float("inf"))
    slices = {name: [f"start {name}", *[name] * 5, f"stop {name}"] for name in "XY"}
    assert log == [*slices["X"], *slices["Y"], *slices["Y"], *slices["X"]]
    assert all(len(entry.rates) == 2 for entry in ready.values())
    throughput.run_rounds(ready, 5, deadline=0.0)  # out of time: one round, as there must be one
    assert all(len(entry.rates) == 3 for entry in ready.values())


def test_flags_hold_inside_a_slice_only():
    before, log = Flags.present(), []
    arm = Recorder("X", log)
    arm.flags = dataclasses.replace(before, deterministic=not before.deterministic)
    arm.step = lambda: log.append(torch.backends.cudnn.deterministic)
    watch = Stopwatch(arm.device)
    arm.run(1, watch)
    assert log[1:-1] == [not before.deterministic] * 3 and Flags.present() == before and watch.seconds > 0


def test_every_arm_says_what_it_is():
    assert list(ARMS) == ["USB", "A", "B", "C", "D", "E", "F", "F-tf32", "F-norm", "F-compile"]
    assert "USB" not in ARMS["B"].name and "USB-style" in ARMS["A"].name


def test_an_arm_names_the_backend_of_its_batchnorm(bench, monkeypatch):
    assert ARMS["F-norm"].why_not(bench).startswith("it serves cuda tensors")
    monkeypatch.setattr(arms, "ONE_LAUNCH", "cpp")  # what there is here
    arm = ARMS["F-norm"].build(bench)
    layers = [layer for layer in arm.trainer.method.network.modules() if isinstance(layer, BatchNormAct2d)]
    assert layers and {layer.backend for layer in layers} == {"cpp"}


def test_arm_e_is_compiled_in_the_time_that_its_stage_has(bench, monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda function=None, **options: function)
    bench = dataclasses.replace(bench, truth=None)
    assert ARMS["E"].build(bench).compiled and not ARMS["D"].build(bench).compiled
    assert vectorized.COMPILE_MODE["cuda"] == "reduce-overhead"  # max-autotune was not done after 185 s


def test_our_compiled_arm_is_compiled_and_gated(bench, monkeypatch):
    assert ARMS["F-compile"].why_not(bench).startswith("takes a minute to compile")
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda module, **options: compiled.append(module) or module)
    arm = ARMS["F-compile"].build(bench)
    assert compiled == [arm.trainer.method] and arm.compiled and not ARMS["F"].build(bench).compiled
    monkeypatch.setattr(torch, "compile", lambda module, **options: lambda *inputs: halved(module(*inputs)))
    with pytest.raises(RedGateError, match="step 0, fp32"):
        ARMS["F-compile"].build(bench)


def halved(output):
    """What a wrong compiler might make of a step."""
    losses = {name: value / 2 for name, value in output.losses.items()}
    return output._replace(losses=losses)


def test_several_runs_take_a_step_each(bench):
    """On a CPU, where it is no arm, but works."""
    several = arms.with_several(2)
    assert several["Fx2"].why_not(bench) == "runs share a GPU, not a CPU" and list(several)[:-1] == list(ARMS)
    assert arms.with_several(0) == ARMS
    arm = several["Fx2"].build(bench)
    first = [trainer.step for trainer in arm.trainers]
    counter = DispatchCounter()
    arm.run(2, counter)
    assert [trainer.config.seed for trainer in arm.trainers] == [0, 1] and arm.runs == 2
    assert [trainer.step - before for trainer, before in zip(arm.trainers, first)] == [arm.warmup + 2] * 2
    assert counter.counts.syncs == 0
