"""Reads the items of an evaluator from JSON and JSON-lines files, and names a broken item by file and line."""

from __future__ import annotations

import codecs
import glob
import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from toolkit.evaluation import builtin
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
    """Read the items of files in which each value is a JSON object with the fields ``required``. ``paths`` are files,
    globs and built-in sets (``builtin:NAME``); .gz and .zst files are read too. ``knob`` is named in messages.

    Raises ValueError for a path that matches nothing, for text that is not JSON or not valid Unicode, for a value that
    is no object or lacks a field, for files without an item, and for two files of one name."""
    items, counts = [], dict[str, int]()
    for path in _find(knob, builtin.located(knob, paths)):
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
            try:
                digest = hashlib.sha256(content.encode()).hexdigest()[:12]
            except UnicodeEncodeError as error:  # JSON can escape it, but few tokenizers take it
                raise ValueError(f"{where}: the item has half of a surrogate pair, as in \\ud800; remove it") from error
            items.append(Item(_own_id(f"{path.name.partition('.')[0]}/{digest}", counts), where, value))
    if not items:
        raise ValueError(f"{knob} = {list(paths)}: the files have no items")
    return with_own_names(knob, items)


def numbered(field: str, rows: Iterable[tuple[str, str, str]]) -> list[Item]:
    """Items with one field from (name, where, text), with an id as ``read_items`` gives it: of the name and the
    text."""
    counts = dict[str, int]()
    return [
        Item(
            _own_id(f"{name}/{hashlib.sha256(text.encode(errors='replace')).hexdigest()[:12]}", counts),
            where,
            {field: text},
        )
        for name, where, text in rows
    ]


def with_own_names(knob: str, items: list[Item]) -> list[Item]:
    """The same items. Raises ValueError if two files would give their metrics the same name."""
    files: dict[str, str] = {}
    for item in items:
        stem, path = item.id.partition("/")[0], item.where.rpartition(":")[0]
        if files.setdefault(stem, path) != path:
            raise ValueError(
                f"{knob}: the metrics of {files[stem]} and {path} would both be called .../{stem}; rename one file"
            )
    return items


def _own_id(key: str, counts: dict[str, int]) -> str:
    """The id of an item: ``key``, or ``key#2`` for the second item with the same content."""
    counts[key] = counts.get(key, 0) + 1
    return key if counts[key] == 1 else f"{key}#{counts[key]}"


def text_of(item: Item, field: str) -> str:
    """A field of an item that must be text. Raises ValueError with file and line."""
    value = item.row[field]
    if not isinstance(value, str):
        raise ValueError(f"{item.where}: {field!r} must be text, not {_short(value)}")
    return value


def filled(item: Item, field: str) -> str:
    """A field of an item that must be text, and not empty. Raises ValueError with file and line."""
    text = text_of(item, field)
    if not text.strip():
        raise ValueError(f"{item.where}: {field!r} is empty")
    return text


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
