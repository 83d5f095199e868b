"""Files of text as corpora come: plain text, JSON and Parquet, compressed or not. Each is a stream of documents.

Memory holds one piece of a file, and the document under way. A suffix tells what a file is, whatever its case:

    .jsonl .ndjson                 one JSON object a line, the document in a column
    .json                          an array of such objects, or objects one after the other
    .parquet                       one document a row
    anything else                  UTF-8 text, divided by a separator
    .gz .xz .zst behind it         the same, compressed"""

from __future__ import annotations

import functools
import glob
import gzip
import json
import logging
import lzma
import os
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

log = logging.getLogger("toolkit")

PIECE = 2**20  # bytes that are read at a time
LINES, VALUES, TABLES, TEXTS = (".jsonl", ".ndjson"), (".json",), (".parquet",), (".txt", ".md", ".text")
COMPRESSED = (".gz", ".xz", ".zst")
FRAME = 2**11  # compressed bytes of a .zst file that are taken at a time: each could become 32 kB
MARK = b"\xef\xbb\xbf"  # the byte order mark that some editors begin a UTF-8 file with


def find(paths: list[str]) -> list[Path]:
    """The files that paths, folders and globs name, each once, in order. A folder stands for the files in it, at any
    depth, whose suffix is listed above; hidden ones are left out. Raises ValueError for a name without files, a file
    that can't be read, and an empty file."""
    files: dict[Path, None] = {}
    for name in paths:
        path = Path(os.path.expanduser(name))
        if path.is_dir():
            found = _in_folder(path)
        elif path.exists():
            found = [path]
        else:
            found = [Path(match) for match in sorted(glob.glob(str(path), recursive=True))]
            found = [match for match in found if match.is_file()]
        if not found:
            raise ValueError(f"TextFiles.paths: no file matches {name!r} (looked from {Path.cwd()})")
        files.update(dict.fromkeys(found))
    for path in files:
        if not path.is_file():
            raise ValueError(f"{path} is neither a file nor a folder; take it out of TextFiles.paths")
        if not os.access(path, os.R_OK):
            raise ValueError(f"{path} can't be read; check its permissions")
        if path.stat().st_size == 0:
            raise ValueError(f"{path} is empty; take it out of TextFiles.paths or fill it")
    return list(files)


def documents(path: Path, separator: str | None, column: str) -> Iterator[str]:
    """The documents of one file. Raises ValueError, with the file and the line or offset, for content that is not what
    the suffix says."""
    suffix, compression = _suffixes(path)
    if suffix in TABLES and not compression:
        yield from _table(path, column)
        return
    try:
        with _opened(path, compression) as file:
            if suffix in LINES:
                yield from _json_lines(file, path, column)
            elif suffix in VALUES:
                yield from _json_values(file, path, column)
            else:
                if suffix not in TEXTS:
                    _refuse_json(path, compression)
                yield from _text(file, path, separator)
    except (gzip.BadGzipFile, EOFError, zlib.error, lzma.LZMAError) as error:
        raise ValueError(f"{path} is damaged, or no {compression} file: {error}; get it again") from error
    except OSError as error:
        if error.errno is not None:
            raise
        raise ValueError(f"{path} is damaged, or no {compression} file: {error}; get it again") from error


def _suffixes(path: Path) -> tuple[str, str]:
    """(suffix, compression) of a name such as stories.JSONL.gz, in small letters."""
    suffix, compression = path.suffix.lower(), ""
    if suffix in COMPRESSED:
        suffix, compression = Path(path.stem).suffix.lower(), suffix
    return suffix, compression


def _in_folder(folder: Path) -> list[Path]:
    known = (*LINES, *VALUES, *TABLES, *TEXTS)
    inside = (path for path in sorted(folder.rglob("*")) if path.is_file() and path.stat().st_size)
    visible = (path for path in inside if not any(part.startswith(".") for part in path.relative_to(folder).parts))
    found = [path for path in visible if _suffixes(path)[0] in known]
    if not found:
        raise ValueError(
            f"TextFiles.paths: the folder {folder} has no text files (of {', '.join(known)}, or these compressed); "
            f"name files of another kind by a glob, such as '{folder}/*'"
        )
    _tell(str(folder), len(found))
    return found


