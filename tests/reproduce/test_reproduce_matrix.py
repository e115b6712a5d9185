"""Tables, published numbers and their expansion into runs; the options of the command; slots."""

import dataclasses
import json
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from run_cases import tiny

from bacon_fast.cli import parse
from bacon_fast.data.longtail import PROTOCOLS
from bacon_fast.engine.presets import PRESETS
from bacon_fast.engine.trainer import Trainer
from bacon_fast.methods import METHODS, bacon
from bacon_fast.methods.sscl.method import SsCLOptions
from bacon_fast.reproduce import published
from bacon_fast.reproduce.__main__ import Arguments, reproduce
from bacon_fast.reproduce.matrix import Options, Run, check_images, command_words, expand, shorten
from bacon_fast.reproduce.runner import lock
from bacon_fast.reproduce.slots import make_slots
from bacon_fast.reproduce.tables import TABLES, Column, Row, Table

DATA = Options(data_dir=Path("/data"))


def cells_of(name: str, options: Options = DATA, out: Path = Path("/out"), seeds=(0, 5)):
    return expand(TABLES[name], seeds, options, out)


# ---- tables ----


@pytest.mark.parametrize("name", TABLES)
def test_a_table_has_unlike_rows_and_columns_and_every_cell_a_run_a_seed(name):
    table, cells = TABLES[name], cells_of(name)
    assert len({row.name for row in table.rows}) == len(table.rows)
    assert len({column.name for column in table.columns}) == len(table.columns)
    assert len(cells) == len(table.rows) * len(table.columns)
    runs = [run for cell in cells for run in cell.runs]
    assert len({run.folder for run in runs}) == len(runs) == 2 * sum(cell.missing is None for cell in cells)
    for cell in cells:
        assert (cell.row.method in METHODS) == (cell.missing is None)
        assert cell.missing is None or cell.row.method in cell.missing
        assert [run.config.seed for run in cell.runs] == ([0, 5] if cell.missing is None else [])
        for run in cell.runs:
            assert run.config.method == cell.row.method and run.config.preset == cell.column.preset
            wanted = {**cell.column.overrides, **cell.row.changes(cell.column)}
            assert {name: run.config.flat()[name] for name in wanted} == wanted


# methods.md F.7, its last column.
SSCL_PAPER = {
    "calibration": "literal",
    "targets": "soft",
    "similarity": "cosine",
    "alpha_of": "nearest",
    "prototype_features": "raw",
    "small_views": "full",
    "window_start": "empty",
    "schedule": "cosine_to_zero",
}


@pytest.mark.parametrize("name", TABLES)
def test_the_command_line_of_a_run_gives_its_configuration(name):
    for run in (run for cell in cells_of(name) for run in cell.runs):
        assert parse(command_words(run.config)) == run.config


def test_command_line_words_of_every_kind_of_field():
    config = (
        PRESETS["folder"]
        .config()
        .replace(
            classes=("cat", "dog"),
            gamma_u=-100.0,
            hflip=False,
            compile=True,
            data_dir=Path("/data/a b"),
            run_dir=Path("/out/x"),
            **{"bacon.neg_mode": "paper"},
        )
    )
    assert parse(command_words(config)) == config


def test_unknown_methods_are_left_out_with_the_reason():
    table = Table("t", (Row("fixmatch", "fixmatch"), Row("magic", "fixmatch+magic")), (Column("digits"),))
    known, unknown = expand(table, [0], Options(), Path("/out"))
    assert known.runs and not unknown.runs
    assert unknown.missing == "method fixmatch+magic is not in this version"


