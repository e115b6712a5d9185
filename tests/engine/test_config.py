"""Which values a configuration refuses, from Python, from JSON and from the command line."""

import dataclasses
import inspect
import json
import math
from pathlib import Path

import pytest
import torch

from bacon_fast.cli import parse
from bacon_fast.engine.checkpoint import load_latest
from bacon_fast.engine.config import FORMAT, GROUP_OF, GROUPS, Config
from bacon_fast.engine.groups import DataOptions, ModelOptions
from bacon_fast.engine.presets import PRESETS
from bacon_fast.files import write_record
from bacon_fast.losses import BaConLoss
from bacon_fast.methods import METHODS, PARTS, default_options, names
from bacon_fast.methods.options import as_fields, from_json, to_json

# A method of each part.
METHOD_OF = {part: next(m for m in METHODS if part in m.split("+")) for part in PARTS}
NAMES = [
    *GROUP_OF, *(f"{part}.{field.name}" for part in PARTS for field in dataclasses.fields(PARTS[part].options)),
]  # fmt: skip
TOP = ("steps", "seed")


def change(name: str, value: object) -> Config:
    """The defaults of a method with that option, and another value of it."""
    return Config.of(METHOD_OF.get(name.rpartition(".")[0], "fixmatch")).replace(**{name: value})


def annotation(name: str) -> object:
    part, _, field = name.rpartition(".")
    options = PARTS[part].options if part else GROUPS[GROUP_OF[name]]
    return next(f.type for f in dataclasses.fields(options) if f.name == field)


FLOATS = [name for name in NAMES if annotation(name) in (float, float | None)]


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("steps", 1.5, "an integer"),
        ("steps", "10", "an integer"),
        ("steps", None, "an integer"),
        ("batch_size", True, "an integer"),
        ("bacon.proj_dim", 32.0, "an integer"),
        ("bacon.proj_layers", 1.0, "an integer"),
        ("seed", 0.0, "an integer"),
        ("lr", "0.1", "a finite number"),
        ("lr", True, "a finite number"),
        pytest.param("lr", 10**400, "a finite number", id="lr-beyond-a-float"),
        ("gamma_u", [1.0], "a finite number or None"),
        ("hflip", "no", "True or False"),
        ("cutout", 1, "True or False"),
        ("lb_in_ulb", "yes", "True or False or None"),
        ("device", 0, "a string"),
        ("backbone", None, "a string"),
        ("precision", "int8", "one of auto, fp32, tf32, bf16, fp16"),
        ("optimizer", "lion", "one of sgd, adam, adamw"),
        ("optimizer", ["sgd"], "one of sgd, adam, adamw"),
        ("bacon.centers", "q", "one of bank, batch"),
        ("bacon.neg_mode", "mean", "one of authors, paper or None"),
        ("classes", "abc", "a tuple of strings or None"),
        ("classes", ("a", 1), "a tuple of strings or None"),
        ("run_dir", "runs/a", "a pathlib.Path or None"),
    ],
)
def test_a_value_of_another_type_is_named(name, value, expected):
    with pytest.raises(ValueError) as refusal:
        change(name, value)
    assert str(refusal.value) == f"{name}: expected {expected}, found {value!r}"


def test_every_field_is_checked_against_its_annotation():
    for name in (*TOP, *NAMES):
        with pytest.raises(ValueError, match=rf"^{name}: expected .*, found <object"):
            change(name, object())
    with pytest.raises(ValueError, match=r"^run: expected RunOptions, found <object"):
        dataclasses.replace(Config.of("ssc"), run=object())


