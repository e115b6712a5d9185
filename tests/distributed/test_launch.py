"""What a process reads from torchrun's environment, and how it uses it."""

import pytest
import torch

from bacon_fast.engine import build, distributed
from bacon_fast.engine.distributed import Launch

ENVIRONMENT = {
    "RANK": "3",
    "WORLD_SIZE": "4",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "2",
    "MASTER_ADDR": "node-0",
    "MASTER_PORT": "29500",
    "TORCHELASTIC_RESTART_COUNT": "2",
    "TORCHELASTIC_USE_AGENT_STORE": "True",
}


@pytest.fixture
def torchrun(monkeypatch):
    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    return monkeypatch


def test_the_environment_of_torchrun_is_read(torchrun):
    assert Launch.from_environment() == Launch(3, 4, 1, 2, "node-0", 29500, restarts=2, keeps_store=True)
    for name in ("TORCHELASTIC_RESTART_COUNT", "TORCHELASTIC_USE_AGENT_STORE"):
        torchrun.delenv(name)
    assert Launch.from_environment() == Launch(3, 4, 1, 2, "node-0", 29500, restarts=0, keeps_store=False)


@pytest.mark.parametrize("name", ["RANK", "WORLD_SIZE"])
def test_without_rank_or_size_it_is_plain_python(torchrun, name):
    torchrun.delenv(name)
    assert Launch.from_environment() is None
    with distributed.process_group(torch.device("cpu"), 1.0) as store:
        assert store is None and distributed.is_main() and distributed.broadcast("mine") == "mine"


@pytest.mark.parametrize("name", ["LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"])
def test_what_is_missing_or_wrong_is_named(torchrun, name):
    if name != "MASTER_ADDR":
        torchrun.setenv(name, "two")
        with pytest.raises(ValueError, match=f"^{name}: expected an integer, as torchrun sets it, found 'two'"):
            Launch.from_environment()
    torchrun.delenv(name)
    with pytest.raises(ValueError, match=f"^{name}: expected"):
        Launch.from_environment()


@pytest.mark.parametrize("name, value", [("RANK", "4"), ("RANK", "-1"), ("LOCAL_RANK", "2")])
def test_a_rank_out_of_range_is_refused(torchrun, name, value):
    torchrun.setenv(name, value)
    with pytest.raises(ValueError, match="expected 0 <= rank < size"):
        Launch.from_environment()


def test_every_process_takes_the_gpu_of_its_local_rank(torchrun):
    torchrun.setattr(torch.cuda, "is_available", lambda: True)
    torchrun.setattr(torch.cuda, "device_count", lambda: 2)
    assert build.resolve_device("auto") == build.resolve_device("cuda") == torch.device("cuda", 1)
    assert build.resolve_device("cpu") == torch.device("cpu")
    with pytest.raises(ValueError, match=r"device: expected auto, cuda or cpu for several processes .* 'cuda:0'"):
        build.resolve_device("cuda:0")
    torchrun.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(ValueError, match="2 processes on this machine need a CUDA device each, and it has 1"):
        build.resolve_device("auto")


def test_processes_of_a_machine_share_its_cores(torchrun):
    before = torch.get_num_threads()
    try:
        torchrun.setattr(build.os, "sched_getaffinity", lambda pid: set(range(7)))
        build.use_threads(0)
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)


def test_ranks_that_do_not_come_end_in_a_clear_error(torchrun):
    torchrun.setenv("RANK", "0")
    torchrun.setenv("MASTER_ADDR", "127.0.0.1")
    torchrun.setenv("MASTER_PORT", "0")  # any that is free
    torchrun.delenv("TORCHELASTIC_USE_AGENT_STORE")
    lost = pytest.raises(distributed.LostProcessError, match="rank 0 waits for another process of this run")
    with lost, distributed.process_group(torch.device("cpu"), 1.0):
        pass
