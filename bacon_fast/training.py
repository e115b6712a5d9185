"""Training from Python: `train` does what the command `bacon-fast train` does."""

from pathlib import Path

from bacon_fast.cli import default_config, saved_config, settle, train_run
from bacon_fast.engine.config import GROUP_OF, GROUPS, Config
from bacon_fast.engine.logger import RowHook
from bacon_fast.methods.options import as_fields
from bacon_fast.parser import with_variants
from bacon_fast.run import Run


def train(preset: str | None = None, *, on_row: RowHook | None = None, **options: object) -> Run:
    """Trains a run to its end, prints its summary and opens it.

    Args:
        preset: as on the command line; None: digits, or under `resume` the run in `run_dir`.
        on_row: called with each row of the log, a dict with "kind" ("train" or "eval"), "step", and what metrics.jsonl
            has. Under torchrun on rank 0. An error in it does not stop the run: the first one is a warning.
        options: named as on the command line, with underscores: ``steps=500``. Options of a part have its name in
            front, so they need a dictionary: ``**{"bacon.top_k": 3}``.

    Returns:
        The run, on the device that it was trained on.

    Raises:
        TypeError: no option has that name.
        ValueError: a value does not fit, or `run_dir` holds another run.
        CheckpointError, DivergedError, StoppedError: as `Trainer` and `Trainer.fit`.

    Example:
        >>> import bacon_fast
        >>> losses = []
        >>> run = bacon_fast.train(
        ...     "digits", method="fixmatch+abc", steps=4, batch_size=8, backbone="wrn-10-1", threads=1, report=False,
        ...     log_every=2, eval_every=4, run_dir="run", on_row=lambda row: losses.append(row.get("loss/total")),
        ...     **{"abc.lambda_abc": 0.5},
        ... )  # doctest: +ELLIPSIS
        run directory: run
        ...
        >>> run.step, len(losses)
        (4, 3)
    """
    config = configuration(preset, options)
    trainer = train_run(config, on_row)
    return Run.open(trainer.run_dir, str(trainer.device))


def configuration(preset: str | None, options: dict[str, object]) -> Config:
    """The configuration of a preset, or of the run to resume, changed by options. Raises what `train` raises."""
    options = dict(options)
    method = options.pop("method", None)
    default = None
    if preset is None and options.get("resume") and options.get("run_dir") is not None:
        default = saved_config(Path(options["run_dir"]), method)
    default = default or default_config(preset or "digits", method)
    default = with_variants(default, {name: options.get(f"{name}.variant") for name in default.parts})
    values = {}
    for name, value in options.items():
        values |= as_fields(GROUPS[GROUP_OF[name]], {name: value}) if name in GROUP_OF else {name: value}
    return settle(default.replace(**values))
