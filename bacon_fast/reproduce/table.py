"""The table as Markdown and CSV: ours beside the published number, and in each row how both were obtained."""

import csv
import io
from collections.abc import Iterable, Mapping, Sequence

from bacon_fast.data.longtail import PROTOCOLS
from bacon_fast.engine.metrics import MEAN_WINDOW, READINGS
from bacon_fast.engine.presets import PRESETS
from bacon_fast.methods import METHODS
from bacon_fast.reproduce.matrix import Options
from bacon_fast.reproduce.published import OTHER_PROTOCOLS, SAME_PROTOCOL, SOURCES, Source, Value
from bacon_fast.reproduce.results import Result, pseudo_precision
from bacon_fast.reproduce.tables import Column, Table

METRICS = {"bacc": "bACC", "top1": "top-1", "gm": "GM", "few": "recall of the rarest third", "error": "error"}
GROUPS = {"many": "recall, most frequent third", "medium": "recall, middle", "few": "recall, rarest third"}


def markdown(table: Table, results: Sequence[Result], options: Options, command: str) -> str:
    """The whole document: a section for each column, as numbers of different protocols never share one."""
    lines = [f"# {table.title}", "", f"Made by `{command}`. Percent; mean ± sample standard deviation over the seeds."]
    machines = sorted({_machine(summary) for result in results for summary in result.summaries})
    lines += [f"Trained on {machine}." for machine in machines]
    lines += [line for caveat in caveats(table, options) for line in ("", f"**{caveat}**")]
    for column in dict.fromkeys(result.cell.column for result in results):
        inside = [result for result in results if result.cell.column == column]
        lines += ["", *_section(table, column, inside)]
    return "\n".join(lines) + "\n"


def caveats(table: Table, options: Options) -> list[str]:
    """Warnings: what the numbers are not."""
    notes = []
    if options.budget < 1:
        note = f"Every run has only {100 * options.budget:g} % of its preset's steps."
        notes.append(note if table.source is None else f"{note} The published numbers come from full runs.")
    if options.dataset is not None:
        notes.append(
            "The images were read from an image folder: if they were compressed again (JPEG), their pixels differ from "
            "the data set's, and numbers can differ for that reason alone."
        )
    if options.settings:
        changed = ", ".join(f"{name} = {value}" for name, value in options.settings.items())
        notes.append(f"Changed in every run: {changed}.")
    if table.source is not None and table.source.note is not None:
        notes.append(table.source.note)
    return notes


def _section(table: Table, column: Column, results: Sequence[Result]) -> list[str]:
    metric, source = table.metric, table.source
    (protocol,) = {result.cell.protocol for result in results}
    lines = [f"## {column.name}", "", describe_protocol(protocol), ""]
    headers = ["method", "run", "seeds", *(f"{METRICS[metric]}, {title}" for title in READINGS.values())]
    if metric == "bacc":
        headers += [f"{METRICS['gm']}, last", f"{METRICS['few']}, last"]
    if source is not None:
        headers += [f"published {METRICS[source.metric]}", "published as"]
    lines += [_row(headers), _row("---" for _ in headers)]
    lines += [_row(_cells(table, result)) for result in results]
    lines += [_row(cells) for cells in _published_only(table, protocol, len(headers))]
    if metric == "bacc" and any(result.summaries for result in results):
        lines += ["", *_groups(results)]
    if problems := [f"- {result.cell.row.name}: {result.problem}" for result in results if result.problem]:
        lines += ["", "Not there:", "", *problems]
    if others := _also_published(table, protocol):
        lines += ["", "Also published:", "", *others]
    return lines


def _cells(table: Table, result: Result) -> list[str]:
    numbers = {reading: result.accuracy(reading, table.metric) for reading in READINGS}
    if table.metric == "bacc":
        numbers |= {name: result.accuracy("last", name) for name in ("gm", "few")}
    named = {name: "–" if number is None else str(number) for name, number in numbers.items()}
    if result.averaged < MEAN_WINDOW:
        named["mean_last_20"] += f" (of {result.averaged})"
    if not result.summaries:
        named["last"] = "not run"
    texts = list(named.values())
    done, wanted = len(result.summaries), len(result.cell.runs)
    seeds = str(done) if done == wanted else f"{done} of {wanted}"
    cells = [result.cell.row.name, describe_run(result), seeds, *texts]
    if table.source is None:
        return cells
    return cells + _published(table.source, result.published(table.source), result.cell.row.method)


