"""Names of files and classes, which others chose, in messages and on the terminal."""

import unicodedata
from collections.abc import Sequence
from pathlib import Path


def printable(text: str) -> str:
    """`text` with every character that is not printable, and bytes that are no UTF-8, escaped as Python escapes them.

    >>> print(printable("a\\x1b[31m\\udcff b"))
    a\\x1b[31m\\udcff b
    """
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def shown(path: Path) -> str:
    """A path for a message."""
    return printable(str(path))


def distinct(*names: str) -> list[str]:
    """`names` for one message: printable, and in ASCII if one looks like another.

    Two spellings of one name, an accent with its letter (NFC) or behind it (NFD), look alike and are different files.

    >>> print(*distinct("ant", "caf\\u00e9", "cafe\\u0301"))
    ant caf\\xe9 cafe\\u0301
    """
    looks: dict[str, set[str]] = {}
    for name in names:
        looks.setdefault(unicodedata.normalize("NFC", name), set()).add(name)
    alike = {name for spellings in looks.values() if len(spellings) > 1 for name in spellings}
    return [ascii(name)[1:-1] if name in alike else printable(name) for name in names]


def require_names(source: str, names: Sequence[str]) -> None:
    """Raises ValueError unless `names` are different, also to the eye, not empty, and UTF-8."""
    shown = ", ".join(f"'{name}'" for name in distinct(*names))
    if len(set(names)) != len(names) or not all(name.strip() for name in names):
        raise ValueError(f"{source}: expected different names, none of them empty, found {shown}")
    if foreign := [name for name in names if not is_utf8(name)]:
        raise ValueError(f"{source}: expected names in UTF-8, found {', '.join(map(ascii, foreign))}")
    if len({unicodedata.normalize("NFC", name) for name in names}) != len(names):
        raise ValueError(f"{source}: expected names that look different, found {shown}")


def is_utf8(name: str) -> bool:
    """Whether it can be written as UTF-8: a file's name may hold other bytes."""
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True
