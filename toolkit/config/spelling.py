"""Which known word a misspelt one was probably meant to be."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def suggest(word: str, known: Iterable[str]) -> str:
    """ "; did you mean X?" for the nearest known word; "" if none is near."""
    near = nearest(word, known)
    return f"; did you mean {near!r}?" if near else ""


def nearest(word: str, known: Iterable[str]) -> str | None:
    """The known word closest to ``word``, ignoring case; None if none is similar. A word that differs by one slip of
    the fingers comes before the most similar one. Of several slips, swapped letters come before a letter too many or
    too few, and these before a replaced one."""
    by_lower = {name.lower(): name for name in known}
    near = difflib.get_close_matches(word.lower(), by_lower, n=1, cutoff=0.6)
    slips = [name for name in by_lower if _is_one_slip(word.lower(), name)]
    slips.sort(key=lambda name: (sorted(name) != sorted(word.lower()), len(name) == len(word), name not in near))
    closest = next(iter([*slips, *near]), None)
    return by_lower[closest] if closest else None


def _is_one_slip(one: str, other: str) -> bool:
    """Whether two words differ by one slip: a letter too many, too few or replaced, or two neighbours swapped."""
    start = 0
    while start < min(len(one), len(other)) and one[start] == other[start]:
        start += 1
    end = 0
    while end < min(len(one), len(other)) - start and one[-1 - end] == other[-1 - end]:
        end += 1
    middle, others = one[start : len(one) - end], other[start : len(other) - end]
    return max(len(middle), len(others)) <= 1 or (len(middle) == 2 and middle[::-1] == others)
