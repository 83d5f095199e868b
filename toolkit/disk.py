"""What checkpoints and token files need of a disk: that bytes are there, and which ones."""

import hashlib
import os
from pathlib import Path


def fsync(path: Path) -> None:
    """Return once a file or folder is on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sha256(path: Path) -> str:
    """SHA-256 of a file's content, hex."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