def test_numbers_are_finite():
    assert {"fixmatch.lambda_u", "abc.lambda_abc", "debiaspl.tau", "daso.t_dist", "crest.alpha"} <= set(FLOATS)
    for name in FLOATS:
        for value in (math.inf, -math.inf, math.nan):
            with pytest.raises(ValueError, match=f"^{name}: expected a finite number.*, found {value}"):
                change(name, value)


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        *((name, -0.5, "a number of at least 0") for name in (
            "fixmatch.lambda_u", "remixmatch.lambda_u", "sscl.lambda_con", "abc.lambda_abc", "bacon.lambda_con",
            "remixmatch.lambda_kl", "ssc.lambda_up", "debiaspl.tau", "bacon.bta", "weight_decay",
        )),
        *((name, 0.0, "a number above 0") for name in (
            "lr", "rank_timeout", "bacon.temperature", "bacon.negative_weight", "remixmatch.rampup", "ssc.temperature",
            "ssc.pl_temperature", "sscl.gamma", "daso.t_dist", "crest.alpha", "remixmatch.mixup_alpha",
        )),
        *((name, 1.5, "a number between 0 and 1") for name in (
            "threshold", "ema", "distribution_momentum", "bacon.reliable_threshold", "bacon.contrast_start",
            "pda.t_min", "cossl.lambda_0", "sscl.momentum",
        )),
        *((name, 1.0, "a number from 0 to below 1") for name in ("daso.start", "darp.start", "cossl.start")),
        *((name, 0, "an integer of at least 1") for name in (
            "steps", "batch_size", "unlabeled_ratio", "epochs", "eval_every", "log_every", "checkpoint_every",
            "bacon.proj_dim", "bacon.top_k", "sscl.queue", "crest.generations",
        )),
        *((name, -1, "an integer of at least 0") for name in ("randaugment_ops", "threads", "sscl.extra_keys")),
        ("bacon.proj_layers", 3, "0, 1 or 2"),
        ("sscl.proj_layers", -1, "0, 1 or 2"),
        ("keep_checkpoints", 1, "at least 2"),
        ("seed", -1, "an integer in 0..2"),
        ("bn_momentum", 0.0, "a number above 0 and up to 1"),
        ("gamma_l", 0.5, "at least 1, or at most -1"),
        ("dataset", "mnist", "one of digits"),
        ("protocol", "none", "one of"),
        ("backbone", "vgg", "wrn-DEPTH-WIDTH"),
    ],
)  # fmt: skip
def test_values_out_of_range_are_named(name, value, expected):
    with pytest.raises(ValueError) as refusal:
        change(name, value)
    assert str(refusal.value).startswith(f"{name}: expected {expected}") and repr(value) in str(refusal.value)


def test_names_on_the_command_line_are_unlike_each_other():
    assert len(GROUP_OF) == sum(len(dataclasses.fields(options)) for options in GROUPS.values())
    assert not set(GROUP_OF) & {"preset", "method", "steps", "seed", "seeds", *PARTS}


def test_an_integer_is_a_number():
    config = Config.of("fixmatch").replace(lr=1, gamma_l=-50, classes=(), run_dir=Path("a"))
    assert config.optimizer.lr == 1


def test_the_adjustment_leaves_temperatures_positive():
    for value in (1.0, 50.0):
        with pytest.raises(ValueError, match="bta: expected a number below 1, except for variant blog, found"):
            change("bacon.bta", value)
    blog = Config.of("fixmatch+bacon", {"bacon": {"bta": 50.0, "variant": "blog"}})
    for options in (change("bacon.bta", 0.999).parts["bacon"], blog.parts["bacon"]):
        loss = BaConLoss(4, 3, 5, 5, bta=options.bta, variant=options.variant)
        loss.bank.class_counts.fill_(7)
        assert (loss.temperatures(0.0) > 0).all()


def test_bacon_s_options_have_the_defaults_of_its_loss():
    parameters = inspect.signature(BaConLoss).parameters
    options = default_options("fixmatch+bacon")["bacon"]
    for field in dataclasses.fields(options):
        if field.name in parameters:
            assert getattr(options, field.name) == parameters[field.name].default, field.name


def test_parts_are_those_of_the_method():
    config = Config.of("fixmatch+daso")
    with pytest.raises(ValueError, match=r"parts: expected those of fixmatch\+daso, found fixmatch"):
        dataclasses.replace(config, parts={"fixmatch": config.parts["fixmatch"]})
    with pytest.raises(ValueError, match="parts: expected DASOOptions for daso, found FixMatchOptions"):
        dataclasses.replace(config, parts=dict.fromkeys(config.parts, config.parts["fixmatch"]))
    with pytest.raises(ValueError, match=r"^bacon.top_k: method fixmatch\+daso has no part bacon; .*: fixmatch\+bacon"):
        config.replace(**{"bacon.top_k": 2})
    with pytest.raises(TypeError, match="unexpected keyword argument 'stop'"):
        config.replace(**{"daso.stop": 2})
    with pytest.raises(TypeError, match="no field 'learning_rate'"):
        config.replace(learning_rate=2)
    with pytest.raises(ValueError, match="config: expected groups and parts, found optimiser"):
        Config.of("fixmatch", {"optimiser": {}})


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_comes_back_from_json(name):
    own_views = PRESETS[name].overrides.get("views", {}).get("strong_crop") == "resized"  # SsCL has a crop of its own
    for method in (None, "fixmatch+crest+pda", *(() if own_views else ("sscl",))):
        config = PRESETS[name].config(method).replace(data_dir=Path("data"), classes=("a", "b"))
        assert Config.from_dict(json.loads(json.dumps(config.to_dict()))) == config


