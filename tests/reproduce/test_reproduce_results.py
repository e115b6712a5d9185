"""From summaries of runs to the table: arithmetic against NumPy, Markdown, CSV and pictures."""

import csv
import dataclasses
import io
import json
from pathlib import Path

import numpy as np
import pytest

from bacon_fast.data.longtail import PROTOCOLS, Split
from bacon_fast.files import read_record, write_record
from bacon_fast.report.style import LIGHT, to_png
from bacon_fast.reproduce import figures, published
from bacon_fast.reproduce.matrix import Options, expand
from bacon_fast.reproduce.results import collect, spread
from bacon_fast.reproduce.table import markdown, runs_csv, table_csv
from bacon_fast.reproduce.tables import TABLES, Column, Row, Table

METRICS = ("top1", "bacc", "gm", "many", "medium", "few")
CLASSES = ["a", "b", "c", "d"]


def write_run(run, rng, classes=CLASSES, **changes) -> dict:
    """A finished run with random accuracies."""
    run.folder.mkdir(parents=True)
    run.config.write(run.folder / "config.json")
    counts = tuple(range(len(classes)))  # rising: pictures have the classes in the opposite order
    labeled, unlabeled = np.split(np.arange(2 * sum(counts)), 2)
    split = Split(PROTOCOLS["digits"], run.config.seed, "made", "made", labeled, unlabeled, counts, counts)
    split.save(run.folder / "split.json")
    summary = {
        "dataset": run.config.data.dataset,
        "method": run.config.method,
        "preset": run.config.preset,
        "seed": run.config.seed,
        "protocol": run.config.data.protocol,
        "steps": run.config.steps,
        "class_names": list(classes),
        "steps_per_second": 10.0,
        "train_seconds": 3.0,
        "device": "cpu, 1 threads",
        "precision": "fp32",
        "split": split.hash,
        "versions": {"bacon_fast": "0.1.0"},
    }
    for reading in ("last", "mean_last_20", "best_on_test"):
        summary[reading] = {name: rng.uniform() for name in METRICS}
        summary[reading]["per_class"] = rng.uniform(size=len(classes)).tolist()
    summary["mean_last_20"]["evaluations"] = 20
    summary = summary | {name: summary["last"][name] for name in ("top1", "bacc", "gm", "per_class")} | changes
    write_record(run.folder / "summary.json", summary)
    rows = [{"kind": "eval", "step": 1}, {"kind": "train", "step": 2}, {"kind": "eval", "step": 2}]
    if run.config.method != "supervised":  # class a never gets a pseudo-label, c only late
        rows[0]["pseudo_precision"] = [None, rng.uniform(), None, *rng.uniform(size=len(classes) - 3).tolist()]
        rows[2]["pseudo_precision"] = [None, *rng.uniform(size=len(classes) - 1).tolist()]
    (run.folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return read_record(run.folder / "summary.json")


@pytest.fixture
def filled(tmp_path):
    """BaCon's Table 2 with runs for three rows of the first column and two of the second: 3, 2 and 0 seeds."""
    full = TABLES["bacon-table2"]
    wanted = ("fixmatch", "fixmatch+abc", "fixmatch+abc+bacon")
    rows = tuple(row for row in full.rows if row.name in wanted)
    table = dataclasses.replace(full, rows=rows, columns=full.columns[:2])
    options = Options(data_dir=Path("/data"))
    cells = expand(table, [0, 1, 2], options, tmp_path)
    rng, summaries = np.random.default_rng(0), {}
    for cell in cells:
        done = {"fixmatch": 3, "fixmatch+abc": 2, "fixmatch+abc+bacon": 3 if cell.column == table.columns[0] else 0}
        for run in cell.runs[: done[cell.row.name]]:
            summaries.setdefault((cell.column.name, cell.row.name), []).append(write_run(run, rng))
    return table, options, cells, summaries


def precisions(run) -> np.ndarray:
    """Of the pseudo-labels at both evaluations [2, K]; NaN for a class without any."""
    rows = [json.loads(line) for line in (run.folder / "metrics.jsonl").read_text().splitlines()]
    return np.array([row["pseudo_precision"] for row in rows if row["kind"] == "eval"], dtype=float)


def sections(text: str, table: int = 0) -> dict[str, list[dict[str, str]]]:
    """Rows of each section's first table, or of a further one, as a reader of Markdown sees them."""
    found, header = {}, None
    for line in text.splitlines():
        if line.startswith("## "):
            tables = found.setdefault(line[3:], [[]])
            header = None
        elif not line and header is not None:  # the end of a table
            tables.append([])
            header = None
        elif line.startswith("| ") and set(line) != set("| -"):
            cells = [cell.strip() for cell in line.strip("|").split(" | ")]
            if header is None:
                header = cells
            else:
                assert len(cells) == len(header)
                tables[-1].append(dict(zip(header, cells)))
    return {name: tables[table] for name, tables in found.items() if table < len(tables)}


def test_spread_is_numpys():
    values = [81.2, 79.9, 84.45]
    found = spread(values)
    assert found.mean == pytest.approx(np.mean(values)) and found.deviation == pytest.approx(np.std(values, ddof=1))
    assert str(found) == f"{np.mean(values):.2f} ± {np.std(values, ddof=1):.2f}"
    assert str(spread([50.0])) == "50.00" and spread([]) is None


def test_table_against_numpy(filled):
    table, options, cells, summaries = filled
    rows = sections(markdown(table, collect(cells, []), options, "command"))
    assert list(rows) == ["bacon-cifar10", "bacon-cifar10-inverse"]
    titles = {
        "last": "bACC, last evaluation",
        "mean_last_20": "bACC, mean of last 20",
        "best_on_test": "bACC, best (chosen on the test set)",
    }
    for (column, method), runs in summaries.items():
        (row,) = [row for row in rows[column] if row["method"] == method]
        for reading, title in titles.items():
            values = 100 * np.array([run[reading]["bacc"] for run in runs])
            assert row[title] == f"{values.mean():.2f} ± {values.std(ddof=1):.2f}"
        for metric, title in (("gm", "GM, last"), ("few", "recall of the rarest third, last")):
            values = 100 * np.array([run["last"][metric] for run in runs])
            assert row[title] == f"{values.mean():.2f} ± {values.std(ddof=1):.2f}"


def test_groups_of_classes_and_their_pseudo_labels_against_numpy(filled):
    table, options, cells, summaries = filled
    results = collect(cells, [])
    rows = sections(markdown(table, results, options, "command"), table=1)
    runs = {(r.cell.column.name, r.cell.row.name): r.finished for r in results}
    logged = list(csv.DictReader(io.StringIO(runs_csv(results))))
    for (column, method), found in summaries.items():
        (row,) = [row for row in rows[column] if row["method"] == method]
        titles = {"gm": "GM", "many": "recall, most frequent third", "few": "recall, rarest third"}
        for metric, title in titles.items():
            values = 100 * np.array([run["mean_last_20"][metric] for run in found])
            assert row[f"{title}, mean of last 20"] == f"{values.mean():.2f} ± {values.std(ddof=1):.2f}"
        # Of the classes a, b, c, d with 0, 1, 2, 3 labeled images the rarest third is a, without pseudo-labels.
        assert row["precision of pseudo-labels, rarest third, mean of last 20"] == "–"
        precision = np.array([precisions(run) for run in runs[column, method]])  # [S, 2, K]
        seeds = [line for line in logged if (line["column"], line["method"]) == (column, method)]
        for reading, expected in (("last", precision[:, 1]), ("mean_last_20", np.nanmean(precision[:, :, 1:], axis=1))):
            cell = [line[f"pseudo_precision_of_each_class_{reading}_percent"].split(" ") for line in seeds]
            assert [words[0] for words in cell] == ["-"] * len(found)
            logged_values = np.array([words[1:] for words in cell], dtype=float)
            np.testing.assert_allclose(logged_values, 100 * expected[:, -3:], atol=0.006)


def test_precision_of_the_rarest_classes_pseudo_labels(tmp_path):
    table = Table("t", (Row("fixmatch", "fixmatch"), Row("supervised", "supervised")), (Column("digits"),))
    cells = expand(table, [0, 1], Options(), tmp_path)
    for cell in cells:
        for run in cell.runs:
            write_run(run, np.random.default_rng(run.config.seed), classes="abcdef")
    fixmatch, supervised = collect(cells, [])
    # Of six classes the rarest two are a, without pseudo-labels, and b.
    values = [100 * precisions(run)[:, 1].mean() for run in fixmatch.finished]
    found = fixmatch.pseudo_precision()
    assert found.mean == pytest.approx(np.mean(values)) and found.deviation == pytest.approx(np.std(values, ddof=1))
    assert supervised.pseudo_precision() is None
    (fixmatch.finished[0].folder / "metrics.jsonl").write_text("")
    assert fixmatch.pseudo_precision().count == 1 and len(runs_csv([fixmatch]).splitlines()) == 3


def test_a_mean_of_fewer_evaluations_says_so(filled):
    table, options, cells, summaries = filled
    run = cells[0].runs[1]
    summary = summaries["bacon-cifar10", "fixmatch"][1]
    summary["mean_last_20"]["evaluations"] = 15
    write_record(run.folder / "summary.json", summary)
    rows = sections(markdown(table, collect(cells, []), options, "command"))["bacon-cifar10"]
    means = {row["method"]: row["bACC, mean of last 20"] for row in rows}
    assert means["fixmatch"].endswith(" (of 15)") and "of" not in means["fixmatch+abc"]


@pytest.mark.parametrize("values", [{"seed": 9}, {"bacc": 5.0}, {"split": "0" * 64}, {"method": "fixmatch+daso"}])
def test_a_summary_of_another_run_is_no_row_of_the_table(filled, tmp_path, values):
    table, options, cells, _ = filled
    path = cells[0].runs[1].folder / "summary.json"
    write_record(path, read_record(path) | values)
    with pytest.raises(ValueError, match=f"^{path}: {next(iter(values))}: expected"):
        collect(cells, [])
    with pytest.raises(ValueError, match=f"^{path}: {next(iter(values))}: expected"):
        expand(table, [0, 1, 2], options, tmp_path)  # before any run begins


def test_a_damaged_summary_is_named(filled):
    _, _, cells, _ = filled
    path = cells[0].runs[1].folder / "summary.json"
    path.write_text(path.read_text().replace("0.", "1.", 1))
    with pytest.raises(ValueError, match=f"^{path}: its content does not have the digest in it"):
        collect(cells, [])


def test_every_row_says_how_it_came_about(filled):
    table, options, cells, _ = filled
    text = markdown(table, collect(cells, []), options, "the command")
    rows = sections(text)
    first = {row["method"]: row for row in rows["bacon-cifar10"]}
    assert first["fixmatch"]["run"] == "bacon-cifar10-100; 300,000 steps; cosine rate; mu 2; backbone wrn-28-2-usb"
    assert (
        first["fixmatch+abc"]["run"] == "bacon-cifar10-100; 300,000 steps; constant rate; mu 2; backbone wrn-28-2-usb"
    )
    assert first["fixmatch"]["seeds"] == "3" and first["fixmatch+abc"]["seeds"] == "2 of 3"
    assert first["fixmatch"]["published bACC"] == "75.66"
    wanted = "300,000 steps; cosine rate; best, chosen on the test set; seeds and ± not stated"
    assert first["fixmatch"]["published as"] == wanted
    assert first["fixmatch+crest+pda"]["published as"] == (
        "6 generations of 65,536 steps; constant rate; best, chosen on the test set; seeds and ± not stated"
    )
    second = {row["method"]: row for row in rows["bacon-cifar10-inverse"]}
    assert second["fixmatch"]["published bACC"] == "56.35"
    assert second["fixmatch+abc+bacon"]["bACC, last evaluation"] == "not run"
    assert second["fixmatch+abc+bacon"]["published bACC"] == "83.80"
    assert "- fixmatch+abc: seed 2 not run" in text and "`the command`" in text
    # Rows of the source that were not asked for are there, without a number of ours.
    assert first["fixmatch+cossl"]["published bACC"] == "83.94"
    assert "not " in first["fixmatch+cossl"]["bACC, last evaluation"]
    # The same protocol elsewhere, and nothing of another one.
    inside = text.split("## ")[1]
    assert "BaCon (AAAI 2024), Table 1" in inside and "84.46 ± 0.15" in inside and "56.35" not in inside


def test_other_protocols_are_kept_apart(tmp_path):
    options = Options(data_dir=Path("/data"))
    table = dataclasses.replace(TABLES["usb"], columns=TABLES["usb"].columns[:1])
    text = markdown(table, collect(expand(table, [0], options, tmp_path), []), options, "c")
    rows = sections(text)["usb-cifar10"]
    assert all("71.5" not in cell for row in rows for cell in row.values())
    assert "Another protocol, not comparable, CDMAD (2024)" in text and "71.5 ± 0.7 / 66.8 ± 1.5" in text
    assert {row["published top-1"] for row in rows} >= {"76.69 ± 0.78", "83.88 ± 0.27"}


def test_other_papers_numbers_say_how_long_their_runs_were(tmp_path):
    """CDMAD's paper has baselines of a length that it does not state, on a protocol of USB's table."""
    table = TABLES["usb"]
    text = markdown(table, collect(expand(table, [0], Options(data_dir=Path("/data")), tmp_path), []), Options(), "c")
    (line,) = [line for line in text.splitlines() if "CDMAD on ReMixMatch" in line and "85.50" in line]
    assert "150,000 steps" in line and "remixmatch 73.80 ± 0.40 (GM 69.50 ± 0.80) (length not stated)" in line
    assert "remixmatch+cdmad 85.50 ± 0.50 (GM 85.30 ± 0.40)." in line


def test_a_changed_protocol_has_no_published_number(tmp_path):
    options = Options(data_dir=Path("/data"), settings={"gamma_u": "-50"})
    table = dataclasses.replace(TABLES["bacon-table2"], columns=TABLES["bacon-table2"].columns[:1])
    text = markdown(table, collect(expand(table, [0], options, tmp_path), []), options, "c")
    assert {row["published bACC"] for row in sections(text)["bacon-cifar10"]} == {"–"}
    assert "gamma_u = -50" in text and "bacon-cifar10-100, changed" in text


def test_variations_of_a_method_have_no_published_number(tmp_path):
    rows = (Row("fixmatch", "fixmatch"), Row("slow", "fixmatch", {"lr": 0.001}))
    table = Table("t", rows, (Column("bacon-cifar10"),), published.BACON_TABLE_1)
    results = collect(expand(table, [0], Options(data_dir=Path("/data")), tmp_path), [])
    assert [str(result.published(table.source)) for result in results] == ["75.30 ± 0.37", "None"]


def test_a_variation_says_what_it_changes(tmp_path):
    rows = (Row("a", "fixmatch", {"lr": 0.001, "lr_schedule": "cosine"}, {"digits": {"threshold": 0.9}}),)
    table = Table("t", rows, (Column("digits"), Column("bacon-cifar10")))
    text = sections(
        markdown(table, collect(expand(table, [0], Options(data_dir=Path("/d")), tmp_path), []), Options(), "c")
    )
    assert text["digits"][0]["run"] == "digits; 1,500 steps; cosine rate; mu 2; lr 0.001; threshold 0.9"
    assert text["bacon-cifar10"][0]["run"] == "bacon-cifar10-100; 300,000 steps; cosine rate; mu 2; lr 0.001"


def test_caveats(filled, tmp_path):
    table, _, _, _ = filled
    options = Options(0.1, "folder", Path("/data"), settings={"precision": "bf16"})
    cells = expand(table, [0], options, tmp_path / "other")
    text = markdown(table, collect(cells, []), options, "c")
    assert "only 10 % of its preset's steps. The published numbers come from full runs." in text
    assert "image folder" in text and "JPEG" in text and "precision = bf16" in text
    assert "30,000 steps (10 % of 300,000)" in text


def test_failed_and_stopped_runs_are_told_apart(tmp_path):
    table = dataclasses.replace(TABLES["digits"], rows=TABLES["digits"].rows[:1])
    cells = expand(table, [0, 1, 2], Options(), tmp_path)
    failed, stopped, _ = cells[0].runs
    for run in (failed, stopped):
        run.folder.mkdir(parents=True)
        run.config.write(run.folder / "config.json")
    (stopped.folder / "metrics.jsonl").write_text('{"step": 1250}\n')
    (result,) = collect(cells, [failed.name])
    assert f"seed 0 failed, see {failed.folder / 'train.log'}" in result.problem
    assert "seed 1 stopped at step 1,250" in result.problem and "seed 2 not run" in result.problem


def test_error_rates(tmp_path):
    """100 - top-1; the best error is that of the best top-1."""
    table = Table("t", (Row("fixmatch", "fixmatch"),), (Column("digits"),), metric="error")
    cells = expand(table, [0, 1], Options(), tmp_path)
    rng = np.random.default_rng(3)
    runs = [write_run(run, rng) for run in cells[0].runs]
    (row,) = sections(markdown(table, collect(cells, []), Options(), "c"))["digits"]
    for reading, title in (("last", "last evaluation"), ("best_on_test", "best (chosen on the test set)")):
        values = 100 - 100 * np.array([run[reading]["top1"] for run in runs])
        assert row[f"error, {title}"] == f"{values.mean():.2f} ± {values.std(ddof=1):.2f}"


def test_csv_files(filled):
    table, options, cells, summaries = filled
    results = collect(cells, [])
    rows = list(csv.DictReader(io.StringIO(table_csv("bacon-table2", table, results, options))))
    assert len(rows) == len(cells)
    by_cell = {(row["column"], row["method"]): row for row in rows}
    for key, runs in summaries.items():
        row = by_cell[key]
        for reading in ("last", "mean_last_20", "best_on_test"):
            for metric in ("bacc", "top1", "gm", "few"):
                values = 100 * np.array([run[reading][metric] for run in runs])
                assert float(row[f"{metric}_{reading}_percent"]) == pytest.approx(values.mean(), abs=1e-4)
                assert float(row[f"{metric}_{reading}_std_percent"]) == pytest.approx(values.std(ddof=1), abs=1e-4)
    row = by_cell["bacon-cifar10-inverse", "fixmatch+abc+bacon"]
    assert row["bacc_last_percent"] == "" and row["missing"].startswith("seed 0 not run")
    assert (row["published_percent"], row["published_selection"]) == ("83.8", "best, chosen on the test set")
    assert by_cell["bacon-cifar10", "fixmatch+abc"]["seeds"] == "0 1"
    runs = list(csv.DictReader(io.StringIO(runs_csv(results))))
    assert len(runs) == sum(map(len, summaries.values()))
    first = summaries["bacon-cifar10", "fixmatch"][0]
    assert float(runs[0]["bacc_last_percent"]) == 100 * first["last"]["bacc"] and runs[0]["split"] == first["split"]
    assert float(runs[0]["gm_mean_last_20_percent"]) == 100 * first["mean_last_20"]["gm"]
    # One unit in both files: what is an accuracy says so, and nothing else does.
    for row in (by_cell["bacon-cifar10", "fixmatch"], runs[0]):
        accuracies = {name for name in row if name.split("_")[0] in ("bacc", "gm", "top1", "few")}
        assert accuracies and all(name.endswith("_percent") and 0 <= float(row[name]) <= 100 for name in accuracies)


def test_a_group_without_test_images_is_left_open(tmp_path):
    table = Table("t", (Row("fixmatch", "fixmatch"),), (Column("digits"),))
    cells = expand(table, [0], Options(), tmp_path)
    rng = np.random.default_rng(0)
    last = {name: 0.5 for name in METRICS} | {"few": None, "per_class": [0.25, None, 0.5, 1.0]}
    write_run(cells[0].runs[0], rng, last=last)
    (result,) = collect(cells, [])
    (row,) = sections(markdown(table, [result], Options(), "c"))["digits"]
    assert row["recall of the rarest third, last"] == "–" and row["bACC, last evaluation"] == "50.00"
    assert result.recalls() == [0.25, None, 0.5, 1.0]


def test_accuracy_picture_shows_the_numbers(filled):
    table, _, cells, summaries = filled
    results = collect(cells, [])
    for column, num_bars in zip(table.columns, (3, 2)):
        inside = [result for result in results if result.cell.column == column and result.summaries]
        figure = figures.accuracies(table, inside, LIGHT)
        assert to_png(figure).startswith(b"\x89PNG")
        (axes,) = figure.axes
        names = [label.get_text() for label in axes.get_yticklabels()]
        assert len(names) == len(axes.patches) == num_bars
        low, high = axes.get_xlim()
        for name, bar in zip(names, axes.patches):
            values = [100 * run["last"]["bacc"] for run in summaries[column.name, name]]
            assert bar.get_width() == pytest.approx(np.mean(values)) and low < np.mean(values) < high
        (dots,) = (line for line in axes.lines if line.get_label() == "a seed, last")
        seeds = [(i, 100 * run["last"]["bacc"]) for i, name in enumerate(names) for run in summaries[column.name, name]]
        np.testing.assert_allclose(np.transpose(dots.get_data()), [(value, i) for i, value in seeds])
        (marks,) = (line for line in axes.lines if line.get_marker() == "D")
        published_values = table.source.values[inside[0].cell.protocol]
        assert list(marks.get_xdata()) == pytest.approx([published_values[name].mean for name in names])


def test_recall_picture_averages_over_seeds(filled):
    table, _, cells, summaries = filled
    inside = [result for result in collect(cells, []) if result.cell.column == table.columns[0]]
    image = figures.recalls(inside, LIGHT).axes[0].images[0].get_array()
    expected = [
        np.mean([run["last"]["per_class"] for run in summaries["bacon-cifar10", result.cell.row.name]], axis=0)
        for result in inside
    ]
    np.testing.assert_allclose(image, np.array(expected)[:, ::-1], err_msg="most labeled images first")


def test_pictures_say_their_length_and_seeds(filled, tmp_path):
    table, _, cells, _ = filled
    inside = [result for result in collect(cells, []) if result.cell.column == table.columns[0]]
    line = "bacon-cifar10, 300,000 steps, 2 to 3 seeds"
    assert figures.accuracies(table, inside, LIGHT).get_suptitle() == line == figures.describe(inside)
    assert figures.recalls(inside, LIGHT).get_suptitle() == line
    short = expand(table, [0], Options(budget=0.1, data_dir=Path("/data")), tmp_path / "short")
    for cell in short:
        write_run(cell.runs[0], np.random.default_rng(0))
    inside = [result for result in collect(short, []) if result.cell.column == table.columns[0]]
    title = figures.accuracies(table, inside, LIGHT).get_suptitle()
    assert title == "bacon-cifar10, 30,000 steps: 10 % of 300,000, 1 seed"


def test_no_picture_of_features_with_fewer_than_two_methods(tmp_path):
    table = dataclasses.replace(TABLES["digits"], rows=TABLES["digits"].rows[:2])
    cells = expand(table, [0], Options(), tmp_path)
    assert figures.embeddings(collect(cells, []), "cpu", LIGHT) is None
