"""One split's token ids on disk, read in rows and verified before they are returned."""

from __future__ import annotations

import hashlib
import os
import weakref
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from toolkit.text.tokencache import BLOCK

DIGEST = hashlib.sha256().digest_size


class TokenFile:
    """The ids in ``path``, each of type ``dtype``. The file stays open as long as the object lives. If ``path``.blocks
    exists, each block is compared with its digest when it is first read.

    The file is read, not memory-mapped: when a file shrinks, a map of it ends the process with SIGBUS, while a read
    returns too few bytes. This costs 10 us for 8 rows of 1025 tokens.

    Threads may read at the same time. Raises ValueError for ids outside the vocabulary and for a damaged block, with
    the split's file and the offset; OSError for a file that has shrunk or can't be read.
    """

    def __init__(self, path: Path, dtype: str, vocab_size: int):
        self.path, self.dtype, self.vocab_size = path, np.dtype(dtype), vocab_size
        self._file = self._open(path)
        self.tokens = os.fstat(self._file).st_size // self.dtype.itemsize
        blocks = path.with_name(f"{path.name}.blocks")
        self._digests = self._open(blocks) if blocks.exists() else None
        self._verified = bytearray(-(-self.tokens * self.dtype.itemsize // BLOCK))  # 1 for a block that was compared

    def rows(self, starts: Sequence[int], length: int) -> np.ndarray:
        """Tokens start ... start + length - 1 for each of the starts, (len(starts), length) int64."""
        rows = np.empty((len(starts), length), dtype=self.dtype)
        for row, start in zip(rows, starts, strict=True):
            offset = start * self.dtype.itemsize
            if self._digests is not None:
                self._verify(self._digests, offset, offset + row.nbytes)
            self._fill(row, offset)
        if rows.max() >= self.vocab_size:  # else an embedding would fail later, and on a GPU not say where
            row, place = np.argwhere(rows >= self.vocab_size)[0]
            raise ValueError(
                f"{self.path}: token {starts[row] + place} of the {self.path.stem} split is {rows[row, place]}, but "
                f"the vocabulary has {self.vocab_size} ids; delete {self.path.parent}, and it is built again"
            )
        return rows.astype(np.int64)

    def _open(self, path: Path) -> int:
        """Open a file to read; it is closed when this object is deleted."""
        handle = os.open(path, os.O_RDONLY)
        weakref.finalize(self, os.close, handle)
        return handle

    def _fill(self, row: np.ndarray, offset: int) -> None:
        """Read a row from byte ``offset`` on. Raises OSError."""
        try:
            read = os.preadv(self._file, [row.data], offset)
        except OSError as error:
            raise OSError(error.errno, f"can't read at byte {offset:,}: {error.strerror}", str(self.path)) from error
        if read != row.nbytes:
            raise OSError(
                f"{self.path} was cut short while it was read: no bytes {offset + read:,} to {offset + row.nbytes:,}; "
                "--resume builds it again and continues from the last checkpoint"
            )

    def _verify(self, digests: int, first: int, end: int) -> None:
        """Compare the blocks that hold the bytes first ... end - 1 with their digests in the open file ``digests``,
        each block once. Raises ValueError."""
        for block in range(first // BLOCK, (end - 1) // BLOCK + 1):
            if self._verified[block]:
                continue
            content = os.pread(self._file, BLOCK, block * BLOCK)
            if hashlib.sha256(content).digest() != os.pread(digests, DIGEST, block * DIGEST):
                raise ValueError(
                    f"{self.path} is damaged in the {BLOCK:,} bytes from {block * BLOCK:,}: they are not what was "
                    f"written; delete {self.path.parent}, and it is built again, then --resume"
                )
            self._verified[block] = 1
