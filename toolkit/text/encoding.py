"""Encode many texts at a time, and compare a tokenizer's fast ``encode_batch`` with its ``encode``."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from typing import Protocol, TypeGuard

import numpy as np

from toolkit.protocols import Tokenizer

EXCERPT = 2_000  # characters of a text that the referee encodes again: about 1 % of the work on a chunk


class BatchEncoder(Tokenizer, Protocol):
    """A tokenizer that can encode many texts in one call."""

    def encode_batch(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]: ...


class Disagreement(Exception):
    """A tokenizer's ``encode_batch`` gave other ids than its ``encode``."""


class Unencodable(ValueError):
    """A tokenizer's ``encode`` panicked on text number ``place``, from 0, of those in the call."""

    def __init__(self, tokenizer: Tokenizer, text: str, place: int, panic: BaseException):
        name, reason = type(tokenizer).__name__, textwrap.shorten(str(panic), 120)
        super().__init__(
            f"{name}.encode fails on a document of {len(text):,} characters that begins with {text[:40]!r} ({reason}); "
            "divide it into shorter documents, or bind another tokenizer"
        )
        self.place = place


def encode(tokenizer: Tokenizer, text: str, place: int = 0) -> Sequence[int]:
    """Return ``tokenizer.encode(text)``. A panic in a Rust library, which is no Exception, becomes Unencodable."""
    try:
        return tokenizer.encode(text)
    except BaseException as error:
        if not is_panic(error):
            raise
        raise Unencodable(tokenizer, text, place, error) from None


def is_panic(error: BaseException) -> bool:
    """Whether an error is a panic in a Rust library."""
    return type(error).__name__ == "PanicException"  # each library has its own class, which can't be imported


def has_batches(tokenizer: Tokenizer) -> TypeGuard[BatchEncoder]:
    """Whether a tokenizer's ``encode_batch`` may stand in for its ``encode``. A class that overrides ``encode`` alone
    ignores an inherited ``encode_batch``."""
    for cls in type(tokenizer).__mro__:
        if "encode_batch" in vars(cls):
            return True
        if "encode" in vars(cls):
            return False
    return False


def encode_all(tokenizer: Tokenizer, texts: Sequence[str], batches: bool = True) -> tuple[np.ndarray, np.ndarray]:
    """(ids (N,), counts (len(texts),)): the ids of all texts in a row, and how many each text has.

    Uses ``encode_batch`` if the tokenizer has one and ``batches`` allows it, else ``encode``, text by text. Raises
    Disagreement if ``encode_batch`` panics or its counts do not fit its ids or the texts, and Unencodable if ``encode``
    panics."""
    if batches and has_batches(tokenizer):
        try:
            ids, counts = (np.asarray(array) for array in tokenizer.encode_batch(texts))
        except BaseException as error:
            if not is_panic(error):
                raise
            raise Disagreement(f"it fails where encode may not ({textwrap.shorten(str(error), 120)})") from None
        if len(counts) != len(texts) or counts.sum() != len(ids):
            raise Disagreement(
                f"it counts {counts.sum()} ids of {len(counts)} texts, but gave {len(ids)} ids of {len(texts)} texts"
            )
        return ids, counts
    all_ids: list[int] = []
    counts = np.empty(len(texts), dtype=np.int64)
    for place, text in enumerate(texts):
        start = len(all_ids)
        all_ids.extend(encode(tokenizer, text, place))
        counts[place] = len(all_ids) - start
    return np.array(all_ids, dtype=np.int64), counts


def referee(tokenizer: Tokenizer, texts: Sequence[str], ids: np.ndarray, counts: np.ndarray, seed: int) -> None:
    """Encode two of the texts with ``encode`` as well: one picked by ``seed``, and the next one that is not pure ASCII,
    since encoders differ most on those. Of a text longer than EXCERPT, an excerpt is encoded in both ways. Raises
    Disagreement if the ids differ."""
    first = seed % len(texts)
    candidates = (place % len(texts) for place in range(first + 1, first + len(texts)))
    places = {first, next((place for place in candidates if not texts[place].isascii()), first)}
    for place in places:
        text = texts[place]
        if len(text) <= EXCERPT:
            end = int(counts[: place + 1].sum())
            given = ids[end - counts[place] : end]
        else:
            start = seed % (len(text) - EXCERPT)
            text = text[start : start + EXCERPT]
            given, _ = encode_all(tokenizer, [text])
        expected = list(encode(tokenizer, text, place))
        if given.tolist() != expected:
            at = next(
                (n for n, pair in enumerate(zip(given, expected, strict=False)) if pair[0] != pair[1]), len(given)
            )
            raise Disagreement(
                f"encode gives {expected[at : at + 5]} where it gave {given[at : at + 5].tolist()}, in {text[:60]!r}"
            )
