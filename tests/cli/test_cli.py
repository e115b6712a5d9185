"""The command line as a user meets it: defaults, overrides, help, and errors that name what is allowed."""

import json
import os
import re
import shutil
import subprocess
import sys
import time
import warnings
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits

from bacon_fast.cli import format_summary, parse, parse_runs, run_directories, train, with_clear_errors
from bacon_fast.engine.checkpoint import list_checkpoints, save_checkpoint
from bacon_fast.engine.config import FORMAT, GROUP_OF
from bacon_fast.engine.presets import PRESETS
from bacon_fast.files import read_record, write_record
from bacon_fast.methods import PARTS
from bacon_fast.parser import RARE
from bacon_fast.run import Run, open_run

ROOT = Path(__file__).resolve().parents[2]


def call(*words: str, cwd: Path = ROOT, columns: int = 120) -> subprocess.CompletedProcess:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "COLUMNS": str(columns)}
    return subprocess.run([sys.executable, *words], cwd=cwd, env=environment, capture_output=True, text=True)


def test_no_argument_means_the_digits_preset():
    config = parse([])
    assert config.data.dataset == "digits" and config.method == "fixmatch+abc+bacon"
    assert config.run.run_dir is None, "made when the run begins"


def test_runs_that_start_in_the_same_second_get_directories_of_their_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(time, "strftime", lambda form: "20260102-030405")
    name = "digits-supervised-seed{}-20260102-030405"
    first, second = (parse_runs(["--method", "supervised", "--lr", lr, "--seeds", "0,1"]) for lr in ("0.1", "0.01"))
    with run_directories(first) as one, run_directories(second) as two:
        assert [config.run.run_dir for config in one] == [Path("runs") / name.format(seed) for seed in (0, 1)]
        assert [config.run.run_dir for config in two] == [Path("runs") / f"{name.format(seed)}-2" for seed in (0, 1)]
        assert all(config.run.run_dir.is_dir() for config in (*one, *two))
        assert [config.optimizer.lr for config in two] == [0.01, 0.01]
        (two[1].run.run_dir / "config.json").touch()
    # What holds a run stays, the rest goes.
    assert list(Path("runs").iterdir()) == [two[1].run.run_dir]
    (named,) = parse_runs(["--run-dir", "mine"])
    with run_directories([named]) as same:
        assert same == [named]
    assert not Path("mine").exists()


@pytest.mark.parametrize(
    "words", [["--help"], ["--lr", "-1"], ["--labeled-head", "500"], ["--seeds", "0,1", "--labeled-head", "500"]]
)
def test_what_trains_nothing_leaves_no_directory(words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit):
        train(["digits", *words])
    assert list(tmp_path.iterdir()) == []


def test_a_run_without_a_named_directory_is_found_under_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    words = ["digits", "--method", "supervised", "--steps", "1", "--batch-size", "8", "--threads", "1", "--no-report"]
    train(words)
    train([*words, "--seeds", "3,4"])
    folders = {line.removeprefix("run directory: ") for line in capsys.readouterr().out.splitlines() if "run d" in line}
    assert len(folders) == 3 and all((tmp_path / folder / "summary.json").exists() for folder in folders)
    assert {Path(folder).name[:23] for folder in folders} == {f"digits-supervised-seed{seed}" for seed in (0, 3, 4)}


