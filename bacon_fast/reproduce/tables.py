"""The tables by name: which methods (rows) run on which presets (columns), and what they change."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

from bacon_fast.methods import METHODS
from bacon_fast.reproduce import published
from bacon_fast.reproduce.published import Source

Overrides = Mapping[str, object]


@dataclass(frozen=True)
class Row:
    """A method, or a variation of one. `overrides` are values by their names on the command line: lr, bacon.top_k.
    `per_column` has further ones, column by column.
    """

    name: str
    method: str
    overrides: Overrides = field(default_factory=dict, hash=False)
    per_column: Mapping[str, Overrides] = field(default_factory=dict, hash=False)

    def changes(self, column: "Column") -> dict[str, object]:
        """What it changes in a column."""
        return {**self.overrides, **self.per_column.get(column.name, {})}


@dataclass(frozen=True)
class Column:
    """A preset, and values that the table changes in it, by their names on the command line."""

    preset: str
    overrides: Overrides = field(default_factory=dict, hash=False)
    title: str = ""

    @property
    def name(self) -> str:
        return self.title or self.preset


@dataclass(frozen=True)
class Table:
    """Rows x columns x seeds. It compares `metric`, "bacc" or "error", and was published in `source`."""

    title: str
    rows: tuple[Row, ...]
    columns: tuple[Column, ...]
    source: Source | None = None
    metric: str = "bacc"
    seeds: tuple[int, ...] = (0, 1, 2)


def _methods(*names: str, overrides: Overrides = MappingProxyType({})) -> tuple[Row, ...]:
    return tuple(Row(name, name, overrides) for name in names)


# What the released configurations set per method beyond the defaults (methods.md 0.3, A.2, H). The base
# learners alone run the cosine schedule, everything added to them a constant rate.
_COSINE = {"lr_schedule": "cosine"}
# DASO's temperature where the unlabeled classes are distributed differently from the labeled ones, and on CIFAR-100.
_DASO_APART = {"daso.t_dist": 0.3}
_DASO_APART_ON = dict.fromkeys(("bacon-cifar100", "bacon-stl10"), _DASO_APART)
# In BaCon's configurations the older baselines have mu = 7 on CIFAR-10, and all of them but CReST on CIFAR-100: the
# methods of its tables do not have equal compute.
_WIDE = {"unlabeled_ratio": 7}
_BACON_DASO, _USB_DASO = {"daso.start": 5120 / 300_000}, {"daso.start": 5120 / 262_144}
_BACON_DARP, _USB_DARP = {"darp.start": 0.2}, {"darp.start": 200 / 256}
_BACON_COSSL, _USB_COSSL = {"cossl.start": 0.2}, {"cossl.start": 200 / 256}


def _older(name: str, *wide: str, overrides: Overrides = MappingProxyType({})) -> Row:
    """FixMatch with an older balancer in BaCon's Table 1; `wide`: columns with mu = 7."""
    return Row(f"fixmatch+{name}", f"fixmatch+{name}", overrides, dict.fromkeys(wide, _WIDE))


_BACON_TABLE_1 = (
    *_methods("fixmatch", overrides=_COSINE),
    Row(
        "fixmatch+daso",
        "fixmatch+daso",
        _BACON_DASO,
        _DASO_APART_ON | {"bacon-cifar10": _WIDE, "bacon-cifar100": _WIDE | _DASO_APART},
    ),
    _older("debiaspl", "bacon-cifar10", "bacon-cifar100"),
    _older("crest", "bacon-cifar10"),
    _older("crest+pda", "bacon-cifar10", "bacon-cifar100"),
    _older("darp", "bacon-cifar10", "bacon-cifar100", overrides=_BACON_DARP),
    *_methods("fixmatch+abc"),
    *_methods("fixmatch+cossl", overrides=_BACON_COSSL),
    *_methods("fixmatch+abc+bacon"),
    *_methods("remixmatch", overrides=_COSINE),
    Row("remixmatch+daso", "remixmatch+daso", _BACON_DASO, _DASO_APART_ON),
    *_methods("remixmatch+crest+pda"),
    *_methods("remixmatch+darp", overrides=_BACON_DARP),
    *_methods("remixmatch+abc"),
    *_methods("remixmatch+cossl", overrides=_BACON_COSSL),
    *_methods("remixmatch+abc+bacon"),
)