def _groups(results: Sequence[Result]) -> list[str]:
    """By groups of classes, each the mean of the last 20 evaluations."""
    names = (METRICS["gm"], *GROUPS.values(), "precision of pseudo-labels, rarest third")
    titles = [f"{name}, {READINGS['mean_last_20']}" for name in names]
    lines = [_row(["method", *titles]), _row(["---"] * (len(titles) + 1))]
    for result in results:
        numbers = [result.accuracy("mean_last_20", name) for name in ("gm", *GROUPS)] + [result.pseudo_precision()]
        lines.append(_row([result.cell.row.name, *("–" if number is None else str(number) for number in numbers)]))
    return lines


def _published(source: Source, value: Value | None, method: str) -> list[str]:
    """The two cells of a published number."""
    if value is None:
        return ["–", "–"]
    return [str(value), f"{source.steps_of(method)}; {source.schedule_of(method)}; {describe_source(source)}"]


def _published_only(table: Table, protocol: str | None, width: int) -> list[list[str]]:
    """Rows of the source that the table leaves out."""
    if table.source is None:
        return []
    ours = {row.method for row in table.rows}
    rows = []
    for method, value in table.source.values.get(protocol, {}).items():
        if method not in ours:
            reason = "not asked for" if method in METHODS else "not in bacon_fast"
            empty = ["–"] * (width - 6)
            rows.append([method, "–", "–", reason, *empty, *_published(table.source, value, method)])
    return rows


def _also_published(table: Table, protocol: str | None) -> list[str]:
    """Other published numbers: of the same protocol, and of protocols that only look alike."""
    kinds = (("The same protocol", SAME_PROTOCOL), ("Another protocol, not comparable", OTHER_PROTOCOLS))
    lines = []
    for source in SOURCES:
        if source is not table.source and (values := source.values.get(protocol)):
            lengths = {m: "" if source.steps_of(m) == source.steps else f" ({source.steps_of(m)})" for m in values}
            listed = ", ".join(f"{method} {value}{lengths[method]}" for method, value in values.items())
            how = f"{METRICS[source.metric]}; {source.steps}; {describe_source(source)}"
            lines.append(f"- The same protocol, {source.title} ({how}): {listed}.")
    for kind, contexts in kinds:
        for context in contexts.get(protocol, ()):
            listed = ", ".join(f"{method} {value}" for method, value in context.values.items())
            lines.append(f"- {kind}, {context.title}: {listed}.")
    return lines


def describe_protocol(name: str | None) -> str:
    """The split in words."""
    if name is None:
        return "A protocol changed by the settings above: nothing published is comparable."
    protocol = PROTOCOLS[name]
    text = f"Protocol {name}"
    if protocol.labeled_head is not None:
        text += f": N1 = {protocol.labeled_head:,}, gamma_l = {protocol.gamma_l:g}"
    if protocol.unlabeled_own:
        text += ", the data set's own unlabeled images" + (" and the labeled ones" if protocol.lb_in_ulb else "")
    elif protocol.unlabeled_head is None:
        text += ", all images unlabeled"
    else:
        text += f", M1 = {protocol.unlabeled_head:,}, gamma_u = {protocol.gamma_u:g}"
    return f"{text}. {protocol.source}."


def describe_run(result: Result) -> str:
    """Protocol, length, learning rates, batch, and what else the row changes."""
    config = result.config
    if config is None:
        return "–"
    full, steps = PRESETS[config.preset].steps, f"{config.steps:,} steps"
    if config.steps != full:
        steps += f" ({100 * config.steps / full:.3g} % of {full:,})"
    parts = [result.cell.protocol or f"{config.data.protocol}, changed", steps, f"{config.optimizer.lr_schedule} rate"]
    if config.method != "supervised":
        parts.append(f"mu {config.views.unlabeled_ratio}")
    changes = {**result.cell.column.overrides, **result.cell.row.changes(result.cell.column)}
    told = ("protocol", "lr_schedule", "unlabeled_ratio")
    flat = config.flat()
    shown = {name: flat[name] for name in changes if name not in told}
    parts += [f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}" for name, value in shown.items()]
    return "; ".join(parts)