def test_a_preset_is_overridden_field_by_field():
    config = parse(
        ["bacon-cifar10", "--data-dir", "D", "--seed", "3", "--gamma-u", "-100", "--no-hflip", "--steps", "7"]
    )
    assert (config.data.data_dir, config.seed, config.data.gamma_u, config.views.hflip, config.steps) == (
        Path("D").resolve(),
        3,
        -100,
        False,
        7,
    )
    assert config.views.batch_size == 64 and config.preset == "bacon-cifar10"


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_parses_and_survives_json(name):
    config = parse([name])
    assert type(config).from_dict(json.loads(json.dumps(config.to_dict()))) == config


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["nonsense"], "bacon-cifar10"),
        (["digits", "--method", "fixmatch+nonsense"], "fixmatch+abc+bacon"),
        (["digits", "--protocol", "nonsense"], "bacon-cifar10-100"),
        (["digits", "--dataset", "nonsense"], "cifar10"),
        (["digits", "--backbone", "vgg"], "wrn-DEPTH-WIDTH"),
        (["digits", "--device", "tpu"], "cuda"),
        (["digits", "--backbone", "wrn-27-2"], "6n+4"),
        (["digits", "--bacon.proj-layers", "3"], "proj_layers"),
        (["digits", "--lr", "-1"], "lr"),
        (["digits", "--lr", "inf"], "finite"),
        (["digits", "--run-dir", "/dev/null/run"], "/dev/null"),
        (["digits", "--steps", "0"], "steps"),
        (["digits", "--gamma-l", "0.5"], "gamma_l"),
        (["digits", "--labeled-head", "500"], "found"),
        (["digits", "--unlabeled-head", "500"], "needs 40 labeled + 500 unlabeled"),
        (["digits", "--resume"], "--run-dir"),
        (["digits", "--precision", "tf32", "--device", "cpu"], "tf32"),
        (["bacon-cifar10"], "data_dir"),
        (["bacon-cifar10", "--data-dir", "missing"], "--download"),
        (["digits", "--backbone", f"wrn-10-{10**11}"], "error: out of memory: "),
        (["digits", "--bacon.proj-dim", str(10**15)], "--batch-size, --image-size"),
        (["digits", "--split", "missing.json"], "missing.json"),
        (["digits", "--split", "/tmp"], "/tmp"),
    ],
)
def test_wrong_values_fail_at_once_and_name_the_allowed_ones(words, expected, tmp_path, capsys):
    if "--run-dir" not in words and "--resume" not in words:
        words = [*words, "--run-dir", str(tmp_path / "run")]
    with pytest.raises(SystemExit) as stop:
        train(words)
    captured = capsys.readouterr()
    assert stop.value.code == 2
    assert expected in captured.err + captured.out
    assert not (tmp_path / "run" / "config.json").exists(), "nothing may be written before the arguments are checked"


def test_errors_reach_the_shell_as_one_line_and_a_status():
    result = call("train.py", "nonsense")
    assert result.returncode == 2
    assert result.stderr.startswith("error: preset: expected one of digits") and result.stderr.count("\n") == 1


