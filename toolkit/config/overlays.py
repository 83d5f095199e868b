"""The toolkit's own overlays: the files under gin/ that put a part into its slot, or set its knobs."""

from __future__ import annotations

import re
from pathlib import Path

from toolkit.config.layers import BASE, find
from toolkit.registry import Entry


def overlay_of(entry: Entry, alone: bool = False) -> str | None:
    """The file under gin/ that puts a part into its slot, or None. A file with only this part in the slot is best;
    ``alone``: no other counts."""
    texts = {name: (_folder() / name).read_text(encoding="utf-8") for name in _names(entry.kind)}
    # The first pattern finds a slot that holds only this part, the second any mention of the part.
    patterns = [rf"{entry.kind}s? = \[?@{entry.name}\]?$", rf"@(\w+/)?{entry.name}\b"]
    for pattern in patterns[:1] if alone else patterns:
        for name, text in texts.items():
            if re.search(pattern, text, re.MULTILINE):
                return f"gin/{name}"
    return None


def overlays(kind: str) -> list[str]:
    """The files under gin/ for a kind of parts, such as "gin/norm/rmsnorm.gin"."""
    return [f"gin/{name}" for name in _names(kind)]


def _names(kind: str) -> list[str]:
    return sorted(f"{kind}/{path.name}" for path in _folder().glob(f"{kind}/*.gin"))


def _folder() -> Path:
    return find(BASE).parent
