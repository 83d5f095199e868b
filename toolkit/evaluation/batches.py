"""Which sequences a model reads side by side: batches as large as allowed, unless they would waste too many tokens."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence

PASS = 128  # tokens that may be wasted in a batch: about as many as take the time of a further pass


def padded(lengths: Sequence[int], batch_tokens: int, largest: int | None = None) -> Iterator[slice]:
    """Divide sequences, the longest first, into batches of at most ``batch_tokens`` tokens, in which the shorter ones
    are padded to the longest, and of at most ``largest`` sequences. At least one sequence is in each batch."""
    sums = list(itertools.accumulate(lengths, initial=0))

    def padding(start: int, end: int) -> int:
        return lengths[start] * (end - start) - (sums[end] - sums[start])

    return _divide(lengths, batch_tokens, largest, padding)


def trimmed(lengths: Sequence[int], weights: Sequence[int], batch_tokens: int, largest: int) -> Iterator[slice]:
    """Divide beginnings, the longest first, into batches in which all are cut to the shortest. Tokens that are cut off
    are read ``weights`` times more. The limits are as in ``padded``."""
    tokens = list(itertools.accumulate((n * weight for n, weight in zip(lengths, weights, strict=True)), initial=0))
    sums = list(itertools.accumulate(weights, initial=0))

    def cut_off(start: int, end: int) -> int:
        return tokens[end] - tokens[start] - lengths[end - 1] * (sums[end] - sums[start])

    return _divide(lengths, batch_tokens, largest, cut_off)


def _divide(
    lengths: Sequence[int], batch_tokens: int, largest: int | None, wasted: Callable[[int, int], int]
) -> Iterator[slice]:
    start = 0
    while start < len(lengths):
        most = batch_tokens // lengths[start]
        last = min(len(lengths), start + (most if largest is None else min(most, largest)))
        end = start + 1
        while end < last and wasted(start, end + 1) <= PASS:
            end += 1
        yield slice(start, end)
        start = end
