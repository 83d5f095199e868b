"""Write state.pt so that a full disk is reported as one; read it so that a hostile file can do no harm."""

from __future__ import annotations

import pickle
import zipfile
from pathlib import Path
from typing import IO, Any

import torch


class _ErrorRecorder:
    """A file for torch.save that keeps the first OSError: torch.save raises a RuntimeError without its cause."""

    def __init__(self, file: IO[bytes]):
        self.file = file
        self.error: OSError | None = None

    def write(self, data: bytes) -> int:
        try:
            return self.file.write(data)
        except OSError as error:
            self.error = self.error or error
            raise

    def flush(self) -> None:
        self.file.flush()


def write_state(path: Path, state: dict[str, Any]) -> None:
    """Write a state with torch.save. Raises OSError with the disk's own reason."""
    with open(path, "wb", buffering=0) as file:
        recorder = _ErrorRecorder(file)
        try:
            torch.save(state, recorder)  # type: ignore[arg-type]  # it calls write and flush alone
        except RuntimeError as error:
            raise recorder.error or OSError(str(error)) from error


def read_state(path: Path) -> Any:
    """Read what ``write_state`` wrote; tensors are put on the CPU. Raises ValueError for a file whose entries could
    need more memory than its size, before it reads them, and for a file with more than tensors and plain values."""
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
        if any(entry.compress_type != zipfile.ZIP_STORED or ".." in Path(entry.filename).parts for entry in entries):
            raise ValueError("an entry is compressed, or outside")
        if sum(entry.file_size for entry in entries) > path.stat().st_size:
            raise ValueError("its entries claim more bytes than it has")
        return torch.load(path, weights_only=True, map_location="cpu")
    except (ValueError, RuntimeError, EOFError, zipfile.BadZipFile, pickle.UnpicklingError) as error:
        reason = str(error).strip().split("\n")[0]
        raise ValueError(f"{path} is not safe to read, so it was not read: {reason}; use another checkpoint") from error
