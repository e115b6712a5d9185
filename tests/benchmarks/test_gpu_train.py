"""benchmarks/gpu_train.sh with a stand-in for Python: what one call leaves behind, and how the next continues."""

import os
import subprocess
import tarfile
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "gpu_train.sh"

# "Trains" in the folder after --out, where it leaves a checkpoint at each call, and a table. Told to, it goes on
# until SIGTERM, upon which it saves as the real one does.
PYTHON = """#!/usr/bin/env bash
echo "$*" >"$CALL"
while [ $# -gt 0 ]; do
  [ "$1" = --out ] && runs=$2
  [ "$1" = --data-dir ] && ls "$2" >"$CALL.images"
  shift
done
checkpoints=$runs/runs/column/fixmatch+abc-seed0/checkpoints
mkdir -p "$checkpoints"
ls "$checkpoints" >"$CALL.found"
save() {
  number=$(printf %08d $((10 * ($(wc -l <"$CALL.found") + 1))))
  head -c "$SIZE" /dev/urandom >"$checkpoints/step-$number.pt"
  echo "| table |" >"$runs/table.md"
}
echo training
trap 'save; exit 143' TERM
if [ -n "$ENDLESS" ]; then
  echo older >"$checkpoints/step-00000005.pt"
  touch "$CALL.ready"
  while :; do sleep 0.05; done
fi
save
exit "$CODE"
"""


@pytest.fixture
def train(tmp_path):
    python = tmp_path / "python"
    python.write_text(PYTHON)
    python.chmod(0o755)

    def call(seconds=60, images="-", size=1000, endless="", code=0, reserve=5):
        environment = {"PYTHON": str(python), "CALL": str(tmp_path / "call"), "SIZE": str(size), "ENDLESS": endless}
        environment |= {"CODE": str(code), "TRAIN_RESERVE": str(reserve)}
        arguments = [str(tmp_path / "out"), str(seconds), str(images), str(tmp_path / "state"), "digits", "--jobs", "3"]
        command = ["bash", str(SCRIPT), *arguments]
        done = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, check=False)
        assert not (SCRIPT.parents[1] / "build" / "gpu_train").exists()
        return done

    return call


def carry_over(tmp_path: Path) -> None:
    """The user's work between two calls."""
    (tmp_path / "state").mkdir(exist_ok=True)
    for part in (tmp_path / "out").glob("state.*"):
        part.rename(tmp_path / "state" / part.name)


def found(tmp_path: Path) -> list[str]:
    return (tmp_path / "call.found").read_text().split()


def test_runs_stop_in_time_and_the_next_call_goes_on(train, tmp_path):
    done = train(seconds=9, endless="yes")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "call.ready").exists() and "stopped after" in done.stdout and found(tmp_path) == []
    assert "--jobs 3 --no-calibrate --out" in (tmp_path / "call").read_text()
    assert (tmp_path / "out" / "table.md").read_text() == "| table |\n"
    assert "training" in (tmp_path / "out" / "log.txt").read_text()
    carry_over(tmp_path)
    done = train()
    assert done.returncode == 0 and "stopped" not in done.stdout
    assert found(tmp_path) == ["step-00000010.pt"], "the older one stayed behind"


def test_a_large_state_comes_in_parts_that_make_one_again(train, tmp_path):
    assert train(size=33_000_000).returncode == 0
    parts = sorted((tmp_path / "out").glob("state.*"))
    assert [part.name for part in parts] == ["state.00", "state.01", "state.02"]
    assert max(part.stat().st_size for part in parts) == 15 * 2**20
    carry_over(tmp_path)
    assert train(size=10).returncode == 0
    assert found(tmp_path) == ["step-00000010.pt"]
    assert [part.name for part in (tmp_path / "out").glob("state.*")] == ["state.00"]


def test_images_come_from_an_archive_or_a_folder(train, tmp_path):
    for part in ("train", "test"):
        (tmp_path / "cifar" / part / "cat").mkdir(parents=True)
    with tarfile.open(tmp_path / "cifar.tar.xz", "w:xz") as archive:
        archive.add(tmp_path / "cifar", "some/cifar")
    for images in (tmp_path / "cifar.tar.xz", tmp_path / "cifar"):
        assert train(images=images).returncode == 0
        assert (tmp_path / "call.images").read_text().split() == ["test", "train"]
        assert "--dataset folder --data-dir" in (tmp_path / "call").read_text()


def test_a_failure_keeps_what_there_is_and_its_status(train, tmp_path):
    assert train(code=3).returncode == 3
    assert (tmp_path / "out" / "state.00").exists() and (tmp_path / "out" / "table.md").exists()
