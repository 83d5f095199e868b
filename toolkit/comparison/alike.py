"""Groups banners and notes that say the same about many arms or runs, for shorter output. No text is lost: a group
keeps all of its texts, and outputs with enough room list them."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from toolkit.comparison.banner import list_names
from toolkit.comparison.record import Record

FEW = 3  # up to this many texts of one kind are shown one by one
_NUMBER = re.compile(r"[+-]?\d[\d,]*(\.\d+)?(e[+-]?\d+)?", re.IGNORECASE)


@dataclass(frozen=True)
class TextGroup:
    """Texts of one guard that differ only in the name of an arm or run, and perhaps in numbers. ``names`` holds the arm
    or run of each text. ``is_identical``: the texts differ in nothing but the name."""

    guard: str
    texts: tuple[str, ...]
    names: tuple[str, ...] = ()
    is_identical: bool = False

    @property
    def others(self) -> str:
        """A line about the texts after the first: "the same for a2, a3 and 32 more"; empty if there is one text."""
        if len(self.texts) == 1:
            return ""
        return f"{'the same for' if self.is_identical else 'similar, with other numbers:'} {list_names(self.names[1:])}"


def banners(record: Record) -> list[TextGroup]:
    """The banners of a record in groups, in their order."""
    return grouped([(banner["guard"], banner["text"]) for banner in record["banners"]], _names(record))


def notes(record: Record) -> list[TextGroup]:
    """The notes of a record in groups, whose ``guard`` is empty."""
    return grouped([("", note) for note in record["notes"]], _names(record))


def grouped(texts: Iterable[tuple[str, str]], names: Iterable[str]) -> list[TextGroup]:
    """Group pairs of (guard, text). Texts of one guard form a group if each begins with one of ``names`` and the rest
    is equal but for names and numbers. Up to FEW such texts stay single."""
    longest_first = sorted(filter(None, names), key=len, reverse=True)
    name_pattern = re.compile("|".join(map(re.escape, longest_first))) if longest_first else re.compile(r"(?!)")
    groups: dict[tuple, list[tuple[str, str, str]]] = {}
    for i, (guard, text) in enumerate(texts):
        match = name_pattern.match(text)
        name = match.group() if match else ""
        rest = text[len(name) :]
        shape = _NUMBER.sub("#", name_pattern.sub("@", rest)) if name else i
        groups.setdefault((guard, shape), []).append((text, name, rest))
    result = []
    for (guard, _), members in groups.items():
        if len(members) <= FEW:
            result += [TextGroup(guard, (text,)) for text, _, _ in members]
        else:
            group_texts, group_names, rests = zip(*members, strict=True)
            result.append(TextGroup(guard, group_texts, group_names, len(set(rests)) == 1))
    return result


def _names(record: Record) -> set[str]:
    runs = [*record["runs"], *record["selection_runs"]]
    return {arm["arm"] for arm in record["arms"]} | {run["run"] for run in runs}
