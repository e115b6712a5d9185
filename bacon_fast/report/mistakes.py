"""The report's section on mistakes: which classes are taken for which, and the images that were most surely wrong."""

import io

import numpy as np
from PIL import Image

from bacon_fast.report import html
from bacon_fast.report.data import ReportData

MAX_PAIRS = 8
_SIDE = 240  # pixels of a shown image: a phone draws its 120 with two each


def mistakes(data: ReportData) -> str:
    """The most frequent pairs of a class and what it was taken for, and the mistakes among the images; nothing without.

    A pair counts once in each direction.
    """
    if data.confusion is None:
        return ""
    errors = data.confusion * (1 - np.eye(len(data.confusion), dtype=data.confusion.dtype))
    rows = []
    for place in np.argsort(-errors, axis=None, kind="stable")[:MAX_PAIRS]:
        truth, found = divmod(int(place), len(errors))
        if count := int(errors[truth, found]):
            share = html.percent(count / data.confusion[truth].sum())
            rows.append([data.class_names[truth], data.class_names[found], f"{count:,}", share])
    if not rows:
        return ""
    table = html.table(["class", "taken for", f"{data.measured_on} images", "% of the class"], rows)
    return table + _images(data)


def _images(data: ReportData) -> str:
    if not data.mistakes:
        return ""
    shown = [
        (
            _png(mistake.image),
            data.class_names[mistake.truth],
            data.class_names[mistake.predicted],
            f" with {100 * mistake.probability:.0f}\u00a0%",
        )
        for mistake in data.mistakes
    ]
    line = f"The {data.measured_on} images that were wrong with the highest probability; a label may be wrong too."
    return html.said(line) + html.thumbs(shown)


def _png(pixels: np.ndarray) -> bytes:
    image, buffer = Image.fromarray(pixels), io.BytesIO()
    image.thumbnail((_SIDE, _SIDE))
    image.save(buffer, "PNG")
    return buffer.getvalue()
