"""Published accuracies, as methods.md (sections F.6, G.6 and I) and newer_methods.md O give them, with how each was
obtained.

Values are percent. Numbers belong to a protocol: two protocols with the same class counts are still two protocols.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Value:
    """A published mean and, where there is one, the number after ±; the same of the geometric mean beside a bACC."""

    mean: float
    deviation: float | None = None
    gm: float | None = None
    gm_deviation: float | None = None

    def __str__(self) -> str:
        text = _plus_minus(self.mean, self.deviation)
        return text if self.gm is None else f"{text} (GM {_plus_minus(self.gm, self.gm_deviation)})"


def _plus_minus(mean: float, deviation: float | None) -> str:
    return f"{mean:.2f}" if deviation is None else f"{mean:.2f} ± {deviation:.2f}"


_NOT_STATED = "length not stated"
_BASES = ("fixmatch", "remixmatch", "uda", "mixmatch")


@dataclass(frozen=True)
class Source:
    """A table of a paper or code base.

    Attributes:
        title: its name.
        metric: "bacc" (balanced accuracy), "top1", or "error" (100 - top-1).
        steps, steps_by_method: length of its runs, and of the methods with another length.
        schedule, base_schedule, schedule_by_method: learning rates of its runs, and of base learners alone or of other
            methods where they differ.
        selection: which evaluation was reported.
        seeds: runs per number; None: not stated.
        deviation: the meaning of its ±; None: not stated.
        note: other differences between its numbers and ours.
        values: protocol -> method -> Value.
    """

    title: str
    metric: str
    steps: str
    schedule: str
    selection: str
    seeds: int | None
    deviation: str | None
    values: Mapping[str, Mapping[str, Value]]
    base_schedule: str | None = None
    note: str | None = None
    steps_by_method: Mapping[str, str] = field(default_factory=dict)
    schedule_by_method: Mapping[str, str] = field(default_factory=dict)

    def steps_of(self, method: str) -> str:
        """Length of the runs of a method."""
        return self.steps_by_method.get(method, self.steps)

    def schedule_of(self, method: str) -> str:
        """Learning rates of the runs of a method."""
        schedule = self.base_schedule if method in _BASES and self.base_schedule is not None else self.schedule
        return self.schedule_by_method.get(method, schedule)


def _columns(protocols: tuple[str, ...], rows: Mapping[str, tuple]) -> dict[str, dict[str, Value]]:
    """Protocol by protocol from rows as papers print them; an entry is a mean, the fields of a Value, or None."""
    table: dict[str, dict[str, Value]] = {protocol: {} for protocol in protocols}
    for method, entries in rows.items():
        for protocol, entry in zip(protocols, entries, strict=True):
            if entry is not None:
                table[protocol][method] = Value(*entry) if isinstance(entry, tuple) else Value(entry)
    return table


# methods.md H: BaCon's baselines are USB's files. CReST's error there has no effect on counts that fall with the class.
_USB_ERRORS = (
    "The published numbers of DASO, DebiasPL and CoSSL are those of USB's code (the repository at 1ef4cbe; semilearn "
    "0.3.1 mended DebiasPL), with errors that ours does not repeat unless told to (--set usb_compat=true)."
)
# USB's code runs the given number of steps in every generation; BaCon's released configurations of CReST give 65,536.
_GENERATIONS = "6 generations of 65,536 steps"
_BACON_RECIPE = {
    "metric": "bacc",
    "steps": "300,000 steps",
    "schedule": "constant rate",
    "base_schedule": "cosine rate",
    "selection": "best, chosen on the test set",
    "seeds": None,
    "deviation": None,
    "note": _USB_ERRORS,
    "steps_by_method": dict.fromkeys(("fixmatch+crest", "fixmatch+crest+pda", "remixmatch+crest+pda"), _GENERATIONS),
}

BACON_TABLE_1 = Source(
    title="BaCon (AAAI 2024), Table 1, through a secondary registry",
    **_BACON_RECIPE,
    values=_columns(
        ("bacon-cifar10-100", "bacon-cifar100-20", "bacon-stl10-10"),
        {
            "fixmatch": ((75.30, 0.37), (53.94, 0.09), (67.16, 0.36)),
            "fixmatch+daso": ((74.78, 0.21), (54.83, 0.19), (68.69, 0.15)),
            "fixmatch+debiaspl": ((75.25, 0.21), (54.90, 0.11), (65.96, 0.23)),
            "fixmatch+crest": ((76.62, 0.12), (54.83, 0.10), (66.45, 0.09)),
            "fixmatch+crest+pda": ((78.64, 0.40), (55.01, 0.12), (67.17, 0.04)),
            "fixmatch+darp": ((78.00, 0.33), (55.63, 0.07), (62.43, 0.10)),
            "fixmatch+abc": ((83.25, 0.77), (56.91, 0.02), (71.23, 0.04)),
            "fixmatch+cossl": ((84.09, 0.16), (57.33, 0.05), (70.95, 0.17)),
            "fixmatch+abc+bacon": ((84.46, 0.15), (57.96, 0.26), (71.55, 0.09)),
            "remixmatch": ((77.96, 0.24), (56.12, 0.12), (66.97, 0.04)),
            "remixmatch+daso": ((78.86, 0.15), (57.67, 0.20), (65.38, 0.18)),
            "remixmatch+crest+pda": ((79.91, 0.20), (59.78, 0.23), (67.57, 0.11)),
            "remixmatch+darp": ((77.80, 0.18), (57.21, 0.21), (65.93, 0.16)),
            "remixmatch+abc": ((84.49, 0.24), (59.92, 0.01), (67.24, 1.02)),
            "remixmatch+cossl": ((84.93, 0.02), (60.46, 0.15), (68.73, 0.77)),
            "remixmatch+abc+bacon": ((85.05, 0.09), (60.15, 0.05), (69.26, 0.83)),
        },
    ),
)

BACON_TABLE_2 = Source(
    title="BaCon (AAAI 2024), Table 2, through a secondary registry",
    **_BACON_RECIPE,
    values=_columns(
        ("bacon-cifar10-100", "bacon-cifar10-100-inverse", "bacon-cifar10-150", "bacon-cifar10-150-inverse"),
        {
            "fixmatch": (75.66, 56.35, 73.45, 62.30),
            "fixmatch+crest+pda": (79.14, 66.47, 74.51, 62.75),
            "fixmatch+abc": (82.48, 81.14, 79.41, 78.84),
            "fixmatch+cossl": (83.94, 71.99, 81.83, 74.14),
            "fixmatch+abc+bacon": (84.61, 83.80, 81.99, 82.35),
        },
    ),
)

USB = Source(
    title="USB, results/classic_cv_imb.csv",
    metric="top1",
    steps="262,144 steps",
    schedule="constant rate",
    base_schedule="cosine rate",
    selection="best, chosen on the test set",
    seeds=None,
    deviation=None,
    note=_USB_ERRORS,
    values=_columns(
        ("usb-cifar10-1500-100", "usb-cifar10-1500-100-inverse", "usb-cifar10-1500-150", "bacon-stl10-10"),
        {
            "fixmatch": ((76.69, 0.78), (69.95, 1.18), (73.01, 0.57), (67.70, 2.02)),
            "fixmatch+abc": ((83.88, 0.27), (83.78, 0.27), (81.73, 0.25), (72.20, 1.20)),
            "fixmatch+cossl": ((85.28, 0.23), (75.48, 0.98), (82.98, 0.12), (71.20, 0.53)),
            "fixmatch+darp": ((78.49, 0.49), (69.67, 0.65), (74.73, 0.30), None),
            "fixmatch+crest+pda": ((78.25, 0.36), (68.81, 0.63), (74.59, 0.66), None),
            "fixmatch+daso": ((76.51, 0.49), (78.07, 0.38), (71.97, 0.51), (71.13, 1.40)),
            "fixmatch+saw": ((80.78, 0.40), (75.37, 0.34), (76.75, 0.23), None),
            "fixmatch+debiaspl": ((77.51, 0.76), (69.72, 0.10), (73.41, 0.47), None),
            "remixmatch": ((78.79, 0.85), None, None, None),
            "remixmatch+abc": ((84.38, 0.54), None, None, None),
            "remixmatch+cossl": ((86.41, 0.13), None, None, None),
        },
    ),
)

SSCL = Source(
    title="SsCL (arXiv 2105.07387)",
    metric="error",
    steps="200 epochs",
    steps_by_method=dict.fromkeys(_BASES, _NOT_STATED),
    schedule="cosine rate",
    base_schedule="rate not stated",
    selection="selection not stated",
    seeds=5,
    deviation="of 5 folds",
    values=_columns(
        ("balanced-cifar10-40", "balanced-cifar10-250", "balanced-cifar10-4000"),
        {
            "sscl": ((10.29, 2.61), (5.12, 0.41), (4.51, 0.13)),
            "fixmatch": ((13.81, 3.37), (5.07, 0.65), (4.26, 0.05)),
            "remixmatch": ((19.10, 9.64), (5.44, 0.05), (4.72, 0.13)),
            "uda": ((29.05, 5.93), (8.82, 1.08), (4.88, 0.18)),
            "mixmatch": ((47.54, 11.50), (11.05, 0.86), (6.42, 0.10)),
        },
    ),
)

_SIMPRO_ORDERS = ("", "-uniform", "-reversed", "-middle", "-head-tail")
SIMPRO = Source(
    title="SimPro (ICML 2024), README of its code; FixMatch on CIFAR-100 and STL-10 through a secondary registry",
    metric="top1",
    steps="43,000 steps",
    steps_by_method={"fixmatch": _NOT_STATED},
    schedule="cosine rate",
    base_schedule="rate not stated",
    selection="best or mean of the last 20, not stated which",
    seeds=None,
    deviation=None,
    note=(
        "SimPro's numbers are of its authors' strong augmentation, which is not that of our runs (engine/presets.py "
        "says what else is missing), and it is not known how they were chosen. FixMatch's on the consistent sets are "
        "those of ACR's paper (CVPR 2023)."
    ),
    values=_columns(
        tuple(f"simpro-cifar10-{gamma}{order}" for gamma in (150, 100) for order in _SIMPRO_ORDERS)
        + tuple(f"simpro-cifar100-20{order}" for order in _SIMPRO_ORDERS)
        + ("simpro-stl10-10", "simpro-stl10-20"),
        {
            "fixmatch": (
                *((62.9, 0.36), (67.6, 2.56), (59.9, 0.82), (64.3, 0.63), (58.3, 1.46)),
                *((67.8, 1.13), (73.0, 3.81), (62.5, 0.94), (71.7, 0.46), (66.6, 0.87)),
                *((40.0, 0.96), (39.6, 1.16), (36.2, 0.63), (39.7, 0.61), (38.2, 0.82)),
                *((72.4, 0.71), (64.0, 2.27)),
            ),
            "fixmatch+simpro": (
                *((74.2, 0.90), (93.6, 0.08), (83.5, 0.95), (82.6, 0.38), (81.0, 0.27)),
                *((80.7, 0.30), (93.8, 0.10), (85.8, 0.48), (84.8, 0.54), (83.0, 0.36)),
                *((43.1, 0.40), (52.2, 0.16), (45.5, 0.34), (43.6, 0.35), (44.8, 0.56)),
                *((84.5, 0.39), (82.5, 0.25)),
            ),
        },
    ),
)

_CDMAD_NOTE = (
    "CDMAD's numbers are of its authors' 16-operation augmentation, which is not here, and of a BatchNorm that the "
    "empty image moves (--set cdmad.authors_statistics=true); engine/presets.py says what else is missing."
)
_CDMAD_RECIPE = {
    "metric": "bacc",
    "schedule": "constant rate",
    "selection": "selection not stated",
}
_CDMAD_BASELINES = ("fixmatch", "fixmatch+darp", "fixmatch+abc", "fixmatch+cossl", "remixmatch", "remixmatch+abc")
_BASELINES_RECIPE = {
    "steps_by_method": dict.fromkeys(_CDMAD_BASELINES, _NOT_STATED),
    "schedule_by_method": dict.fromkeys(_CDMAD_BASELINES, "rate not stated"),
}
_OF_THREE = {"seeds": 3, "deviation": "standard error"}
CDMAD = Source(
    title="CDMAD (CVPR 2024), through a secondary registry",
    **_CDMAD_RECIPE,
    **_OF_THREE,
    steps="250,000 steps",
    **_BASELINES_RECIPE,
    note=_CDMAD_NOTE,
    values=_columns(
        (
            *(f"cossl-cifar10-{gamma}" for gamma in (50, 100, 150)),
            *(f"cdmad-cifar10-100-{word}" for word in ("uniform", "50", "150")),
            *(f"cossl-cifar100-{gamma}" for gamma in (20, 50, 100)),
            *(f"cdmad-stl10-{gamma}" for gamma in (10, 20)),
        ),
        {
            "fixmatch": (
                *((79.2, 0.3, 77.8, 0.4), (71.5, 0.7, 66.8, 1.5), (68.4, 0.2, 59.9, 0.4)),
                *((68.9, 2.0, 42.8, 8.1), (73.9, 0.3, 70.5, 0.5), (69.6, 0.6, 62.6, 1.1)),
                *((49.6, 0.78), (42.1, 0.33), (37.6, 0.48)),
                *((72.9, 0.1, 69.6, 0.0), (63.4, 0.2, 52.6, 0.1)),
            ),
            "fixmatch+darp": (
                *(None, None, None),
                *((85.4, 0.6, 85.0, 0.7), (77.3, 0.2, 75.5, 0.2), (72.9, 0.2, 69.5, 0.2)),
                *((50.8, 0.77), (43.1, 0.54), (38.3, 0.47)),
                *((77.8, 0.3, 76.5, 0.4), (69.9, 1.8, 65.4, 3.1)),
            ),
            "fixmatch+abc": (
                *((85.6, 0.3, 85.2, 0.3), (81.1, 1.1, 80.3, 1.3), (77.3, 1.3, 75.6, 1.7)),
                *((82.7, 0.5, 81.9, 0.7), (82.7, 0.6, 82.0, 0.8), (78.4, 0.9, 77.2, 1.1)),
                *((53.3, 0.79), (46.7, 0.26), (41.2, 0.06)),
                *((79.1, 0.5, 78.1, 0.6), (73.8, 0.2, 72.1, 0.2)),
            ),
            "fixmatch+cossl": (
                *((86.8, 0.3, 86.6, 0.3), (83.2, 0.5, 82.7, 0.6), (80.3, 0.6, 79.6, 0.6)),
                *(None, None, None),
                *((53.9, 0.78), (47.6, 0.57), (43.0, 0.61)),
                *(None, None),
            ),
            "fixmatch+cdmad": (
                *((87.3, 0.1, 87.0, 0.2), (83.6, 0.5, 83.1, 0.6), (80.8, 0.9, 79.9, 1.1)),
                *((87.5, 0.5, 87.1, 0.5), (85.7, 0.4, 85.3, 0.4), (82.3, 0.2, 81.8, 0.3)),
                *((54.3, 0.44), (48.8, 0.75), (44.1, 0.29)),
                *((79.9, 0.2, 78.9, 0.4), (75.2, 0.4, 73.5, 0.3)),
            ),
        },
    ),
)
CDMAD_BY_DYTRIM = Source(
    title="CDMAD in DyTrim's paper (ICLR 2026)",
    **_CDMAD_RECIPE,
    seeds=None,
    deviation=None,
    steps="250,000 steps",
    note=_CDMAD_NOTE,
    values={"cdmad-cifar10-100-reversed": {"fixmatch+cdmad": Value(77.1, gm=75.4)}},
)
CDMAD_REMIXMATCH = Source(
    title="CDMAD on ReMixMatch (CVPR 2024), through a secondary registry",
    **_CDMAD_RECIPE,
    **_OF_THREE,
    steps="150,000 steps",
    **_BASELINES_RECIPE,
    note=_CDMAD_NOTE,
    values=_columns(
        (
            *("cdmad-disjoint-cifar10-50", "usb-cifar10-1500-100", "usb-cifar10-1500-150"),
            *(f"cdmad-disjoint-cifar100-{gamma}" for gamma in (20, 50, 100)),
        ),
        {
            "remixmatch": (
                *((81.5, 0.3, 80.2, 0.3), (73.8, 0.4, 69.5, 0.8), (69.9, 0.5, 62.5, 0.4)),
                *((51.6, 0.43), (44.2, 0.59), (39.3, 0.43)),
            ),
            "remixmatch+abc": (
                *((87.9, 0.5, 87.6, 0.5), (84.5, 0.3, 84.1, 0.4), (80.5, 1.2, 79.5, 1.4)),
                *((55.6, 0.35), (47.9, 0.10), (42.2, 0.12)),
            ),
            "remixmatch+cdmad": (
                *((88.3, 0.4, 88.1, 0.4), (85.5, 0.5, 85.3, 0.4), (82.5, 0.2, 82.0, 0.3)),
                *((57.0, 0.32), (51.1, 0.46), (44.9, 0.42)),
            ),
        },
    ),
)

SOURCES = (BACON_TABLE_1, BACON_TABLE_2, USB, SSCL, SIMPRO, CDMAD, CDMAD_BY_DYTRIM, CDMAD_REMIXMATCH)


@dataclass(frozen=True)
class Context:
    """Numbers beside those of the sources: of the same protocol by another method or another code, or of a protocol
    that only looks alike, with the same images and counts.
    """

    title: str
    values: Mapping[str, str]


def _dytrim(value: str) -> tuple[Context]:
    return (Context("DyTrim on CDMAD (ICLR 2026), bACC / GM", {"DyTrim": value}),)


def _cpg(cpg: str, simpro: str, *others: Context) -> tuple[Context, ...]:
    """Its SimPro weighs by M/N, moves the priors every step, and has one strong view (newer_methods.md K)."""
    return (Context("a note on CPG (NeurIPS 2025), best", {"CPG": cpg, "CPG's own SimPro": simpro}), *others)


# Our protocol -> numbers of it by methods that are not here, or by other code for one that is.
SAME_PROTOCOL: dict[str, tuple[Context, ...]] = {
    "cossl-cifar10-50": _dytrim("88.0 / 87.8"),
    "cossl-cifar10-100": _dytrim("84.8 / 84.4"),
    "cossl-cifar10-150": _dytrim("82.0 / 81.3"),
    "cdmad-cifar10-100-uniform": (
        Context(
            "CDMAD changed (FARAD), bACC / GM or bACC",
            {
                "pseudo-labels not debiased": "78.2 / 75.8",
                "predictions not debiased": "84.9 / 84.1",
                "hard pseudo-labels": "86.7",
                "threshold 0.95": "86.8",
            },
        ),
    ),
    "cpg-cifar10-100": _cpg("76.93", "64.13"),
    "cpg-cifar10-100-inverse": _cpg("82.37", "63.70"),
    "cpg-cifar10-100-random": _cpg(
        "82.10", "65.81", Context("CPG's log of seed 1", {"CPG, best": "82.33", "CPG, last": "81.61"})
    ),
}

_USB_BALANCED = "USB, results/classic_cv.csv, error after 2^20 steps with networks of other widths"
# Our protocol -> numbers of another one with such counts.
OTHER_PROTOCOLS: dict[str, tuple[Context, ...]] = {
    "usb-cifar10-1500-100": (
        Context(
            "CDMAD (2024) with the labeled images among the unlabeled ones, bACC / GM, ± standard error of 3 runs, "
            "through a secondary registry",
            {
                "FixMatch": "71.5 ± 0.7 / 66.8 ± 1.5",
                "ABC": "81.1 ± 1.1 / 80.3 ± 1.3",
                "CoSSL": "83.2 ± 0.5 / 82.7 ± 0.6",
                "SAW+LA": "80.7 ± 0.2 / 77.5 ± 0.2",
            },
        ),
        Context("SC-SSL, its run of CDMAD in USB", {"CDMAD": "83.33 ± 0.52"}),
    ),
    "usb-cifar10-1500-100-inverse": (Context("SC-SSL, its run of CDMAD in USB", {"CDMAD": "77.76 ± 0.56"}),),
    "usb-cifar10-1500-150": (
        Context(
            "CDMAD (2024) with the labeled images among the unlabeled ones, bACC / GM of 3 runs, through a secondary "
            "registry",
            {"FixMatch": "68.4 / 59.9", "ABC": "77.3 / 75.6", "CoSSL": "80.3 / 79.6", "SAW+LA": "73.7 / 71.2"},
        ),
    ),
    "balanced-cifar100-400": (Context(_USB_BALANCED, {"FixMatch": "53.37 ± 2.15"}),),
    "balanced-cifar100-2500": (Context(_USB_BALANCED, {"FixMatch": "34.29 ± 0.43"}),),
}
