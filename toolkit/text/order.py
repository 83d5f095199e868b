"""The order in which an epoch goes through its windows."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Protocol

import numpy as np

LISTED = 2**24  # windows: up to this many, the order is an array, 8 bytes each; a longer order is computed on demand
ROUNDS = 8
MASK = 2**64 - 1


class Permutation(Protocol):
    """The numbers below its length, each once: the window at each place of an epoch."""

    def __len__(self) -> int: ...

    def __getitem__(self, place: int, /) -> int: ...


def order(windows: int, seed: Sequence[int]) -> Permutation:
    """A permutation of range(windows), the same for the same seed."""
    if windows <= LISTED:
        return np.random.default_rng(seed).permutation(windows)
    return Feistel(windows, seed)


class Feistel:
    """A permutation of range(size) that stores no list: place i is computed when it is read, in about 10 us.

    A number below a * a, with a = ceil(sqrt(size)), is written as a pair (left, right). Each round shifts one half by a
    keyed hash of the other, modulo a. That can be undone, so the rounds permute range(a * a). A result outside
    range(size) is permuted again until it falls inside ("cycle walking": Black and Rogaway, Ciphers with Arbitrary
    Finite Domains, 2002)."""

    def __init__(self, size: int, seed: Sequence[int]):
        self.size, self.side = size, math.isqrt(size - 1) + 1
        self.keys = np.random.default_rng(seed).integers(2**64, size=ROUNDS, dtype=np.uint64).tolist()

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, place: int) -> int:
        if not 0 <= place < self.size:
            raise IndexError(place)
        while (place := self._permuted(place)) >= self.size:
            pass
        return place

    def _permuted(self, number: int) -> int:
        """All rounds, once, for a number below side * side."""
        left, right = divmod(number, self.side)
        for key in self.keys:
            left, right = right, (left + _mixed(right ^ key)) % self.side
        return left * self.side + right


def _mixed(value: int) -> int:
    """SplitMix64's finaliser (Steele, Lea and Flood, 2014): a hash of 64 bits, each depending on all of ``value``."""
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & MASK
    return value ^ (value >> 31)
