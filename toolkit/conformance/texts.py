"""Checks of tokenizers and data sources."""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np

from toolkit.conformance.bench import Bench, plain_part
from toolkit.conformance.lines import Broken, Gauge, NotApplicable, check
from toolkit.protocols import Data, Tokenizer
from toolkit.text.encoding import encode_all, has_batches

SAMPLES = (
    "Once upon a time, there was a little girl named Lily.",
    "",
    " ",
    "\n\n\t tabs\r\n and  spaces  ",
    "naïve façade, Ünïcödé; 数学と詩; Привет, мир; مرحبا; नमस्ते",
    "emoji 👩‍👩‍👧‍👦 🏳️‍🌈, flags 🇯🇵, combining e\u0301 n\u0303, zero\u200bwidth, \ufeff mark",
    "<|endoftext|> is text here, and </s> [SEP] <unk> too",
    "\x00\x01\x7f control",
    "𝔘𝔫𝔦𝔠𝔬𝔡𝔢 beyond the first plane, \U0010fffd",
    "a" * 300,
)
MAX_WINDOWS_COMPARED = 20_000  # at most so many windows of an epoch are compared


@check("round trip on any Unicode", "tokenizer")
def round_trip(bench: Bench) -> Gauge:
    """decode(encode(text)) is the text, unless the tokenizer declares ``lossy = True``."""
    tokenizer = _trained_tokenizer(bench)
    gauge, changed_texts = Gauge(0.0, "texts that came back changed,"), []
    for text in SAMPLES:
        is_same = tokenizer.decode(list(tokenizer.encode(text))) == text
        if not is_same:
            changed_texts.append(text[:30])
        gauge.record(0.0 if is_same or getattr(tokenizer, "lossy", False) else 1.0, f"{len(text)} characters")
    if changed_texts and getattr(tokenizer, "lossy", False):
        gauge.note = f"declared lossy: {len(changed_texts)} of {len(SAMPLES)} texts came back changed"
    gauge.tried = [f"{len(SAMPLES)} texts: scripts, emoji, controls, specials spelled out"]
    if gauge.worst:
        raise Broken(f"came back changed: {changed_texts}; or declare lossy = True")
    return gauge


@check("ids within the vocabulary", "tokenizer")
def ids_in_range(bench: Bench) -> Gauge:
    """Ids lie in 0 ... vocab_size - 1, and no text contains the id that ends a document."""
    tokenizer, gauge = _trained_tokenizer(bench), Gauge(0.0, "ids outside")
    if not 0 <= tokenizer.eot < tokenizer.vocab_size:
        raise Broken(f"eot = {tokenizer.eot} is not below vocab_size = {tokenizer.vocab_size}")
    for text in SAMPLES:
        ids = np.asarray(list(tokenizer.encode(text)), dtype=np.int64)
        if (ids == tokenizer.eot).any():
            raise Broken(f"the text {text[:30]!r} yields eot, the end of a document")
        gauge.record(((ids < 0) | (ids >= tokenizer.vocab_size)).sum(), f"vocab_size {tokenizer.vocab_size:,}")
    return gauge


@check("bytes counted", "tokenizer")
def lengths(bench: Bench) -> Gauge:
    """The byte_lengths of a text's ids add up to its UTF-8 bytes, which bits per byte need; that of eot is 0."""
    tokenizer, gauge = _trained_tokenizer(bench), Gauge(0.0, "bytes off")
    byte_lengths = np.asarray(tokenizer.byte_lengths)
    if byte_lengths.shape != (tokenizer.vocab_size,) or byte_lengths[tokenizer.eot] != 0:
        raise Broken(
            f"byte_lengths has shape {byte_lengths.shape}, or eot stands for {byte_lengths[tokenizer.eot]} bytes"
        )
    for text in SAMPLES:
        ids = list(tokenizer.encode(text))
        is_same = tokenizer.decode(ids) == text
        if is_same or not getattr(tokenizer, "lossy", False):
            gauge.record(abs(int(byte_lengths[ids].sum()) - len(text.encode())), f"{len(text.encode())} bytes")
    if not gauge.tried:
        raise NotApplicable("declared lossy, and no text of the sample came back as it was")
    gauge.tried = [f"{len(gauge.tried)} texts"]
    return gauge


