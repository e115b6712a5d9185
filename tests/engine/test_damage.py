"""Damaged, forged and mixed-up files of a run: none is used in silence, each is named in one line."""

import json
import random
import shutil
from pathlib import Path

import pytest
import torch
from run_cases import tiny

from bacon_fast.cli import train
from bacon_fast.data.longtail import Split
from bacon_fast.engine.checkpoint import CheckpointError, list_checkpoints, save_checkpoint
from bacon_fast.engine.config import Config
from bacon_fast.engine.summary import read_summary
from bacon_fast.engine.trainer import Trainer
from bacon_fast.files import read_record, write_record
from bacon_fast.run import Run, open_run

SHORT = {"method": "fixmatch", "steps": 4, "eval_every": 2, "log_every": 1, "checkpoint_every": 2}


def short(run_dir: Path, **changes) -> Config:
    return tiny(run_dir, **(SHORT | changes))


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> dict[int, Path]:
    """A finished run of seed 0 and one of seed 1; none of their files may be changed."""
    folder = tmp_path_factory.mktemp("runs")
    for seed in (0, 1):
        Trainer(short(folder / str(seed), seed=seed)).fit()
    return {seed: folder / str(seed) for seed in (0, 1)}


@pytest.fixture
def run_dir(finished, tmp_path) -> Path:
    """A copy of the first run."""
    return shutil.copytree(finished[0], tmp_path / "run")


def newest(run_dir: Path) -> Path:
    return list_checkpoints(run_dir / "checkpoints")[-1]


def edit_checkpoint(run_dir: Path, change) -> Path:
    """Changes the content of the newest checkpoint, and writes it with a right digest."""
    state = torch.load(newest(run_dir), weights_only=True)
    change(state)
    return save_checkpoint(run_dir / "checkpoints", 4, state, keep=2)


# ---- bit flips ----