_BACON_TABLE_2 = (
    *_methods("fixmatch", overrides=_COSINE),
    *_methods("fixmatch+crest+pda", overrides=_WIDE),
    *_methods("fixmatch+abc"),
    *_methods("fixmatch+cossl", overrides=_BACON_COSSL),
    *_methods("fixmatch+abc+bacon"),
    *_methods("fixmatch+simpro", "fixmatch+cdmad"),  # newer than the table, which has no numbers of theirs
)

_USB = (
    *_methods("fixmatch", overrides=_COSINE),
    *_methods("fixmatch+abc"),
    *_methods("fixmatch+cossl", overrides=_USB_COSSL),
    *_methods("fixmatch+darp", overrides=_USB_DARP),
    *_methods("fixmatch+crest+pda"),
    Row("fixmatch+daso", "fixmatch+daso", _USB_DASO, {"usb-cifar10-inverse": _DASO_APART}),
    *_methods("fixmatch+saw", "fixmatch+debiaspl"),
    *_methods("remixmatch", overrides=_COSINE),
    *_methods("remixmatch+abc"),
    *_methods("remixmatch+cossl", overrides=_USB_COSSL),
)


def _ablation() -> tuple[Row, ...]:
    """BaCon, and BaCon with one thing changed (methods.md E.2 to E.6)."""
    bacon = "fixmatch+abc+bacon"
    variations: dict[str, Overrides] = {
        "no-rns": {"bacon.top_k": 1},
        "no-bta": {"bacon.bta": 0.0},
        **{f"projection-{d}": {"bacon.proj_dim": d} for d in (8, 16, 64)},
        "projection-none": {"bacon.proj_layers": 0},
        "projection-2-layers": {"bacon.proj_layers": 2},
        **{f"top-k-{k}": {"bacon.top_k": k} for k in (2, 5)},
        **{f"temperature-{tau}": {"bacon.temperature": tau} for tau in (0.05, 0.2, 0.5)},
        **{f"bta-{eta}": {"bacon.bta": eta} for eta in (0.05, 0.5)},
        **{f"reliable-{s}": {"bacon.reliable_threshold": s} for s in (0.9, 0.95, 0.99)},
        **{f"negative-weight-{w:g}": {"bacon.negative_weight": w} for w in (16.0, 256.0)},
        "negatives-per-anchor": {"bacon.neg_mode": "paper"},
        "batch-centers": {"bacon.centers": "batch"},
        "released-code": {"bacon.variant": "official", "bacon.proj_dim": 16},
    }
    return (
        Row("bacon", bacon),
        Row("no-contrast", "fixmatch+abc"),
        *(Row(name, bacon, overrides) for name, overrides in variations.items()),
    )


def _columns(*presets: str, **overrides) -> tuple[Column, ...]:
    return tuple(Column(preset, overrides) for preset in presets)


# The published numbers come from USB's code, or BaCon's, which is built on it. Both have USB's network (models/wrn.py).
_USB_NETWORK = {"backbone": "wrn-28-2-usb"}


def _protocols(preset: str, *protocols: str, **overrides) -> tuple[Column, ...]:
    """Columns of a preset under other protocols, by whose names they go."""
    return tuple(Column(preset, {"protocol": protocol, **overrides}, protocol) for protocol in protocols)


# The methods that came after BaCon, beside it, with the recipe of one of them.
_NEWER = _methods("fixmatch", "fixmatch+abc+bacon", "fixmatch+simpro", "fixmatch+cdmad")
_ORDERS = ("", "-uniform", "-reversed", "-middle", "-head-tail")


