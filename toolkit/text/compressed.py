"""Open files that may be compressed, as their suffix says, as a stream in bounded memory."""

from __future__ import annotations

import bz2
import contextlib
import gzip
import io
import lzma
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path


@contextlib.contextmanager
def opened(path: Path) -> Iterator[io.BufferedIOBase]:
    """Open a file as a binary stream; it is decompressed if its suffix is a key of ``COMPRESSIONS``.

    Raises ValueError, also while the stream is read, for compressed content that is damaged or cut short, and OSError
    if the disk fails."""
    decompress = COMPRESSIONS.get(path.suffix.lower())
    with path.open("rb") as file:
        if decompress is None:
            yield file
            return
        with named_damage(path), decompress(file) as content:
            yield content


@contextlib.contextmanager
def named_damage(path: Path) -> Iterator[None]:
    """Turn what decompressors and pyarrow raise on a damaged file into a ValueError that names the file."""
    try:
        yield
    except (EOFError, OSError, zlib.error, lzma.LZMAError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise  # the disk failed; the content may be whole
        reason = " ".join(str(error).split())[:120].rstrip(". ")
        raise ValueError(f"{path} is damaged or was cut short ({reason}); copy or download it again") from error


def _zstandard(file: io.BufferedReader) -> io.BufferedReader:
    """Decompress with pyarrow, which notices a frame that was cut short."""
    import pyarrow

    if not pyarrow.Codec.is_available("zstd"):
        raise ValueError(f"{file.name}: this pyarrow was built without zstd; run `python -m pip install pyarrow`")
    return io.BufferedReader(pyarrow.CompressedInputStream(file, "zstd"))


def _gzip(file: io.BufferedReader) -> gzip.GzipFile:
    """Decompress with gzip, from an open file."""
    return gzip.GzipFile(fileobj=file)


COMPRESSIONS: dict[str, Callable[[io.BufferedReader], io.BufferedIOBase]] = {
    ".gz": _gzip,
    ".bz2": bz2.BZ2File,
    ".xz": lzma.LZMAFile,
    ".zst": _zstandard,
}
