"""Seals: digests stored in a file, of its own content and of other files, so that damage is noticed when it is read.

A JSON file has its seal as an entry. A gin file has it as comments at its end, which may cover other files too:

    # sealed DIGEST the lines above; files below: 1
    # sealed DIGEST code/kernel.py

A seal is written in one step with its file, so that a process that is killed can't leave new content with an old seal.
Seals guard against damage, not against malice. Whoever edits a file on purpose deletes its seal. A file without a seal,
as older versions wrote it, is accepted."""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

KEY = "seal"
_LINE = re.compile(r"# sealed ([0-9a-f]{64}) (.*)\n?")
_OWN = re.compile(r"the lines above; files below: (\d+)")
REMEDY = (
    "restore it from a copy; or, if you edited it on purpose, delete the lines that begin with '# sealed' from the "
    "run's config.gin"
)


def seal(value: dict[str, Any]) -> dict[str, Any]:
    """A JSON object with its digest as the entry ``KEY``; an old seal is replaced."""
    content = {key: each for key, each in value.items() if key != KEY}
    return content | {KEY: digest(content)}


def digest(value: object) -> str:
    """SHA-256 of a JSON value, hex; the order of keys does not matter."""
    content = json.loads(json.dumps(value))  # as when it is read back: tuples become lists, keys strings
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True)
class SealedText:
    """A gin text without its seal lines, and what these lines say. ``is_sealed``: whether there were any. ``problem``:
    why the text is not what was sealed, or None. ``files``: {name: digest} of other files."""

    text: str
    is_sealed: bool = False
    problem: str | None = None
    files: dict[str, str] = field(default_factory=dict)


def seal_text(text: str, files: dict[str, str] | None = None) -> str:
    """A gin text with its seal appended, and the digests of other files, {name: digest}."""
    files = files or {}
    own = f"# sealed {hashlib.sha256(text.encode()).hexdigest()} the lines above; files below: {len(files)}\n"
    return text + own + "".join(f"# sealed {digest} {name}\n" for name, digest in files.items())


def unseal_text(sealed: str) -> SealedText:
    """Split a gin text from its seal lines, and compare the two."""
    lines = re.findall(r"[^\n]*\n|[^\n]+", sealed)
    seals = [(index, match[1], match[2]) for index, line in enumerate(lines) if (match := _LINE.fullmatch(line))]
    if not seals:
        return SealedText(sealed)
    first = seals[0][0]
    text = "".join(lines[:first])
    own = _OWN.fullmatch(seals[0][2])
    files = {name: digest for _, digest, name in seals[1:]}
    is_complete = own is not None and len(seals) - 1 == int(own[1]) == len(lines) - first - 1
    matches = is_complete and hashlib.sha256(text.encode()).hexdigest() == seals[0][1]
    return SealedText(text, True, None if matches else "its lines do not fit the seal at its end", files)


def file_problem(config: Path, name: str) -> str | None:
    """How a run's file differs from its digest in the run's config.gin, in words; None if it matches, or config.gin
    has no digest of it. ``config`` is the path of config.gin; ``name`` is relative to its folder, with slashes."""
    try:
        files = unseal_text(config.read_text(encoding="utf-8-sig")).files
    except (OSError, UnicodeDecodeError):
        return None
    return compare(config.parent, {name: files[name]}) if name in files else None


def compare(folder: Path, digests: dict[str, str]) -> str | None:
    """The first of some files that does not match its digest, in words; None if all match."""
    for name, expected in digests.items():
        try:
            with open(folder / name, "rb") as file:
                actual = hashlib.file_digest(file, "sha256").hexdigest()
        except OSError as error:
            return f"{folder / name} can't be read: {error.strerror or error}"
        if actual != expected:
            return f"{folder / name} is not what was written"
    return None
