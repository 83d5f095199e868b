"""Reads the items of an evaluator from JSON and JSON-lines files, and names a broken item by file and line."""

from __future__ import annotations

import codecs
import glob
import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from toolkit.text.compressed import opened
from toolkit.text.jsonstream import JSONError, values

PIECE = 2**20  # characters that are read at a time


class Item(NamedTuple):
    """One item of a file. ``id`` depends on the file's name and on the item's content, not on its place in the file.
    ``where`` is its file and line, for messages."""

    id: str
    where: str
    row: dict[str, object]


def read_items(knob: str, paths: Sequence[str], required: Sequence[str]) -> list[Item]:
    """Read the items of files in which each value is a JSON object with the fields ``required``. ``paths`` are files
    and globs; .gz and .zst files are read too. ``knob`` is named in messages.

    Raises ValueError for a path that matches nothing, for text that is not JSON, for a value that is no object or lacks
    a field, and for files without an item."""
    items, counts = [], dict[str, int]()
    for path in _find(knob, paths):
        for line, value in _values(path):
            where = f"{path}:{line}"
            if not isinstance(value, dict):
                raise ValueError(
                    f"{where}: an item must be a JSON object with {_listed(required)}, not {_short(value)}"
                )
            missing = [name for name in required if name not in value]
            if missing:
                raise ValueError(f"{where}: the item lacks {_listed(missing)}; it has {_listed(list(value))}")
            content = json.dumps(value, sort_keys=True, ensure_ascii=False)
            name = f"{path.name.partition('.')[0]}/{hashlib.sha256(content.encode(errors='replace')).hexdigest()[:12]}"
            counts[name] = counts.get(name, 0) + 1  # the same item twice
            items.append(Item(name if counts[name] == 1 else f"{name}#{counts[name]}", where, value))
    if not items:
        raise ValueError(f"{knob} = {list(paths)}: the files have no items")
    return items


def text_of(item: Item, field: str) -> str:
    """A field of an item that must be text. Raises ValueError with file and line."""
    value = item.row[field]
    if not isinstance(value, str):
        raise ValueError(f"{item.where}: {field!r} must be text, not {_short(value)}")
    return value


def fingerprint(items: Sequence[Item], *knobs: object) -> str:
    """SHA-256, hex, of the items, in any order, and of an evaluator's knobs."""
    content = json.dumps([sorted(item.id for item in items), [repr(knob) for knob in knobs]])
    return hashlib.sha256(content.encode()).hexdigest()


def _find(knob: str, paths: Sequence[str]) -> Iterator[Path]:
    found: dict[Path, None] = {}
    for pattern in paths:
        path = Path(os.path.expanduser(pattern))
        matches = [path] if path.is_file() else sorted(Path(name) for name in glob.glob(str(path), recursive=True))
        matches = [match for match in matches if match.is_file()]
        if not matches:
            raise ValueError(f"{knob}: no file matches {pattern!r} (looked from {Path.cwd()})")
        found.update(dict.fromkeys(matches))
    yield from found


def _values(path: Path) -> Iterator[tuple[int, object]]:
    try:
        with opened(path) as file:
            text = codecs.getreader("utf-8-sig")(file)
            yield from values(iter(lambda: text.read(PIECE), ""))
    except JSONError as error:
        raise ValueError(f"{path}:{error.line}: not valid JSON: {error.reason}") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 text: {error.reason} at byte {error.start:,}") from error


def _listed(names: Sequence[str]) -> str:
    return ", ".join(map(repr, names)) or "no fields"


def _short(value: object) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 40 else text[:37] + "..."
