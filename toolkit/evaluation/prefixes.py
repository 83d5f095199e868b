"""Sequences that begin alike: which of them a model should read together, so that it reads their beginning once."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from typing import NamedTuple

Ids = tuple[int, ...]

LARGEST = 64  # sequences in a group
WORTH = 1 / 4  # the least share of a group's tokens that must be saved: two passes over few tokens cost more than one


class Group(NamedTuple):
    """Sequences whose first ``shared`` tokens are the same. The token after these is the same, too, so that all
    predictions from the shared tokens are."""

    sequences: list[Ids]
    shared: int


def groups(sequences: Iterable[Ids]) -> tuple[list[Group], list[Ids]]:
    """Divide different sequences into groups that share a beginning, and sequences to be read alone.

    The division saves the most tokens among all divisions of the sorted sequences into consecutive ones, up to
    ``LARGEST`` each. Groups that save little are not formed."""
    ordered = sorted(sequences)
    equal = [common(a, b) for a, b in itertools.pairwise(ordered)]
    found, alone = [], []
    for start, end in _runs(equal, [len(each) for each in ordered]):
        members, shared = ordered[start:end], min(equal[start : end - 1], default=1) - 1
        if shared * (end - start - 1) > WORTH * sum(map(len, members)):
            found.append(Group(members, shared))
        else:
            alone += members
    return found, alone


def common(a: Sequence[int], b: Sequence[int]) -> int:
    """The number of tokens with which both begin."""
    low, high = 0, min(len(a), len(b))
    while low < high:
        middle = (low + high + 1) // 2
        if a[low:middle] == b[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low


def _runs(equal: Sequence[int], lengths: Sequence[int]) -> list[tuple[int, int]]:
    """The (start, end) of each run, where ``equal`` has the tokens that neighbours share. Found by dynamic programming:
    ``saved[n]`` is the largest number of tokens that the first n sequences can save."""
    saved, begins = [0], [0]
    for end in range(1, len(lengths) + 1):
        best, begin, shared, shortest = saved[end - 1], end - 1, lengths[end - 1], lengths[end - 1]
        for start in range(end - 2, max(-1, end - 1 - LARGEST), -1):
            shared, shortest = min(shared, equal[start] - 1), min(shortest, lengths[start])
            if shared <= WORTH * shortest:  # too little to read together
                break
            total = saved[start] + shared * (end - start - 1)
            if total > best:
                best, begin = total, start
        saved.append(best)
        begins.append(begin)
    runs, end = [], len(lengths)
    while end > 0:
        runs.append((begins[end], end))
        end = begins[end]
    return runs[::-1]