def test_recipes_of_the_published_tables():
    """methods.md 0.3 and A.2: schedules, mu, and the start of the contrastive loss. What else the released
    configurations (of BaCon's repository: config/classic_cv_imb) set: mu on CIFAR-100, epochs and temperatures."""
    wide = {  # presets with mu = 7, of BaCon's Table 1
        "fixmatch+daso": {"bacon-cifar10", "bacon-cifar100"},
        "fixmatch+debiaspl": {"bacon-cifar10", "bacon-cifar100"},
        "fixmatch+crest": {"bacon-cifar10"},
        "fixmatch+crest+pda": {"bacon-cifar10", "bacon-cifar100"},
        "fixmatch+darp": {"bacon-cifar10", "bacon-cifar100"},
    }
    every = {"bacon-cifar10", "bacon-cifar10-inverse", "bacon-cifar10-150", "bacon-cifar10-150-inverse"}
    starts = {  # completed steps, of BaCon's and of USB's runs
        "darp.start": (200 * 300, 200 * 1024),
        "cossl.start": (200 * 300, 200 * 1024),
        "daso.start": (5120, 5120),
    }
    apart = {"bacon-cifar100", "bacon-stl10", "usb-cifar10-inverse"}
    tables = (("bacon-table1", wide, 300_000), ("bacon-table2", {"fixmatch+crest+pda": every}, 300_000))
    for table, wide_rows, steps in (*tables, ("usb", {}, 262_144)):
        configs = {(c.column.name, c.row.name): c.runs[0].config for c in cells_of(table) if c.runs}
        assert {config.steps for config in configs.values()} == {steps}
        for (column, row), config in configs.items():
            assert config.model.backbone == "wrn-28-2-usb"
            mu = 7 if column in wide_rows.get(row, ()) else 1 if row.startswith("remixmatch") else 2
            assert config.views.unlabeled_ratio == mu, (table, column, row)
            assert config.optimizer.lr_schedule == ("cosine" if row in ("fixmatch", "remixmatch") else "constant")
            for name, values in starts.items():
                if name.split(".")[0] in row:
                    assert config.flat()[name] * steps == pytest.approx(values[table == "usb"])
            if "daso" in row:
                assert config.parts["daso"].t_dist == (0.3 if column in apart else 1.5)
            if "bacon" in row.split("+"):
                assert config.parts["bacon"].contrast_start == (1 / 30 if row.startswith("remixmatch") else 0.5)


def test_recipes_of_the_newer_tables():
    """newer_methods.md N.1, N.2 and L: length, batch, optimizer, and what the method has of its own."""
    for cell in cells_of("simpro"):
        config = cell.runs[0].config
        assert cell.protocol == cell.column.name == config.data.protocol
        optimizer, flat = config.optimizer, config.flat()
        assert (config.steps, config.shared.epochs, config.views.batch_size) == (43_000, 86, 64)
        assert config.views.unlabeled_ratio == (16 if "stl10" in cell.protocol else 8)
        assert (optimizer.lr, optimizer.lr_schedule, optimizer.weight_decay) == (0.17, "cosine", 5e-4)
        hundred = "cifar100-" in cell.protocol
        assert config.shared.threshold == 0.95
        if "simpro" in cell.row.name:
            assert (flat["simpro.tau"], flat["simpro.threshold"]) == ((1.0, 0.2) if hundred else (2.0, 0.95))
            assert flat["simpro.estimates"] == 86
    decays = {"cifar10": 0.04, "cifar100": 0.08, "stl10": 0.01}
    for cell in cells_of("cdmad"):
        config, optimizer = cell.runs[0].config, cell.runs[0].config.optimizer
        assert cell.protocol == cell.column.name == config.data.protocol
        assert (config.steps, config.views.batch_size, config.views.unlabeled_ratio) == (250_000, 32, 2)
        decay = 0.01 if cell.protocol.endswith("uniform") else decays[config.data.dataset]
        found = optimizer.optimizer, optimizer.lr, optimizer.weight_decay, optimizer.ema_buffers
        assert found == ("adam", 0.0015, decay, "average")
        assert config.flat().get("cdmad.start", 0.202) * 250_000 == pytest.approx(50_500)
        if "simpro" in cell.row.name:
            expected = (1.0, 0.2, 86) if config.data.dataset == "cifar100" else (2.0, 0.95, 86)
            assert tuple(config.flat()[f"simpro.{name}"] for name in ("tau", "threshold", "estimates")) == expected
    for cell in cells_of("cdmad-remixmatch"):
        config, flat = cell.runs[0].config, cell.runs[0].config.flat()
        assert (config.steps, config.views.batch_size, config.optimizer.lr) == (150_000, 64, 0.002)
        assert (flat["remixmatch.lambda_u"], flat["remixmatch.lambda_rot"]) == (2.0, 1.0)
        if "cdmad" in cell.row.name:
            assert (flat["remixmatch.sharpening"], flat["remixmatch.rampup"]) == (1.0, 1.0)
            assert flat["cdmad.align"] == "auto" and flat["cdmad.start"] * 150_000 == pytest.approx(50_500)


def test_sscl_alone_is_without_cutout():
    configs = {cell.row.name: cell.runs[0].config for cell in cells_of("sscl-cifar10")}
    assert {name: config.views.cutout for name, config in configs.items()} == {
        "sscl": False,
        "sscl-paper": False,
        "fixmatch": True,
        "remixmatch": True,
    }


