"""Options: frozen dataclasses that check themselves, for the groups of a configuration and the parts of a method."""

import sys
from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import cache
from pathlib import Path
from types import UnionType
from typing import ClassVar, Literal, Union, get_args, get_origin, get_type_hints


@dataclass(frozen=True)
class Options:
    """Base of all options. It refuses a value of another type than annotated, or out of range, and names its field.

    Raises:
        ValueError: names the field, what was expected and what was found.

    Example:
        >>> SharedOptions(threshold=2.0)
        Traceback (most recent call last):
        ...
        ValueError: threshold: expected a number between 0 and 1, found 2.0
    """

    part: ClassVar[str] = ""
    """Name of the part, which stands before its fields: daso in --daso.start. Empty: the fields stand alone."""

    def __post_init__(self) -> None:
        for name, kind in _kinds(type(self)).items():
            self.require(_is_of(kind, getattr(self, name)), name, _words(kind))
        self.check()

    def check(self) -> None:
        """Refuses values out of range; a subclass with such fields overrides it."""

    def require(self, condition: bool, name: str, expected: str) -> None:
        """Raises ValueError, which names the field `name`, unless the condition holds."""
        if not condition:
            label = f"{self.part}.{name}" if self.part else name
            raise ValueError(f"{label}: expected {expected}, found {getattr(self, name)!r}")

    def require_integers(self, low: int, *names: str) -> None:
        """These fields are None or at least `low`."""
        for name in names:
            value = getattr(self, name)
            self.require(value is None or value >= low, name, f"an integer of at least {low}")

    def require_positive(self, *names: str) -> None:
        """These fields are None or above 0."""
        for name in names:
            value = getattr(self, name)
            self.require(value is None or value > 0, name, "a number above 0")

    def require_weights(self, *names: str) -> None:
        """These fields are None or at least 0."""
        for name in names:
            value = getattr(self, name)
            self.require(value is None or value >= 0, name, "a number of at least 0")

    def require_fractions(self, *names: str) -> None:
        """These fields lie in [0, 1]."""
        for name in names:
            self.require(0 <= getattr(self, name) <= 1, name, "a number between 0 and 1")

    def require_starts(self, *names: str) -> None:
        """These fields, fractions of a run, lie in [0, 1)."""
        for name in names:
            self.require(0 <= getattr(self, name) < 1, name, "a number from 0 to below 1")


@dataclass(frozen=True)
class SharedOptions(Options):
    """Options that several parts of methods read.

    usb_compat brings back what USB's code at 1ef4cbe, which BaCon's is a copy of, does otherwise: in DASO and CoSSL as
    in semilearn 0.3.0 to 0.3.2; in CReST, where the labeled counts do not fall from class to class, likewise; in
    DebiasPL as in semilearn 0.3.0 only, as 0.3.1 mended it.
    """

    threshold: float = 0.95
    """Least confidence of a pseudo-label, and of a row that BaCon counts."""
    epochs: int = 1000
    """E: ABC anneals, SAW counts and SsCL refreshes by epochs."""
    distribution_momentum: float = 0.999
    """Momentum of the mean prediction (ReMixMatch, CReST+, DebiasPL)."""
    usb_compat: bool = False
    """Bring back errors of USB's code that published numbers contain."""
    loss_backend: Literal["auto", "reference", "cpp", "triton", "chunks"] = "auto"
    """Implementation of the fused losses."""

    def check(self) -> None:
        self.require_fractions("threshold", "distribution_momentum")
        self.require_integers(1, "epochs")

    @property
    def backend(self) -> str | None:
        """`loss_backend` as the operations take it: None for the best one."""
        return None if self.loss_backend == "auto" else self.loss_backend


@cache
def _kinds(options: type) -> dict[str, object]:
    """What each field may hold, as annotated."""
    hints = get_type_hints(options)
    return {field.name: hints[field.name] for field in fields(options)}


def _is_of(kind: object, value: object) -> bool:
    """Whether a value fits an annotation. An integer may stand for a float; True and False are no numbers."""
    origin, of = get_origin(kind), get_args(kind)
    if origin in (Union, UnionType):
        return any(_is_of(one, value) for one in of)
    if origin is Literal:
        return isinstance(value, str) and value in of
    if origin is tuple:
        return isinstance(value, tuple) and all(_is_of(of[0], entry) for entry in value)
    if kind is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= sys.float_info.max
    return isinstance(value, origin or kind) and (kind is bool or not isinstance(value, bool))


_WORDS = {int: "an integer", float: "a finite number", bool: "True or False", str: "a string", Path: "a pathlib.Path"}


def _words(kind: object) -> str:
    """An annotation in words."""
    origin, of = get_origin(kind), get_args(kind)
    if origin in (Union, UnionType):
        return " or ".join(_words(one) for one in of)
    if origin is Literal:
        return f"one of {', '.join(of)}"
    if origin is tuple:
        return "a tuple of paths" if of[0] is Path else "a tuple of strings"
    if kind is type(None):
        return "None"
    return _WORDS.get(kind) or f"{(origin or kind).__name__}"


def from_json(options: type[Options], values: dict) -> Options:
    """Options from their JSON values: see `as_fields`.

    Raises ValueError for a missing or an unknown field, and for a value that does not fit.
    """
    kinds, label = _kinds(options), options.part or options.__name__
    if not isinstance(values, dict):
        raise ValueError(f"{label}: expected names and values, found {values!r}")
    for what, names in (("unknown", set(values) - set(kinds)), ("missing", set(kinds) - set(values))):
        if names:
            raise ValueError(f"{label}: {what} fields {', '.join(sorted(names))}")
    return options(**as_fields(options, values))


def as_fields(options: type[Options], values: Mapping[str, object]) -> dict[str, object]:
    """The values with a path in the place of a string, or the other way round, and a tuple in that of a list, as the
    fields take them."""
    kinds, given = _kinds(options), {}
    for name, value in values.items():
        kind = kinds.get(name)
        if Path in (kind, *get_args(kind)):
            value = [_path(entry) for entry in value] if isinstance(value, (list, tuple)) else _path(value)
            if get_origin(kind) is tuple and isinstance(value, Path):  # one alone
                value = (value,)
        elif isinstance(value, Path) and str in (kind, *get_args(kind)):
            value = str(value)
        given[name] = tuple(value) if isinstance(value, list) else value
    return given


def _path(value: object) -> object:
    return Path(value) if isinstance(value, str) else value


def to_json(options: Options) -> dict:
    """Inverse of `from_json`: values that JSON has."""
    return {name: _json_value(getattr(options, name)) for name in _kinds(type(options))}


def _json_value(value: object) -> object:
    if isinstance(value, tuple):
        return [_json_value(entry) for entry in value]
    return str(value) if isinstance(value, Path) else value
