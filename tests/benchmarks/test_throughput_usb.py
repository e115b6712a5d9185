"""USB's own loop as an arm of benchmarks/throughput, on a CPU, which USB itself does not have.

Needs the optional extra `usb` (semilearn 0.3.2 with timm 1.0.31), which has an environment of its own.
"""

import dataclasses
from contextlib import AbstractContextManager
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

pytest.importorskip("semilearn", reason="USB is not installed (optional extra 'usb')")

from semilearn.core.utils import EMA, misc
from semilearn.imb_algorithms.abc.abc import ABC

from benchmarks.throughput.problem import Problem, make_config, make_trainer
from benchmarks.throughput.usb import UsbArm, why_not


class Wrapped(nn.Module):
    """Stands for DataParallel, which needs a GPU."""

    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, x):
        return self.module(x)


class Recorder(AbstractContextManager):
    """How many steps, averages and updates there were inside."""

    def __init__(self):
        self.steps = None

    def __enter__(self):
        self.steps = self.averages = self.losses = 0
        return self

    def __exit__(self, *_):
        self.result = (self.steps, self.averages, self.losses)
        self.steps = None


@pytest.fixture
def problem(tmp_path):
    config = make_config(Path("unused"), "cpu", backbone="wrn-28-2", threads=1)
    digits = {"dataset": "digits", "protocol": "digits", "data_dir": None, "image_size": 16}
    config = config.replace(**digits, batch_size=4)
    return Problem.of(config, make_trainer(config, tmp_path))


@pytest.fixture
def without_gpu(monkeypatch):
    event = SimpleNamespace(record=lambda: None, elapsed_time=lambda _: 1.0)
    monkeypatch.setattr(torch.Tensor, "cuda", lambda tensor, *_, **__: tensor)
    monkeypatch.setattr(torch.cuda, "Event", lambda **_: event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda *_: None)
    monkeypatch.setattr(misc, "send_model_cuda", lambda args, model, clip_batch=True: Wrapped(model))


def test_usb_needs_a_gpu_and_one_of_its_networks(problem):
    assert why_not(problem) == "USB trains on CUDA devices only"
    cuda = dataclasses.replace(problem, device=torch.device("cuda"))
    assert why_not(cuda) is None
    small = dataclasses.replace(cuda, config=problem.config.replace(backbone="wrn-10-1"))
    assert why_not(small) == "USB has no wrn-10-1"


def test_a_slice_is_so_many_steps_of_usbs_own_loop(problem, without_gpu, tmp_path, monkeypatch):
    recorder = Recorder()

    def counted(cls, name, field):
        method = getattr(cls, name)

        def call(*args, **kwargs):
            if recorder.steps is not None:
                setattr(recorder, field, getattr(recorder, field) + 1)
            return method(*args, **kwargs)

        monkeypatch.setattr(cls, name, call)

    counted(ABC, "train_step", "steps")
    counted(ABC, "compute_abc_loss", "losses")
    counted(EMA, "update", "averages")
    arm = UsbArm(problem, tmp_path)
    arm.warmup = 1
    before = {name: p.detach().clone() for name, p in arm.algorithm.model.module.named_parameters()}
    for steps in (2, 3):
        arm.run(steps, recorder)
        assert recorder.result == (steps,) * 3
    after = dict(arm.algorithm.model.module.named_parameters())
    for name in ("backbone.conv1.weight", "backbone.classifier.weight", "aux_classifier.weight"):
        assert not torch.equal(after[name], before[name]), name
    data = arm.algorithm.dataset_dict
    assert len(data["train_lb"]) == len(problem.labeled) and len(data["train_ulb"]) == len(problem.unlabeled)
    assert data["train_lb"].targets == problem.labels.tolist()
    assert arm.algorithm.use_cat and not arm.algorithm.use_amp and arm.algorithm.scheduler is None
    batch = next(iter(arm.algorithm.loader_dict["train_ulb"]))
    assert batch["x_ulb_s"].shape == (8, 3, 16, 16)