def test_a_backend_that_cannot_run_here_is_refused_before_anything_is_written(tmp_path, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    words = ["--loss-backend", "triton", "--device", "cpu", "--run-dir", str(tmp_path / "run")]
    result = call("train.py", "digits", *words)
    assert result.returncode == 2 and result.stderr.startswith("error: loss_backend: ")
    assert not (tmp_path / "run").exists()


def test_help_lists_presets_options_and_choices():
    text = call("train.py", "--help").stdout
    for word in (*PRESETS, "--run-dir", "--steps", "--seed", "--method", "--resume", "--gamma-u", "fixmatch+abc+bacon"):
        assert word in text


@pytest.mark.parametrize("preset", ["digits", "sscl-imagenet-10pct"])
def test_the_help_of_a_preset_fits_two_screens_and_shows_the_method_s_own_options(preset):
    text = call("train.py", preset, "--help", columns=110).stdout
    assert len(text.splitlines()) <= 2 * 60 and max(map(len, text.splitlines())) <= 110
    own = {name.split(".")[0] for name in re.findall(r"--([a-z]+)\.", text)}
    assert own == set(PRESETS[preset].config().parts)
    assert "--lr FLOAT" in text and "--threads" not in text and "--help-all" in text


def test_the_help_leaves_out_rare_options_but_those_that_the_preset_sets():
    texts = {preset: call("train.py", preset, "--help").stdout for preset in ("digits", "photos", "photos-cached")}
    shown = {option: [preset for preset in texts if f"--{option} " in texts[preset].replace(",", " ")]
             for option in ("usb-compat", "ema-warmup", "cached-views")}  # fmt: skip
    assert shown == {"usb-compat": [], "ema-warmup": ["photos", "photos-cached"], "cached-views": ["photos-cached"]}
    assert set(GROUP_OF) >= RARE
    assert parse(["digits", "--usb-compat", "--other-labels", "drop"]).shared.usb_compat, "hidden, not gone"


def test_help_all_shows_every_option():
    text = call("train.py", "--help-all").stdout
    for name in (*GROUP_OF, *(f"{part}.{f.name}" for part in PARTS for f in fields(PARTS[part].options))):
        assert f"--{name.replace('_', '-')}" in text, name


def test_an_option_of_a_part_that_the_method_lacks_is_refused_with_those_that_have_it():
    result = call("train.py", "digits", "--method", "fixmatch+abc", "--bacon.top-k", "5")
    assert result.returncode == 2 and result.stderr.startswith(
        "error: method fixmatch+abc has no part bacon; the methods that have one: fixmatch+bacon, fixmatch+abc+bacon, "
    )
    config = parse(["digits", "--method=fixmatch+daso", "--daso.start", "0.1", "--lr", "3e-4"])
    assert (config.parts["daso"].start, config.optimizer.lr) == (0.1, 3e-4)
    assert parse(["digits", "--method", "ssc", "--method", "sscl", "--sscl.mask-queue"]).parts["sscl"].mask_queue


def test_info_reports_versions_and_backends():
    result = call("-m", "bacon_fast", "info")
    assert result.returncode == 0
    for word in ("bacon_fast", "torch", "native extension: built", "cpp", "triton", "reference", "bacon_loss"):
        assert word in result.stdout


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("cli") / "run"
    words = ["--run-dir", str(folder), "--steps", "30", "--batch-size", "16", "--eval-every", "15", "--log-every", "10"]
    result = call("train.py", "digits", *words)
    assert result.returncode == 0, result.stderr
    for word in ("last evaluation", "best (chosen on the test set)", "mean of last 20", "recall", "report"):
        assert word in result.stdout
    speed = re.search(r"step 10/30 .* [\d.]+ (steps/s|s/step) ETA ", result.stderr)  # a crowded machine makes few
    assert speed, "plain progress lines without a terminal"
    return folder


def test_run_writes_a_self_contained_report(run_dir):
    text = (run_dir / "report.html").read_text()
    assert "fixmatch+abc+bacon" in text and "data:image/png;base64," in text
    assert "http://" not in text.replace("http://www.w3.org", "") and 'src="http' not in text
    assert list((run_dir / "figures").glob("*.png"))


def test_evaluate_repeats_the_run_s_last_evaluation(run_dir):
    result = call("-m", "bacon_fast", "evaluate", str(run_dir))
    assert result.returncode == 0, result.stderr
    metrics, summary = json.loads(result.stdout), json.loads((run_dir / "summary.json").read_text())
    assert metrics["step"] == 30 and metrics["class_names"] == summary["class_names"] == [str(d) for d in range(10)]
    assert all(metrics[name] == summary[name] for name in ("top1", "bacc", "gm", "per_class"))
    assert sum(map(sum, metrics["confusion"])) == metrics["num_images"]


def test_predict_prints_a_json_line_a_file_and_names_the_unreadable(run_dir, tmp_path):
    files = []
    for i, image in enumerate(load_digits().images[:3]):
        files.append(tmp_path / f"{i}.png")
        Image.fromarray((image * 255 / 16).astype("uint8")).resize((40, 40)).save(files[-1])
    files.insert(1, tmp_path / "broken.png")
    files[1].write_bytes(b"no image")
    result = call("-m", "bacon_fast", "predict", str(run_dir), *map(str, files))
    rows = [json.loads(line) for line in result.stdout.splitlines()]
    assert [row["file"] for row in rows] == [str(f) for f in files]
    assert result.returncode == 1 and "error" in rows[1] and "Traceback" not in result.stderr
    for row in (rows[0], rows[2], rows[3]):
        assert row["class"] in {str(d) for d in range(10)} and 0 < row["probability"] <= 1


def test_a_network_opens_without_the_run_s_configuration(run_dir, tmp_path):
    """As long as the format is known: the checkpoint describes the network beside its weights."""
    (checkpoint,) = list_checkpoints(run_dir / "checkpoints")[-1:]
    state = torch.load(checkpoint, weights_only=True)
    assert state["format"] == FORMAT and state["inference"]["network"]["heads"] == "balanced"
    save_checkpoint(tmp_path / "checkpoints", 30, state | {"config": {}}, keep=2)
    one, two = open_run(run_dir, "cpu"), open_run(tmp_path, "cpu")
    images = torch.zeros(2, 3, *one.image_size)
    assert torch.equal(one.network.predict(images)[1], two.network.predict(images)[1])


def test_a_run_of_another_format_is_refused_in_one_line(run_dir, tmp_path):
    folder = shutil.copytree(run_dir, tmp_path / "run")
    path, (checkpoint, *_) = folder / "config.json", list_checkpoints(folder / "checkpoints")[::-1]
    write_record(path, {name: value for name, value in read_record(path).items() if name != "format"})
    state = torch.load(checkpoint, weights_only=True)
    torch.save({name: value for name, value in state.items() if name != "format"}, checkpoint)
    words = ["digits", "--run-dir", str(folder), "--steps", "30", "--batch-size", "16", "--resume"]
    for command in (["train.py", *words], ["-m", "bacon_fast", "evaluate", str(folder)]):
        result = call(*command)
        assert result.returncode == 2 and result.stderr == (
            f"error: {checkpoint}: its format is without a number, and this version of bacon_fast reads format 2 only\n"
        )
    for file in (folder / "checkpoints").iterdir():
        file.unlink()
    result = call("train.py", *words)
    assert result.returncode == 2 and result.stderr.startswith(f"error: {path}: its format is without a number")
    assert result.stderr.count("\n") == 1


def test_evaluate_and_predict_say_what_is_missing(tmp_path):
    for module in ("evaluate", "predict"):
        words = ["-m", "bacon_fast", module, str(tmp_path / "none"), *(["x.png"] if module == "predict" else [])]
        result = call(*words)
        assert result.returncode == 2 and "Traceback" not in result.stderr and "none" in result.stderr


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (MemoryError(), 2),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"), 2),
        (torch.AcceleratorError("CUDA error: out of memory"), 2),
        (RuntimeError("shapes do not fit"), None),
    ],
)
def test_exhausted_memory_comes_with_advice_and_no_traceback(error, status, capsys):
    def fail() -> None:
        raise error

    with pytest.raises(RuntimeError if status is None else SystemExit) as stop:
        with_clear_errors(fail)
    if status is not None:
        assert stop.value.code == status
        message = capsys.readouterr().err
        assert message.startswith("error: out of memory: ") and "smaller --batch-size" in message
        assert (str(error) or "no detail") in message


