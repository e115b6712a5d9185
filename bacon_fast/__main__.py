"""The command `bacon-fast WORD ...`, also `python -m bacon_fast WORD ...`."""

import importlib
import sys
from collections.abc import Sequence

import bacon_fast

# Word -> the module and the function that takes the words after it, imported when they are asked for; and its help.
COMMANDS = {
    "train": ("bacon_fast.cli", "train", "Train a classifier: a preset, then options."),
    "evaluate": ("bacon_fast.evaluate", "main", "Metrics of a run on its test or validation images, as JSON."),
    "predict": ("bacon_fast.predict", "main", "Class and probability of image files, as JSON lines."),
    "label": ("bacon_fast.label", "main", "Labels of many images, as a CSV file to review and to train on."),
    "export": ("bacon_fast.export", "main", "The network as safetensors or ONNX, with a description."),
    "report": ("bacon_fast.redraw", "main", "Write a run's report.html again."),
    "reproduce": ("bacon_fast.reproduce.__main__", "main", "Tables of methods and seeds beside published numbers."),
    "info": ("bacon_fast.info", "main", "Versions, devices, and which backends work here."),
}


def usage() -> str:
    """The text of --help."""
    lines = [f"  {word:<12}{text}" for word, (_, _, text) in COMMANDS.items()]
    return "\n".join(["usage: bacon-fast COMMAND [...]", "", *lines, "", "Options of each: bacon-fast COMMAND --help"])


def main(args: Sequence[str] | None = None) -> None:
    """Entry point of `bacon-fast`: hands the words to the command that the first one names."""
    words = list(sys.argv[1:] if args is None else args)
    match words[:1]:
        case ["-h" | "--help"]:
            print(usage())
        case ["--version"]:
            print(bacon_fast.__version__)
        case [word] if word in COMMANDS:
            module, function, _ = COMMANDS[word]
            getattr(importlib.import_module(module), function)(words[1:])
        case []:
            sys.exit(usage())
        case [word]:
            print(f"error: command: expected one of {', '.join(COMMANDS)}, found {word!r}", file=sys.stderr)
            sys.exit(2)


if __name__ == "__main__":
    main()
