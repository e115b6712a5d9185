"""The HTML of a run's report: one page without scripts, network resources or files beside it."""

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

STYLE = """
:root { color-scheme: light dark; --page: #f4f6f8; --panel: #ffffff; --ink: #1c2530; --muted: #5b6675;
  --line: #e3e8ee; --accent: #0b66b0; --warn: #a04a00; }
@media (prefers-color-scheme: dark) { :root { --page: #0f1318; --panel: #171c23; --ink: #e6eaf0; --muted: #9aa5b3;
  --line: #2b333d; --accent: #6db6f2; --warn: #f0a35e; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", "DejaVu Sans", sans-serif; }
main { max-width: 1120px; margin: 0 auto; padding: 48px 24px 72px; }
h1 { font-size: clamp(1.3rem, 5vw, 2rem); line-height: 1.2; margin: 0 0 8px; letter-spacing: -0.02em;
  overflow-wrap: anywhere; }
h2 { font-size: 1.2rem; margin: 52px 0 14px; letter-spacing: -0.01em; }
p { margin: 0 0 12px; overflow-wrap: anywhere; }
.facts { color: var(--muted); }
.facts b { color: var(--ink); font-weight: 600; }
.facts span { display: inline-block; margin-right: 22px; }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(230px, 1fr)); gap: 16px; margin-top: 26px; }
.card, figure, .table { background: var(--panel); border: 1px solid var(--line); border-radius: 12px; }
.card { padding: 18px 20px 16px; display: flex; flex-direction: column; }
.card h3 { margin: 0; font-size: 0.95rem; font-weight: 600; }
.card .note { color: var(--muted); font-size: 0.82rem; margin: 0; }
.card .optimistic { color: var(--warn); }
.card .big { font-size: 2.5rem; font-weight: 650; line-height: 1.15; margin: auto 0 0; padding-top: 12px;
  letter-spacing: -0.03em; font-variant-numeric: tabular-nums; }
.card .big small { font-size: 1.1rem; font-weight: 500; color: var(--muted); letter-spacing: 0; }
.card dl { display: grid; grid-template-columns: 1fr auto; margin: 12px 0 0; font-size: 0.9rem; row-gap: 2px; }
.card dt { color: var(--muted); }
.card dd { margin: 0; text-align: right; font-variant-numeric: tabular-nums; }
.pair { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 420px), 1fr)); gap: 16px; }
.stack { display: grid; gap: 16px; }
.pair + .stack, .stack + .pair { margin-top: 16px; }
.note-line { border-left: 3px solid var(--warn); padding: 2px 0 2px 12px; margin: 22px 0 0; }
.legend { color: var(--muted); font-size: 0.88rem; margin: 0 0 14px; padding: 0; list-style: none; }
.legend li { display: inline-block; margin-right: 18px; }
.legend b { color: var(--ink); font-weight: 600; }
figure { margin: 0; padding: 16px 18px 14px; min-width: 0; }
figure img { display: block; width: 100%; height: auto; margin: 0 auto; }
.frame { overflow-x: auto; }
figcaption { color: var(--muted); font-size: 0.88rem; margin-top: 10px; }
.table { overflow-x: auto; padding: 4px 0; }
table { border-collapse: collapse; width: 100%; font-size: 0.88rem; font-variant-numeric: tabular-nums; }
th, td { padding: 6px 18px; text-align: right; border-bottom: 1px solid var(--line); }
tr:last-child td { border-bottom: 0; }
th { color: var(--muted); font-weight: 600; vertical-align: bottom; }
th:first-child, td:first-child, .left { text-align: left; }
.thumbs { display: grid; grid-template-columns: repeat(auto-fill, minmax(150px, 1fr)); gap: 12px; }
.thumbs figure { padding: 10px; }
.thumbs img { aspect-ratio: 1; object-fit: contain; border-radius: 6px; }
.thumbs figcaption { font-size: 0.82rem; line-height: 1.35; overflow-wrap: anywhere; }
.thumbs b { color: var(--ink); font-weight: 600; }
.said { color: var(--muted); font-size: 0.88rem; margin: 18px 0 10px; }
.settings { columns: 3 300px; column-gap: 32px; padding: 14px 20px; }
.settings div { display: flex; justify-content: space-between; align-items: baseline; gap: 16px;
  break-inside: avoid; font-size: 0.86rem;  border-bottom: 1px solid var(--line); padding: 4px 0; }
.settings span { color: var(--muted); }
.settings code { font: 0.84rem ui-monospace, SFMono-Regular, Menlo, "DejaVu Sans Mono", monospace; text-align: right;
  overflow-wrap: anywhere; }
@media (max-width: 520px) { main { padding: 28px 12px 48px; } figure { padding: 10px 10px 12px; }
  .settings { columns: auto; padding: 8px 12px; } th, td { padding: 6px 8px; } }
@media (max-width: 680px) { .wide figcaption::before { content: "Scroll the picture sideways. "; } }
details summary { cursor: pointer; color: var(--accent); margin: 16px 0 12px; font-weight: 600; }
footer { color: var(--muted); font-size: 0.82rem; margin-top: 56px; }
"""


