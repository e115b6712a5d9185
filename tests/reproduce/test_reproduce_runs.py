"""The command as a user meets it: two runs at once, a failing run, Ctrl-C, kill -9, and going on afterwards."""

import csv
import dataclasses
import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from bacon_fast.engine.checkpoint import list_checkpoints
from bacon_fast.files import write_record
from bacon_fast.reproduce import speed
from bacon_fast.reproduce.__main__ import Arguments, reproduce
from bacon_fast.reproduce.matrix import Options, Run, expand
from bacon_fast.reproduce.runner import Progress, lock
from bacon_fast.reproduce.tables import TABLES

# Runs of seconds: 4 labeled images a step, few evaluations.
QUICK = "batch_size=4,eval_every=300,log_every=5,checkpoint_every=100000,steps=400"
PATIENCE = 120


@pytest.fixture(autouse=True)
def one_core():
    """On a busy machine two threads of one run wait for each other many times longer than they compute."""
    cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(cores)})
    yield
    os.sched_setaffinity(0, cores)


def options(text: str) -> Options:
    return Options(settings=dict(word.split("=") for word in text.split(",")))


def runs_of(out: Path, settings: str, methods=("supervised",), seeds=(0,)) -> list[Run]:
    rows = tuple(row for row in TABLES["digits"].rows if row.name in methods)
    table = dataclasses.replace(TABLES["digits"], rows=rows)
    return [run for cell in expand(table, seeds, options(settings), out) for run in cell.runs]


def start(out: Path, settings: str, *words: str) -> subprocess.Popen:
    command = [sys.executable, "-m", "bacon_fast.reproduce", "digits", "--out", str(out), "--device", "auto"]
    command += ["--set", settings, "--no-calibrate", *words]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    pipe = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(command, env=environment, start_new_session=True, **pipe)


def wait_until(condition, process: subprocess.Popen | None = None) -> None:
    begin = time.monotonic()
    while not condition():
        assert time.monotonic() - begin < PATIENCE
        assert process is None or process.poll() is None, process.communicate()[0]
        time.sleep(0.02)


def saved_step(run: Run) -> int:
    found = list_checkpoints(run.folder / "checkpoints")
    return int(re.search(r"\d+", found[-1].name).group()) if found else 0


def resumed(run: Run) -> list[bool]:
    """For each process of the run, whether it was told to go on."""
    lines = (run.folder / "train.log").read_text().splitlines()
    return [line.endswith("--resume") for line in lines if line.startswith("$ ")]


def is_free(out: Path) -> bool:
    try:
        with lock(out):
            return True
    except ValueError:
        return False


@pytest.mark.slow
def test_two_runs_at_once_stop_together(tmp_path):
    endless = QUICK.replace("steps=400", "steps=1000000")
    runs = runs_of(tmp_path, endless, seeds=(0, 1))
    process = start(tmp_path, endless, "--methods", "supervised", "--seeds", "0,1", "--jobs", "2")
    # Both advance while neither is done: they run at once.
    wait_until(lambda: all(run.step() >= 20 for run in runs), process)
    os.killpg(process.pid, signal.SIGINT)  # as the terminal's Ctrl-C: to the whole group
    output = process.communicate(timeout=PATIENCE)[0]
    assert process.returncode == 128 + signal.SIGINT and "the same command continues" in output
    assert "2 runs, 0 done" in output
    assert is_free(tmp_path), "no run is left behind"
    for run in runs:
        step = saved_step(run)
        assert run.state == "started" and step >= 20
        assert f"seed {run.config.seed} stopped at step {step:,}" in (tmp_path / "table.md").read_text()


@pytest.mark.slow
def test_a_killed_call_leaves_nothing_behind_and_the_next_one_finishes(tmp_path):
    (run,) = runs_of(tmp_path, QUICK)
    process = start(tmp_path, QUICK, "--methods", "supervised", "--seeds", "0")
    wait_until(lambda: run.step() >= 20, process)
    process.kill()
    process.communicate()
    wait_until(lambda: is_free(tmp_path))  # the run notices, saves and ends
    step = saved_step(run)
    assert run.state == "started" and 20 <= step < 400

    arguments = Arguments("digits", out=tmp_path, set=QUICK, methods="supervised", seeds="0", calibrate=False)
    assert reproduce(arguments, "again") == []
    assert run.state == "done" and resumed(run) == [False, True]
    rows = [json.loads(line) for line in (run.folder / "metrics.jsonl").read_text().splitlines()]
    steps = [row["step"] for row in rows if row["kind"] == "train"]
    assert steps == list(range(5, 401, 5)), "as of a run that nothing interrupted"
    (row,) = csv.DictReader(io.StringIO((tmp_path / "runs.csv").read_text()))
    assert row["seed"] == "0" and float(row["bacc_last_percent"]) == 100 * run.summary()["last"]["bacc"]

    modified = (run.folder / "summary.json").stat().st_mtime_ns
    assert reproduce(arguments, "and again") == []
    assert modified == (run.folder / "summary.json").stat().st_mtime_ns, "nothing was repeated"


