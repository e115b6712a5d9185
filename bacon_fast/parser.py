"""The command line of a configuration, made for the method at hand: its groups, and the options of its parts."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Annotated, Literal

import tyro

from bacon_fast import methods
from bacon_fast.engine.config import GROUPS, Config
from bacon_fast.methods.options import Options

# --help leaves these out: groups of how a run is computed, measured and logged, and options that few runs change.
RARE_GROUPS = ("engine", "log")
RARE = frozenset(
    {
        *("other_labels", "unreadable", "follow_links", "lb_in_ulb", "cached_views", "layer_decay", "ema_buffers"),
        *("ema_warmup", "distribution_momentum", "usb_compat", "loss_backend"),
    }
)
STEPS_HELP = "T, optimizer steps. Schedules run on t/T."
SEED_HELP = "Of split, initialization, sampling order and augmentation draws."

Extra = Mapping[str, tuple[object, object]]
"""Further options by name: annotated type and default."""


def value_in(words: Sequence[str], option: str) -> str | None:
    """What command-line words give an option such as --method, the last one if there are several; None without any.

    Example:
        >>> value_in(["--method", "ssc", "--run_dir=x"], "--run-dir")
        'x'
    """
    found = None
    for word, value in zip(words, (*words[1:], None)):
        name, equals, given = word.partition("=")
        if name.replace("_", "-") == option:
            found = given if equals else value
    return found


def refuse_empty(words: Sequence[str]) -> None:
    """Raises ValueError for an option without a value, as --run-dir "" is: an empty path would be the current one."""
    for word, value in zip(words, (*words[1:], None)):
        name, equals, given = word.partition("=")
        if name.startswith("--") and (value == "" or (equals and not given)):
            raise ValueError(f"{name[2:].replace('-', '_')}: expected a value, found ''")


def override(
    default: Config, words: Sequence[str], *, prog: str, description: str = "", extra: Extra | None = None
) -> tuple[Config, dict[str, object]]:
    """The configuration as changed by command-line words, and the values of the extra options.

    Under --help it prints the options of the method's parts and of all groups but `RARE_GROUPS`, without those of
    `RARE` that the preset leaves alone; under --help-all all options of every part and group. Then it exits.

    Raises:
        ValueError: an option belongs to a part that the method does not have.
        SystemExit: tyro refused the words.
    """
    default = with_variants(default, {name: value_in(words, f"--{name}.variant") for name in default.parts})
    extra, parts, groups, rare = extra or {}, default.parts, list(GROUPS), frozenset()
    if "--help-all" in words:
        parts = {name: part.options() for name, part in methods.PARTS.items()} | parts
        words = ["--help"]
    elif {"-h", "--help"} & set(words):
        groups, rare = [name for name in groups if name not in RARE_GROUPS], RARE
        description = f"{description}\n\nRare options, those of the engine, of logging and of other methods: --help-all"
        words = ["--help"]
    else:
        _refuse_other_parts(default.method, words)
    fields = [_method(default), _field("steps", int, default, STEPS_HELP), _field("seed", int, default, SEED_HELP)]
    fields += [(name, kind, dataclasses.field(default=value)) for name, (kind, value) in extra.items()]
    for name in groups:
        options = _without(getattr(default, name), rare)
        fields.append((name, Annotated[type(options), tyro.conf.arg(name="")], dataclasses.field(default=options)))
    fields += [(name, type(o), dataclasses.field(default=o)) for name, o in parts.items() if dataclasses.fields(o)]
    kind = dataclasses.make_dataclass("Arguments", fields, frozen=True)
    found = tyro.cli(kind, args=list(words), prog=prog, description=description)
    given = {name: getattr(found, name, options) for name, options in parts.items()}
    values = {name: getattr(found, name) for name in ("steps", "seed", *groups)}
    config = dataclasses.replace(default, **values, parts=given)
    return config, {name: getattr(found, name) for name in extra}


def words_of(config: Config, default: Config) -> list[str]:
    """The command-line words that turn `default` into `config`, which has the same method."""
    variants = {name: getattr(options, "variant", None) for name, options in config.parts.items()}
    words, values = [], with_variants(default, variants).flat()
    for name, value in config.flat().items():
        if value == values[name]:
            continue
        flag = name.replace("_", "-")
        if isinstance(value, bool) and isinstance(values[name], bool):
            before, _, last = flag.rpartition(".")
            words.append(f"--{flag}" if value else f"--{before}{'.' if before else ''}no-{last}")
        elif isinstance(value, tuple):
            words += [f"--{flag}", *map(str, value)]
        else:
            words += [f"--{flag}", str(value)]
    return words


def with_variants(default: Config, variants: Mapping[str, str | None]) -> Config:
    """The defaults beside these variants of the parts: a variant changes what its part's table says of it."""
    for part, variant in variants.items():
        default = default.replace(**default.parts[part].variants.get(variant, {}))
    return default


def _without(options: Options, hidden: frozenset[str]) -> Options:
    """The options, for a help text that leaves out those of `hidden` that have the value of their class."""
    kinds = {f.name: f.type for f in dataclasses.fields(options) if f.name in hidden}
    usual = {name: kind for name, kind in kinds.items() if getattr(options, name) == getattr(type(options), name)}
    if not usual:
        return options
    annotations = {name: Annotated[kind, tyro.conf.Suppress] for name, kind in usual.items()}
    defaults = {name: getattr(type(options), name) for name in usual}
    kind = type(type(options).__name__, (type(options),), {"__annotations__": annotations, **defaults})
    return dataclasses.dataclass(frozen=True)(kind)(**vars(options))


def _method(default: Config) -> tuple:
    names = methods.names()
    added: dict[str, list[str]] = {}
    for name in names:
        base, _, others = name.partition("+")
        added.setdefault(base, []).extend([f"+{others}"] if others else [])
    help_text = "; ".join(f"{base} [{' '.join(others)}]" if others else base for base, others in added.items())
    kind = Annotated[Literal[names], tyro.conf.arg(metavar="METHOD", help=f"{help_text}.")]
    return "method", kind, dataclasses.field(default=default.method)


def _field(name: str, kind: type, default: Config, text: str) -> tuple:
    return name, Annotated[kind, tyro.conf.arg(help=text)], dataclasses.field(default=getattr(default, name))


def _refuse_other_parts(method: str, words: Sequence[str]) -> None:
    own = methods.parts_of(method)
    for word in words:
        part, dot, _ = word.removeprefix("--").partition(".")
        if word.startswith("--") and dot and part in methods.PARTS and part not in own:
            raise ValueError(methods.missing_part(method, part))