@check("saved and loaded alike", "tokenizer")
def reloaded(bench: Bench) -> Gauge:
    """A new tokenizer that loads the saved files gives the same ids, also through ``encode_batch`` if it has one, and
    the same fingerprint."""
    tokenizer, gauge = _trained_tokenizer(bench), Gauge(0.0, "texts encoded otherwise")
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save(Path(folder))
        other = bench.cls()
        other.load(Path(folder))
        for text in SAMPLES:
            gauge.record(float(list(other.encode(text)) != list(tokenizer.encode(text))), f"{len(SAMPLES)} texts")
        if has_batches(other):
            ids, counts = encode_all(other, SAMPLES)
            rows = np.split(ids, np.cumsum(counts)[:-1])
            pairs = zip(rows, SAMPLES, strict=True)
            gauge.record(float(sum(row.tolist() != list(tokenizer.encode(text)) for row, text in pairs)), "in a batch")
        if other.fingerprint() != tokenizer.fingerprint():
            raise Broken("the loaded tokenizer has another fingerprint")
    return gauge


@check("a sample is a function of its index", "data")
def pure(bench: Bench) -> Gauge:
    """Sample j does not depend on the batch size, on the order of calls, or on the instance."""
    data, other, gauge = _prepared_data(bench), _prepared_data(bench), Gauge(0.0, "samples that differ")
    for split in ("train", "val"):
        first = np.concatenate([data.batch(split, i, 4) for i in range(6)])
        if first.dtype != np.int64 or first.shape != (24, 65):
            raise Broken(f"batch gives {first.shape} {first.dtype}; it is (B, T + 1) int64")
        for size in (1, 3, 8, 24):
            again = np.concatenate([data.batch(split, i, size) for i in reversed(range(24 // size))][::-1])
            gauge.record((again != first).any(1).sum(), f"{split}, batches of {size}, backwards")
        again = np.concatenate([other.batch(split, i, 8) for i in range(3)])
        gauge.record((again != first).any(1).sum(), "another instance")
    return gauge


@check("an epoch has every window once", "data")
def epochs(bench: Bench) -> Gauge:
    """Each epoch contains every window exactly once."""
    data, gauge = _prepared_data(bench), Gauge(0.0, "windows lost or repeated,")
    for split in ("train", "val"):
        count = data.windows(split)
        if count > MAX_WINDOWS_COMPARED:
            raise NotApplicable(f"{count:,} windows in {split}: too many to compare one by one")
        epochs = [[data.batch(split, e * count + i, 1).tobytes() for i in range(count)] for e in (0, 1)]
        gauge.record(count - len(set(epochs[0])), f"{split} of {count:,} windows, first epoch")
        gauge.record(len(set(epochs[0]) ^ set(epochs[1])), f"{split} of {count:,} windows, second epoch")
    return gauge


@check("splits are disjoint", "data")
def disjoint(bench: Bench) -> Gauge:
    """No validation window is a training window."""
    data, gauge = _prepared_data(bench), Gauge(0.0, "windows in both")
    if max(data.windows("train"), data.windows("val")) > MAX_WINDOWS_COMPARED:
        raise NotApplicable(f"{data.windows('train'):,} windows: too many to compare one by one")
    train, val = ({data.batch(s, i, 1).tobytes() for i in range(data.windows(s))} for s in ("train", "val"))
    gauge.record(len(train & val), f"{len(train):,} training and {len(val):,} validation windows")
    return gauge


@check("prepared once, with one fingerprint", "data")
def prepared(bench: Bench) -> Gauge:
    """A second prepare() changes nothing, and two instances have the same fingerprint."""
    data, gauge = _prepared_data(bench), Gauge(note="equal fingerprints")
    before, sample = data.fingerprint(), data.batch("train", 0, 4)
    data.prepare()
    if data.fingerprint() != before or (data.batch("train", 0, 4) != sample).any():
        raise Broken("a second prepare() changes the data or its fingerprint")
    if _prepared_data(bench).fingerprint() != before:
        raise Broken("two instances of the same data have different fingerprints")
    gauge.record(0, "prepare() twice, two instances")
    return gauge


def _trained_tokenizer(bench: Bench) -> Tokenizer:
    """A tokenizer, trained on a sample if it has train(). Raises NotApplicable if its vocabulary can't be loaded."""
    tokenizer = bench.cls()
    try:
        if hasattr(tokenizer, "train"):
            tokenizer.train(list(SAMPLES[:1]) * 3 + ["The cat sat on the mat. " * 20])
        tokenizer.encode("a")
    except (OSError, ValueError) as error:
        raise NotApplicable(f"its vocabulary can't be had here: {str(error)[:160]}") from error
    return tokenizer


def _prepared_data(bench: Bench, seed: int = 0) -> Data:
    """The data, prepared with check.gin's tokenizer. Raises NotApplicable if it can't be loaded here."""
    data = bench.cls(plain_part("tokenizer")(), 64, seed)
    try:
        if bench.unavailable:
            raise ValueError(bench.unavailable)
        data.prepare()
    except (OSError, ValueError) as error:
        bench.unavailable = str(error)[:160]
        raise NotApplicable(f"it can't be had here: {bench.unavailable}") from error
    return data
