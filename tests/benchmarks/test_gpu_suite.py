"""benchmarks/gpu_suite.sh with a stand-in for Python: order of the stages, gate, limits, what comes back."""

import os
import subprocess
import tarfile
from pathlib import Path

import pytest

SUITE = Path(__file__).resolve().parents[2] / "benchmarks" / "gpu_suite.sh"

# Knows the questions that are asked inline, writes every other call down, and fails or dawdles where it is told to.
PYTHON = """#!/usr/bin/env bash
case "$*" in
  *get_device_capability*) echo 9.0; exit 0;;
  *decode_folder*) touch "${@: -1}/cifar.npz"; echo "${@: -1}/cifar.npz"; exit 0;;
esac
echo "$*" >>"$CALLS"
while [ $# -gt 0 ]; do
  case "$1" in
    --out) echo row >"$2"; echo png >"${2%.csv}.png";;
    --run-dir) mkdir "$2"; touch "$2/a.pt" "$2/b.csv";;
  esac
  shift
done
last=$(tail -n 1 "$CALLS")
[[ -n $SLOW && $last == *$SLOW* ]] && exec sleep 30
[[ -n $FAIL && $last == *$FAIL* ]] && exit 1
exit 0
"""


@pytest.fixture
def suite(tmp_path):
    python = tmp_path / "python"
    python.write_text(PYTHON)
    python.chmod(0o755)

    def run(*arguments, fail="", slow="", seconds=560):
        calls = tmp_path / "calls"
        calls.write_text("")
        environment = os.environ | {"PYTHON": str(python), "CALLS": str(calls), "FAIL": fail, "SLOW": slow}
        environment |= {"SUITE_SECONDS": str(seconds), "TMPDIR": str(tmp_path)}
        command = ["bash", str(SUITE), str(tmp_path / "out"), *arguments]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        return done, calls.read_text().splitlines()

    return run


def members(out):
    with tarfile.open(out / "suite.tar.gz") as bundle:
        return {Path(name).name for name in bundle.getnames()}


def test_all_stages_run_and_few_files_come_back(suite, tmp_path):
    done, calls = suite(str(tmp_path))
    assert done.returncode == 0, done.stderr
    first = [call.split()[0] for call in calls]
    assert first.index("setup.py") < first.index("-m") < first.index("benchmarks/ceilings.py")
    (tests,) = (k for k, call in enumerate(calls) if call.startswith("-m pytest") and call.endswith(" tests/gpu"))
    assert all(tests < k for k, call in enumerate(calls) if "benchmarks/" in call or "train.py" in call)
    ladder = [call for call in calls if "throughput.py" in call]
    assert len(ladder) == 3 and all("cifar.npz" in call for call in ladder)
    assert "--arms E " in ladder[0] and "F-tf32 E " in ladder[1] and "--full-run" in ladder[2]
    files = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert files == ["stages.txt", "suite.tar.gz", "tests.log", "throughput_cuda.csv", "throughput_cuda.png"]
    assert {"loss_cuda.csv", "ceilings_cuda.csv", "batchnorm_cuda.csv", "throughput.log", "b.csv"} <= members(
        tmp_path / "out"
    )
    assert not {"a.pt", "cifar.npz"} & members(tmp_path / "out")
    assert not list(tmp_path.glob("tmp.*"))  # nothing is left behind


def test_nothing_is_measured_behind_a_red_gate(suite, tmp_path):
    done, calls = suite(fail="tests/gpu")
    assert done.returncode == 1 and "red gate: nothing is measured" in done.stdout
    assert not any("benchmarks/" in call or "train.py" in call for call in calls)
    assert "red gate" in (tmp_path / "out" / "stages.txt").read_text() and (tmp_path / "out" / "tests.log").exists()


def test_a_failing_stage_leaves_the_others(suite, tmp_path):
    done, calls = suite(fail="--arms E")
    assert done.returncode == 0
    measured = next(call for call in calls if "--arms USB" in call)
    assert "F-tf32 --concurrent" in measured  # E did not compile: it is not among the arms
    assert "compile: status 1" in (tmp_path / "out" / "stages.txt").read_text()
    assert not any("decode_folder" in call or "bacon-cifar10" in call for call in calls)


def test_the_time_is_kept(suite, tmp_path):
    done, calls = suite(slow="ceilings.py", seconds=3)
    stages = (tmp_path / "out" / "stages.txt").read_text()
    assert "ceilings: status 124" in stages and "throughput: no time left" in stages
    assert "ceilings.py" in calls[-1] and done.returncode == 0


def test_stages_can_be_chosen(suite, tmp_path):
    done, calls = suite("-", "build", "throughput")
    assert done.returncode == 0 and [call.split()[0] for call in calls] == ["setup.py", "benchmarks/throughput.py"]
    assert "tests: not asked for" in (tmp_path / "out" / "stages.txt").read_text()
