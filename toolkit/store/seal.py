"""Seals: digests that files carry of themselves, or of their neighbours, so that damage is noticed when they are read.

A JSON file carries its seal as an entry; a gin file as comments at its end, which may vouch for other files as well:

    # sealed DIGEST the lines above; files below: 1
    # sealed DIGEST code/kernel.py

A seal is written with the file, in one step, so that a process that is killed leaves no file with another's seal. It
guards against damage, not against malice. Who edits a file on purpose deletes its seal; files of older versions have
none, and pass."""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass, field
from pathlib import Path

KEY = "seal"
_LINE = re.compile(r"# sealed ([0-9a-f]{64}) (.*)\n?")
_OWN = re.compile(r"the lines above; files below: (\d+)")
REMEDY = (
    "restore it from a copy; or, if you edited it on purpose, delete the lines that begin with '# sealed' from the "
    "run's config.gin"
)


def seal(value: dict) -> dict:
    """A JSON object with the digest of its own content."""
    content = {key: each for key, each in value.items() if key != KEY}
    return content | {KEY: digest(content)}


def digest(value: object) -> str:
    """SHA-256 of a JSON value, hex; the order of keys does not count."""
    content = json.loads(json.dumps(value))  # as it is read back
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True)
class SealedText:
    """A gin text without its seals, and what these say. ``problem`` is why the text is not what was sealed, or None.
    ``files`` are digests of other files by name; ``is_sealed`` is False where the text carries no seal at all."""

    text: str
    is_sealed: bool = False
    problem: str | None = None
    files: dict[str, str] = field(default_factory=dict)


def seal_text(text: str, files: dict[str, str] | None = None) -> str:
    """A gin text with its seal, and with the digests of other files, at its end."""
    files = files or {}
    own = f"# sealed {hashlib.sha256(text.encode()).hexdigest()} the lines above; files below: {len(files)}\n"
    return text + own + "".join(f"# sealed {digest} {name}\n" for name, digest in files.items())


def unseal_text(sealed: str) -> SealedText:
    """Take a gin text and its seals apart, and compare them."""
    lines = re.findall(r"[^\n]*\n|[^\n]+", sealed)
    found = [(place, match[1], match[2]) for place, line in enumerate(lines) if (match := _LINE.fullmatch(line))]
    if not found:
        return SealedText(sealed)
    first = found[0][0]
    text = "".join(lines[:first])
    own = _OWN.fullmatch(found[0][2])
    files = {name: digest for _, digest, name in found[1:]}
    whole = own is not None and len(found) - 1 == int(own[1]) == len(lines) - first - 1
    fits = whole and hashlib.sha256(text.encode()).hexdigest() == found[0][1]
    return SealedText(text, True, None if fits else "its lines do not fit the seal at its end", files)


def file_problem(config: Path, name: str) -> str | None:
    """Why a file of a run is not the one that the run's config.gin vouches for; None where it is, or where config.gin
    does not vouch for it. ``name`` is relative to the folder, with slashes."""
    try:
        files = unseal_text(config.read_text(encoding="utf-8-sig")).files
    except (OSError, UnicodeDecodeError):
        return None
    return compare(config.parent, {name: files[name]}) if name in files else None


def compare(folder: Path, digests: dict[str, str]) -> str | None:
    """Which of some files is not what was sealed, in words; None where all are."""
    for name, expected in digests.items():
        try:
            with open(folder / name, "rb") as file:
                found = hashlib.file_digest(file, "sha256").hexdigest()
        except OSError as error:
            return f"{folder / name} can't be read: {error.strerror or error}"
        if found != expected:
            return f"{folder / name} is not what was written"
    return None