@pytest.mark.parametrize("name", ["config.json", "summary.json", "split.json"])
def test_a_flipped_bit_of_a_record_is_never_used(run_dir, name):
    config, split, path = Config.read(run_dir / "config.json"), Split.load(run_dir / "split.json"), run_dir / name
    read = {
        "config.json": lambda: Config.read(path).to_dict(),
        "summary.json": lambda: read_summary(path, config, split.hash),
        "split.json": lambda: Split.load(path).hash,
    }[name]
    before, whole, refused = read(), path.read_bytes(), 0
    for bit in random.Random(0).sample(range(8 * len(whole)), 200):
        damaged = bytearray(whole)
        damaged[bit // 8] ^= 1 << bit % 8
        path.write_bytes(damaged)
        try:
            assert read() == before, f"bit {bit} of {8 * len(whole)}"  # such as 1E-5 for 1e-5
        except ValueError as error:
            assert str(path) in str(error) and "\n" not in str(error)
            refused += 1
    assert refused > 190


# ---- checkpoints ----


def test_an_older_checkpoint_is_used_with_a_line_that_says_so(run_dir):
    newest(run_dir).unlink()
    line = r"step-00000002\.pt is used, of step 2; .*run came to step 4, of which it has no usable checkpoint"
    with pytest.warns(UserWarning, match=line):
        assert open_run(run_dir, "cpu").step == 2
    (run_dir / "metrics.jsonl").unlink()  # the summary knows too
    with pytest.warns(UserWarning, match=line):
        assert open_run(run_dir, "cpu").step == 2
    (run_dir / "summary.json").unlink()
    (run_dir / "metrics.jsonl").write_text(json.dumps({"kind": "train", "step": 4}) + "\n")
    with pytest.warns(UserWarning, match=line):
        Trainer(short(run_dir, resume=True)).logger.close()


def test_the_newest_checkpoint_comes_without_a_word(run_dir, recwarn):
    assert open_run(run_dir, "cpu").step == 4
    assert not [warning for warning in recwarn if "checkpoint" in str(warning.message)]


def test_evaluate_and_predict_refuse_another_run_s_checkpoint(finished, run_dir):
    shutil.copy(newest(finished[1]), newest(run_dir))
    with pytest.raises(
        CheckpointError, match=r"step-00000004\.pt is not of the run in .*config\.json: seed: "
    ) as refusal:
        open_run(run_dir, "cpu")
    assert "\n" not in str(refusal.value)


def test_a_checkpoint_under_the_name_of_another_step_is_refused(run_dir):
    shutil.copy(list_checkpoints(run_dir / "checkpoints")[0], run_dir / "checkpoints" / "step-00000009.pt")
    with pytest.warns(UserWarning, match=r"step-00000009\.pt: expected the state after the step in its name, found 2"):
        assert open_run(run_dir, "cpu").step == 4


@pytest.mark.parametrize("command", [lambda run: open_run(run, "cpu"), lambda run: Run.open(run, "cpu").evaluate()])
def test_another_run_s_split_is_refused(finished, run_dir, command):
    shutil.copy(finished[1] / "split.json", run_dir / "split.json")
    with pytest.raises(CheckpointError, match=r"split\.json has hash .*, the run of .*step-00000004\.pt used"):
        command(run_dir)


def drop(name: str):
    return lambda state: state.pop(name)


def put(name: str, value: object):
    return lambda state: state.update({name: value})


def edit(part: str, change):
    return lambda state: change(state[part])


def first(tensors: dict) -> str:
    return next(name for name, value in tensors.items() if value.is_floating_point() and value.dim() > 1)


def broken(part: str, value: float):
    return edit(part, lambda tensors: tensors[first(tensors)].fill_(value))


def reshaped(part: str):
    return edit(part, lambda tensors: tensors.update({first(tensors): torch.zeros(3, 5)}))


BOTH = {
    "no average": drop("ema"),
    "no network": drop("inference"),
    "an average of no tensors": put("ema", [1, 2]),
    "shapes of another network": reshaped("ema"),
    "a weight that is not finite": broken("ema", float("nan")),
    "a backbone that does not exist": edit("inference", lambda i: i["network"].update(backbone="vgg")),
    "fewer classes than names": edit("inference", lambda i: i.update(class_names=["a"])),
    "images of 100000 pixels": edit("inference", lambda i: i.update(image_size=[100_000, 100_000])),
    "no configuration": drop("config"),
    "a configuration of no object": put("config", []),
    "no split": drop("split"),
}
RESUME = {
    "no method": drop("method"),
    "a method of other shapes": reshaped("method"),
    "a parameter that is infinite": broken("method", float("inf")),
    "no optimizer": drop("optimizer"),
    "a momentum of another shape": edit("optimizer", lambda o: o["state"][0].update(momentum_buffer=torch.zeros(7, 7))),
    "rows of the pool that do not exist": put("labeled", torch.full((184,), 10**12)),
    "classes that do not exist": put("labels", torch.full((184,), -1)),
    "more labels than rows": put("labels", torch.zeros(7, dtype=torch.int64)),
    "labels of text": put("labels", "abc"),
    "rows of the log without a step": put("rows", [{"kind": "eval"}]),
    "a log of no rows": put("rows", 5),
    "a generation below 0": put("generation", -1),
    "seconds that are no number": put("train_seconds", float("nan")),
    "a meter of text": put("meter", "abc"),
}
# A resumed run makes the network from its own configuration.
UNREAD = ("no network", "a backbone that does not exist", "fewer classes than names", "images of 100000 pixels")


@pytest.mark.parametrize("damage", BOTH)
def test_a_checkpoint_of_other_content_is_named_in_one_line_by_predict(run_dir, damage):
    path = edit_checkpoint(run_dir, BOTH[damage])
    with pytest.raises(CheckpointError, match=f"^{path}: its content does not fit: ") as refusal:
        open_run(run_dir, "cpu")
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("damage", [name for name in (*BOTH, *RESUME) if name not in UNREAD])
def test_a_checkpoint_of_other_content_is_named_in_one_line_on_resume(run_dir, damage):
    path = edit_checkpoint(run_dir, (BOTH | RESUME)[damage])
    with pytest.raises(CheckpointError, match=f"^{path}: its content does not fit: ") as refusal:
        Trainer(short(run_dir, resume=True))
    assert "\n" not in str(refusal.value)


# ---- configurations ----

CONFIGS = {
    "empty": b"",
    "cut": b'{"sha256": "0',
    "zeros": bytes(300),
    "not UTF-8": b'{"a": "\xff\xfe"}',
    "deep": b"[" * 100_000,
    "a list": b"[]",
    "a number": b"3",
    "an empty object": b"{}",
    "a long number": b'{"sha256": "", "seed": ' + b"9" * 5000 + b"}",
}
FORGED = {
    "no groups": {"format": 2},
    "another format": {"format": 99},
    "a group of text": {"engine": "abc"},
    "a group of a list": {"data": []},
    "parts of a list": {"parts": []},
    "a part of a number": {"parts": {"fixmatch": 5}},
    "a method of a list": {"method": ["fixmatch"]},
    "a method that does not exist": {"method": "fixmatch+nothing"},
    "a seed of text": {"seed": "0"},
    "steps below 1": {"steps": -5},
    "images of 100000 pixels": {"data": {"image_size": 100_000}},
    "one more field": {"log": {"loud": True}},
}


def one_line(capsys, words: list[str]) -> str:
    """What the command writes to stderr; it ends with status 2."""
    with pytest.raises(SystemExit) as stop:
        train(words)
    text = capsys.readouterr().err
    assert stop.value.code == 2 and text.count("\n") == 1 and text.startswith("error: "), text
    return text


@pytest.mark.parametrize("words", [["digits", "--method", "fixmatch"], []])
@pytest.mark.parametrize("damage", [*CONFIGS, *FORGED])
def test_a_configuration_without_a_checkpoint_is_named_in_one_line(run_dir, damage, words, capsys):
    shutil.rmtree(run_dir / "checkpoints")
    path = run_dir / "config.json"
    if damage in CONFIGS:
        path.write_bytes(CONFIGS[damage])
    else:
        saved = read_record(path)
        for name, value in FORGED[damage].items():
            inside = isinstance(value, dict) and name != "parts"
            saved[name] = saved[name] | value if inside else value
        if damage == "no groups":
            saved = FORGED[damage]
        write_record(path, saved)
    assert f"error: {path}: " in one_line(capsys, [*words, "--run-dir", str(run_dir), "--resume"])


# ---- summaries ----

SUMMARIES = {
    "another seed": {"seed": 5},
    "another method": {"method": "ssc"},
    "other steps": {"steps": 5},
    "another split": {"split": "0" * 64},
    "an accuracy above 1": {"bacc": 5.0},
    "an accuracy of text": {"top1": "0.5"},
    "no last evaluation": {"last": None},
    "a mean of too few numbers": {"mean_last_20": {"bacc": 0.5}},
    "recalls of other classes": {"per_class": [0.5]},
    "names of no classes": {"class_names": 5},
    "no time": {"train_seconds": 0},
    "no versions": {"versions": None},
}


@pytest.mark.parametrize("values", SUMMARIES.values(), ids=SUMMARIES)
def test_a_summary_that_is_not_of_the_run_is_named_in_one_line(run_dir, values):
    path, config = run_dir / "summary.json", Config.read(run_dir / "config.json")
    split = Split.load(run_dir / "split.json").hash
    summary = read_summary(path, config, split)
    write_record(path, summary | values)
    with pytest.raises(ValueError, match=f"^{path}: {next(iter(values))}") as refusal:
        read_summary(path, config, split)
    assert "\n" not in str(refusal.value)


# ---- what killed writers leave ----


@pytest.mark.parametrize("resume", [True, False])
def test_temporary_files_of_killed_writers_go_at_the_next_start(run_dir, tmp_path, resume):
    folder = run_dir if resume else tmp_path / "new"
    left = [".config.json.1.tmp", ".summary.json.22.tmp", ".split.json.3.tmp", ".metrics.jsonl.4.tmp"]
    left += ["checkpoints/.step-00000016.pt.5.tmp", "figures/.curves.png.6.tmp"]
    for name in left:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("half")
    (folder / ".mine.tmp").touch()
    Trainer(short(folder, resume=resume)).logger.close()
    assert not [name for name in left if (folder / name).exists()]
    assert (folder / ".mine.tmp").exists()