@dataclass(frozen=True)
class Picture:
    """One picture in its two appearances, light and dark, with its description."""

    light: bytes
    dark: bytes
    alt: str
    caption: str
    width: int
    """Largest width in CSS pixels."""
    least: int = 0
    """Smallest width at which its words can be read; a narrower page scrolls it."""


def page(title: str, body: str) -> str:
    """A complete document."""
    return (
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n<main>\n{body}\n</main>\n</body>\n</html>\n"
    )


def header(title: str, facts: Mapping[str, Any]) -> str:
    """The page's title and a line of facts."""
    items = "".join(f"<span>{escape(name)} <b>{escape(show(value))}</b></span>" for name, value in facts.items())
    return f'<header><h1>{escape(title)}</h1><p class="facts">{items}</p></header>'


def card(title: str, note: str, accuracies: Mapping[str, float | None], *, optimistic: bool = False) -> str:
    """One headline: the first accuracy large, the others below it. All are fractions, shown in percent."""
    (name, value), *others = accuracies.items()
    rows = "".join(f"<dt>{escape(key)}</dt><dd>{percent(other)}</dd>" for key, other in others)
    mark = " optimistic" if optimistic else ""
    return (
        f'<div class="card"><h3>{escape(title)}</h3><p class="note{mark}">{escape(note)}</p>'
        f'<p class="big">{percent(value)}<small> % {escape(name)}</small></p><dl>{rows}</dl></div>'
    )


def figure(picture: Picture) -> str:
    """A picture that follows the reader's light or dark setting."""
    wide = ' class="wide"' if picture.least else ""
    return (
        f'<figure{wide}><div class="frame"><picture>'
        f'<source media="(prefers-color-scheme: dark)" srcset="{_embedded(picture.dark)}">'
        f'<img src="{_embedded(picture.light)}" alt="{escape(picture.alt)}" '
        f'style="max-width:{picture.width}px;min-width:{picture.least}px">'
        f"</picture></div><figcaption>{escape(picture.caption)}</figcaption></figure>"
    )


def thumbs(images: Sequence[tuple[bytes, str, str, str]]) -> str:
    """Small images beside each other, each a PNG with its true class, the predicted one, and what else is said."""
    figures = "".join(
        f'<figure><img src="{_embedded(data)}" alt="{escape(f"{truth}, taken for {predicted}")}"><figcaption>'
        f"<b>{escape(truth)}</b>, taken for <b>{escape(predicted)}</b>{escape(more)}</figcaption></figure>"
        for data, truth, predicted, more in images
    )
    return f'<div class="thumbs">{figures}</div>'


def _embedded(png: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(png).decode('ascii')}"


def said(text: str) -> str:
    """What the next part of a section shows."""
    return f'<p class="said">{escape(text)}</p>'


def note(text: str) -> str:
    """A line that a reader should not miss; nothing for an empty one."""
    return f'<p class="note-line">{escape(text)}</p>' if text else ""


def line(text: str) -> str:
    """A sentence under the header; nothing without text."""
    return f'<p class="facts">{escape(text[:1].upper() + text[1:])}.</p>' if text else ""


def legend(text: str, pairs: Sequence[tuple[str, str]]) -> str:
    """What labels in pictures stand for; nothing without pairs."""
    items = "".join(f"<li><b>{escape(label)}</b> <bdi>{escape(name)}</bdi></li>" for label, name in pairs)
    return f'<ul class="legend"><li>{escape(text)}</li>{items}</ul>' if pairs else ""


def section(title: str, *parts: str) -> str:
    """A titled section; nothing when it has no content."""
    content = "".join(parts)
    return f"<section><h2>{escape(title)}</h2>{content}</section>" if content else ""


def group(kind: str, pictures: Sequence[Picture]) -> str:
    """Pictures beside ("pair") or below ("stack") each other."""
    return f'<div class="{kind}">{"".join(map(figure, pictures))}</div>' if pictures else ""


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table whose first column is text and whose others are numbers, mostly."""
    head = "".join(f"<th>{escape(name)}</th>" for name in columns)
    body = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f'<div class="table"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def details(summary: str, content: str, *, opened: bool = False) -> str:
    """Content that opens and closes on a click."""
    return f"<details{' open' if opened else ''}><summary>{escape(summary)}</summary>{content}</details>"


def settings(values: Mapping[str, Any]) -> str:
    """Names and values in columns; nested mappings are written as name.name."""
    rows = "".join(
        f"<div><span>{escape(name)}</span><code>{escape(show(value))}</code></div>" for name, value in flatten(values)
    )
    return f'<div class="table settings">{rows}</div>' if rows else ""


def flatten(values: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    """(dotted name, value) pairs of nested mappings."""
    pairs = []
    for key, value in values.items():
        name = f"{prefix}{key}"
        pairs += flatten(value, f"{name}.") if isinstance(value, Mapping) else [(name, value)]
    return pairs


def percent(value: float | None) -> str:
    """A fraction as a percentage without its sign, or a dash."""
    return "–" if value is None else f"{100 * value:.1f}"


def show(value: Any) -> str:
    """A value as a reader would write it."""
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1e5 else f"{value:.4g}"
    if isinstance(value, (list, tuple)):
        return ", ".join(map(show, value)) or "–"
    return str(value)
