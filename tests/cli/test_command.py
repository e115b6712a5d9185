"""`bacon-fast WORD`: every word leads to a command, and Python does the same by the same names."""

import doctest
import json
import os
import re
import subprocess
import sys
import tomllib
import warnings
from pathlib import Path

import pytest
import torch
from PIL import Image

import bacon_fast
from bacon_fast.__main__ import COMMANDS, main
from bacon_fast.cli import parse
from bacon_fast.engine.checkpoint import CheckpointError
from bacon_fast.engine.config import Config
from bacon_fast.redraw import redraw
from bacon_fast.training import configuration

ROOT = Path(__file__).resolve().parents[2]
SHORT = {"steps": 4, "batch_size": 8, "backbone": "wrn-10-1", "threads": 1, "log_every": 1, "eval_every": 2}


def test_the_console_command_is_the_module_s_main():
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    assert scripts == {"bacon-fast": "bacon_fast.__main__:main"}
    called = [sys.executable, "-m", "bacon_fast", "--help"]
    text = subprocess.run(called, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert re.findall(r"^  (\w+)  ", text, re.MULTILINE) == list(COMMANDS)


@pytest.mark.parametrize("word", COMMANDS)
def test_every_word_has_a_help_of_its_own(word, capsys):
    with pytest.raises(SystemExit) as end:
        main([word, "--help"])
    assert not end.value.code and f"usage: bacon-fast {word} " in capsys.readouterr().out


def test_other_words_are_refused_with_those_there_are(capsys):
    with pytest.raises(SystemExit) as end:
        main(["tarin", "digits"])
    assert end.value.code == 2
    assert capsys.readouterr().err.startswith("error: command: expected one of train, evaluate, ")
    with pytest.raises(SystemExit, match="usage: bacon-fast COMMAND"):
        main([])
    main(["--version"])
    assert capsys.readouterr().out == f"{bacon_fast.__version__}\n"


def test_keywords_give_the_configuration_of_the_words(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = ["folder", "--method", "remixmatch+daso", "--data-dir", "photos", "--image-size", "32", "--no-hflip"]
    words += ["--classes", "ant", "bee", "--daso.start", "0.1", "--run-dir", "mine", "--lr", "1"]
    options = {"method": "remixmatch+daso", "data_dir": "photos", "image_size": 32, "hflip": False, "lr": 1}
    options |= {"classes": ["ant", "bee"], "daso.start": 0.1, "run_dir": "mine"}
    assert configuration("folder", options).to_dict() == parse(words).to_dict()
    assert configuration(None, {}).to_dict() == parse([]).to_dict()
    variant = {"method": "fixmatch+abc+bacon", "bacon.variant": "official"}
    assert configuration("digits", variant).to_dict() == parse(["digits", "--bacon.variant", "official"]).to_dict()


@pytest.mark.parametrize(
    ("preset", "options", "error", "message"),
    [
        ("digit", {}, ValueError, "preset: expected one of digits"),
        ("digits", {"stpes": 3}, TypeError, "no field 'stpes'"),
        ("digits", {"method": "fixmatch", "abc.lambda_abc": 1.0}, ValueError, "method fixmatch has no part abc"),
        ("digits", {"lr": "fast"}, ValueError, "lr: expected a finite number, found 'fast'"),
        ("digits", {"resume": True}, ValueError, "resume: expected --run-dir"),
    ],
)
def test_a_keyword_that_does_not_fit_is_named(preset, options, error, message):
    with pytest.raises(error, match=re.escape(message)):
        bacon_fast.train(preset, **options)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run from Python, and the rows that its hook got."""
    rows, folder = [], tmp_path_factory.mktemp("python") / "run"
    options = {"method": "fixmatch+abc", "run_dir": str(folder), "report": False, **{"abc.lambda_abc": 0.5}}
    return bacon_fast.train("digits", on_row=rows.append, **SHORT, **options), rows


def test_training_from_python_returns_the_run(trained, tmp_path):
    run, rows = trained
    assert run.step == 4 and Config.from_dict(run.saved).parts["abc"].lambda_abc == 0.5
    logged = [json.loads(line) for line in (run.directory / "metrics.jsonl").read_text().splitlines()]
    assert rows == logged and [row["kind"] for row in rows].count("eval") == 2
    summary, metrics = json.loads((run.directory / "summary.json").read_text()), run.evaluate()
    assert metrics["bacc"] == summary["bacc"]
    Image.new("L", (20, 20), 128).save(tmp_path / "gray.png")
    opened = bacon_fast.Run.open(run.directory, "cpu")
    (one,), (two,) = opened.predict([tmp_path / "gray.png"]), run.predict([str(tmp_path / "gray.png")])
    assert one == two and one["class"] in run.class_names
    state, other = run.network.state_dict(), opened.network.state_dict()
    assert all(torch.equal(value, other[name]) for name, value in state.items())


def test_a_run_goes_on_from_python(tmp_path):
    rows = []
    bacon_fast.train("digits", method="supervised", run_dir=tmp_path, report=False, **SHORT)
    again = bacon_fast.train(run_dir=tmp_path, resume=True, steps=6, on_row=rows.append)
    assert again.step == 6 and {row["step"] for row in rows} == {5, 6}
    with pytest.raises(ValueError, match=r"method: expected supervised, that of the run in .*, found fixmatch"):
        bacon_fast.train(run_dir=tmp_path, resume=True, method="fixmatch")


@pytest.mark.parametrize("called", [bacon_fast.train, bacon_fast.Run], ids=["train", "Run"])
def test_the_examples_run(called, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (test,) = (test for test in doctest.DocTestFinder().find(called, called.__name__) if test.examples)
    assert doctest.DocTestRunner().run(test).failed == 0


def test_an_error_in_the_hook_warns_once_and_costs_nothing(tmp_path):
    def fail(row: dict) -> None:
        row.clear()
        raise KeyError("loss")

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run = bacon_fast.train("digits", method="supervised", on_row=fail, run_dir=tmp_path, report=False, **SHORT)
    assert [str(w.message)[:23] for w in caught if "on_row" in str(w.message)] == ["on_row: KeyError: 'loss"]
    logged = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert run.step == 4 and len(logged) == 6 and all("step" in row for row in logged)


def test_a_table_that_another_program_has_open_is_left_with_a_warning(tmp_path, monkeypatch):
    replace = os.replace

    def refuse(source, target):
        if Path(target).name == "metrics.csv" and (tmp_path / "metrics.csv").exists():
            raise PermissionError(13, "in use", str(target))
        replace(source, target)

    monkeypatch.setattr("bacon_fast.files.REPLACE_AFTER", (0,))
    monkeypatch.setattr(os, "replace", refuse)
    with pytest.warns(UserWarning, match=r"in use.*metrics\.csv.*the next evaluation writes it again"):
        run = bacon_fast.train("digits", method="supervised", run_dir=tmp_path, report=False, **SHORT)
    assert run.step == 4 and (tmp_path / "metrics.jsonl").read_text().count("eval") == 2


@pytest.mark.slow
def test_the_report_can_be_written_again(trained, tmp_path, monkeypatch):
    run, _ = trained
    before = (run.directory / "summary.json").read_bytes()
    path = redraw(run.directory)
    assert path == run.directory / "report.html" and "fixmatch+abc" in path.read_text()
    assert (run.directory / "summary.json").read_bytes() == before
    with pytest.raises(CheckpointError, match="run: expected a run directory"):
        redraw(tmp_path / "none")


def test_a_report_that_cannot_be_written_is_a_warning(tmp_path, monkeypatch):
    def refuse(run_dir, data):
        raise PermissionError(13, "in use", str(run_dir / "report.html"))

    monkeypatch.setattr("bacon_fast.report.page.write_report", refuse)
    with pytest.warns(UserWarning, match=r"report\.html.*; `bacon-fast report .*` writes the report again"):
        run = bacon_fast.train("digits", method="supervised", run_dir=tmp_path / "run", **SHORT)
    assert run.step == 4
