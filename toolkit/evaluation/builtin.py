"""The built-in sets of items, which need no file of the user: ``MinimalPairs.paths = ['builtin:agreement']``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from toolkit.config.spelling import suggest

PREFIX = "builtin:"
FOLDER = Path(__file__).parent / "sets"  # written by python -m experiments.story_items.make


def names() -> list[str]:
    """The names of all sets."""
    return sorted(path.stem for path in FOLDER.glob("*.jsonl"))


def located(knob: str, paths: Sequence[str]) -> list[str]:
    """The same paths, with the file of a set in place of builtin:NAME. Raises ValueError for a name that no set has;
    ``knob`` is named in the message."""
    return [_file(knob, path.removeprefix(PREFIX)) if path.startswith(PREFIX) else path for path in paths]


def _file(knob: str, name: str) -> str:
    if name not in names():
        raise ValueError(
            f"{knob}: no built-in set is called {name!r}{suggest(name, names())}; the sets are {', '.join(names())}"
        )
    return str(FOLDER / f"{name}.jsonl")
