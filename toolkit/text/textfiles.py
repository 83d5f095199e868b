"""Text files as corpora come: which files paths, globs and folders name, and the documents in each."""

from __future__ import annotations

import codecs
import functools
import glob
import json
import logging
import os
import re
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

from toolkit.text.compressed import COMPRESSIONS, named_damage, opened
from toolkit.text.jsonstream import JSONError, reason_of, values

log = logging.getLogger("toolkit")

PIECE = 2**20  # bytes of a file's content that are read at a time
ROWS = 256  # rows of a parquet file that are read at a time
BYTE_ORDER_MARK = codecs.BOM_UTF8
JSON_BEGINS = re.compile(rb'(\xef\xbb\xbf)?\s*\[?\s*\{\s*"([^"\\\n]|\\.)*"\s*:')


# ---- which files


def find_files(paths: list[str]) -> list[Path]:
    """The files behind paths, globs and folders, each once, in order. A path that exists is no glob.

    A folder stands for the files in it, at any depth, whose suffix is a key of FORMATS; those that are empty, and
    files and folders whose name begins with a dot, are left out. Raises ValueError for a path that matches nothing,
    and for a file that is empty or can't be read."""
    files: dict[Path, None] = {}
    for pattern in paths:
        path = Path(os.path.expanduser(pattern))
        if pattern and path.is_dir():
            found = _in_folder(path)
        elif path.is_file():
            found = [path]
        else:
            found = [Path(name) for name in sorted(glob.glob(str(path), recursive=True))]
            found = [path for path in found if path.is_file()]
        if not found:
            raise ValueError(f"TextFiles.paths: no file matches {pattern!r} (looked from {Path.cwd()})")
        files.update(dict.fromkeys(found))
    for path in files:
        if not os.access(path, os.R_OK):
            raise ValueError(f"{path} can't be read; check its permissions")
        if path.stat().st_size == 0:
            raise ValueError(f"{path} is empty; take it out of TextFiles.paths or fill it")
    return list(files)


def _in_folder(folder: Path) -> list[Path]:
    found, others = [], 0
    for parent, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for path in (Path(parent, name) for name in names if not name.startswith(".")):
            is_text = path.is_file() and format_suffix(path) in FORMATS and path.stat().st_size > 0
            found += [path] if is_text else []
            others += not is_text
    if not found:
        raise ValueError(
            f"TextFiles.paths: the folder {folder} has no text file with something in it: none of {others} files ends "
            f"in {', '.join(FORMATS)} (each also with {', '.join(COMPRESSIONS)}); name others by a glob, "
            f"'{folder}/**/*.tex'"
        )
    left_out = f"; {others} others are left out: empty, or not of these kinds" if others else ""
    _say_once(f"{folder}: {len(found)} text files ({', '.join(sorted(set(map(format_suffix, found))))}){left_out}")
    return sorted(found)


@functools.cache
def _say_once(message: str) -> None:
    log.warning(message)


def were_plain_text(files: list[Path]) -> bool:
    """Whether one is of a format that was once read as plain text, so that token files of then are not its own."""
    return any(FORMATS.get(format_suffix(path), _text) is not _text and path.suffix != ".jsonl" for path in files)


def name_of(files: list[Path]) -> str:
    """The files as a message calls them: three by name."""
    names = ", ".join(path.name for path in files[:3])
    return names if len(files) <= 3 else f"{names} and {len(files) - 3:,} more files"


# ---- what is in them


def documents(path: Path, separator: str | None, column: str) -> Iterator[str]:
    """The documents of one file, read as its suffix says, in bounded memory: one document and a few pieces.

    ``separator`` divides a text (None: the file is one document), ``column`` holds the document in each row of JSON
    and parquet. Raises ValueError, with the line where there are lines, for content that is not what the suffix says,
    and OSError where the disk fails."""
    read = FORMATS.get(format_suffix(path))
    if read is None:
        _refuse_json(path)
        read = _text
    return read(path, separator, column)


def format_suffix(path: Path) -> str:
    """The suffix that says what a file holds, in lower case: ".txt" of A.TXT and a.txt.gz."""
    inner = path.with_suffix("") if path.suffix.lower() in COMPRESSIONS else path
    return inner.suffix.lower()


def _refuse_json(path: Path) -> None:
    with opened(path) as file:
        begins = JSON_BEGINS.match(file.read(4096))
    if begins:
        raise ValueError(
            f"{path} looks like JSON, but its suffix does not say so; rename it: to .jsonl where each line is an "
            "object, to .json where the file is one array, or to .txt to read it as plain text"
        )


def _text(path: Path, separator: str | None, column: str) -> Iterator[str]:
    """The documents of a text file, exactly as they stand between the separators. Read, not mapped: a map of a file
    that shrinks ends the process."""
    mark = separator.encode() if separator else b""
    held, start, searched = bytearray(), 0, 0  # the document under way, where it begins, how far it holds no mark
    with opened(path) as file:
        while piece := file.read(PIECE):
            _refuse_nul(piece, path, start + len(held))
            held += piece
            at = 0
            while mark and (end := held.find(mark, max(at, searched))) != -1:
                yield _decoded(bytes(held[at:end]), path, start + at)
                at = end + len(mark)
            del held[:at]
            start, searched = start + at, max(0, len(held) - len(mark) + 1)
    if held:
        yield _decoded(bytes(held), path, start)


