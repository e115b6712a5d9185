"""Every section of the specification (docs/) that the repository cites exists."""

import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SPECIFICATIONS = ("methods", "newer_methods", "augmentation")
SUFFIXES = (".py", ".cpp", ".cu", ".h", ".md", ".sh")

SECTION = r"(?:[A-Z](?:\.\d+)?|\d+(?:\.\d+)?)\b"
SEPARATOR = r"(?:,\s*(?:and\s+)?|\s+and\s+|\s+to\s+|-|–)"
# "methods.md E.2 to E.6, J.2", "methods.md, section J", "methods.md's table (sections F.6 and I)"; a line break counts
# as a space. Case matters: "methods.md does ..." names no section.
CITATION = re.compile(
    rf"\b({'|'.join(SPECIFICATIONS)})\.md(?:,\s*)?(?:[^.\n(]{{0,40}}\()?\s*(?:[Ss]ections?\s+)?"
    rf"({SECTION}(?:{SEPARATOR}{SECTION})*)"
)
# What looks like a citation but does not name the file.
LOOSE = re.compile(r"\b(?:[Mm]ethods|specification),?\s+(?:[Ss]ections?\s+)?(?:[A-Z]|0)\.\d+\b|\([A-O]\.\d\)")


def sections(markdown: str) -> set[str]:
    """Numbers of a specification's headings: "## E. BaCon" -> E, "### E.2 One step" -> E.2."""
    return set(re.findall(rf"^#+ ({SECTION})", markdown, re.MULTILINE))


def citations(text: str) -> list[tuple[str, str]]:
    """(document, section) of every citation in a text."""
    return [
        (document, section)
        for document, listed in CITATION.findall(without_line_starts(text))
        for section in re.findall(SECTION, listed)
    ]


def without_line_starts(text: str) -> str:
    """The text without comment marks at line starts: a citation may be wrapped before one."""
    return re.sub(r"\n[ \t]*(?:#|//|\*)?[ \t]*", "\n", text)


def faults(text: str, known: dict[str, set[str]]) -> list[str]:
    """What is wrong with the citations in a text."""
    missing = [f"{document}.md has no section {s}" for document, s in citations(text) if s not in known[document]]
    loose = [f"{found!r} names no file" for found in LOOSE.findall(without_line_starts(text))]
    return missing + loose


@pytest.fixture(scope="module")
def known() -> dict[str, set[str]]:
    return {name: sections((ROOT / "docs" / f"{name}.md").read_text()) for name in SPECIFICATIONS}


@pytest.fixture(scope="module")
def texts() -> dict[str, str]:
    """Tracked files that may cite, by name: all except this one and the specifications."""
    try:
        listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True)
        names = listed.stdout.split("\0")
    except (OSError, subprocess.CalledProcessError):  # an unpacked source distribution
        names = [str(path.relative_to(ROOT)) for path in ROOT.rglob("*") if ".venv" not in path.parts]
    own = {"tests/docs/test_citations.py", *(f"docs/{name}.md" for name in SPECIFICATIONS)}
    paths = {name: ROOT / name for name in names if name.endswith(SUFFIXES) and name not in own}
    return {name: path.read_text(encoding="utf-8") for name, path in paths.items() if path.is_file()}


def test_the_headings_are_found(known):
    assert {"0.3", "A", "A.1", "E.2", "E.9", "F.6", "G.6", "H", "I", "J.5"} <= known["methods"]
    assert known["newer_methods"] == {"K", "L", "M", "N", "N.1", "N.2", "N.3", "O"}
    assert known["augmentation"] == {"1", "2", "3"}


def test_every_cited_section_exists(texts, known):
    wrong = {name: found for name, text in texts.items() if (found := faults(text, known))}
    assert not wrong, "\n".join(f"{name}: {fault}" for name, found in wrong.items() for fault in found)


def test_the_citations_are_found(texts):
    """A pattern that matches nothing would pass the test above."""
    cited = [pair for text in texts.values() for pair in citations(text)]
    assert len(cited) >= 80
    assert {("methods", "E.2"), ("methods", "H"), ("methods", "0.3"), ("augmentation", "2")} <= set(cited)
    assert {("newer_methods", "K"), ("newer_methods", "L"), ("newer_methods", "N.2")} <= set(cited)


@pytest.mark.parametrize("document", SPECIFICATIONS)
def test_the_specification_refers_to_its_own_sections(document, known):
    """In the text of methods.md itself "E.6" and "§0.3" stand alone."""
    text = (ROOT / "docs" / f"{document}.md").read_text()
    named = set(re.findall(r"(?<![\w.`])([A-O]\.\d)(?![\w.])", text)) | set(re.findall(r"§(0\.\d)", text))
    assert named <= known[document] | known["methods"]
    assert len(named) > 20 or document != "methods"


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ('"""SAW (methods.md H; Lai, Wang, ICML 2022)."""', [("methods", "H")]),
        ("methods.md B, C; Lee, Shin", [("methods", "B"), ("methods", "C")]),
        ("(methods.md C, USB's column)", [("methods", "C")]),
        ("as methods.md gives them (sections F.6, G.6 and I)", [("methods", s) for s in ("F.6", "G.6", "I")]),
        ("methods.md E.2-E.6, one row", [("methods", "E.2"), ("methods", "E.6")]),
        ("// methods.md E.2 to\n//   E.6, J.2", [("methods", s) for s in ("E.2", "E.6", "J.2")]),
        ("# see methods.md\n# 0.3 and A.2", [("methods", "0.3"), ("methods", "A.2")]),
        ("(newer_methods.md K, L; methods.md B)", [("newer_methods", "K"), ("newer_methods", "L"), ("methods", "B")]),
        ("spec: augmentation.md, section 2).", [("augmentation", "2")]),
        ("which methods.md does not settle; A test", []),
    ],
)
def test_citations_are_read(text, found):
    assert citations(text) == found


@pytest.mark.parametrize(
    "text",
    [
        "methods.md E.10",
        "methods.md H.1",
        "methods.md E.2 to E.99",
        "methods.md Z",
        "augmentation.md 4",
        "newer_methods.md A",
    ],
)
def test_a_made_up_section_is_a_fault(text, known):
    assert len(faults(f'"""A docstring ({text})."""', known)) == 1


@pytest.mark.parametrize("text", ["(methods E.2)", "Methods E.9: the sum", "specification A.3", "weights (G.5)"])
def test_a_citation_without_the_file_is_a_fault(text, known):
    assert len(faults(text, known)) == 1