def describe_source(source: Source) -> str:
    """Which of its numbers it reports, and over how many seeds."""
    missing = [name for name, value in (("seeds", source.seeds), ("±", source.deviation)) if value is None]
    parts = [source.selection]
    if source.seeds is not None:
        parts.append(f"{source.seeds} seeds")
    if source.deviation is not None:
        parts.append(f"± {source.deviation}")
    if missing:
        parts.append(f"{' and '.join(missing)} not stated")
    return "; ".join(parts)


def _machine(summary: Mapping) -> str:
    return f"{summary['device']}, {summary['precision']}, bacon_fast {summary['versions']['bacon_fast']}"


def _row(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"


def table_csv(name: str, table: Table, results: Sequence[Result], options: Options) -> str:
    """One row a cell; accuracies in percent, as their columns say."""
    rows = []
    for result in results:
        config, source, value = result.config, table.source, result.published(table.source)
        row = {"table": name, "column": result.cell.column.name, "method": result.cell.row.name}
        if config is not None:
            row |= {
                "protocol": result.cell.protocol or f"{config.data.protocol}, changed",
                "dataset": config.data.dataset,
                "budget": options.budget,
                "steps": config.steps,
                "lr_schedule": config.optimizer.lr_schedule,
                "unlabeled_ratio": config.views.unlabeled_ratio,
            }
        row |= {"seeds": " ".join(map(str, result.seeds)), "missing": result.problem or ""}
        for reading in READINGS:
            for metric in (table.metric, "top1", "gm", "few"):
                if (found := result.accuracy(reading, metric)) is not None:
                    row[f"{metric}_{reading}_percent"] = f"{found.mean:.4f}"
                    row[f"{metric}_{reading}_std_percent"] = "" if found.deviation is None else f"{found.deviation:.4f}"
        if value is not None:
            row |= {
                "published_percent": value.mean,
                "published_deviation_percent": value.deviation,
                "published_gm_percent": value.gm,
                "published_gm_deviation_percent": value.gm_deviation,
                "published_metric": source.metric,
                "published_source": source.title,
                "published_steps": source.steps_of(result.cell.row.method),
                "published_schedule": source.schedule_of(result.cell.row.method),
                "published_selection": source.selection,
                "published_seeds": source.seeds or "not stated",
                "published_deviation_is": source.deviation or "not stated",
            }
        rows.append(row)
    return _csv(rows)


def runs_csv(results: Sequence[Result]) -> str:
    """One row a finished run; accuracies in percent, as their columns say."""
    rows = []
    for result in results:
        for run, summary in zip(result.finished, result.summaries):
            row = {"column": result.cell.column.name, "method": result.cell.row.name, "seed": summary["seed"]}
            row |= {"protocol": summary["protocol"], "steps": summary["steps"]}
            for metric in ("bacc", "gm", "top1", *GROUPS):
                values = {reading: summary[reading][metric] for reading in READINGS}
                row |= {f"{metric}_{reading}_percent": "" if v is None else 100 * v for reading, v in values.items()}
            row["recall_of_each_class_last_percent"] = _percents(summary["last"]["per_class"])
            for reading, precision in pseudo_precision(run).items():
                row[f"pseudo_precision_of_each_class_{reading}_percent"] = _percents(precision)
            row["evaluations_averaged"] = summary["mean_last_20"]["evaluations"]
            names = ("steps_per_second", "train_seconds", "device", "precision", "split")
            rows.append(row | {name: summary[name] for name in names})
    return _csv(rows)


def _percents(fractions: Iterable[float | None]) -> str:
    """One cell of a CSV file for all classes; "-" for a class without a number."""
    return " ".join("-" if fraction is None else f"{100 * fraction:.2f}" for fraction in fractions)


def _csv(rows: Sequence[Mapping]) -> str:
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, list(dict.fromkeys(name for row in rows for name in row)), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return buffer.getvalue()
