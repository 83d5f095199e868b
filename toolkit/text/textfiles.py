"""Find the text files that paths, globs and folders name, and read the documents in each."""

from __future__ import annotations

import codecs
import glob
import io
import json
import os
import re
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from toolkit.text.compressed import COMPRESSIONS, named_damage, opened
from toolkit.text.jsonstream import JSONError, reason_of, values
from toolkit.text.once import say_once

if TYPE_CHECKING:
    import pyarrow

PIECE = 2**20  # bytes of a file's content that are read at a time
ROWS = 256  # rows of a parquet file that are read at a time
BYTE_ORDER_MARK = codecs.BOM_UTF8
JSON_BEGINS = re.compile(rb'(\xef\xbb\xbf)?\s*\[?\s*\{\s*"([^"\\\n]|\\.)*"\s*:')


# ---- which files


def find_files(paths: list[str]) -> list[Path]:
    """The files that paths, globs and folders name, each once, in order. A path that exists is not read as a glob.

    A folder stands for the files in it, at any depth, whose suffix is a key of FORMATS. Empty files, and files and
    folders whose name begins with a dot, are left out. Raises ValueError for a path that matches nothing,
    and for a file that is empty or can't be read."""
    files: dict[Path, None] = {}
    for pattern in paths:
        path = Path(os.path.expanduser(pattern))
        if pattern and path.is_dir():
            matches = _files_in_folder(path)
        elif path.is_file():
            matches = [path]
        else:
            matches = [Path(name) for name in sorted(glob.glob(str(path), recursive=True))]
            matches = [path for path in matches if path.is_file()]
        if not matches:
            raise ValueError(f"TextFiles.paths: no file matches {pattern!r} (looked from {Path.cwd()})")
        files.update(dict.fromkeys(matches))
    for path in files:
        if not os.access(path, os.R_OK):
            raise ValueError(f"{path} can't be read; check its permissions")
        if path.stat().st_size == 0:
            raise ValueError(f"{path} is empty; remove it from TextFiles.paths or fill it")
    return list(files)


def _files_in_folder(folder: Path) -> list[Path]:
    """The text files that a folder stands for, sorted; see ``find_files``. Raises ValueError if there is none."""
    files, others = [], 0
    for parent, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for path in (Path(parent, name) for name in names if not name.startswith(".")):
            is_text = path.is_file() and format_suffix(path) in FORMATS and path.stat().st_size > 0
            files += [path] if is_text else []
            others += not is_text
    if not files:
        raise ValueError(
            f"TextFiles.paths: the folder {folder} has no text file that is not empty: none of its {others} files ends "
            f"in {', '.join(FORMATS)} (each also with {', '.join(COMPRESSIONS)}); name others with a glob, as in "
            f"'{folder}/**/*.tex'"
        )
    left_out = f"; {others} others are ignored: empty, or of another kind" if others else ""
    say_once(f"{folder}: {len(files)} text files ({', '.join(sorted(set(map(format_suffix, files))))}){left_out}")
    return sorted(files)


def were_plain_text(files: list[Path]) -> bool:
    """Whether a file has a format that older versions read as plain text, so that their token files hold other text."""
    return any(FORMATS.get(format_suffix(path), _text) is not _text and path.suffix != ".jsonl" for path in files)


def name_of(files: list[Path]) -> str:
    """The files in words, for a message: the first three by name, the others by number."""
    names = ", ".join(path.name for path in files[:3])
    return names if len(files) <= 3 else f"{names} and {len(files) - 3:,} more files"


# ---- what is in them


def documents(path: Path, separator: str | None, column: str) -> Iterator[str]:
    """Yield the documents of one file, read as its suffix says. Memory holds one document and a few pieces.

    ``separator`` divides plain text (None: the file is one document). ``column`` holds the document in each row of JSON
    and parquet. Raises ValueError for content that is not what the suffix says, with the line if the format has lines,
    and OSError if the disk fails."""
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
    """Raise ValueError if a file begins like JSON."""
    with opened(path) as file:
        match = JSON_BEGINS.match(file.read(4096))
    if match:
        raise ValueError(
            f"{path} looks like JSON, but its suffix does not say so; rename it: to .jsonl where each line is an "
            "object, to .json where the file is one array, or to .txt to read it as plain text"
        )


