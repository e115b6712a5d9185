"""Jobs of two processes, as users start them: a rank is killed, hangs or is asked to stop, and torchrun restarts."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from rank_cases import (
    RANKS,
    RESTARTED,
    Trainer,
    free_port,
    quiet_environment,
    start,
    tiny,
    train_command,
    wait_until,
)

from bacon_fast.engine.checkpoint import list_checkpoints

ENDLESS = {"steps": 5_000, "checkpoint_every": 5, "eval_every": 100_000, "log_every": 5}


class Job:
    """Two processes of train.py without torchrun's agent, which would end them all by itself."""

    def __init__(self, run_dir, **changes):
        self.run_dir, port = run_dir, free_port()
        self.config = tiny(run_dir, **(ENDLESS | changes))
        pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "cwd": run_dir.parent}
        self.processes = [start(r, port, train_command(self.config), **pipes) for r in range(RANKS)]

    def checkpoints(self):
        return list_checkpoints(self.run_dir / "checkpoints")

    def has_trained(self):
        metrics = self.run_dir / "metrics.jsonl"
        return metrics.exists() and metrics.read_text()

    def signal_second_rank(self, signum) -> None:
        assert all(process.poll() is None for process in self.processes), "ended before it was to"
        self.processes[1].send_signal(signum)

    def kill(self) -> None:
        for process in self.processes:
            process.kill()
            process.communicate()


@pytest.fixture(scope="module")
def jobs(tmp_path_factory):
    """Three jobs at once, as most of their time is waiting: by what happens to the second rank of each."""
    folder = tmp_path_factory.mktemp("jobs")
    jobs = {
        signal.SIGKILL: Job(folder / "killed"),
        signal.SIGSTOP: Job(folder / "hanging", rank_timeout=8.0),
        signal.SIGTERM: Job(folder / "stopped", checkpoint_every=100_000),
    }
    try:
        for signum, job in jobs.items():
            wait_until(job.has_trained if signum == signal.SIGTERM else job.checkpoints)
            job.signal_second_rank(signum)
        yield jobs
    finally:
        for job in jobs.values():
            job.kill()


@pytest.mark.parametrize("signum", [signal.SIGKILL, signal.SIGSTOP])
def test_a_lost_rank_ends_the_job_with_a_clear_error_and_a_usable_checkpoint(jobs, signum):
    job = jobs[signum]
    _, message = job.processes[0].communicate(timeout=60)
    assert job.processes[0].returncode == 2
    assert "[rank 0] error: rank 0 waits for another process of this run" in message and "--resume" in message
    assert "Traceback" not in message
    job.processes[1].kill()
    resumed = Trainer(tiny(job.run_dir, **(ENDLESS | {"resume": True})))
    resumed.logger.close()
    assert resumed.step >= 5 and resumed.step % 5 == 0


def test_a_signal_to_one_rank_saves_the_state_of_the_same_step_and_stops_all(jobs):
    job = jobs[signal.SIGTERM]
    messages = [process.communicate(timeout=60)[1] for process in job.processes]
    assert [process.returncode for process in job.processes] == [128 + signal.SIGTERM] * RANKS
    (path,) = job.checkpoints()
    step = torch.load(path, weights_only=True)["step"]
    for message in messages:
        assert f"stopped at step {step}: saved {path}; continue with --resume" in message
        assert "Traceback" not in message


def test_torchrun_restarts_a_killed_job_from_its_last_checkpoint_to_the_same_end(tmp_path, ranks):
    command = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={RANKS}", "--max-restarts=1"]
    options = {"cwd": tmp_path, "env": quiet_environment(), "stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE}
    # Without --run-dir: the second start must find the directory that the first one named after the time.
    config = tiny(None, **RESTARTED)
    agent = subprocess.Popen([sys.executable, *command, *train_command(config)], text=True, **options)
    try:
        wait_until(lambda: list(tmp_path.glob("runs/*/checkpoints/step-*.pt")) or agent.poll() is not None)
        workers = children(agent.pid)
        assert len(workers) == RANKS
        os.kill(workers[0], signal.SIGKILL)
        _, messages = agent.communicate(timeout=120)
    finally:
        agent.kill()
        agent.communicate()
    assert agent.returncode == 0, messages
    (run,) = (tmp_path / "runs").iterdir()
    final = torch.load(list_checkpoints(run / "checkpoints")[-1], weights_only=True)
    assert final["step"] == RESTARTED["steps"]
    steps = [row["step"] for row in final["rows"] if row["kind"] == "train"]
    assert steps == list(range(1, RESTARTED["steps"] + 1)), "each step once"
    for name, value in final["method"].items():
        assert torch.equal(value, ranks[0]["whole"][name]), name


def children(pid: int) -> list[int]:
    lists = Path(f"/proc/{pid}/task").glob("*/children")
    return [int(child) for text in lists for child in text.read_text().split()]