def test_sscls_variants_are_eight_choices_which_single_options_override():
    choices = SsCLOptions().choices()
    for cell in cells_of("sscl-cifar10"):
        if cell.row.method == "sscl":
            config = cell.runs[0].config
            found = config.parts["sscl"].choices() | {"schedule": config.optimizer.lr_schedule}
            paper = cell.row.name == "sscl-paper"
            expected = SSCL_PAPER if paper else choices | {"schedule": "cosine"}
            assert found == expected
    assert len(SSCL_PAPER) == 8 and all(SSCL_PAPER[name] != value for name, value in choices.items())

    words = ["sscl-cifar10", "--sscl.variant", "paper"]
    whole, but_two = parse(words), parse([*words, "--sscl.targets", "hard", "--lr-schedule", "cosine"])
    assert whole.parts["sscl"].choices() | {"schedule": whole.optimizer.lr_schedule} == SSCL_PAPER
    changed = SSCL_PAPER | {"targets": "hard", "schedule": "cosine"}
    assert but_two.parts["sscl"].choices() | {"schedule": but_two.optimizer.lr_schedule} == changed
    for config in (whole, but_two):
        assert parse(command_words(config)) == config
    assert parse([*words, "--sscl.variant=default"]) == parse(words[:1])


def test_ablations_reach_the_loss():
    data = SimpleNamespace(num_classes=10, num_labeled=20, num_unlabeled=30)
    found = {}
    for cell in cells_of("ablation"):
        if "bacon" in cell.row.method.split("+"):
            config = cell.runs[0].config
            setup = SimpleNamespace(data=data, num_features=128, steps=config.steps, shared=config.shared)
            found[cell.row.name] = bacon.build(config.parts["bacon"], setup)
    standard = found.pop("bacon")
    attributes = ("top_k", "bta", "temperature", "reliable_threshold", "negative_weight", "neg_mode", "centers")
    attributes += ("count_gate", "labeled_counts", "center_slots")

    def describe(loss):
        linears = [tuple(p.shape) for p in loss.projection.parameters() if p.dim() == 2]
        return {name: getattr(loss, name) for name in attributes} | {"projection": linears}

    basis = describe(standard)
    assert basis["projection"] == [(32, 128)] and basis["top_k"] == 3 and basis["centers"] == "bank"
    changes = {name: {k: v for k, v in describe(loss).items() if v != basis[k]} for name, loss in found.items()}
    assert all(changes.values()), "every row changes something"
    assert changes["no-rns"] == {"top_k": 1}
    assert changes["no-bta"] == {"bta": 0.0}
    assert changes["projection-8"] == {"projection": [(8, 128)]}
    assert changes["projection-none"] == {"projection": []}
    assert [shape[0] for shape in changes["projection-2-layers"]["projection"]][-1] == 32
    assert len(changes["projection-2-layers"]["projection"]) == 2
    assert changes["temperature-0.05"] == {"temperature": 0.05}
    assert changes["bta-0.5"] == {"bta": 0.5}
    assert changes["reliable-0.9"] == {"reliable_threshold": 0.9}
    assert changes["negative-weight-16"] == {"negative_weight": 16.0}
    assert changes["negatives-per-anchor"] == {"neg_mode": "paper"}
    assert changes["batch-centers"] == {"centers": "batch"}
    flags = {"count_gate": "logit", "labeled_counts": "with_pseudo", "center_slots": "selected"}
    assert changes["released-code"] == flags | {"projection": [(16, 128)]}


# ---- published numbers ----


def test_published_numbers_belong_to_known_protocols_and_methods():
    for table in TABLES.values():
        if table.source is not None:
            protocols = {
                column.overrides.get("protocol", PRESETS[column.preset].config().data.protocol)
                for column in table.columns
            }
            for protocol in protocols - {"cdmad-cifar10-100-reversed"}:  # which only another paper has
                assert {row.method for row in table.rows} & table.source.values[protocol].keys()
    for source in published.SOURCES:
        assert source.values.keys() <= PROTOCOLS.keys()
        for values in source.values.values():
            assert all(0 < v.mean < 100 and (v.deviation is None or 0 < v.deviation < 12) for v in values.values())


