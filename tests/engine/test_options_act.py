"""Every option of every part of a method changes what a run computes: none is accepted and then forgotten."""

import functools
from dataclasses import fields
from itertools import combinations
from typing import Literal, get_args, get_origin

import pytest
import torch
from run_cases import tiny

from bacon_fast.engine.config import Config
from bacon_fast.engine.trainer import Trainer
from bacon_fast.methods import METHODS, PARTS, parts_of

STEPS = 6
# What begins late begins early, and what is rare is common, so that each option has something to act on.
ACTIVE = dict.fromkeys(("bacon.contrast_start", "daso.start", "darp.start", "cdmad.start"), 0.2)
ACTIVE |= {"cossl.start": 0.5, "crest.generations": 2, "simpro.estimates": 3, "simpro.threshold": 0.1}
OF_PART = {
    "abc": "fixmatch+abc",
    "bacon": "fixmatch+abc+bacon",
    "la": "supervised+la",
    "pda": "fixmatch+crest+pda",
}
# Another method where the usual one refuses the option.
METHOD_OF = {"cdmad.align": "remixmatch+cdmad"}
# Further options without which one does nothing.
BESIDE = {
    "sscl.refresh_epochs": {"epochs": STEPS},
    "ssc.lambda_down": {"threshold": 0.5},  # unconfident rows
    "ssc.pl_temperature": {"threshold": 0.5},
    "bacon.labeled_counts": {"threshold": 0.9},  # steps without a pseudo-label
}
# Numbers other than half the default.
OTHER = {"bacon.temperature": 0.5, "bacon.bta": 0.5, "bacon.negative_weight": 5.0, "remixmatch.rampup": 1.0}
OTHER |= dict.fromkeys(("bacon.contrast_start", "daso.start", "darp.start", "cdmad.start"), 0.6)
OTHER |= {"simpro.threshold": 0.3}


def values(part: str, field) -> list:
    """The default and others; of a choice all that it has."""
    name = f"{part}.{field.name}"
    kinds = [kind for kind in (field.type, *get_args(field.type)) if get_origin(kind) is Literal]
    if kinds:
        return list(get_args(kinds[0]))
    if field.type is bool:
        return [False, True]
    start = ACTIVE.get(name, field.default)
    return [start, OTHER.get(name, start // 2 or 2 if field.type is int else (start or 1.0) / 2)]


CASES = {f"{name}.{field.name}": values(name, field) for name, part in PARTS.items() for field in fields(part.options)}
CASES |= {"threshold": [0.1, 0.3], "epochs": [3, 6], "distribution_momentum": [0.9, 0.999]}  # that several parts read
METHOD_OF |= {"threshold": "fixmatch", "epochs": "fixmatch+abc", "distribution_momentum": "remixmatch"}


def config_of(run_dir, method: str, options: tuple) -> Config:
    shared = {name: value for name, value in options if "." not in name}
    parts = {name: value for name, value in options if "." in name and name.split(".")[0] in parts_of(method)}
    return tiny(run_dir, method=method, steps=STEPS, device="cpu", parts=parts, **shared)


@functools.cache
def computed(folder, method: str, options: tuple) -> tuple[list[dict], dict[str, torch.Tensor]]:
    """Losses of each step, and the last state of the method and its averaged network."""
    run_dir = folder / str(len(list(folder.iterdir())))
    trainer = Trainer(config_of(run_dir, method, options))
    losses = []
    for _ in range(STEPS):
        step_losses, _ = trainer.train_step()
        losses.append({name: float(value) for name, value in step_losses.items()})
    trainer.logger.close()
    state = trainer.method.state_dict() | {f"ema.{k}": v for k, v in trainer.ema.state_dict().items()}
    return losses, {name: value.clone() for name, value in state.items()}


def same(one, two) -> bool:
    if one[0] != two[0] or one[1].keys() != two[1].keys():
        return False
    return all(torch.equal(value, two[1][name]) for name, value in one[1].items())


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("runs")


@pytest.mark.parametrize("option", CASES)
def test_each_value_of_an_option_is_another_run(folder, option):
    part = option.split(".")[0]
    method = METHOD_OF.get(option) or OF_PART.get(part) or next(m for m in METHODS if part in parts_of(m))
    base = ACTIVE | BESIDE.get(option, {})
    default = config_of(folder, method, tuple(base.items())).flat()[option]
    changes = [{} if value == default else {option: value} for value in CASES[option]]  # one run for all defaults
    runs = [computed(folder, method, tuple(sorted((base | change).items()))) for change in changes]
    if option == "cdmad.align":
        assert same(runs[0], runs[1]), "auto is on where both sets have one imbalance"
        runs = runs[1:]
    alike = [(a, b) for a, b in combinations(range(len(runs)), 2) if same(runs[a], runs[b])]
    assert not alike, f"{method} computes the same with {option} as {[CASES[option][a] for a in alike[0]]}"
