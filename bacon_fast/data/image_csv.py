"""CSV files of images and labels."""

import csv
import os
from pathlib import Path

from bacon_fast.data.names import distinct, printable, shown

COLUMNS = ("image_path", "label")
"""What such a file must have; further columns are not read."""


def read_csv(path: Path, *, label: bool = True) -> list[tuple[Path, str]]:
    """Rows of a CSV file with the columns image_path and label, in order: files, and labels, "" where there is none.

    Paths are relative to the file's folder. UTF-8 with or without a byte order mark, commas, quotes as in RFC 4180.
    Spaces around a label do not count. A file in several rows with one label is there once; one row with a label is
    enough to label it.

    Args:
        label: False: read the paths only; the column label may be missing.

    Raises:
        FileNotFoundError: no such file.
        ValueError: it is no such table, or gives one file two labels; the message names the line.
    """
    if not path.is_file():
        raise FileNotFoundError(f"expected a CSV file of images, found no file {shown(path.absolute())}")
    labels: dict[Path, str] = {}
    lines: dict[Path, int] = {}
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            rows = csv.reader(file, strict=True)
            header = [name.strip() for name in next(rows, [])]
            columns = [_column(path, header, name) for name in COLUMNS[: 1 + label]]
            for row in rows:
                if not row:
                    continue
                where = f"{shown(path)}, line {rows.line_num}"
                if len(row) != len(header):
                    raise ValueError(f"{where}: expected {len(header)} values, as the first line has, found {len(row)}")
                name, given = row[columns[0]], row[columns[1]].strip() if label else ""
                if not name.strip() or "\0" in name:
                    raise ValueError(f"{where}: expected an image file, found image_path {printable(name)!r}")
                image = Path(os.path.normpath(path.parent / name))
                known = labels.get(image, "")
                if known and given and known != given:
                    first, second = distinct(known, given)
                    raise ValueError(
                        f"{where}: expected one label for {printable(name)}, found {second}, and {first} in line "
                        f"{lines[image]}"
                    )
                if image not in labels or given:
                    labels[image], lines[image] = given, rows.line_num
    except UnicodeDecodeError as error:
        raise ValueError(f"{shown(path)}: expected UTF-8 text, found other bytes ({error})") from error
    except csv.Error as error:
        raise ValueError(f"{shown(path)}: expected comma-separated values, found others ({error})") from error
    return list(labels.items())


def _column(path: Path, header: list[str], name: str) -> int:
    if header.count(name) != 1:
        raise ValueError(
            f"{shown(path)}: expected one column {name} in the first line, found the columns "
            f"{', '.join(map(printable, header)) or 'none'}"
        )
    return header.index(name)