@pytest.mark.parametrize(
    ("source", "protocol", "method", "text"),
    [
        ("BACON_TABLE_1", "bacon-cifar10-100", "fixmatch+abc+bacon", "84.46 ± 0.15"),
        ("BACON_TABLE_1", "bacon-cifar100-20", "remixmatch+cossl", "60.46 ± 0.15"),
        ("BACON_TABLE_1", "bacon-stl10-10", "fixmatch+darp", "62.43 ± 0.10"),
        ("BACON_TABLE_2", "bacon-cifar10-100-inverse", "fixmatch+abc+bacon", "83.80"),
        ("BACON_TABLE_2", "bacon-cifar10-150", "fixmatch+cossl", "81.83"),
        ("BACON_TABLE_2", "bacon-cifar10-150-inverse", "fixmatch", "62.30"),
        ("USB", "usb-cifar10-1500-100-inverse", "fixmatch+daso", "78.07 ± 0.38"),
        ("USB", "usb-cifar10-1500-150", "fixmatch+saw", "76.75 ± 0.23"),
        ("USB", "bacon-stl10-10", "fixmatch+daso", "71.13 ± 1.40"),
        ("USB", "usb-cifar10-1500-100", "remixmatch+cossl", "86.41 ± 0.13"),
        ("SSCL", "balanced-cifar10-40", "sscl", "10.29 ± 2.61"),
        ("SSCL", "balanced-cifar10-4000", "fixmatch", "4.26 ± 0.05"),
    ],
)
def test_published_numbers_are_those_of_the_specification(source, protocol, method, text):
    assert str(getattr(published, source).values[protocol][method]) == text


def test_the_newer_published_numbers_are_those_of_the_specification():
    """All of newer_methods.md O's tables, and no others."""
    text = (Path(__file__).parents[2] / "docs" / "newer_methods.md").read_text()
    expected, protocols = {}, []
    for line in text[text.index("## O. ") :].splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if line.startswith("| method"):
            protocols = cells[1:]
        elif line.startswith("| ") and set(line) != set("|-"):
            numbers = [[tuple(map(float, part.split("±"))) for part in c.split("/")] for c in cells[1:] if c != "–"]
            named = zip([p for p, cell in zip(protocols, cells[1:], strict=True) if cell != "–"], numbers)
            expected |= {(protocol, cells[0]): parts for protocol, parts in named}
    found = {}
    for source in (published.SIMPRO, published.CDMAD, published.CDMAD_BY_DYTRIM, published.CDMAD_REMIXMATCH):
        for protocol, values in source.values.items():
            for method, value in values.items():
                parts = [(value.mean, value.deviation), (value.gm, value.gm_deviation)]
                numbers = [tuple(n for n in part if n is not None) for part in parts]
                found[protocol, method] = [part for part in numbers if part]
    assert found == expected and len(found) == 100


def test_numbers_that_usb_does_not_give_are_not_there():
    assert "remixmatch" not in published.USB.values["usb-cifar10-1500-150"]
    assert published.USB.values["bacon-stl10-10"].keys() == {
        "fixmatch", "fixmatch+abc", "fixmatch+cossl", "fixmatch+daso",
    }  # fmt: skip


# ---- options ----


def test_a_budget_shortens_runs_and_keeps_enough_evaluations():
    full = PRESETS["bacon-cifar10"].config()
    assert shorten(full, 1.0) is full
    tenth = shorten(full, 0.1)
    assert (tenth.steps, tenth.log.eval_every, tenth.log.log_every) == (30_000, 750, 100)
    tiny = shorten(full, 1e-4)
    assert (tiny.steps, tiny.log.eval_every, tiny.log.log_every) == (30, 1, 1)
    digits = shorten(PRESETS["digits"].config(), 0.9)
    assert (digits.steps, digits.log.eval_every) == (1350, 33)


def test_settings_reach_every_run_with_their_types():
    settings = {"precision": "bf16", "eval_every": "7", "hflip": "false", "compile": "true", "gamma_u": "-100"}
    for cell in cells_of("bacon-table2", dataclasses.replace(DATA, settings=settings)):
        for run in cell.runs:
            config = run.config
            assert (config.engine.precision, config.engine.compile) == ("bf16", True)
            assert (config.log.eval_every, config.views.hflip) == (7, False)
            assert config.data.gamma_u == -100.0


