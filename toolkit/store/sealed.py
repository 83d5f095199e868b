"""Sealed folders: written whole or not at all, with a manifest that proves their files. Checkpoints and token files are
such folders, and this module alone writes and verifies them.

``write`` fills a temporary folder beside the final one and waits until its files are on the disk. Then it writes their
sizes and SHA-256 sums into manifest.json, which also holds a digest of itself, and renames the folder into place. A
process that dies at any moment leaves the old folder or the new one, under the final name or set aside under a
temporary one, from which ``sweep`` brings it back."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from toolkit.store import seal
from toolkit.store.disk import fsync, give_mode_of, sha256

MANIFEST = "manifest.json"


class Damaged(Exception):
    """A folder is not what was written. The message says how; the caller names the folder and the remedy."""


@dataclass(frozen=True)
class ManifestStyle:
    """How one kind of folder spells its manifest. The kinds differ, and folders on disk must stay readable.

    ``seal_key``: the entry that holds the digest of all other entries. ``indent``: spaces in the JSON. ``limit``: bytes
    that a manifest may have; None for any number. ``exact``: whether a file that the manifest does not list counts as
    damage. ``measure(path)`` returns the entry of a file; ``expected(entry)`` returns what it says: (bytes, SHA-256 in
    hex, or None for a file that its reader verifies)."""

    seal_key: str
    indent: int
    limit: int | None
    exact: bool
    measure: Callable[[Path], Any]  # Any: a JSON value, which is read back unchecked
    expected: Callable[[Any], tuple[int, str | None]]


def write(folder: Path, fill: Callable[[Path], dict[str, Any]], style: ManifestStyle) -> dict[str, Any]:
    """Write a sealed folder; a folder of that name is replaced. Returns the manifest, without its seal.

    ``fill(temporary)`` writes the files into an empty folder, and returns entries for the manifest besides "files".
    Whatever ``fill`` or the disk raises is passed on; the old folder is then unchanged."""
    temporary = folder.with_name(f"{folder.name}.tmp-{os.getpid()}")
    try:
        temporary.mkdir()
        manifest = fill(temporary)
        paths = sorted(temporary.rglob("*"))
        files = [path for path in paths if path.is_file()]
        for path in files:
            fsync(path)
        manifest["files"] = {path.relative_to(temporary).as_posix(): style.measure(path) for path in files}
        sealed = manifest | {style.seal_key: seal.digest(manifest)}
        (temporary / MANIFEST).write_text(json.dumps(sealed, indent=style.indent), encoding="utf-8")
        give_mode_of(temporary / MANIFEST, files)
        fsync(temporary / MANIFEST)
        for path in reversed(paths):  # the deepest folders first
            if path.is_dir():
                fsync(path)
        fsync(temporary)
        put_in_place(temporary, folder)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    return manifest


def put_in_place(source: Path, folder: Path) -> None:
    """Rename a finished folder to ``folder``. An existing ``folder`` is set aside until the new name is on the disk,
    and then deleted; it gets its name back if the renaming fails. Raises OSError."""
    old = folder.with_name(f"{folder.name}.tmp-old-{os.getpid()}")
    try:
        if folder.exists():
            folder.rename(old)
        source.rename(folder)
    except BaseException:
        if old.exists() and not folder.exists():
            with contextlib.suppress(OSError):  # ``sweep`` tries again
                old.rename(folder)
        raise
    fsync(folder.parent)
    shutil.rmtree(old, ignore_errors=True)


def sweep(root: Path, name: str = "*") -> None:
    """Delete what interrupted writes of the folder ``name`` (by default of any folder) left in ``root``. A folder that
    was set aside gets its name back if its successor is missing. No other process may be writing these folders."""
    for stale in root.glob(f"{name}.tmp-*"):
        original = stale.with_name(stale.name.split(".tmp-")[0])
        if ".tmp-old-" in stale.name and not original.exists():
            stale.rename(original)
        else:
            shutil.rmtree(stale, ignore_errors=True)


def delete(folder: Path) -> None:
    """Delete a sealed folder, its manifest first, so that a half-deleted folder can't be taken for a whole one. Files
    that can't be deleted stay. Raises OSError if the manifest can't be deleted."""
    (folder / MANIFEST).unlink(missing_ok=True)
    shutil.rmtree(folder, ignore_errors=True)


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a folder. Nothing is verified; ``verified`` does that."""
    return json.loads((folder / MANIFEST).read_text(encoding="utf-8"))


def verified(folder: Path, style: ManifestStyle) -> dict[str, Any]:
    """The manifest of a folder, seal included, after it and all files were compared with what was written. Raises
    Damaged, and nothing else, if they differ or can't be read."""
    try:
        if style.limit is not None and (folder / MANIFEST).stat().st_size > style.limit:
            raise Damaged(f"{MANIFEST} is too long to be a manifest")
        manifest = read_manifest(folder)
        content = {key: value for key, value in manifest.items() if key != style.seal_key}
        if manifest[style.seal_key] != seal.digest(content):
            raise Damaged(f"{MANIFEST} is not what was written")
        files = {name: style.expected(entry) for name, entry in manifest["files"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise Damaged(f"no readable {MANIFEST} ({type(error).__name__}: {error})") from error
    try:
        _verify_files(folder, files, style.exact)
    except OSError as error:
        raise Damaged(f"{error.filename or folder} can't be read: {error.strerror or error}") from error
    except ValueError as error:  # a name that no file can have
        raise Damaged(f"{MANIFEST} lists no files: {error}") from error
    return manifest


def _verify_files(folder: Path, files: dict[str, tuple[int, str | None]], exact: bool) -> None:
    """Compare the files of a folder with (bytes, SHA-256 or None) of each. Raises Damaged, and
    OSError or ValueError if a file can't be read."""
    names = {path.name for path in folder.iterdir()} - {MANIFEST}
    if exact and names != files.keys():
        raise Damaged(f"its files are {sorted(names)}, but {sorted(files)} were written")
    for name, (size, digest) in files.items():
        actual_size = (folder / name).stat().st_size
        if actual_size != size:
            raise Damaged(f"{name} has {actual_size} bytes, but {size} were written")
        if digest is not None and sha256(folder / name) != digest:
            raise Damaged(f"{name} is not what was written")