def _json_lines(path: Path, separator: str | None, column: str) -> Iterator[str]:
    start = 0
    with opened(path) as file:
        for number, line in enumerate(_lines(file, path), start=1):
            text = _decoded(line.removeprefix(BYTE_ORDER_MARK) if number == 1 else line, path, start)
            start += len(line)
            if text.isspace() or not text:
                continue
            try:
                row = json.loads(text)
            except (ValueError, RecursionError) as error:
                raise ValueError(
                    f"{path}:{number}: not valid JSON ({reason_of(error)}); one object a line is expected"
                ) from error
            yield _document(row, column, f"{path}:{number}")


def _lines(file: BinaryIO, path: Path) -> Iterator[bytes]:
    """Lines with their line break. A file that expands into zeros is refused at its first piece."""
    start = 0
    while line := file.readline(PIECE):
        _refuse_nul(line, path, start)
        if len(line) == PIECE and not line.endswith(b"\n"):
            parts = [line]
            while not parts[-1].endswith(b"\n") and (part := file.readline(PIECE)):
                _refuse_nul(part, path, start + sum(map(len, parts)))
                parts.append(part)
            line = b"".join(parts)
        start += len(line)
        yield line


def _json(path: Path, separator: str | None, column: str) -> Iterator[str]:
    """Of an array of objects, or of objects one after another."""
    try:
        for line, row in values(_characters(path)):
            yield _document(row, column, f"{path}:{line}")
    except JSONError as error:
        raise ValueError(
            f"{path}:{error.line}: not valid JSON ({error.reason}); an array of objects, or objects, are expected"
        ) from error


def _characters(path: Path) -> Iterator[str]:
    """The text of a UTF-8 file in pieces, without its byte order mark."""
    held, start = b"", 0  # bytes of a character that was cut, and where they are
    with opened(path) as file:
        while piece := file.read(PIECE):
            held += piece
            begun = _begun_character(held)
            whole, rest = held[: len(held) - begun], held[len(held) - begun :]
            text = _decoded(whole, path, start)
            yield text.removeprefix("\ufeff") if start == 0 else text
            start, held = start + len(whole), rest
    if held:
        yield _decoded(held, path, start)


def _begun_character(data: bytes) -> int:
    """How many bytes at the end begin a character of UTF-8 that takes more, 0 to 3."""
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    decoder.decode(data[-3:])
    return len(decoder.getstate()[0])


def _parquet(path: Path, separator: str | None, column: str) -> Iterator[str]:
    import pyarrow
    from pyarrow import parquet

    if path.suffix.lower() in COMPRESSIONS:
        raise ValueError(f"{path}: parquet compresses its columns itself; unpack the file to {path.stem}")
    with path.open("rb") as file, named_damage(path):
        try:
            table = parquet.ParquetFile(file, buffer_size=PIECE, pre_buffer=False)
            _check_column(path, table.schema_arrow, column)
            for batch in table.iter_batches(ROWS, columns=[column], use_threads=False):
                yield from (text or "" for text in batch.column(0).to_pylist())
        except UnicodeDecodeError as error:
            raise ValueError(f"{path}: a text in the column {column!r} is not UTF-8; write the file again") from error
        except pyarrow.ArrowException as error:
            raise EOFError(str(error)) from error


def _check_column(path: Path, schema, column: str) -> None:
    from pyarrow import types

    if column not in schema.names:
        found = textwrap.shorten(", ".join(schema.names), 120)
        raise ValueError(f"{path}: no column {column!r} (found: {found}); bind TextFiles.column")
    kind = schema.field(column).type
    kind = kind.value_type if types.is_dictionary(kind) else kind
    if not (types.is_string(kind) or types.is_large_string(kind)):
        raise ValueError(f"{path}: the column {column!r} holds no text, but {kind}; bind TextFiles.column")


def _document(row: object, column: str, where: str) -> str:
    if not isinstance(row, dict) or not isinstance(row.get(column), str):
        found = textwrap.shorten(", ".join(row), 120) if isinstance(row, dict) else type(row).__name__
        raise ValueError(
            f"{where}: no text in the column {column!r} (found: {found}); bind TextFiles.column or mend the line"
        )
    return row[column]


def _decoded(data: bytes, path: Path, start: int) -> str:
    _refuse_nul(data, path, start)
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        where = f"byte {data[error.start]:#04x} at offset {start + error.start}"
        raise ValueError(f"{path} is not UTF-8: {where}; convert the file") from error


def _refuse_nul(data: bytes, path: Path, start: int) -> None:
    if (nul := data.find(0)) != -1:  # valid UTF-8, but no text: UTF-16, a hole that a crash left, a binary file
        raise ValueError(f"{path} is not text: byte 0x00 at offset {start + nul}; convert the file to UTF-8")


FORMATS: dict[str, Callable[[Path, str | None, str], Iterator[str]]] = {
    ".txt": _text,
    ".md": _text,
    ".jsonl": _json_lines,
    ".ndjson": _json_lines,
    ".json": _json,
    ".parquet": _parquet,
}