def _text(path: Path, separator: str | None, column: str) -> Iterator[str]:
    """The documents of a text file, exactly as they are between the separators. The file is read, not memory-mapped: a
    map ends the process if the file shrinks."""
    mark = separator.encode() if separator else b""
    buffer, start, searched = bytearray(), 0, 0  # the current document, its offset, and its bytes without a mark
    with opened(path) as file:
        while piece := file.read(PIECE):
            _refuse_nul(piece, path, start + len(buffer))
            buffer += piece
            at = 0
            while mark and (end := buffer.find(mark, max(at, searched))) != -1:
                yield _decode(bytes(buffer[at:end]), path, start + at)
                at = end + len(mark)
            del buffer[:at]
            start, searched = start + at, max(0, len(buffer) - len(mark) + 1)
    if buffer:
        yield _decode(bytes(buffer), path, start)


def _json_lines(path: Path, separator: str | None, column: str) -> Iterator[str]:
    """The documents of a file with one JSON object a line; blank lines are skipped."""
    start = 0
    with opened(path) as file:
        for number, line in enumerate(_lines(file, path), start=1):
            text = _decode(line.removeprefix(BYTE_ORDER_MARK) if number == 1 else line, path, start)
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


def _lines(file: io.BufferedIOBase, path: Path) -> Iterator[bytes]:
    """Lines with their line break. Each piece is checked as it is read, so that a small compressed file of zeros can't
    fill the memory."""
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
    """The documents of a file with an array of JSON objects, or with objects one after another."""
    try:
        for line, row in values(_characters(path)):
            yield _document(row, column, f"{path}:{line}")
    except JSONError as error:
        raise ValueError(
            f"{path}:{error.line}: not valid JSON ({error.reason}); an array of objects, or objects, are expected"
        ) from error


def _characters(path: Path) -> Iterator[str]:
    """The text of a UTF-8 file in pieces, without its byte order mark."""
    pending, start = b"", 0  # bytes of an incomplete character, and their offset
    with opened(path) as file:
        while piece := file.read(PIECE):
            pending += piece
            incomplete = _incomplete_bytes(pending)
            complete, rest = pending[: len(pending) - incomplete], pending[len(pending) - incomplete :]
            text = _decode(complete, path, start)
            yield text.removeprefix("\ufeff") if start == 0 else text
            start, pending = start + len(complete), rest
    if pending:
        yield _decode(pending, path, start)


def _incomplete_bytes(data: bytes) -> int:
    """How many bytes at the end of ``data`` are the beginning of an incomplete UTF-8 character, 0 to 3."""
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    decoder.decode(data[-3:])
    return len(decoder.getstate()[0])


def _parquet(path: Path, separator: str | None, column: str) -> Iterator[str]:
    """The documents in a column of a parquet file; a missing value is an empty document."""
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


def _check_column(path: Path, schema: pyarrow.Schema, column: str) -> None:
    """Raise ValueError unless a pyarrow schema has the column and it holds text."""
    from pyarrow import types

    if column not in schema.names:
        columns = textwrap.shorten(", ".join(schema.names), 120)
        raise ValueError(f"{path}: no column {column!r} (found: {columns}); bind TextFiles.column")
    kind = schema.field(column).type
    kind = kind.value_type if types.is_dictionary(kind) else kind
    if not (types.is_string(kind) or types.is_large_string(kind)):
        raise ValueError(f"{path}: the column {column!r} does not hold text, but {kind}; bind TextFiles.column")


def _document(row: object, column: str, where: str) -> str:
    """The text in a column of a JSON row. Raises ValueError if there is none; ``where`` names the row."""
    if not isinstance(row, dict) or not isinstance(row.get(column), str):
        content = textwrap.shorten(", ".join(row), 120) if isinstance(row, dict) else type(row).__name__
        raise ValueError(
            f"{where}: no text in the column {column!r} (found: {content}); bind TextFiles.column or correct the line"
        )
    return row[column]


def _decode(data: bytes, path: Path, start: int) -> str:
    """Decode UTF-8. Raises ValueError with the offset in the file, where ``data`` begins at ``start``."""
    _refuse_nul(data, path, start)
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        where = f"byte {data[error.start]:#04x} at offset {start + error.start}"
        raise ValueError(f"{path} is not UTF-8: {where}; convert the file") from error


def _refuse_nul(data: bytes, path: Path, start: int) -> None:
    """Raise ValueError if ``data``, which begins at offset ``start`` of the file, has a zero byte."""
    if (nul := data.find(0)) != -1:  # valid UTF-8, but a sign of UTF-16, a crash or a binary file
        raise ValueError(f"{path} is not text: byte 0x00 at offset {start + nul}; convert the file to UTF-8")


FORMATS: dict[str, Callable[[Path, str | None, str], Iterator[str]]] = {
    ".txt": _text,
    ".md": _text,
    ".jsonl": _json_lines,
    ".ndjson": _json_lines,
    ".json": _json,
    ".parquet": _parquet,
}
