"""torchrun on GPUs: one process, and two that reach each other by NCCL, follow plain python."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bacon_fast.engine.checkpoint import list_checkpoints

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")

ROOT = Path(__file__).resolve().parents[2]
STEPS = 6


def launch(run_dir: Path, processes: int | None, *options: str) -> list[dict]:
    """Rows of the training log of a small run: under torchrun, or under plain python."""
    torchrun = [
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--local-addr=127.0.0.1",
        f"--nproc-per-node={processes}",
    ]
    command = [sys.executable, *(torchrun if processes else []), str(ROOT / "train.py"), "digits"]
    command += ["--run-dir", str(run_dir), "--steps", str(STEPS), "--batch-size", "16", "--no-report"]
    command += ["--log-every", "1", "--eval-every", "3", "--checkpoint-every", "3", "--precision", "fp32"]
    command += ["--threshold", "0.15", "--bacon.reliable-threshold", "0.15", "--bacon.contrast-start", "0.1"]
    command += ["--sync-batchnorm"]
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]  # packages may have come by it
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths)}
    done = subprocess.run([*command, *options], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if row["kind"] == "train"]


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return launch(tmp_path_factory.mktemp("plain") / "run", None, "--device", "cuda")


def assert_follows(rows: list[dict], plain: list[dict]) -> None:
    assert [row["step"] for row in rows] == [row["step"] for row in plain] == list(range(1, STEPS + 1))
    # Two steps: later ones multiply what the order of sums changes.
    for one, two in zip(rows[:2], plain):
        losses = [name for name in two if name.startswith("loss/")]
        assert len(losses) > 3
        assert [one[name] for name in losses] == pytest.approx([two[name] for name in losses], rel=1e-3, abs=1e-5)


@pytest.mark.parametrize(
    "processes",
    [1, pytest.param(2, marks=pytest.mark.skipif(torch.cuda.device_count() < 2, reason="fewer than 2 CUDA devices"))],
)
def test_processes_of_torchrun_follow_plain_python(tmp_path, plain, processes):
    assert_follows(launch(tmp_path / "run", processes), plain)
    assert [p.name for p in list_checkpoints(tmp_path / "run" / "checkpoints")] == [
        "step-00000003.pt",
        "step-00000006.pt",
    ]


def test_more_processes_than_devices_are_refused(tmp_path):
    processes = torch.cuda.device_count() + 1
    with pytest.raises(AssertionError, match=f"{processes} processes on this machine need a CUDA device each"):
        launch(tmp_path / "run", processes)
