"""Published accuracies, as methods.md (sections F.6, G.6 and I) and newer_methods.md O give them, with how each was
obtained.

Values are percent. Numbers belong to a protocol: two protocols with the same class counts are still two protocols.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Value:
    """A published mean and, where there is one, the number after ±."""

    mean: float
    deviation: float | None = None

    def __str__(self) -> str:
        return f"{self.mean:.2f}" if self.deviation is None else f"{self.mean:.2f} ± {self.deviation:.2f}"


_BASES = ("fixmatch", "remixmatch", "uda", "mixmatch")


@dataclass(frozen=True)
class Source:
    """A table of a paper or code base.

    Attributes:
        title: its name.
        metric: "bacc" (balanced accuracy), "top1", or "error" (100 - top-1).
        steps, steps_by_method: length of its runs, and of the methods with another length.
        schedule, base_schedule: learning rates of its runs, and of base learners alone where they differ.
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

    def steps_of(self, method: str) -> str:
        """Length of the runs of a method."""
        return self.steps_by_method.get(method, self.steps)

    def schedule_of(self, method: str) -> str:
        """Learning rates of the runs of a method."""
        return self.base_schedule if method in _BASES and self.base_schedule is not None else self.schedule


def _columns(protocols: tuple[str, ...], rows: Mapping[str, tuple]) -> dict[str, dict[str, Value]]:
    """Protocol by protocol from rows as papers print them; an entry is mean, (mean, deviation) or None."""
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
    steps_by_method=dict.fromkeys(_BASES, "length not stated"),
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
    title="SimPro (ICML 2024), README of its code",
    metric="top1",
    steps="43,000 steps",
    schedule="cosine rate",
    selection="best or mean of the last 20, not stated which",
    seeds=None,
    deviation=None,
    note=(
        "SimPro's numbers are of its authors' strong augmentation, which is not that of our runs (engine/presets.py "
        "says what else is missing), and it is not known how they were chosen."
    ),
    values=_columns(
        tuple(f"simpro-cifar10-{gamma}{order}" for gamma in (150, 100) for order in _SIMPRO_ORDERS)
        + tuple(f"simpro-cifar100-20{order}" for order in _SIMPRO_ORDERS)
        + ("simpro-stl10-10", "simpro-stl10-20"),
        {
            "fixmatch": (
                *((62.9, 0.36), (67.6, 2.56), (59.9, 0.82), (64.3, 0.63), (58.3, 1.46)),
                *((67.8, 1.13), (73.0, 3.81), (62.5, 0.94), (71.7, 0.46), (66.6, 0.87)),
                *[None] * 7,
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
    "seeds": 3,
    "deviation": "standard error",
}
CDMAD = Source(
    title="CDMAD (CVPR 2024), through a secondary registry; the reversed set through DyTrim's paper",
    **_CDMAD_RECIPE,
    steps="250,000 steps",
    note=_CDMAD_NOTE,
    values=_columns(
        (
            *(f"cossl-cifar10-{gamma}" for gamma in (50, 100, 150)),
            *(f"cdmad-cifar10-100-{word}" for word in ("uniform", "50", "150", "reversed")),
            *(f"cossl-cifar100-{gamma}" for gamma in (20, 50, 100)),
            *(f"cdmad-stl10-{gamma}" for gamma in (10, 20)),
        ),
        {
            "fixmatch+cdmad": (
                *((87.3, 0.1), (83.6, 0.5), (80.8, 0.9)),
                *((87.5, 0.5), (85.7, 0.4), (82.3, 0.2), 77.1),
                *((54.3, 0.4), (48.8, 0.8), (44.1, 0.3)),
                *((79.9, 0.2), (75.2, 0.4)),
            )
        },
    ),
)
CDMAD_REMIXMATCH = Source(
    title="CDMAD on ReMixMatch (CVPR 2024), through a secondary registry",
    **_CDMAD_RECIPE,
    steps="150,000 steps",
    note=_CDMAD_NOTE,
    values=_columns(
        (
            *("cdmad-disjoint-cifar10-50", "usb-cifar10-1500-100", "usb-cifar10-1500-150"),
            *(f"cdmad-disjoint-cifar100-{gamma}" for gamma in (20, 50, 100)),
        ),
        {
            "remixmatch+cdmad": (
                *((88.3, 0.1), (85.5, 0.5), (82.5, 0.2)),
                *((57.0, 0.3), (51.1, 0.5), (44.9, 0.4)),
            )
        },
    ),
)

SOURCES = (BACON_TABLE_1, BACON_TABLE_2, USB, SSCL, SIMPRO, CDMAD, CDMAD_REMIXMATCH)


@dataclass(frozen=True)
class Context:
    """Numbers that look alike and are not comparable: same images and counts, another protocol."""

    title: str
    values: Mapping[str, str]


_USB_BALANCED = "USB, results/classic_cv.csv, error after 2^20 steps with networks of other widths"


def _dytrim(value: str) -> Context:
    return Context("DyTrim on CDMAD (ICLR 2026), bACC / GM", {"DyTrim": value})


def _cpg(cpg: str, simpro: str) -> Context:
    """Its SimPro weighs by M/N, moves the priors every step, and has one strong view (newer_methods.md K)."""
    return Context("a note on CPG (NeurIPS 2025), best", {"CPG": cpg, "CPG's own SimPro": simpro})


# Our protocol -> other published numbers for such counts.
OTHER_PROTOCOLS: dict[str, tuple[Context, ...]] = {
    "usb-cifar10-1500-100": (
        Context(
            "CDMAD (2024), bACC / GM, ± standard error of 3 runs, through a secondary registry",
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
    "cossl-cifar10-50": (_dytrim("88.0 / 87.8"),),
    "cossl-cifar10-100": (_dytrim("84.8 / 84.4"),),
    "cossl-cifar10-150": (_dytrim("82.0 / 81.3"),),
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
    "cpg-cifar10-100": (_cpg("76.93", "64.13"),),
    "cpg-cifar10-100-inverse": (_cpg("82.37", "63.70"),),
    "cpg-cifar10-100-random": (_cpg("82.10", "65.81"),),
    "usb-cifar10-1500-150": (
        Context(
            "CDMAD (2024), bACC / GM of 3 runs, through a secondary registry",
            {"FixMatch": "68.4 / 59.9", "ABC": "77.3 / 75.6", "CoSSL": "80.3 / 79.6", "SAW+LA": "73.7 / 71.2"},
        ),
    ),
    "balanced-cifar100-400": (Context(_USB_BALANCED, {"FixMatch": "53.37 ± 2.15"}),),
    "balanced-cifar100-2500": (Context(_USB_BALANCED, {"FixMatch": "34.29 ± 0.43"}),),
}
