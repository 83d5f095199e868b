"""Texts to ids, many at a time, and the referee that compares a fast way of doing it with ``encode``."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

import numpy as np

EXCERPT = 2_000  # characters of a text that the referee encodes again: about 1 % of the work on a chunk


class Disagreement(Exception):
    """``encode_batch`` of a tokenizer gave other ids than ``encode``."""


class Unencodable(ValueError):
    """``encode`` of a tokenizer panicked on text number ``place`` of those that it was given."""

    def __init__(self, tokenizer, text: str, place: int, panic: BaseException):
        name, reason = type(tokenizer).__name__, textwrap.shorten(str(panic), 120)
        super().__init__(
            f"{name}.encode stops on a document of {len(text):,} characters that begins with {text[:40]!r} ({reason}); "
            "divide it into shorter documents, or bind another tokenizer"
        )
        self.place = place


def encode(tokenizer, text: str, place: int = 0) -> Sequence[int]:
    """``tokenizer.encode(text)``. A panic in a Rust library, which is no Exception, becomes Unencodable."""
    try:
        return tokenizer.encode(text)
    except BaseException as error:
        if not is_panic(error):
            raise
        raise Unencodable(tokenizer, text, place, error) from None


def is_panic(error: BaseException) -> bool:
    return type(error).__name__ == "PanicException"  # pyo3 gives each library a class of its own, to import nowhere


def has_batches(tokenizer) -> bool:
    """Whether ``encode_batch`` of a tokenizer speaks for its ``encode``: a class that overrides encode alone must not
    be passed over for the encode_batch that it inherits."""
    for cls in type(tokenizer).__mro__:
        if "encode_batch" in vars(cls):
            return True
        if "encode" in vars(cls):
            return False
    return False


def encode_all(tokenizer, texts: Sequence[str], batches: bool = True) -> tuple[np.ndarray, np.ndarray]:
    """(ids (N,), counts (len(texts),)): the ids of all texts in a row, and how many each has. By ``encode_batch``
    where the tokenizer has one and ``batches`` allows it, else one by one."""
    if batches and has_batches(tokenizer):
        try:
            ids, counts = (np.asarray(array) for array in tokenizer.encode_batch(texts))
        except BaseException as error:
            if not is_panic(error):
                raise
            raise Disagreement(f"it stops where encode may not ({textwrap.shorten(str(error), 120)})") from None
        if len(counts) != len(texts) or counts.sum() != len(ids):
            raise Disagreement(
                f"it counts {counts.sum()} ids of {len(counts)} texts, and gave {len(ids)} of {len(texts)}"
            )
        return ids, counts
    ids: list[int] = []
    counts = np.empty(len(texts), dtype=np.int64)
    for place, text in enumerate(texts):
        before = len(ids)
        ids.extend(encode(tokenizer, text, place))
        counts[place] = len(ids) - before
    return np.array(ids, dtype=np.int64), counts


def referee(tokenizer, texts: Sequence[str], ids: np.ndarray, counts: np.ndarray, seed: int) -> None:
    """Encode two of the texts with ``encode`` as well: one picked by ``seed``, and the next with more than ASCII, where
    encoders part ways. Of a long one an excerpt, by both. Disagreement where the ids differ."""
    first = seed % len(texts)
    rich = (place % len(texts) for place in range(first + 1, first + len(texts)))
    places = {first, next((place for place in rich if not texts[place].isascii()), first)}
    for place in places:
        text = texts[place]
        if len(text) <= EXCERPT:
            end = int(counts[: place + 1].sum())
            found = ids[end - counts[place] : end]
        else:
            start = seed % (len(text) - EXCERPT)
            text = text[start : start + EXCERPT]
            found, _ = encode_all(tokenizer, [text])
        expected = list(encode(tokenizer, text, place))
        if found.tolist() != expected:
            at = next(
                (n for n, pair in enumerate(zip(found, expected, strict=False)) if pair[0] != pair[1]), len(found)
            )
            raise Disagreement(
                f"encode gives {expected[at : at + 5]} where it gave {found[at : at + 5].tolist()}, in {text[:60]!r}"
            )
