"""Reads a table that anybody wrote, CSV or JSON lines, row by row. Each fault is a ValueError that names the line."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from toolkit.config.spelling import suggest
from toolkit.output.escape import line as one_line
from toolkit.output.escape import shorten

DELIMITERS = ",;\t|"
LISTED = 20  # columns that an error lists
QUOTED = 60  # characters of a cell or a name that an error quotes


@dataclass(frozen=True)
class Row:
    """A row of a table: the line of the file where it ends, and {column: cell}. A cell of a CSV file is a text; one of
    JSON lines has its JSON type, and each object has keys of its own."""

    line: int
    cells: dict[str, Any]
    has_own_keys: bool = False


def columns(file: Path) -> list[str]:
    """The names of all columns, in the order in which they come: those in the first line of a CSV file; of JSON lines,
    those of any object. Raises ValueError."""
    names: dict[str, None] = {}
    for row in rows(file):
        names |= dict.fromkeys(row.cells)
        if not row.has_own_keys:
            break
    if not names:
        raise ValueError(f"{file}: no rows below the names of the columns")
    return list(names)


def rows(file: Path) -> Iterator[Row]:
    """The rows of a file. Lines of JSON objects are recognised by their first character; anything else is CSV, with
    its names in the first line, separated by commas, semicolons, tabs or bars. Raises ValueError."""
    with _opened(file) as stream:
        first = next((text for text in stream if text.strip()), "")
        stream.seek(0)
        if first.lstrip()[:1] == "[":
            raise ValueError(f"{file}: a JSON list; write one JSON object a line (JSON lines), or a CSV file")
        if not first:
            raise ValueError(f"{file}: empty; its first line should name the columns")
        yield from _json_rows(file, stream) if first.lstrip()[:1] == "{" else _csv_rows(file, stream, first)


def require(file: Path, columns: list[str], wanted: str, flag: str) -> None:
    """Raise ValueError if a column is missing: it lists those that exist, and the nearest spelling."""
    if wanted not in columns:
        listed = ", ".join(shorten(one_line(name), QUOTED) for name in columns[:LISTED])
        more = f" and {len(columns) - LISTED} more" if len(columns) > LISTED else ""
        raise ValueError(
            f"{flag} {quote(wanted)}: {file} has no such column{suggest(wanted, columns)}; it has {listed}{more}"
        )


def number(row: Row, column: str, file: Path) -> float | None:
    """The number in a cell; None if it is empty or null. "nan" and "inf" are numbers: a diverged run has such values.
    Raises ValueError for anything else."""
    value = row.cells.get(column)
    if value is None or (isinstance(value, str) and not value.strip()):
        return None
    try:
        if isinstance(value, str) and "_" not in value:
            return float(value)
        if isinstance(value, int | float) and not isinstance(value, bool):
            return float(value)
    except ValueError:
        pass
    except OverflowError:  # an integer of JSON may have any size
        return math.inf
    raise ValueError(f"{file}, line {row.line}: {column!r} is {quote(value)}, not a number{_remedy(value)}")


def _remedy(value: object) -> str:
    text = str(value).strip()
    if text.count(",") == 1 and text.replace(",", "").lstrip("+-").isdigit():
        return "; write a decimal point, not a comma"
    if text.endswith("%"):
        return "; write it without the percent sign"
    return "; leave the cell empty if the run has no value, and write nan if it diverged"


def label(row: Row, column: str, file: Path) -> str:
    """The text in a cell that names something. Raises ValueError if it is empty."""
    value = row.cells.get(column)
    text = "" if value is None else str(value).strip()
    if not text or isinstance(value, dict | list):
        raise ValueError(f"{file}, line {row.line}: {column!r} is empty; each row needs a name there")
    return text


def whole_number(row: Row, column: str, file: Path) -> int:
    """The integer in a cell; "3.0" is one too. Raises ValueError if it is none, or beyond 63 bits."""
    cell = row.cells.get(column)
    value = number(row, column, file)
    if value is not None and abs(value) < 2**63:  # false for nan
        if isinstance(cell, str) and (digits := cell.strip().lstrip("+-")).isascii() and digits.isdigit():
            return int(cell)
        if isinstance(cell, int) or value == int(value):
            return int(cell if isinstance(cell, int) else value)
    raise ValueError(f"{file}, line {row.line}: {column!r} is {quote(cell)}, not an integer")


def quote(value: object) -> str:
    """A value of a table in one short quoted line."""
    return repr(shorten(one_line(value), QUOTED))


@contextmanager
def _opened(file: Path) -> Iterator[TextIO]:
    """The file as text without a byte order mark; what can go wrong while it is read becomes a ValueError."""
    if not file.is_file():
        raise ValueError(f"{file}: {'a folder, not a file' if file.is_dir() else 'file not found'}")
    try:
        with open(file, encoding="utf-8-sig", newline="") as stream:
            yield stream
    except UnicodeDecodeError:
        raise ValueError(f"{file}: not text in UTF-8; save it as CSV in UTF-8") from None
    except csv.Error as error:
        raise ValueError(f"{file}: not a CSV file: {error}") from None


def _csv_rows(file: Path, stream: TextIO, first: str) -> Iterator[Row]:
    delimiter = max(DELIMITERS, key=lambda each: len(next(csv.reader([first], delimiter=each), [])))
    reader = csv.reader(stream, delimiter=delimiter)
    names: list[str] = []
    for cells in reader:
        if not any(cell.strip() for cell in cells):
            continue
        if not names:
            names = [name.strip() for name in cells]
            twice = sorted({name for name in names if name and names.count(name) > 1})
            if twice:
                raise ValueError(f"{file}: two columns are called {quote(twice[0])}; give each column its own name")
            continue
        if len(cells) != len(names):
            raise ValueError(
                f"{file}, line {reader.line_num}: {len(cells)} cells, but the first line names {len(names)} columns; "
                f"put texts that contain {delimiter!r} into double quotes"
            )
        yield Row(reader.line_num, dict(zip(names, cells, strict=True)))


def _json_rows(file: Path, stream: TextIO) -> Iterator[Row]:
    for number_of_line, text in enumerate(stream, 1):
        if not text.strip():
            continue
        try:
            value = json.loads(text)
            flat = dict(_flat(value)) if isinstance(value, dict) else {}
        except (ValueError, RecursionError):
            raise ValueError(f"{file}, line {number_of_line}: not a JSON object; write one in each line") from None
        if not isinstance(value, dict):
            raise ValueError(f"{file}, line {number_of_line}: a {type(value).__name__}, not a JSON object")
        yield Row(number_of_line, flat, has_own_keys=True)


def _flat(value: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The values of nested objects, under names joined by dots: {"a": {"b": 1}} has "a.b"."""
    for key, each in value.items():
        if isinstance(each, dict):
            yield from _flat(each, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", each
