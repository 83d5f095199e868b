"""Read and write files safely: whole or not at all, never through a link, never from a damaged JSON file.

Commands write every file in the folder of a run or of a plan with ``write_text`` or ``write_bytes``, and call
``refuse_links`` on the folder before they write in it."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import stat
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from toolkit.store import seal

log = logging.getLogger("toolkit")
NO_FOLLOW = getattr(os, "O_NOFOLLOW", 0)  # 0 on Windows, which lacks it
BINARY = getattr(os, "O_BINARY", 0)  # 0 everywhere but on Windows


def fsync(path: Path) -> None:
    """Wait until the content of a file or folder is on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sha256(path: Path) -> str:
    """SHA-256 of a file's content, hex."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; {} if the file does not exist. Raises ValueError, naming the file, if it is damaged:
    if it holds no JSON object, or its seal does not match its content."""
    if not path.is_file():
        return {}
    remedy = "restore it from a copy"
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        reason = "a value is nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise ValueError(f"{path} is damaged: it can't be read as JSON ({reason}); {remedy}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} is damaged: it holds a {type(value).__name__}, not a JSON object; {remedy}")
    if seal.KEY in value and seal.seal(value)[seal.KEY] != value[seal.KEY]:
        raise ValueError(
            f"{path} is damaged: its content does not fit its seal; {remedy}, or, if you edited it on purpose, delete "
            f'its entry "{seal.KEY}"'
        )
    return value


def read_json_or_warn(path: Path) -> dict[str, Any]:
    """As ``read_json``, but a damaged file gives a warning that names it, and {}."""
    try:
        return read_json(path)
    except ValueError as error:
        log.warning("%s; continuing without it", error)
        return {}


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Write a JSON object with its seal, whole or not at all. Raises OSError."""
    write_text(path, json.dumps(seal.seal(value), indent=1) + "\n")


def write_text(path: Path, text: str) -> None:
    """Replace a file's content by a text in UTF-8; see ``write_bytes``."""
    write_bytes(path, text.encode("utf-8"))


def write_bytes(path: Path, content: bytes) -> None:
    """Replace a file's content, and wait until it is on the disk. A process that is killed meanwhile leaves the old
    content or the new. If ``path`` is a link, the link is replaced, not followed. Raises OSError; the old content is
    then unchanged."""
    draft = path.with_name(f"{path.name}.tmp")
    try:
        with contextlib.suppress(FileNotFoundError):
            draft.unlink()  # left by a process that was killed, or a link that somebody made
        handle = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL | NO_FOLLOW | BINARY, 0o666)
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(draft, path)
    except OSError:
        with contextlib.suppress(OSError):
            draft.unlink()
        raise


def give_mode_of(file: Path, others: Iterable[Path]) -> None:
    """Give the permissions of ``file``, which ``open`` has made and which follow the umask, to other files. Some
    libraries write through temporary files that only their owner may read. A disk that refuses is no error."""
    mode = stat.S_IMODE(file.stat().st_mode)
    for other in others:
        if stat.S_IMODE(other.stat().st_mode) != mode:
            with contextlib.suppress(OSError):
                other.chmod(mode)


def refuse_links(folder: Path, below: Path | None = None) -> None:
    """Raise ValueError if writing into a folder could change a file elsewhere: for a symbolic link in the folder that
    leads out of it, and for anything in it that is neither a file, a folder nor a link.

    The folder itself may be a link. With ``below``, a folder that contains it, neither the folder nor any folder
    between the two may be a link. A folder that does not exist passes."""
    if below is not None:
        names = folder.absolute().relative_to(below.absolute()).parts
        for depth in range(1, len(names) + 1):
            _refuse_link(below.joinpath(*names[:depth]), below)
    root = folder.resolve()
    for parent, folders, files in os.walk(folder):
        for name in [*folders, *files]:
            path = Path(parent, name)
            mode = path.lstat().st_mode
            if stat.S_ISLNK(mode) and not _target(path).is_relative_to(root):
                _refuse_link(path, folder)
            elif not (stat.S_ISLNK(mode) or stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
                raise ValueError(f"{path} is neither a file nor a folder; delete it: nothing is written in {folder}")


def _refuse_link(path: Path, folder: Path) -> None:
    """Raise ValueError if ``path`` is a symbolic link. ``folder`` is named in the message."""
    if path.is_symlink():
        raise ValueError(
            f"{path} is a link to {os.readlink(path)}, and nothing is written through a link that lies in {folder}: "
            "delete the link, or put what it leads to in its place"
        )


def _target(link: Path) -> Path:
    """The path that a link leads to, which need not exist; the root folder for a link that leads to itself."""
    try:
        return link.resolve()
    except (OSError, RuntimeError):
        return Path(os.path.abspath(os.sep))
