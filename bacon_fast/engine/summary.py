"""The content of summary.json: the accuracy that a run reached, and how it was run."""

import math
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

import bacon_fast
from bacon_fast.data.datasets import ImageDataset
from bacon_fast.data.longtail import Split
from bacon_fast.engine.config import Config
from bacon_fast.engine.distributed import num_ranks
from bacon_fast.engine.evaluation import Part
from bacon_fast.engine.metrics import GROUPS, HEADLINE, READINGS, History, standard_error
from bacon_fast.engine.selection import best_row, is_out_of_patience
from bacon_fast.files import read_record


def summarize(
    config: Config,
    dataset: ImageDataset,
    split: Split,
    parts: Sequence[Part],
    history: History,
    device: torch.device,
    step: int,
    train_seconds: float,
) -> dict[str, Any]:
    """The averaged model by which the run is reported, beside the ways papers report accuracy; JSON-ready.

    Args:
        parts: what was measured on; of the first are the accuracies. Without any there is none.
        history: of the whole run, to its last step.
        step: at which it ended, before the last one if it ran out of patience.
        train_seconds: time of the steps, without evaluations and checkpoints.
    """
    cuda = device.type == "cuda"
    return {
        "dataset": config.data.dataset,
        "method": config.method,
        "preset": config.preset,
        "protocol": split.protocol.name,
        "seed": config.seed,
        "steps": config.steps,
        "step": step,
        **_measured(config, parts, history),
        "choice": choice(config, parts, history),
        "calibration": calibration(config, parts, history),
        "class_names": list(dataset.class_names),
        "steps_per_second": step / train_seconds,
        "train_seconds": train_seconds,
        "device": torch.cuda.get_device_name(device) if cuda else f"cpu, {torch.get_num_threads()} threads",
        "processes": num_ranks(),
        "precision": config.engine.precision,
        "split": split.hash,
        "versions": {
            "bacon_fast": bacon_fast.__version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
    }


def chosen_row(config: Config, history: History) -> dict[str, Any]:
    """The evaluation by which the run is reported: the best on validation, if that was asked for, else the last."""
    best = best_row(history.rows) if config.log.select == "validation" else None
    return history.rows[-1 if best is None else best]


def _measured(config: Config, parts: Sequence[Part], history: History) -> dict[str, Any]:
    """Accuracies of the chosen evaluation and the readings of `History.summary`, with what they were measured on."""
    if not parts:
        return {"evaluated_on": None}
    row, part = chosen_row(config, history), parts[0]
    readings = history.summary()
    if part.name != "test":
        del readings["best_on_test"]
    if config.log.select == "validation":
        names = ("step", *HEADLINE, *GROUPS, "per_class")
        readings["best_on_validation"] = {name: row[name] for name in names if name in row}
    counts = torch.bincount(part.labels, minlength=len(row["per_class"])).tolist()
    validation = {name.removeprefix("validation_"): row[name] for name in row if name.startswith("validation_")}
    errors = {name: _finite(row.get(name)) for name in ("calibration_error", "scaled_calibration_error") if name in row}
    return {
        **{name: row[name] for name in (*HEADLINE, "per_class")},
        **errors,
        "bacc_error": standard_error(row["per_class"], counts),
        "evaluated_on": part.name,
        "images": len(part.labels),
        **({"validation": validation} if validation else {}),
        **readings,
    }


def choice(config: Config, parts: Sequence[Part], history: History) -> str:
    """What the reported weights were chosen by and measured on, in words."""
    ended = ""
    if is_out_of_patience(history.rows, config.log.patience):
        ended = f"; ended at step {history.rows[-1]['step']:,}: {config.log.patience} evaluations were no better"
    if not parts:
        return "last averaged weights, not evaluated: no test images (--test), no validation images (--validation)"
    row, part = chosen_row(config, history), parts[0]
    if config.log.select == "validation":
        precision = f"{row['validation_images']:,} images, bACC ±{row['validation_bacc_error']:.2f}"
        where = "test" if part.name == "test" else "the same images: optimistic"
        return f"chosen by validation log-loss ({precision}), reported on {where}{ended}"
    counts = torch.bincount(part.labels, minlength=len(row["per_class"])).tolist()
    precision = f"{len(part.labels):,} images, bACC ±{standard_error(row['per_class'], counts):.2f}"
    return f"last averaged weights, reported on {part.name} ({precision}){ended}"


def calibration(config: Config, parts: Sequence[Part], history: History) -> str:
    """What is known of the reported probabilities, in words: the temperature, and the expected calibration error."""
    if not parts:
        return "uncalibrated: no validation images (--validation, --val)"
    row, part = chosen_row(config, history), parts[0]
    before, after = (_percent(row.get(name)) for name in ("calibration_error", "scaled_calibration_error"))
    if (temperature := row.get("validation_temperature")) is None:
        why = " (the validation images determine no temperature)" if "validation_images" in row else ""
        return f"uncalibrated{why}: expected calibration error {before} on {part.name}"
    where = "test" if part.name == "test" else "the same images"
    return (
        f"temperature {temperature:.2f}, of {row['validation_images']:,} validation images: expected calibration error "
        f"{before} before, {after} after, on {where}"
    )


def _finite(value: float | None) -> float | None:
    """None for what JSON does not have."""
    return None if value is None or not math.isfinite(value) else value


def _percent(value: float | None) -> str:
    return "unknown" if _finite(value) is None else f"{100 * value:.1f} %"


def read_summary(path: Path, config: Config, split: str) -> dict[str, Any]:
    """The summary in the file, of a run of this configuration on the split of this hash.

    Raises:
        ValueError: names the file and the entry: it is damaged, of another run, or holds what no run reaches.
        OSError: it is not there, or cannot be read.
    """
    summary = read_record(path)
    of_this_run = {
        "dataset": config.data.dataset,
        "method": config.method,
        "preset": config.preset,
        "seed": config.seed,
        "steps": config.steps,
        "split": split,
    }
    for name, value in of_this_run.items():
        _require(path, name, repr(value), summary.get(name), summary.get(name) == value)
    names = summary.get("class_names")
    _require(path, "class_names", "names of classes", names, isinstance(names, list) and all(map(_is_text, names)))
    for name, found in _accuracies(summary).items():
        if name.endswith("per_class"):
            fits = isinstance(found, list) and len(found) == len(names) and all(map(_is_share_or_none, found))
            _require(path, name, f"{len(names)} numbers between 0 and 1", found, fits)
        else:
            group = name.rpartition(".")[2] in GROUPS  # may have no test image
            _require(path, name, "a number between 0 and 1", found, _is_share(found) or (group and found is None))
    if summary.get("evaluated_on", "test") is not None:
        evaluations = summary["mean_last_20"].get("evaluations")
        _require(path, "mean_last_20.evaluations", "a count", evaluations, type(evaluations) is int and evaluations > 0)
    for name in ("steps_per_second", "train_seconds"):
        found = summary.get(name)
        _require(path, name, "a number above 0", found, _is_number(found) and 0 < found < math.inf)
    for name in ("protocol", "device", "precision"):
        _require(path, name, "a string", summary.get(name), _is_text(summary.get(name)))
    versions = summary.get("versions")
    _require(path, "versions", "names and versions", versions, isinstance(versions, dict) and "bacon_fast" in versions)
    return summary


def _accuracies(summary: dict[str, Any]) -> dict[str, Any]:
    """The entries that hold accuracies, None for missing ones, by name: bacc, last.bacc, last.per_class, ...

    A run without a test part has no best one on it, and a run that measured nothing has none.
    """
    part = summary.get("evaluated_on", "test")
    if part is None:
        return {}
    found = {name: summary.get(name) for name in (*HEADLINE, "per_class")}
    for reading in READINGS if part == "test" else set(READINGS) - {"best_on_test"}:
        section = summary.get(reading)
        values = section if isinstance(section, dict) else {}
        found |= {f"{reading}.{name}": values.get(name) for name in (*HEADLINE, *GROUPS, "per_class")}
    return found


def _require(path: Path, name: str, expected: str, found: object, fits: bool) -> None:
    if not fits:
        raise ValueError(f"{path}: {name}: expected {expected}, found {str(found)[:80]}")


def _is_text(value: object) -> bool:
    return isinstance(value, str)


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _is_share(value: object) -> bool:
    return _is_number(value) and 0 <= value <= 1


def _is_share_or_none(value: object) -> bool:
    return value is None or _is_share(value)