@functools.cache  # once, however often the files are looked up
def _tell(folder: str, count: int) -> None:
    from toolkit.terminal import Terminal

    files = f"{count:,} text file{'s' if count > 1 else ''}"
    Terminal(stderr=True).print(f"{folder}: {files}", soft_wrap=True)


def _opened(path: Path, compression: str) -> BinaryIO:
    """The file's content as a stream of bytes, decompressed."""
    if compression == ".gz":
        return gzip.open(path, "rb")
    if compression == ".xz":
        return lzma.open(path, "rb")
    if compression == ".zst":
        return _zstandard(path)
    return path.open("rb")


def _zstandard(path: Path) -> BinaryIO:
    try:
        import zstandard
    except ImportError as error:
        raise ValueError(f'{path}: reading .zst takes zstandard: python -m pip install -e ".[zstd]"') from error

    return _ZstandardFile(path, zstandard)


class _ZstandardFile:
    """A .zst file as a stream: all of its frames; one that ends early is an error, as with the other formats."""

    def __init__(self, path: Path, zstandard):
        self._file, self._errors = path.open("rb"), zstandard.ZstdError
        self._decompressor, self._new = None, zstandard.ZstdDecompressor
        self._rest = b""

    def __enter__(self) -> _ZstandardFile:
        return self

    def __exit__(self, *_) -> None:
        self._file.close()

    def read(self, size: int = PIECE) -> bytes:
        """Some decompressed bytes; none at the end of the file."""
        while True:
            compressed = self._rest or self._file.read(FRAME)
            if not compressed:
                if self._decompressor is not None:
                    raise EOFError("the file ends before the end of the compressed data")
                return b""
            if self._decompressor is None:
                self._decompressor = self._new().decompressobj()
            try:
                content = self._decompressor.decompress(compressed)
            except self._errors as error:
                raise EOFError(str(error)) from error
            self._rest = self._decompressor.unused_data if self._decompressor.eof else b""
            if self._decompressor.eof:
                self._decompressor = None
            if content:
                return content

    def __iter__(self) -> Iterator[bytes]:
        held = b""
        while piece := self.read():
            *lines, held = (held + piece).split(b"\n")
            yield from (line + b"\n" for line in lines)
        if held:
            yield held


def _text(file: BinaryIO, path: Path, separator: str | None) -> Iterator[str]:
    """The documents of a text file, exactly as they stand between the separators. Read, not mapped: a map of a file
    that shrinks ends the process."""
    mark = separator.encode() if separator else b""
    held, start, searched = bytearray(), 0, 0  # the document under way, where it begins, how far it holds no mark
    while piece := file.read(PIECE):
        held += piece
        at = 0
        while mark and (end := held.find(mark, max(at, searched))) != -1:
            yield _decoded(bytes(held[at:end]), path, start + at)
            at = end + len(mark)
        del held[:at]
        start, searched = start + at, max(0, len(held) - len(mark) + 1)
    if held:
        yield _decoded(bytes(held), path, start)


def _json_lines(file: BinaryIO, path: Path, column: str) -> Iterator[str]:
    start = 0
    for number, line in enumerate(file, start=1):
        text = _decoded(line.removeprefix(MARK) if number == 1 else line, path, start)
        start += len(line)
        if text.strip():
            yield _document(
                _parsed(text, f"{path}:{number}", "one object a line is expected"), column, f"{path}:{number}"
            )


def _json_values(file: BinaryIO, path: Path, column: str) -> Iterator[str]:
    """The documents of an array, or of values one after the other, read value by value."""
    decoder, held, line, closed, array = json.JSONDecoder(), "", 1, False, None
    pieces = _decoded_pieces(file, path)
    more = True
    while True:
        stripped = held.lstrip(" \t\r\n," if array else " \t\r\n")
        line += held.count("\n", 0, len(held) - len(stripped))
        held = stripped
        if not held and more:
            more = (piece := next(pieces, None)) is not None
            held += piece or ""
            continue
        if not held:
            break
        if array is None and held[0] == "[":
            array, held = True, held[1:]
            continue
        array = bool(array)
        if closed:
            raise ValueError(f"{path}:{line}: something follows the end of the array; mend the file")
        if array and held[0] == "]":
            closed, held = True, held[1:]
            continue
        try:
            value, end = decoder.raw_decode(held)
        except json.JSONDecodeError as error:
            if more:  # the value may only be cut off here: read on, ever more at a time, so that the work stays linear
                wanted = len(held)
                while wanted > 0 and (piece := next(pieces, None)) is not None:
                    held, wanted = held + piece, wanted - len(piece)
                more = wanted <= 0
                continue
            raise ValueError(
                f"{path}:{line + held.count(chr(10), 0, error.pos)}: not valid JSON ({error.msg}); an array of objects "
                "is expected, or objects one after the other"
            ) from error
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path}:{line}: {_reason(error)}; mend the value") from error
        yield _document(value, column, f"{path}:{line}")
        line += held.count("\n", 0, end)
        held = held[end:]
    if array and not closed:
        raise ValueError(f"{path}:{line}: the array has no end; the file was cut short, get it again")


