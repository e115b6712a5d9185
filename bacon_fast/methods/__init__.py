"""Methods: what one training step computes. This file has the table of their parts, and says which combinations exist.

A method's name joins its parts by plus signs: a base learner, then a class balancer, then a regularizer, such as
fixmatch+abc+bacon. To add a part, write its file (options, module, `build`) and one line in the table.
"""

from collections.abc import Mapping, Sequence
from itertools import combinations

from bacon_fast.methods import abc, bacon, fixmatch, remixmatch, ssc, supervised
from bacon_fast.methods.balancers import cdmad, cossl, crest, darp, daso, debiaspl, la, saw, simpro
from bacon_fast.methods.method import Method
from bacon_fast.methods.part import Part, PartOptions, Setup
from bacon_fast.methods.sscl import method as sscl_method
from bacon_fast.models.network import Network
from bacon_fast.models.ssc import PrototypeNetwork

_NO_UNLABELED_ROWS = "supervised has no unlabeled rows, which a balancer (but la) and BaCon act on"
_SSCL_ALONE = "SsCL calibrates its pseudo-labels by prototypes, and has a contrastive loss of its own"
_SSC_ALONE = "SSC has prototypes in the place of the classifier that a balancer and BaCon act on"
_HARD_LABELS = {"remixmatch": "it acts on hard pseudo-labels, and ReMixMatch trains towards soft, mixed targets"}
_PRIORS_APART = {
    "remixmatch": "MixUp mixes rows of the two priors that it tells apart",
    "bacon": "it balances the classifier by its priors already, and nobody has measured both",
}
_BALANCED_BY_IMAGE = {"bacon": "it takes the bias out of the logits that BaCon reads, and nobody has measured both"}
_LABELS_AS_THEY_ARE = {
    "remixmatch": "MixUp mixes the labels whose prior it adds",
    "bacon": "it balances the logits that BaCon reads, and nobody has measured both",
}
_TWO_BALANCERS = "a method has one balancer, as each sets the targets of the unlabeled rows"
_BESIDE_BACON = "BaCon is added to a base learner alone or with ABC; beside another balancer nobody has measured it"

# METHODS has this order, and so have the parts within a name.
_TABLE = (
    Part("base", supervised.SupervisedOptions, supervised.build, alone=_NO_UNLABELED_ROWS, takes=("la",)),
    Part("base", fixmatch.FixMatchOptions, fixmatch.build),
    Part("base", remixmatch.ReMixMatchOptions, remixmatch.build),
    Part("base", sscl_method.SsCLOptions, sscl_method.build, alone=_SSCL_ALONE),
    Part("base", ssc.SSCOptions, ssc.build, alone=_SSC_ALONE),
    Part("balancer", abc.ABCOptions, abc.build, beside=("bacon",)),
    Part("regularizer", bacon.BaConOptions, bacon.build),
    Part("balancer", debiaspl.DebiasPLOptions, debiaspl.build, refuses=_HARD_LABELS),
    Part("balancer", saw.SAWOptions, saw.build, refuses=_HARD_LABELS),
    Part("balancer", daso.DASOOptions, daso.build),
    Part("balancer", darp.DARPOptions, darp.build),
    Part("balancer", crest.CReSTOptions, crest.build),
    Part("extension", crest.PDAOptions, extends="crest"),
    Part("balancer", cossl.CoSSLOptions, cossl.build),
    Part("balancer", simpro.SimProOptions, simpro.build, refuses=_PRIORS_APART),
    Part("balancer", cdmad.CDMADOptions, cdmad.build, refuses=_BALANCED_BY_IMAGE),
    Part("balancer", la.LAOptions, la.build, refuses=_LABELS_AS_THEY_ARE),
)
PARTS: dict[str, Part] = {part.name: part for part in _TABLE}
"""The parts by name."""


def refusal(words: Sequence[str]) -> str | None:
    """Why these parts, given in the table's order, make no method; None if they make one."""
    parts = [PARTS[word] for word in words]
    base, *added = parts
    if base.kind != "base" or any(part.kind == "base" for part in added):
        return "a method has one base learner, which comes first"
    if base.alone and not {part.name for part in added} <= set(base.takes):
        return base.alone
    if sum(part.kind == "balancer" for part in added) > 1:
        return _TWO_BALANCERS
    regularizers = [part.name for part in added if part.kind == "regularizer"]
    for part in added:
        for other, reason in part.refuses.items():
            if other in words:
                return f"{part.name} does not go with {other}: {reason}"
        if part.kind == "balancer" and not set(regularizers) <= set(part.beside):
            return _BESIDE_BACON
        if part.extends and part.extends not in words:
            return f"{part.name} extends {part.extends}"
    return None


def names() -> tuple[str, ...]:
    """The methods that exist: each base learner alone, then with its additions, ordered by the last one."""
    additions = [name for name, part in PARTS.items() if part.kind != "base"]
    found = []
    for base in (name for name, part in PARTS.items() if part.kind == "base"):
        found.append((base,))
        for last, name in enumerate(additions):
            for others in (o for size in range(3) for o in combinations(additions[:last], size)):
                if refusal(words := (base, *others, name)) is None:
                    found.append(words)
    return tuple("+".join(words) for words in found)


METHODS: tuple[str, ...] = names()


def parts_of(method: str) -> tuple[str, ...]:
    """The names of a method's parts, the base learner first.

    Raises ValueError for a name that is no method, with the reason if its parts exist.

    Example:
        >>> parts_of("fixmatch+abc+bacon")
        ('fixmatch', 'abc', 'bacon')
    """
    words = tuple(method.split("+"))
    if not set(words) <= set(PARTS) or len(set(words)) < len(words):
        raise ValueError(f"method: expected one of {', '.join(names())}, found {method!r}")
    ordered = tuple(sorted(words, key=list(PARTS).index))
    reason = refusal(ordered)
    if reason is None and ordered != words:
        reason = f"its parts have an order, {'+'.join(ordered)}"
    if reason is not None:
        raise ValueError(f"method: {method} does not exist: {reason}")
    return words


def default_options(method: str) -> dict[str, PartOptions]:
    """Default options of a method's parts, by name. A part may change the defaults of the parts beside it."""
    kinds = {name: PARTS[name].options for name in parts_of(method)}
    changes: dict[str, dict[str, object]] = {name: {} for name in kinds}
    for name in kinds:
        for kind in kinds.values():
            changes[name] |= kind.changes.get(name, {})
    return {name: kind(**changes[name]) for name, kind in kinds.items()}


def missing_part(method: str, part: str) -> str:
    """The message for an option of a part that the method does not have."""
    having = [name for name in names() if part in parts_of(name)]
    return f"method {method} has no part {part}; the methods that have one: {', '.join(having)}"


def build_method(options: Mapping[str, PartOptions], setup: Setup, network: Network | PrototypeNetwork) -> Method:
    """Builds the method of these parts, the base learner first, on a fresh network."""
    base, *added = options
    additions = {}
    for part in (PARTS[name] for name in added):
        if part.build is not None:
            additions[part.kind] = part.build(options[part.name], setup)
    return PARTS[base].build(options[base], setup, network, **additions)
