"""The table of parts: which combinations exist, why others do not, and what it takes to add a balancer."""

import inspect
import json
from dataclasses import dataclass
from typing import ClassVar

import pytest

from bacon_fast import methods
from bacon_fast.cli import parse, train
from bacon_fast.engine.config import Config
from bacon_fast.methods import METHODS, PARTS, parts_of
from bacon_fast.methods.balancers.base import Balancer, Targets
from bacon_fast.methods.part import Part, PartOptions, Setup


def test_the_methods_are_these_in_this_order():
    added = ["abc", "bacon", "abc+bacon", "debiaspl", "saw", "daso", "darp", "crest", "crest+pda", "cossl"]
    added += ["simpro", "cdmad", "la"]
    fixmatch = ("fixmatch", *(f"fixmatch+{name}" for name in added))
    remixmatch = (
        "remixmatch",
        *(f"remixmatch+{name}" for name in added if name not in ("debiaspl", "saw", "simpro", "la")),
    )
    assert ("supervised", "supervised+la", *fixmatch, *remixmatch, "sscl", "ssc") == METHODS and len(METHODS) == 28


@pytest.mark.parametrize(
    ("method", "reason"),
    [
        ("supervised+abc", "supervised has no unlabeled rows"),
        ("supervised+daso", "supervised has no unlabeled rows"),
        ("remixmatch+la", "la does not go with remixmatch: MixUp mixes the labels"),
        ("fixmatch+bacon+la", "la does not go with bacon: it balances the logits"),
        ("sscl+bacon", "SsCL calibrates its pseudo-labels"),
        ("ssc+abc+bacon", "SSC has prototypes in the place of the classifier"),
        ("fixmatch+abc+daso", "a method has one balancer"),
        ("fixmatch+bacon+daso", "BaCon is added to a base learner alone or with ABC"),
        ("fixmatch+pda", "pda extends crest"),
        ("remixmatch+saw", "saw does not go with remixmatch: it acts on hard pseudo-labels"),
        ("remixmatch+debiaspl", "debiaspl does not go with remixmatch"),
        ("remixmatch+simpro", "simpro does not go with remixmatch: MixUp mixes rows of the two priors"),
        ("fixmatch+bacon+simpro", "simpro does not go with bacon: it balances the classifier by its priors already"),
        ("remixmatch+bacon+cdmad", "cdmad does not go with bacon: it takes the bias out of the logits"),
        ("fixmatch+simpro+cdmad", "a method has one balancer"),
        ("fixmatch+abc+cdmad", "a method has one balancer"),
        ("fixmatch+ssc", "a method has one base learner"),
        ("daso", "a method has one base learner"),
        ("fixmatch+bacon+abc", "its parts have an order, fixmatch+abc+bacon"),
    ],
)
def test_a_combination_that_does_not_exist_is_refused_with_the_reason(method, reason):
    with pytest.raises(ValueError) as refusal:
        parts_of(method)
    assert str(refusal.value).startswith(f"method: {method} does not exist: {reason}")


@pytest.mark.parametrize("method", ["", "fixmatch+", "fixmatch+magic", "fixmatch+abc+abc", "FixMatch"])
def test_what_is_no_method_is_refused_with_their_names(method):
    with pytest.raises(ValueError) as refusal:
        parts_of(method)
    assert str(refusal.value) == f"method: expected one of {', '.join(METHODS)}, found {method!r}"


def test_a_part_names_its_options_once():
    assert list(PARTS) == [part.options.part for part in PARTS.values()]
    assert all(inspect.getdoc(part.options) for part in PARTS.values())


# --- a balancer of somebody else's -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class ToyOptions(PartOptions):
    """A balancer that divides probabilities by the labeled frequencies."""

    part: ClassVar[str] = "toy"

    strength: float = 0.5
    """Exponent of the frequencies."""

    def check(self) -> None:
        self.require_weights("strength")


class Toy(Balancer):
    def __init__(self, counts, strength: float) -> None:
        super().__init__()
        self.strength = strength
        self.register_buffer("weights", (counts / counts.sum()) ** -strength)

    def forward(self, rows, step, phase) -> Targets:
        weighted = rows.weak_logits.softmax(1) * self.weights
        return Targets(weighted / weighted.sum(1, keepdim=True))


def build(options: ToyOptions, setup: Setup) -> Toy:
    return Toy(setup.data.labeled_counts, options.strength)


@pytest.fixture
def toy(monkeypatch):
    monkeypatch.setitem(methods.PARTS, "toy", Part("balancer", ToyOptions, build))


def test_one_line_in_the_table_adds_a_balancer(toy, tmp_path, capsys):
    """Options, help, training, the saved run: through the functions that the commands call."""
    assert {"fixmatch+toy", "remixmatch+toy"} == set(methods.names()) - set(METHODS)
    words = ["digits", "--method", "fixmatch+toy", "--toy.strength", "0.25", "--steps", "3", "--batch-size", "8"]
    words += ["--threads", "1", "--no-report", "--run-dir", str(tmp_path / "run")]
    config = parse(words)
    assert config.parts["toy"] == ToyOptions(0.25) and list(config.parts) == ["fixmatch", "toy"]
    train(words)
    saved = Config.read(tmp_path / "run" / "config.json")
    assert saved.parts == config.parts
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["method"] == "fixmatch+toy"
    with pytest.raises(ValueError, match=r"^method fixmatch has no part toy; .* one: fixmatch\+toy, remixmatch\+toy$"):
        parse(["digits", "--method", "fixmatch", "--toy.strength", "1"])
    capsys.readouterr()
    with pytest.raises(SystemExit):
        parse(["digits", "--method", "remixmatch+toy", "--help"])
    assert "--toy.strength FLOAT" in (text := capsys.readouterr().out) and "Exponent of the frequencies." in text
    with pytest.raises((SystemExit, ValueError)) as refusal:
        parse(["digits", "--method", "fixmatch+toy", "--toy.strength", "-1"])
    assert "toy.strength: expected a number of at least 0" in f"{refusal.value}{capsys.readouterr().err}"