def _table(path: Path, column: str) -> Iterator[str]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as table:
            kinds = {field.name: field.type for field in table.schema_arrow}
            if column not in kinds:
                raise ValueError(f"{path} has no column {column!r}; it has {', '.join(kinds)}: bind TextFiles.column")
            if "string" not in str(kinds[column]):
                raise ValueError(f"{path}: the column {column!r} holds no text, but {kinds[column]}")
            for batch in table.iter_batches(batch_size=256, columns=[column]):
                yield from (text or "" for text in batch.column(0).to_pylist())
    except (pyarrow.ArrowException, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"{path} is damaged, or no Parquet file: {reason}; get it again") from error


def _document(row: object, column: str, place: str) -> str:
    if not isinstance(row, dict) or not isinstance(row.get(column), str):
        found = ", ".join(row) if isinstance(row, dict) else type(row).__name__
        raise ValueError(
            f"{place}: no text in the column {column!r} (found: {found[:200]}); bind TextFiles.column or mend the line"
        )
    return row[column]


def _parsed(text: str, place: str, expected: str) -> object:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{place}: not valid JSON ({_reason(error)}); {expected}") from error


def _reason(error: Exception) -> str:
    """Why JSON can't be read, in words that don't speak of Python."""
    if isinstance(error, RecursionError):
        return "a value is nested too deeply"
    if "integer string conversion" in str(error):
        return "a number has thousands of digits"
    return str(error)


def _decoded_pieces(file: BinaryIO, path: Path) -> Iterator[str]:
    """The text in pieces, none of which ends within a character."""
    start, held = 0, b""
    while piece := file.read(PIECE):
        held += piece.removeprefix(MARK) if start == 0 else piece
        whole = _whole_characters(held)
        yield _decoded(held[:whole], path, start)
        start, held = start + whole, held[whole:]
    if held:
        yield _decoded(held, path, start)


def _whole_characters(data: bytes) -> int:
    """How many bytes, from the first on, are whole characters: at most three at the end are a part of one."""
    for end in range(len(data), max(len(data) - 4, 0), -1):
        lead = data[end - 1]
        if lead < 0x80:
            return end
        if lead >= 0xC0:  # the first byte of a character tells its length
            length = 2 if lead < 0xE0 else 3 if lead < 0xF0 else 4
            return len(data) if end - 1 + length <= len(data) else end - 1
    return len(data)


def _refuse_json(path: Path, compression: str) -> None:
    """Raise ValueError for a file whose name does not say what it is, and whose first line is a JSON object."""
    with _opened(path, compression) as file:
        first = next(iter(file.read(PIECE).removeprefix(MARK).splitlines()), b"")
    try:
        is_json = isinstance(json.loads(first), dict | list)
    except (ValueError, RecursionError):
        return
    if is_json:
        raise ValueError(
            f"{path} looks like JSON, but its name does not say so; rename it to .jsonl or .json, or to .txt to have "
            "it read as text"
        )


def _decoded(data: bytes, path: Path, start: int) -> str:
    if (nul := data.find(0)) != -1:  # valid UTF-8, but no text: UTF-16, a hole that a crash left, a binary file
        raise ValueError(f"{path} is not text: byte 0x00 at offset {start + nul}; convert the file to UTF-8")
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        where = f"byte {data[error.start]:#04x} at offset {start + error.start}"
        raise ValueError(f"{path} is not UTF-8: {where}; convert the file") from error