def test_an_image_folder_stands_for_one_data_set(tmp_path):
    options = dataclasses.replace(DATA, dataset="folder")
    for cell in cells_of("bacon-table2", options):
        assert all(run.config.data.dataset == "folder" and run.config.data.image_size is None for run in cell.runs)
    with pytest.raises(ValueError, match="one folder cannot stand for cifar10, cifar100, stl10"):
        cells_of("bacon-table1", options)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"table": "table9"}, "table: expected one of bacon-table1, .*, found 'table9'"),
        ({"budget": 0.0}, "budget: expected a number above 0 and up to 1, found 0"),
        ({"budget": 1.5}, "budget: .* found 1.5"),
        ({"budget": float("nan")}, "budget: .* found nan"),
        ({"methods": "fixmatch,foo"}, "methods: expected some of supervised, .*, found foo"),
        ({"columns": "cifar"}, "columns: expected some of .*, found cifar"),
        ({"seeds": "0,one"}, "seeds: expected different integers of at least 0 between commas, found '0,one'"),
        ({"seeds": "0,0"}, "seeds: expected different integers of at least 0 between commas, found '0,0'"),
        ({"seeds": "0,00"}, "seeds: expected different integers of at least 0 between commas, found '0,00'"),
        ({"seeds": "-1"}, "seeds: expected different integers of at least 0 between commas, found '-1'"),
        ({"set": "precision"}, "set: expected NAME=VALUE, found 'precision'"),
        ({"set": "precison=bf16"}, "set: expected an option of bacon-fast train .* found 'precison'"),
        ({"set": "method=fixmatch"}, "set: expected an option that the table leaves open, found 'method'"),
        ({"set": "resume=true"}, "set: expected an option that the table leaves open, found 'resume'"),
        ({"set": "bacon.top_q=2"}, "set: expected an option of bacon-fast train .* found 'bacon.top_q'"),
        ({"set": "daso.start=0", "methods": "fixmatch"}, "set: no row .* 'daso.start', its methods are fixmatch$"),
        ({"jobs": 0}, "jobs: expected at least 1, found 0"),
        ({"device": "tpu"}, "device: expected auto, cpu"),
        ({"table": "bacon-table2"}, "data_dir: expected where cifar10 lies, found None"),
    ],
)  # fmt: skip
def test_bad_options_are_named_before_anything_is_written(tmp_path, changes, message):
    arguments = dataclasses.replace(Arguments("digits", out=tmp_path / "out"), **changes)
    with pytest.raises(ValueError, match=message):
        reproduce(arguments, "command")
    assert not (tmp_path / "out").exists()


def test_a_finished_run_on_other_images_is_not_taken_for_this_one(tmp_path):
    """The same images elsewhere are the same run."""
    numbers = np.random.default_rng(0)
    images = numbers.integers(0, 256, (300, 8, 8, 3), dtype=np.uint8)
    arrays = {"train_images": images, "train_labels": np.arange(300) % 3}
    arrays |= {"test_images": images[:9], "test_labels": np.arange(9) % 3}
    for name in ("a", "moved"):
        np.savez(tmp_path / f"{name}.npz", **arrays)
    np.savez(tmp_path / "b.npz", **(arrays | {"train_images": images[::-1]}))
    changes = {"dataset": "arrays", "method": "supervised", "steps": 1, "log_every": 1, "data_dir": tmp_path / "a.npz"}
    config = tiny(tmp_path / "run", **changes)
    Trainer(config).fit()
    check_images([Run(config), Run(config.replace(data_dir=tmp_path / "moved.npz"))])
    with pytest.raises(ValueError, match=r"out: .*run holds a run on other images, from .*a\.npz; name another --out"):
        check_images([Run(config.replace(data_dir=tmp_path / "b.npz"))])


def test_a_run_of_another_configuration_is_not_taken_for_this_one(tmp_path):
    run = cells_of("digits", out=tmp_path)[0].runs[0]
    run.folder.mkdir(parents=True)
    run.config.replace(lr=0.5).write(run.folder / "config.json")
    with pytest.raises(ValueError, match=r"(?s)out: .* holds a run of another configuration.*lr: checkpoint 0.5, now"):
        cells_of("digits", out=tmp_path)
    run.config.replace(log_every=3).write(run.folder / "config.json")
    assert cells_of("digits", out=tmp_path)[0].runs[0].state == "started"
    (run.folder / "summary.json").write_text("{}")
    assert run.state == "done"


