"""Banners and notes that say the same of many arms or runs, gathered for the eye. Nothing is lost: a group keeps every
text, and the outputs that have room list them."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from toolkit.comparison.guards import some

FEW = 3  # so many texts of one kind are shown each for itself
_NUMBER = re.compile(r"[+-]?\d[\d,]*(\.\d+)?(e[+-]?\d+)?", re.IGNORECASE)


@dataclass(frozen=True)
class Alike:
    """Texts of one guard that differ in the arm or run that they are about, and in numbers at most. ``names`` are what
    the texts are about, one each; ``same`` is whether they differ in nothing else."""

    guard: str
    texts: tuple[str, ...]
    names: tuple[str, ...] = ()
    same: bool = False

    @property
    def others(self) -> str:
        """What the first text leaves out: "the same of a2, a3, a4, a5, a6, a7 and 32 more"; empty for one text."""
        if len(self.texts) == 1:
            return ""
        return f"{'the same of' if self.same else 'alike, with other numbers:'} {some(self.names[1:])}"


def banners(said: dict) -> list[Alike]:
    """The banners of a record, the order kept."""
    return gathered([(banner["guard"], banner["text"]) for banner in said["banners"]], _names(said))


def notes(said: dict) -> list[Alike]:
    """The notes of a record, as groups without a guard."""
    return gathered([("", note) for note in said["notes"]], _names(said))


def gathered(texts: Iterable[tuple[str, str]], names: Iterable[str]) -> list[Alike]:
    """(guard, text) in groups. More than FEW texts become one where each begins with one of the names and goes on in
    words that they share."""
    found = sorted(filter(None, names), key=len, reverse=True)
    known = re.compile("|".join(map(re.escape, found))) if found else re.compile(r"(?!)")
    groups: dict[tuple, list[tuple[str, str, str]]] = {}
    for i, (guard, text) in enumerate(texts):
        subject = known.match(text)
        name = subject.group() if subject else ""
        rest = text[len(name) :]
        shape = _NUMBER.sub("#", known.sub("@", rest)) if name else i
        groups.setdefault((guard, shape), []).append((text, name, rest))
    out = []
    for (guard, _), members in groups.items():
        if len(members) <= FEW:
            out += [Alike(guard, (text,)) for text, _, _ in members]
        else:
            every, subjects, rests = zip(*members, strict=True)
            out.append(Alike(guard, every, subjects, len(set(rests)) == 1))
    return out


def _names(said: dict) -> set[str]:
    runs = [*said["runs"], *said["selection_runs"]]
    return {arm["arm"] for arm in said["arms"]} | {run["run"] for run in runs}