def test_a_warning_is_one_line_without_a_place(capsys):
    def warn() -> None:
        print(warnings.formatwarning(UserWarning("one\n  two"), UserWarning, "/ours/file.py", 3), end="")

    with_clear_errors(warn)
    assert capsys.readouterr().out == "warning: one two\n"


def test_the_module_of_the_command_line_is_one_itself():
    result = call("-m", "bacon_fast.cli", "nonsense")
    assert result.returncode == 2 and result.stderr.startswith("error: preset: expected one of digits")


def test_evaluate_refuses_images_of_another_size(tmp_path):
    generator = np.random.default_rng(0)

    def write(side: int) -> Path:
        def images(n: int) -> np.ndarray:
            return generator.integers(0, 255, (n, side, side, 3), dtype=np.uint8)

        labels = {"train_labels": np.arange(12) % 3, "test_labels": np.arange(6) % 3}
        file = tmp_path / f"{side}.npz"
        np.savez(file, train_images=images(12), test_images=images(6), class_names=list("abc"), **labels)
        return file

    small, large = write(8), write(16)
    words = ["digits", "--dataset", "arrays", "--protocol", "as-is", "--data-dir", str(small), "--method", "supervised"]
    words += ["--steps", "1", "--batch-size", "4", "--threads", "1", "--no-report", "--run-dir", str(tmp_path / "run")]
    train(words)
    run = Run.open(tmp_path / "run")
    assert run.evaluate()["num_images"] == 6
    other = tmp_path / "other.npz"
    shutil.copy(write(8), other)
    with pytest.warns(UserWarning, match=r"data_dir: the images of .*other\.npz are not those that the run had"):
        run.evaluate(other)
    with pytest.raises(ValueError, match=r"data_dir: expected images of 8 x 8 pixels, .*, found 16 x 16"):
        run.evaluate(large)


def test_control_characters_in_names_do_not_reach_the_terminal(capsys):
    names = ["cat", "\x1b[31mdog"]
    row = {"top1": 0.5, "bacc": 0.5, "gm": 0.5}
    summary = {
        "dataset": "folder",
        "method": "supervised",
        "steps": 1,
        "seed": 0,
        "steps_per_second": 1.0,
        "choice": "",
        "calibration": "",
    }
    summary |= {"last": row, "mean_last_20": row, "best_on_test": row, "class_names": names, "per_class": [1.0, None]}
    assert "\x1b" not in (text := format_summary(summary, [1, 1], None)) and "\\x1b[31mdog" in text

    def fail() -> None:
        raise ValueError("data_dir: \x1b[31mred\nsecond line")

    with pytest.raises(SystemExit):
        with_clear_errors(fail)
    assert capsys.readouterr().err == "error: data_dir: \\x1b[31mred\nsecond line\n"
