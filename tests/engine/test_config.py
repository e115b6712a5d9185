"""What a configuration refuses, from Python, from JSON and from the command line."""

import dataclasses
import json
import math
from pathlib import Path

import pytest

from bacon_fast.cli import parse
from bacon_fast.engine.config import METHODS, Config
from bacon_fast.engine.presets import PRESETS
from bacon_fast.losses import BaConLoss

FLOATS = [field.name for field in dataclasses.fields(Config) if field.type in (float, float | None)]


@pytest.mark.parametrize(
    ("field", "value", "expected"),
    [
        ("steps", 1.5, "an integer"),
        ("steps", "10", "an integer"),
        ("steps", None, "an integer"),
        ("batch_size", True, "an integer"),
        ("proj_dim", 32.0, "an integer or None"),
        ("proj_layers", 1.0, "an integer or None"),
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
        ("optimizer", "lion", "one of sgd, adam"),
        ("optimizer", ["sgd"], "one of sgd, adam"),
        ("centers", "q", "one of bank, batch"),
        ("neg_mode", "mean", "one of authors, paper or None"),
        ("method", "fixmatch+abcd", f"one of {', '.join(METHODS)}"),
        ("classes", "abc", "a tuple of strings or None"),
        ("classes", ("a", 1), "a tuple of strings or None"),
        ("run_dir", "runs/a", "a pathlib.Path or None"),
    ],
)
def test_a_value_of_another_type_is_named(field, value, expected):
    with pytest.raises(ValueError) as refusal:
        Config(**{field: value})
    assert str(refusal.value) == f"{field}: expected {expected}, found {value!r}"


def test_every_field_is_checked_against_its_annotation():
    for field in dataclasses.fields(Config):
        with pytest.raises(ValueError, match=rf"^{field.name}: expected .*, found <object"):
            Config(**{field.name: object()})


def test_numbers_are_finite():
    assert {"lambda_u", "lambda_abc", "lambda_con", "debiaspl_tau", "daso_t_dist", "crest_alpha"} <= set(FLOATS)
    for field in FLOATS:
        for value in (math.inf, -math.inf, math.nan):
            with pytest.raises(ValueError, match=f"^{field}: expected a finite number.*, found {value}"):
                Config(**{field: value})


def test_weights_are_not_negative():
    for field in ("lambda_u", "lambda_abc", "lambda_con", "lambda_kl", "ssc_lambda_up", "debiaspl_tau", "bta"):
        with pytest.raises(ValueError, match=f"{field}: expected a number of at least 0, found -0.5"):
            Config(**{field: -0.5})


def test_an_integer_is_a_number():
    assert Config(lr=1, gamma_l=-50, classes=(), run_dir=Path("a")).lr == 1


def test_the_adjustment_leaves_temperatures_positive():
    for value in (1.0, 50.0):
        with pytest.raises(ValueError, match="bta: expected a number below 1, except for variant blog, found"):
            Config(bta=value)
        assert Config(bta=value, variant="blog").bta == value
    for config in (Config(bta=0.999), Config(bta=50.0, variant="blog")):
        loss = BaConLoss(4, 3, 5, 5, bta=config.bta, variant=config.variant)
        loss.bank.class_counts.fill_(7)
        assert (loss.temperatures(0.0) > 0).all()


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_comes_back_from_json(name):
    config = dataclasses.replace(PRESETS[name].config, data_dir=Path("data"), classes=("a", "b"))
    assert Config.from_dict(json.loads(config.to_json())) == config


@pytest.mark.parametrize(
    ("field", "value", "expected"),
    [
        ("classes", "abc", "a tuple of strings or None"),
        ("data_dir", 5, "a pathlib.Path or None"),
        ("steps", [1], "an integer"),
        ("lambda_u", math.inf, "a finite number or None"),
    ],
)
def test_values_from_json_are_checked(field, value, expected):
    with pytest.raises(ValueError, match=f"^{field}: expected {expected}, found "):
        Config.from_dict(json.loads(json.dumps(Config().to_dict() | {field: value})))


def test_the_command_line_checks_too(capsys):
    for word, field in (("--lambda-u", "lambda_u"), ("--debiaspl-tau", "debiaspl_tau"), ("--lambda-con", "lambda_con")):
        with pytest.raises(SystemExit):
            parse([word, "inf"])
        assert f"{field}: expected a finite number" in capsys.readouterr().err
