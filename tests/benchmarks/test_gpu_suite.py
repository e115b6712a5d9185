"""benchmarks/gpu_suite.sh with stand-ins for Python and nvidia-smi: order of the stages, limits, what comes back."""

import os
import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SUITE = ROOT / "benchmarks" / "gpu_suite.sh"
FIRST = ["info", "gate", "loss", "queue", "steps", "run", "norm", "arms"]
SECOND = [
    "rest",
    "ceilings",
    "losses",
    "batchnorm",
    "augment",
    "compiled",
    "several",
    "digits",
    "memcheck",
    "racecheck",
]

# Answers questions about device and extension, writes every other call down, and fails or dawdles when told to.
PYTHON = """#!/usr/bin/env bash
case "$*" in
  *built_with_cuda*) [ -e bacon_fast/_C.built.so ]; exit;;
  *torch.cuda.init*) [ -z "$NO_GPU" ]; exit;;
  *gpu_bundle*--digest*) echo abc; exit 0;;
esac
echo "$*" >>"$CALLS"
[[ "$*" == *"setup.py build_ext"* ]] && touch bacon_fast/_C.built.so
while [ $# -gt 0 ]; do
  case "$1" in
    --out) echo row >"$2"; echo png >"${2%.csv}.png";;
    --junitxml) echo xml >"$2";;
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
    """Runs a copy of the script in a checkout with nothing else in it."""
    checkout, tools = tmp_path / "checkout", tmp_path / "tools"
    for folder in (checkout / "benchmarks", checkout / "bacon_fast", tools):
        folder.mkdir(parents=True)
    for name in ("gpu_suite.sh", "gpu_gate.txt"):
        shutil.copy(SUITE.with_name(name), checkout / "benchmarks")
    for name, text in {
        "python": PYTHON,
        "nvidia-smi": "#!/bin/sh\necho a card",
        "compute-sanitizer": "#!/bin/sh\nwhile [ $1 != python ] && [ ${1##*/} != python ]; do shift; done\nexec $*",
    }.items():
        (tools / name).write_text(text)
        (tools / name).chmod(0o755)

    def run(*arguments, fail="", slow="", seconds=470, no_gpu=""):
        calls = tmp_path / "calls"
        calls.write_text("")
        environment = os.environ | {"PYTHON": str(tools / "python"), "CALLS": str(calls), "FAIL": fail, "SLOW": slow}
        environment |= {"SUITE_SECONDS": str(seconds), "TMPDIR": str(tmp_path), "PATH": f"{tools}:{os.environ['PATH']}"}
        environment |= {"NO_GPU": no_gpu, "TRITON_CACHE_DIR": str(tmp_path / "cache/triton")}
        (tmp_path / "cache").mkdir(exist_ok=True)
        command = ["bash", str(checkout / "benchmarks/gpu_suite.sh"), str(tmp_path / "out"), *arguments]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        return done, calls.read_text().splitlines()

    run.checkout, run.out = checkout, tmp_path / "out"
    return run


def stages(out: Path) -> dict[str, str]:
    return dict(line.split(": ") for line in (out / "stages.txt").read_text().splitlines())


def test_the_first_call(suite, tmp_path):
    done, calls = suite()
    assert done.returncode == 0, done.stderr
    assert list(stages(suite.out)) == ["build", *FIRST]
    assert calls[0].startswith("setup.py build_ext") and "-m bacon_fast.info" in calls[1]
    assert "tests/gpu -k" in calls[2] and "bank_gpu" in calls[2]
    files = {path.name for path in suite.out.iterdir()}
    assert files == {"stages.txt", "gate.xml", "loss.csv", "throughput.csv", "throughput.png", "run.csv", "logs.tar.gz"}
    with tarfile.open(suite.out / "logs.tar.gz") as logs:
        names = {Path(name).name for name in logs.getnames()}
    assert {"gate.log", "arms.log", "nvidia-smi.txt", "prepare.log"} <= names
    assert not list(tmp_path.glob("tmp.*"))  # nothing is left behind


def test_the_second_call_and_all(suite):
    done, calls = suite("second")
    assert done.returncode == 0, done.stdout
    assert list(stages(suite.out)) == ["build", *SECOND]
    rest = next(call for call in calls if "-k not (" in call)
    gate = " ".join((ROOT / "benchmarks/gpu_gate.txt").read_text().split("\n"))
    assert rest.endswith(f"-k not ({gate})")
    with tarfile.open(suite.out / "logs.tar.gz") as logs:
        names = {Path(name).name for name in logs.getnames()}
    assert "b.csv" in names and "a.pt" not in names
    suite("all")
    assert list(stages(suite.out)) == [*FIRST, *SECOND]  # built by the call before


@pytest.mark.parametrize("failing", ["setup.py", "tests/gpu", "--full-run"])
def test_no_stage_stops_the_next(suite, failing):
    done, _ = suite(fail=failing)
    assert done.returncode == 1
    found = stages(suite.out)
    assert list(found) == ["build", *FIRST]
    assert sum(line.startswith("status 1") for line in found.values()) == 1


def test_without_a_device_nothing_runs(suite):
    done, calls = suite(no_gpu="1")
    assert done.returncode == 1 and "finds no usable CUDA device" in done.stdout and not calls


def test_the_time_is_kept_and_results_are_there_before_the_end(suite):
    done, calls = suite(slow="B=4096", seconds=13)
    assert done.returncode == 1
    found = stages(suite.out)
    assert found["queue"].startswith("status 124") and found["arms"] == "no time left"
    assert "B=4096" in calls[-1] and (suite.out / "loss.csv").exists() and (suite.out / "gate.xml").exists()


def test_stages_can_be_chosen(suite):
    done, _ = suite("run", "info")
    assert done.returncode == 0 and list(stages(suite.out)) == ["build", "run", "info"]
    done, calls = suite("rnu")
    assert done.returncode == 2 and "no stage is called rnu" in done.stdout and not calls


def test_a_bundle_is_used_where_it_fits(suite, tmp_path):
    bundle = suite.checkout / "gpu-bundle"
    (bundle / "wheels").mkdir(parents=True)
    (bundle / "wheels/a.whl").touch()
    (bundle / "_C.built.so").touch()
    (tmp_path / "cache/triton").mkdir(parents=True)
    (tmp_path / "cache/triton/kernel").touch()
    with tarfile.open(bundle / "triton.tar.xz", "w:xz") as archive:
        archive.add(tmp_path / "cache/triton", "triton")
    shutil.rmtree(tmp_path / "cache/triton")
    (bundle / "_C.digest").write_text("another")
    _, calls = suite("info")
    assert calls[0].startswith("-m pip install") and calls[1].startswith("setup.py")  # made from other sources
    (suite.checkout / "bacon_fast/_C.built.so").unlink()
    (bundle / "_C.digest").write_text("abc")
    _, calls = suite("info")
    assert not any(call.startswith("setup.py") for call in calls)
    assert (tmp_path / "cache/triton/kernel").exists()
    with tarfile.open(suite.out / "triton.tar.xz") as archive:  # for the bundle of the next call
        assert "triton/kernel" in archive.getnames()


def collected(expression: str) -> set[str]:
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-o", "addopts=", "-p", "no:cacheprovider"]
    done = subprocess.run([*command, "-k", expression, "tests/gpu"], cwd=ROOT, capture_output=True, text=True)
    return {line for line in done.stdout.splitlines() if "::" in line}


GATE = " ".join((ROOT / "benchmarks/gpu_gate.txt").read_text().split("\n"))


def test_the_gate_is_what_a_device_has_time_for():
    """252 tests took 48 s on an H200: about as many, of every file that a single GPU runs."""
    gate = collected(GATE)
    assert 200 <= len(gate) <= 320
    assert {re.sub(r"\[.*", "", test.split("::")[1]) for test in gate if "test_graph_gpu" in test} == {
        "test_200_graphed_steps_end_bit_for_bit_as_200_eager_ones",
        "test_a_step_is_one_launch_and_no_wait",
        "test_every_method_waits_for_nothing_and_agrees_with_its_graph",
        "test_seeds_at_once_end_bit_for_bit_as_alone",
    }
    files = {path.name for path in (ROOT / "tests/gpu").glob("test_*.py")}
    assert {Path(test.split("::")[0]).name for test in gate} == files - {"test_distributed_gpu.py", "test_sscl_gpu.py"}


def test_the_sanitizer_sees_every_kernel_and_no_graph():
    """It does not follow what is allocated inside a capture."""
    (expression,) = re.findall(r'^plain=.* -k "(.*)"\)$', SUITE.read_text(), re.MULTILINE)
    tests = collected(expression.replace("$gate", GATE))
    assert not [test for test in tests if re.search("graph|replay|captured", test)]
    gate_files = {test.split("::")[0] for test in collected(GATE)}
    assert {test.split("::")[0] for test in tests} == {file for file in gate_files if "graph" not in file}
