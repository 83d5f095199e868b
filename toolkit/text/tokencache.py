"""Cache folders: built once, by one process, put in place whole, and verified each time they are opened."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from platformdirs import user_cache_dir

from toolkit.store import sealed
from toolkit.store.disk import sha256

log = logging.getLogger("toolkit")

FORMAT = 2  # raise it when the files or their content change: folders of older formats are then ignored
WHOLE = 2**32  # bytes: a file up to this size is hashed as a whole each time its folder is opened
BLOCK = 2**16  # bytes: a larger file has a digest for each block, which the reader of the block compares


def cached(kind: str, about: dict[str, Any], build: Callable[[Path], dict[str, Any]]) -> tuple[Path, dict[str, Any]]:
    """(folder, manifest) of the cache for ``about``. If no valid folder exists, ``build(folder)`` fills one and returns
    entries for the manifest. One process builds at a time; others wait.

    The manifest and every file of at most WHOLE bytes are verified by their digests; a folder that is damaged is built
    again, with a warning. Hashing runs at 1 to 2 GB/s. A longer file NAME is verified block by block by its reader,
    with the digests in NAME.blocks, so that the start is quick at any size."""
    key = hashlib.sha256(json.dumps({"format": FORMAT, **about}, sort_keys=True).encode()).hexdigest()
    root = Path(os.environ.get("TOOLKIT_CACHE") or user_cache_dir("gpt-ablation-toolkit"))
    folder = root / f"{kind}-{key}"
    manifest = _read_manifest(folder)  # without the lock: a folder appears whole, and a shared cache may be read-only
    if manifest is None:
        root.mkdir(parents=True, exist_ok=True)
        lock = FileLock(f"{folder}.lock")
        try:
            lock.acquire(timeout=1)
        except Timeout:
            log.warning("waiting for another process, which is preparing the same text in %s", folder)
            lock.acquire()
        try:
            manifest = _read_manifest(folder, damage="built again") or _build(folder, about, build)
        finally:
            lock.release()
    return folder, manifest


def _read_manifest(folder: Path, damage: str | None = None) -> dict[str, Any] | None:
    """The manifest of a folder if it and the files verify, else None. ``damage``: what the warning says is done."""
    if not folder.exists():
        return None
    try:
        return sealed.verified(folder, STYLE)
    except sealed.Damaged as error:
        if damage:
            log.warning("the cache folder %s is damaged and is %s: %s", folder, damage, error)
    return None


def _build(folder: Path, about: dict[str, Any], build: Callable[[Path], dict[str, Any]]) -> dict[str, Any]:
    """Write a cache folder; returns its manifest. The caller holds the lock, so an existing temporary folder was left
    by a process that died."""

    def fill(temporary: Path) -> dict[str, Any]:
        entries = {"format": FORMAT, **about, **build(temporary)}
        for path in [path for path in temporary.rglob("*") if path.is_file() and path.stat().st_size > WHOLE]:
            _write_blocks(path)
        return entries

    sealed.sweep(folder.parent, folder.name)
    return sealed.write(folder, fill, STYLE)


def _measure(path: Path) -> list[int | str | None]:
    """[bytes, SHA-256], or [bytes, None] for a file that is verified block by block."""
    size = path.stat().st_size
    return [size, sha256(path) if size <= WHOLE else None]


def _write_blocks(path: Path) -> None:
    """Write the digests of a file's blocks into ``path``.blocks."""
    with path.open("rb") as file, path.with_name(f"{path.name}.blocks").open("wb") as digests:
        while block := file.read(BLOCK):
            digests.write(hashlib.sha256(block).digest())


STYLE = sealed.ManifestStyle(
    seal_key="seal", indent=2, limit=None, exact=False, measure=_measure, expected=lambda entry: (entry[0], entry[1])
)