@pytest.mark.slow
def test_a_failing_run_is_reported_and_does_not_stop_the_others(tmp_path, capfd):
    settings = QUICK.replace("steps=400", "steps=20")
    broken, other = runs_of(tmp_path, settings, ("fixmatch", "fixmatch+abc"))
    broken.folder.mkdir(parents=True)
    (broken.folder / "checkpoints").write_text("in the way of the folder of checkpoints")
    arguments = Arguments("digits", out=tmp_path, set=settings, methods="fixmatch,fixmatch+abc", seeds="0")
    assert reproduce(arguments, "python -m bacon_fast.reproduce digits") == ["digits/fixmatch-seed0"]
    assert other.state == "done"
    errors = capfd.readouterr().err
    assert "digits/fixmatch-seed0 ended with status" in errors and "checkpoints" in errors
    assert re.search(r"2 runs, 0 done; 40 steps left, .*; about \d+:\d\d", errors)
    known = speed.load(tmp_path)
    assert len(known) == 2 and all(s.setup > 0 and s.step > 0 and s.evaluation > 0 for s in known.values())
    assert "fixmatch: seed 0 failed, see" in (tmp_path / "table.md").read_text()
    rows = {row["method"]: row for row in csv.DictReader(io.StringIO((tmp_path / "table.csv").read_text()))}
    assert rows["fixmatch"]["bacc_last_percent"] == "" and rows["fixmatch+abc"]["seeds"] == "0"
    assert float(rows["fixmatch+abc"]["bacc_last_percent"]) == pytest.approx(100 * other.summary()["bacc"], abs=1e-4)
    assert not (tmp_path / "features-digits.png").exists(), "one method has nothing to stand beside"

    before = (other.folder / "summary.json").stat().st_mtime_ns
    (broken.folder / "checkpoints").unlink()
    assert reproduce(dataclasses.replace(arguments, calibrate=False), "again") == []
    assert broken.state == "done" and "failed" not in (tmp_path / "table.md").read_text()
    assert before == (other.folder / "summary.json").stat().st_mtime_ns, "the failed run alone was missing"
    for name in ("accuracy-digits", "recall-digits", "features-digits"):
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")


def test_a_dry_run_lists_and_writes_nothing(tmp_path, capsys):
    out = tmp_path / "out"
    arguments = Arguments("digits", out=out, methods="supervised,fixmatch", seeds="3", budget=0.5, dry_run=True)
    assert not reproduce(arguments, "c") and not out.exists()
    lines = capsys.readouterr().out.splitlines()
    assert [line.split() for line in lines[:2]] == [
        ["digits/supervised-seed3", "750", "steps", "new"],
        ["digits/fixmatch-seed3", "750", "steps", "new"],
    ]
    assert "2 runs, 0 done; 1,500 steps left" in lines[2] and "time not known yet" in lines[2]

    runs = runs_of(out, "steps=750,eval_every=37", ("supervised", "fixmatch"), (3,))
    jobs = min(2, len(os.sched_getaffinity(0)))
    out.mkdir()
    known = {speed.key(run.config, jobs): {"setup": 4.0, "step": 0.1, "evaluation": 0.5} for run in runs}
    write_record(out / "speed.json", known)
    reproduce(arguments, "c")
    one = 4 + 750 * 0.1 + 750 / 18 * 0.5  # a budget of a half has an evaluation every 18 steps
    minutes, seconds = divmod(round(one if jobs == 2 else 2 * one), 60)
    assert f"about {minutes}:{seconds:02d}" in capsys.readouterr().out
    (out / "speed.json").write_text("{}")
    with pytest.warns(UserWarning, match=r"speed\.json: expected a digest .*; speeds are measured again"):
        reproduce(arguments, "c")
    assert "time not known yet" in capsys.readouterr().out


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_the_bar_counts_the_steps_of_all_runs_and_follows_a_resumed_one_back(tmp_path, monkeypatch):
    one, two = runs_of(tmp_path, QUICK, seeds=(0, 1))
    for run, step in ((one, 300), (two, 50)):
        run.folder.mkdir(parents=True)
        (run.folder / "metrics.jsonl").write_text(json.dumps({"step": step}) + "\n")
    with Progress([one, two], Terminal()) as progress:
        assert (progress.bar.total, progress.bar.initial, progress.bar.n) == (800, 350, 350)
        (one.folder / "metrics.jsonl").write_text('{"step": 200}\n')
        progress.update([one])
        assert progress.bar.n == 250
        one.config.write(one.folder / "config.json")
        monkeypatch.setattr(Run, "summary", lambda run: {"last": {"bacc": 0.9}, "steps_per_second": 7.0})
        progress.finished(one)
        progress.update([two])
        assert progress.bar.n == 450
    text = progress.stream.getvalue()
    assert "1/2 digits/supervised-seed0: bACC 90.00, 7.0 steps/s" in text and "800" in text
