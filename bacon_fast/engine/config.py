"""The typed configuration of a run: groups that every run has, and the options of the method's parts."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from bacon_fast import methods
from bacon_fast.engine.groups import (
    DataOptions,
    EngineOptions,
    LogOptions,
    ModelOptions,
    OptimizerOptions,
    RunOptions,
    ViewOptions,
)
from bacon_fast.files import read_record, write_record
from bacon_fast.methods.options import Options, SharedOptions, from_json, to_json
from bacon_fast.methods.part import PartOptions
from bacon_fast.models.timm_backbone import PREFIX

FORMAT = 2
"""Number of the format in which config.json and checkpoints are written."""

# In the order of the command line.
GROUPS: dict[str, type[Options]] = {
    "run": RunOptions,
    "data": DataOptions,
    "views": ViewOptions,
    "model": ModelOptions,
    "optimizer": OptimizerOptions,
    "shared": SharedOptions,
    "engine": EngineOptions,
    "log": LogOptions,
}
TOP = ("preset", "method", "steps", "seed")
STEPS = 300_000
"""T, unless a preset says otherwise."""
# Every name on the command line that stands alone, and its group.
GROUP_OF: dict[str, str] = {f.name: group for group, options in GROUPS.items() for f in dataclasses.fields(options)}

# Fields that do not change the result of a run, but where it happens and what it prints: a resumed run may change them.
RESUME_MAY_CHANGE = {
    "run": ("run_dir", "resume"),
    "data": ("data_dir", "unlabeled", "test", "val", "unreadable", "download", "split", "images", "follow_links"),
    "engine": ("graph", "rank_timeout"),
    "log": ("log_every", "checkpoint_every", "keep_checkpoints", "report"),
}
_MAY_CHANGE = frozenset(name for names in RESUME_MAY_CHANGE.values() for name in names)


@dataclass(frozen=True)
class Config(Options):
    """Everything that defines a run. Presets make it (engine/presets.py); the command line overrides single values.

    Attributes:
        preset: name of the preset it started from.
        method: its parts between plus signs.
        steps: T; schedules, ABC's annealing and BaCon's temperature run on t/T.
        seed: of the split, the initialization, the sampling order and every augmentation draw.
        run, data, views, model, optimizer, shared, engine, log: groups; `shared` is what several parts read.
        parts: options of the method's parts, by name: exactly of those.

    Raises:
        ValueError: names the field, for a value that is not of the field's type or out of its range.

    Example:
        >>> config = Config.of("fixmatch+daso", {"optimizer": {"lr": 0.1}, "daso": {"start": 0.25}})
        >>> config.optimizer.lr, config.parts["daso"].start
        (0.1, 0.25)
        >>> config.replace(**{"seed": 3, "daso.start": 0.5}).flat()["daso.start"]
        0.5
    """

    preset: str
    method: str
    steps: int
    seed: int
    run: RunOptions
    data: DataOptions
    views: ViewOptions
    model: ModelOptions
    optimizer: OptimizerOptions
    shared: SharedOptions
    engine: EngineOptions
    log: LogOptions
    parts: dict[str, PartOptions]

    def check(self) -> None:
        words = methods.parts_of(self.method)
        self.require_integers(1, "steps")
        self.require(0 <= self.seed < 2**64, "seed", "an integer in 0..2^64-1")
        if tuple(self.parts) != words:
            raise ValueError(f"parts: expected those of {self.method}, found {', '.join(self.parts) or 'none'}")
        for name, options in self.parts.items():
            kind = methods.PARTS[name].options
            if type(options) is not kind:
                raise ValueError(f"parts: expected {kind.__name__} for {name}, found {options!r}")
        for options in self.parts.values():
            options.check_beside(self.parts)
        self._check_what_is_trained()
        mu = self.parts[words[0]].unlabeled_ratio
        if mu not in (None, self.views.unlabeled_ratio):
            raise ValueError(f"unlabeled_ratio: expected {mu} for {words[0]}, found {self.views.unlabeled_ratio}")
        stored, size = self.views.stored_size, self.data.image_size
        if stored is not None and (size is None or stored < size):
            expected = "none without --image-size" if size is None else f"at least the image_size, {size}"
            raise ValueError(f"stored_size: expected {expected}, found {stored}")
        if self.views.strong_crop == "resized" and self.parts[words[0]].crops_strong_views:
            raise ValueError(
                f"strong_crop: expected window for {words[0]}, whose strong views have a resized crop of their own"
            )

    def _check_what_is_trained(self) -> None:
        """Refuses what would have no effect."""
        model = self.model
        if self.views.cached_views:
            found = f"found {self.views.cached_views}"
            if model.train != "head":
                raise ValueError(f"cached_views: expected 0 unless train is head, as features would change; {found}")
            for name, options in self.parts.items():
                if reason := options.needs_images():
                    raise ValueError(f"cached_views: expected 0 beside {name}, {reason}; {found}")
        if model.train == "head":
            for name, options in self.parts.items():
                if reason := options.idle_on_frozen_features():
                    raise ValueError(f"train: expected all, lora or bias beside {name}, {reason}; found 'head'")
        if self.optimizer.layer_decay != 1 and (not model.backbone.startswith(PREFIX) or model.train == "head"):
            raise ValueError(
                "layer_decay: expected 1 where no layers of a timm backbone are trained, found "
                f"{self.optimizer.layer_decay} with backbone {model.backbone}, train {model.train}"
            )

    @classmethod
    def of(cls, method: str, overrides: Mapping[str, object] | None = None) -> "Config":
        """The defaults of a method, changed by `overrides`: {group or part: {field: value}}, and preset, steps, seed.

        Overrides of parts that the method does not have are left out: a preset has them for the methods that do.
        Raises ValueError for a name that is neither a group nor a part, TypeError for one that is no field of its own,
        and what `Config` raises.
        """
        overrides = dict(overrides or {})
        if unknown := sorted(set(overrides) - {*TOP, *GROUPS, *methods.PARTS}):
            raise ValueError(f"config: expected groups and parts, found {', '.join(unknown)}")
        defaults = methods.default_options(method)
        mu = next(iter(defaults.values())).unlabeled_ratio
        if mu is not None:
            overrides["views"] = {"unlabeled_ratio": mu, **overrides.get("views", {})}
        top = {"preset": "digits", "steps": STEPS, "seed": 0, **{k: v for k, v in overrides.items() if k in TOP}}
        groups = {name: kind(**overrides.get(name, {})) for name, kind in GROUPS.items()}
        parts = {name: dataclasses.replace(options, **overrides.get(name, {})) for name, options in defaults.items()}
        return cls(**top | {"method": method}, **groups, parts=parts)

    def replace(self, **changes: object) -> "Config":
        """The same configuration with other values, named as on the command line: seed, lr, bacon.top_k.

        Raises ValueError for a part that the method does not have, TypeError for a name that is no field.
        """
        top, nested = {}, {}
        for name, value in changes.items():
            part, _, field_name = name.rpartition(".")
            if part and part in methods.PARTS and part not in self.parts:
                raise ValueError(f"{name}: {methods.missing_part(self.method, part)}")
            if name in ("preset", "steps", "seed"):
                top[name] = value
            elif name in GROUP_OF or part in self.parts:
                nested.setdefault(part or GROUP_OF[name], {})[field_name] = value
            else:
                raise TypeError(f"config: no field {name!r}")
        groups = {k: dataclasses.replace(getattr(self, k), **nested[k]) for k in GROUPS if k in nested}
        parts = {k: dataclasses.replace(options, **nested.get(k, {})) for k, options in self.parts.items()}
        return dataclasses.replace(self, **top, **groups, parts=parts)

    def flat(self) -> dict[str, object]:
        """All values by their names on the command line."""
        values = {name: getattr(self, name) for name in TOP}
        values |= {name: getattr(getattr(self, group), name) for name, group in GROUP_OF.items()}
        for part, options in self.parts.items():
            values |= {f"{part}.{f.name}": getattr(options, f.name) for f in dataclasses.fields(options)}
        return values

    def runs_on_length(self) -> list[str]:
        """What follows t/T, by name. With any, a run of more steps is another one from its start."""
        schedule = self.optimizer.lr_schedule
        names = [] if schedule == "constant" else [f"lr_schedule {schedule}"]
        names += ["warmup"] if self.optimizer.warmup else []
        return names + [name for name, options in self.parts.items() if options.runs_on_length]

    def to_dict(self) -> dict:
        """JSON-ready values, paths as strings, and the format's number."""
        groups = {name: to_json(getattr(self, name)) for name in GROUPS}
        parts = {name: to_json(options) for name, options in self.parts.items()}
        return {"format": FORMAT, **{name: getattr(self, name) for name in TOP}, **groups, "parts": parts}

    @classmethod
    def from_dict(cls, values: dict) -> "Config":
        """Inverse of `to_dict`.

        Raises ValueError for another format, for names this version does not know and for values that do not fit.
        """
        require_format(values, "config")
        if set(values) != {"format", *TOP, *GROUPS, "parts"}:
            raise ValueError(f"config: expected format, {', '.join((*TOP, *GROUPS))}, parts, found {', '.join(values)}")
        if not isinstance(values["parts"], dict):
            raise ValueError(f"parts: expected names and values, found {values['parts']!r}")
        if not isinstance(values["method"], str):
            raise ValueError(f"method: expected a string, found {values['method']!r}")
        words = methods.parts_of(values["method"])
        if set(values["parts"]) != set(words):
            raise ValueError(f"parts: expected those of {values['method']}, found {', '.join(values['parts'])}")
        groups = {name: from_json(kind, values[name]) for name, kind in GROUPS.items()}
        parts = {name: from_json(methods.PARTS[name].options, values["parts"][name]) for name in words}
        return cls(**{name: values[name] for name in TOP}, **groups, parts=parts)

    @classmethod
    def read(cls, path: Path) -> "Config":
        """The configuration in a file that `write` wrote.

        Raises ValueError, which names the file, for one that is damaged, of another format or no configuration.
        """
        values = read_record(path)
        require_format(values, path)
        try:
            return cls.from_dict(values)
        except ValueError as error:
            raise ValueError(f"{path}: {error} (another version of bacon_fast may have written it)") from error

    def write(self, path: Path) -> None:
        """Writes a file config.json, atomically, with a digest of its content."""
        write_record(path, self.to_dict())

    def differences(self, other: "Config") -> list[str]:
        """Readable lines, one for each value by which `other`, a saved configuration, computes something else.

        A run records what "auto" became on its device, and validation None with its data: these agree with whatever
        was recorded.
        """
        mine, theirs = self.flat(), other.flat()
        if self.engine.precision == "auto":
            mine["precision"] = theirs["precision"]
        if self.data.validation is None:
            mine["validation"] = theirs["validation"]
        if self.method != other.method:  # of which all other differences in parts follow
            mine, theirs = ({k: v for k, v in values.items() if "." not in k} for values in (mine, theirs))
        changed = [name for name in mine if name not in _MAY_CHANGE and mine[name] != theirs[name]]
        return [f"{name}: checkpoint {theirs[name]!r}, now {mine[name]!r}" for name in changed]


def require_format(saved: object, source: Path | str) -> None:
    """Raises ValueError unless `saved`, read from the file `source`, is of this version's format."""
    found = saved.get("format", "without a number") if isinstance(saved, dict) else "unknown"
    if found != FORMAT:
        raise ValueError(f"{source}: its format is {found}, and this version of bacon_fast reads format {FORMAT} only")
