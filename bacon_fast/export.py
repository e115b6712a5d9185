"""`bacon-fast export RUN --out DIR`: the averaged network as safetensors or ONNX, with a description."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from bacon_fast.cli import with_clear_errors
from bacon_fast.engine.build import use_threads
from bacon_fast.run import Run


@dataclass(frozen=True)
class Arguments:
    """Write a run's averaged network as model.safetensors, with model.json, which says how to use it."""

    run: Annotated[Path, tyro.conf.Positional]
    """Run directory."""
    out: Path
    """Folder for the files; it must not hold a model yet."""
    onnx: bool = False
    """Also model.onnx: images uint8 [N,H,W,3] to probabilities [N,K]."""


def main(args: Sequence[str] | None = None) -> None:
    """The command, with these words or those of the process."""
    arguments = tyro.cli(Arguments, prog="bacon-fast export", args=args)

    def show() -> None:
        use_threads(0)
        for path in Run.open(arguments.run, "cpu").export(arguments.out, onnx=arguments.onnx):
            print(path, file=sys.stderr)

    with_clear_errors(show)


if __name__ == "__main__":
    main()