def test_the_step_of_a_run_survives_a_half_written_line(tmp_path):
    run = cells_of("digits", out=tmp_path)[0].runs[0]
    assert run.step() == 0
    run.folder.mkdir(parents=True)
    log = run.folder / "metrics.jsonl"
    log.write_text("")
    assert run.step() == 0
    rows = [json.dumps({"kind": "train", "step": step, "padding": "x" * 500}) for step in range(10, 4000, 10)]
    log.write_text("\n".join(rows) + "\n" + rows[-1][:20])
    assert run.step() == 3990
    # A row of many classes is longer than what is read first, and a cut through its lists is no row.
    log.write_text("\n".join(rows) + "\n" + json.dumps({"step": 4000, "per_class": [0.5] * 100_000}) + "\n")
    assert run.step() == 4000
    log.write_text(log.read_text() + json.dumps({"step": 4010, "per_class": [0.5] * 100_000})[:300_000])
    assert run.step() == 4000


def test_the_step_of_a_stopped_run_is_that_of_its_checkpoint(tmp_path):
    run = cells_of("digits", out=tmp_path)[0].runs[0]
    (run.folder / "checkpoints").mkdir(parents=True)
    (run.folder / "metrics.jsonl").write_text('{"kind": "train", "step": 25}\n')
    (run.folder / "checkpoints/step-00000027.pt").write_bytes(b"")
    assert run.step() == 27  # the log has a row every 5 steps
    (run.folder / "metrics.jsonl").write_text('{"kind": "train", "step": 30}\n')
    assert run.step() == 30


def test_two_calls_do_not_share_a_directory(tmp_path):
    with lock(tmp_path / "out"), pytest.raises(ValueError, match="is in use"), lock(tmp_path / "out"):
        pass
    with lock(tmp_path / "out"):
        pass


# ---- slots ----


@pytest.mark.parametrize("jobs", [1, 2, 3, 5])
def test_cpu_slots_share_no_core(monkeypatch, jobs):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 4, 5, 6})
    slots = make_slots("cpu", jobs, runs=10)
    assert len(slots) == jobs
    assert sorted(core for slot in slots for core in slot.cores) == [0, 1, 4, 5, 6]
    sizes = [len(slot.cores) for slot in slots]
    assert max(sizes) - min(sizes) <= 1


def test_number_of_slots(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(64)))
    assert [len(slot.cores) for slot in make_slots("cpu", None, runs=100)] == [8] * 8
    assert [len(slot.cores) for slot in make_slots("cpu", None, runs=2)] == [32] * 2
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1})
    assert [slot.cores for slot in make_slots("cpu", 3, runs=9)] == [{0}, {1}, {0}]
    assert len(make_slots("cpu", None, runs=0)) == 1


def test_gpu_slots(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,GPU-abc")
    assert [s.environment["CUDA_VISIBLE_DEVICES"] for s in make_slots("auto", 3, runs=9)] == ["3", "GPU-abc", "3"]
    assert len(make_slots("auto", None, runs=9)) == 2, "one a GPU"
    assert [s.environment for s in make_slots("cuda:1", 2, runs=9)] == [{}, {}], "the device that was named"
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert len(make_slots("cuda", None, runs=9)) == 1 and not make_slots("cuda", None, runs=9)[0].cores


@pytest.mark.parametrize(("own", "today"), [("bilinear", "bicubic"), ("bicubic", "bilinear")])
def test_images_of_a_moved_run_are_compared_as_it_resized_them(tmp_path, monkeypatch, own, today):
    """Networks of timm resized bilinearly once, and resize as their weights want it since."""

    def resize(interpolation):
        for module in ("engine.build", "reproduce.matrix"):
            monkeypatch.setattr(f"bacon_fast.{module}.interpolation", lambda config: interpolation)

    numbers = np.random.default_rng(0)
    for part, count in (("train", 110), ("test", 2)):
        for name in ("cat", "dog"):
            folder = tmp_path / "a" / part / name
            folder.mkdir(parents=True)
            for i in range(count):
                Image.fromarray(numbers.integers(0, 256, (20, 20, 3), dtype=np.uint8)).save(folder / f"{i}.png")
    shutil.copytree(tmp_path / "a", tmp_path / "moved")
    changes = {"dataset": "folder", "method": "supervised", "steps": 1, "log_every": 1, "image_size": 8}
    config = tiny(tmp_path / "run", **changes, data_dir=tmp_path / "a")
    resize(own)
    Trainer(config).fit()
    moved = Run(config.replace(data_dir=tmp_path / "moved"))
    resize(today)
    check_images([moved])
    shutil.rmtree(tmp_path / "run" / "checkpoints")  # which alone say how it was
    resize(own)
    check_images([moved])
