"""state.pt: written so that a full disk is told as what it is, read so that a hostile file can do nothing."""

from __future__ import annotations

import pickle
import zipfile
from pathlib import Path

import torch


class _Noted:
    """A file for torch.save, which tells a full disk as a RuntimeError without its cause; this keeps the cause."""

    def __init__(self, file):
        self.file, self.error = file, None

    def write(self, data):
        try:
            return self.file.write(data)
        except OSError as error:
            self.error = self.error or error
            raise

    def flush(self):
        self.file.flush()


def write_state(path: Path, state: dict) -> None:
    """Raises OSError with the disk's own reason."""
    with open(path, "wb", buffering=0) as file:
        noted = _Noted(file)
        try:
            torch.save(state, noted)
        except RuntimeError as error:
            raise noted.error or OSError(str(error)) from error


def read_state(path: Path) -> dict:
    """What ``write_state`` wrote. Raises ValueError, before anything is read, for a file that could grow when it is
    unpacked, and for one that holds more than tensors and plain values."""
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
        if any(e.compress_type != zipfile.ZIP_STORED or ".." in Path(e.filename).parts for e in entries):
            raise ValueError("an entry is compressed, or outside")
        if sum(e.file_size for e in entries) > path.stat().st_size:
            raise ValueError("its entries claim more bytes than it has")
        return torch.load(path, weights_only=True, map_location="cpu")
    except (ValueError, RuntimeError, EOFError, zipfile.BadZipFile, pickle.UnpicklingError) as error:
        reason = str(error).strip().split("\n")[0]
        raise ValueError(f"{path} is not safe to read, and was not: {reason}; use another checkpoint") from error
