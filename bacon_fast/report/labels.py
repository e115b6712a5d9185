"""What pictures call the classes: their names, where the font has the letters and there is room."""

import re
import unicodedata
from collections.abc import Sequence
from functools import cache

import numpy as np
from matplotlib.font_manager import FontProperties, findfont, get_font

LONGEST = 18
"""Longer names are cut: an axis would have no room left for its bars."""


def class_labels(names: Sequence[str], order: np.ndarray) -> list[str]:
    """For each class its name, a cut one that ends in "…", or "#n", with n its place in `order`, from 1.

    "#n" stands for a name that the font would show as boxes or, where it is written from right to left, backwards, for
    names that are one after the cut, and for names that look like "#n".

    Example:
        >>> class_labels(["cat", "猫", "yellow-throated sparrow"], np.array([1, 0, 2]))
        ['cat', '#1', 'yellow-throated s…']
    """
    cut = [name if len(name) <= LONGEST else name[: LONGEST - 1].rstrip() + "…" for name in names]
    labels = list(cut)
    for place, c in enumerate(order, start=1):
        if not is_drawable(cut[c]) or cut.count(cut[c]) > 1 or re.fullmatch(r"#\d+", cut[c]):
            labels[c] = f"#{place}"
    return labels


def replaced(names: Sequence[str], labels: Sequence[str], order: np.ndarray) -> list[tuple[str, str]]:
    """(label, name) of the classes that are not called by their names, in the given order."""
    return [(labels[c], names[c]) for c in order if labels[c] != names[c]]


def is_drawable(text: str) -> bool:
    """Whether the font of the pictures has every character, and they stand from left to right."""
    return all(ord(c) in _characters() and unicodedata.bidirectional(c) not in ("R", "AL") for c in text)


@cache
def _characters() -> frozenset[int]:
    return frozenset(get_font(findfont(FontProperties())).get_charmap())