@pytest.mark.parametrize(
    ("group", "name", "value", "expected"),
    [
        ("data", "classes", "abc", "classes: expected a tuple of strings or None"),
        ("data", "data_dir", 5, "data_dir: expected a pathlib.Path or None"),
        ("optimizer", "lr", math.inf, "lr: expected a finite number"),
        ("log", "log_often", 5, "LogOptions: unknown fields log_often"),
        ("fixmatch", "lambda_u", [1], "fixmatch.lambda_u: expected a finite number"),
        ("abc", "lambda_x", 1, "abc: unknown fields lambda_x"),
    ],
)
def test_values_from_json_are_checked(group, name, value, expected):
    saved = Config.of("fixmatch+abc").to_dict()
    (saved["parts"] if group in PARTS else saved)[group][name] = value
    with pytest.raises(ValueError, match=f"^{expected}"):
        Config.from_dict(json.loads(json.dumps(saved)))


@pytest.mark.parametrize("values", [[], "abc", None, 5, {"format": 2}])
def test_what_is_no_configuration_is_refused(values):
    with pytest.raises(ValueError, match=r"^config: "):
        Config.from_dict(values)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"image_size": 100_000}, "image_size: expected 1 to 4096 pixels, found 100000"),
        ({"image_size": 0}, "image_size: expected 1 to 4096 pixels, found 0"),
        ({"follow_links": True}, "follow_links: expected False, but for dataset folder, found True"),
    ],
)
def test_images_are_bounded_and_links_are_those_of_a_folder(changes, expected):
    with pytest.raises(ValueError, match=f"^{expected}$"):
        Config.of("fixmatch", {"data": changes})
    Config.of("fixmatch", {"data": {"dataset": "folder", "follow_links": True, "image_size": 4096}})


def test_nothing_is_filled_in_for_what_a_file_lacks():
    saved = Config.of("fixmatch").to_dict()
    for values, lost in ((saved["log"], "report"), (saved["parts"]["fixmatch"], "lambda_u")):
        kept = values.pop(lost)
        with pytest.raises(ValueError, match=f"missing fields {lost}"):
            Config.from_dict(saved)
        values[lost] = kept
    for lost in ("engine", "seed", "parts"):
        with pytest.raises(ValueError, match=r"^config: expected format, preset"):
            Config.from_dict({name: value for name, value in saved.items() if name != lost})


@pytest.mark.parametrize(("number", "found"), [(1, "1"), (3, "3"), (None, "without a number")])
def test_another_format_is_refused_by_its_number(tmp_path, number, found):
    """Files without a number are older than the number."""
    saved = Config.of("fixmatch").to_dict() | {"format": number}
    if number is None:
        del saved["format"]
    path = tmp_path / "config.json"
    write_record(path, saved)
    line = f"{path}: its format is {found}, and this version of bacon_fast reads format {FORMAT} only"
    with pytest.raises(ValueError) as refusal:
        Config.read(path)
    assert str(refusal.value) == line
    checkpoint = tmp_path / "step-00000004.pt"
    torch.save(saved, checkpoint)
    torch.save(saved | {"format": FORMAT}, tmp_path / "step-00000002.pt")  # the one before is not taken instead
    with pytest.raises(ValueError) as refusal:
        load_latest(tmp_path)
    assert str(refusal.value) == line.replace(str(path), str(checkpoint))


@pytest.mark.parametrize("words", [["--lr", "inf"], ["--bacon.lambda-con", "inf"], ["--abc.lambda-abc", "nan"]])
def test_the_command_line_checks_too(words, capsys):
    name = words[0].removeprefix("--").replace("-", "_")
    with pytest.raises((SystemExit, ValueError)) as refusal:
        parse(words)
    assert f"{name}: expected a finite number" in f"{refusal.value}{capsys.readouterr().err}"


def test_every_method_has_a_configuration():
    for method in names():
        config = Config.of(method)
        assert "+".join(config.parts) == config.method == method


def test_lists_of_paths_are_saved_and_one_path_may_stand_alone():
    options = DataOptions(dataset="folder", protocol="as-is", data_dir=Path("p.csv"), unlabeled=(Path("a"), Path("b")))
    assert to_json(options)["unlabeled"] == ["a", "b"] and from_json(DataOptions, to_json(options)) == options
    given = as_fields(DataOptions, {"val": "inbox", "test": ["x.csv"]})
    assert given == {"val": (Path("inbox"),), "test": (Path("x.csv"),)}
    assert as_fields(ModelOptions, {"weights": Path("a.pt")}) == {"weights": "a.pt"}
    with pytest.raises(ValueError, match="validation: expected 0 beside --val"):
        DataOptions(dataset="folder", protocol="as-is", val=(Path("a"),), validation=0.2)
    with pytest.raises(ValueError, match="unlabeled: expected none, but for dataset folder"):
        DataOptions(unlabeled=(Path("a"),))