TABLES: dict[str, Table] = {
    "bacon-table1": Table(
        "BaCon's Table 1: three data sets, two base learners",
        _BACON_TABLE_1,
        _columns("bacon-cifar10", "bacon-cifar100", "bacon-stl10", **_USB_NETWORK),
        published.BACON_TABLE_1,
    ),
    "bacon-table2": Table(
        "BaCon's Table 2: labeled and unlabeled images of different imbalance",
        _BACON_TABLE_2,
        _columns(
            "bacon-cifar10", "bacon-cifar10-inverse", "bacon-cifar10-150", "bacon-cifar10-150-inverse", **_USB_NETWORK
        ),
        published.BACON_TABLE_2,
    ),
    "usb": Table(
        "USB's long-tailed CIFAR-10",
        _USB,
        _columns("usb-cifar10", "usb-cifar10-inverse", "usb-cifar10-150", **_USB_NETWORK),
        published.USB,
    ),
    "ablation": Table("BaCon with one thing changed at a time", _ablation(), _columns("bacon-cifar10", **_USB_NETWORK)),
    "sscl-cifar10": Table(
        "SsCL on CIFAR-10 with few labels",
        # SsCL's strong view has no Cutout, the others' has it (methods.md 0.3, F.1).
        (
            *_methods("sscl"),
            # The paper's sentences to the letter, where ours reads them otherwise (methods.md F.7).
            Row("sscl-paper", "sscl", {"sscl.variant": "paper", "lr_schedule": "cosine_to_zero"}),
            *_methods("fixmatch", overrides={"cutout": True}),
            *_methods("remixmatch", overrides={"cutout": True, "unlabeled_ratio": 1}),
        ),
        tuple(
            Column("sscl-cifar10", {"protocol": f"balanced-cifar10-{labels}"}, f"sscl-cifar10-{labels}")
            for labels in (40, 250, 4000)
        ),
        published.SSCL,
        metric="error",
    ),
    "ssc": Table(
        "SSC and FixMatch with 4 and 25 labels a class (SSC's own numbers are not at hand)",
        _methods("ssc", "fixmatch"),
        _columns("ssc-cifar100-400", "ssc-cifar100-2500")
        + _columns(*(f"ssc-{name}-{labels}" for name in ("stl10", "svhn", "cifar10") for labels in (40, 250))),
        metric="error",
    ),
    "simpro": Table(
        "SimPro's unlabeled sets of five class distributions",
        _NEWER,
        _protocols("simpro-cifar10", *(f"simpro-cifar10-{gamma}{order}" for gamma in (150, 100) for order in _ORDERS))
        + _protocols("simpro-cifar100", *(f"simpro-cifar100-20{order}" for order in _ORDERS))
        + _protocols("simpro-stl10", "simpro-stl10-10", "simpro-stl10-20"),
        published.SIMPRO,
    ),
    "cdmad": Table(
        "CDMAD's protocols with FixMatch",
        _NEWER,
        _protocols("cdmad-cifar10", "cossl-cifar10-50", "cossl-cifar10-100", "cossl-cifar10-150")
        # The authors' decay where there are 30,000 images or more.
        + _protocols("cdmad-cifar10", "cdmad-cifar10-100-uniform", weight_decay=0.01)
        + _protocols("cdmad-cifar10", *(f"cdmad-cifar10-100-{word}" for word in ("50", "150", "reversed")))
        + _protocols("cdmad-cifar100", *(f"cossl-cifar100-{gamma}" for gamma in (20, 50, 100)))
        + _protocols("cdmad-stl10", "cdmad-stl10-10", "cdmad-stl10-20"),
        published.CDMAD,
    ),
    "cdmad-remixmatch": Table(
        "CDMAD's protocols with ReMixMatch",
        _methods("remixmatch", "remixmatch+abc+bacon", "remixmatch+cdmad"),
        _protocols(
            "cdmad-remixmatch-cifar10", "cdmad-disjoint-cifar10-50", "usb-cifar10-1500-100", "usb-cifar10-1500-150"
        )
        + _protocols("cdmad-remixmatch-cifar100", *(f"cdmad-disjoint-cifar100-{gamma}" for gamma in (20, 50, 100))),
        published.CDMAD_REMIXMATCH,
    ),
    "cpu-cifar10": Table(
        "A reduced CIFAR-10-LT for a CPU: WRN-10-1, 5,000 steps of 32 labeled images",
        _methods("supervised", "fixmatch", "fixmatch+abc", "fixmatch+abc+bacon", "fixmatch+cdmad", "fixmatch+simpro"),
        _protocols("cpu-cifar10", *(f"bacon-cifar10-100{order}" for order in ("", "-inverse", "-uniform"))),
    ),
    "digits": Table("Every method on the built-in digits", _methods(*METHODS), _columns("digits")),
}
"""Tables by name, as `bacon-fast reproduce NAME` takes them."""
