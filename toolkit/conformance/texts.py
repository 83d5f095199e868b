"""Checks of tokenizers and data sources."""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np

from toolkit.conformance.bench import Bench, plain_part
from toolkit.conformance.report import Broken, Gauge, NotApplicable, check
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
TOO_MANY = 20_000  # windows in an epoch that are compared one by one


@check("round trip on any Unicode", "tokenizer")
def round_trip(bench: Bench) -> Gauge:
    """decode(encode(text)) is the text; a tokenizer that loses something says ``lossy = True``."""
    tokenizer = _trained(bench)
    gauge, lost = Gauge(0.0, "texts that came back changed,"), []
    for text in SAMPLES:
        same = tokenizer.decode(list(tokenizer.encode(text))) == text
        if not same:
            lost.append(text[:30])
        gauge.see(0.0 if same or getattr(tokenizer, "lossy", False) else 1.0, f"{len(text)} characters")
    if lost and getattr(tokenizer, "lossy", False):
        gauge.note = f"declared lossy: {len(lost)} of {len(SAMPLES)} texts came back changed"
    gauge.tried = [f"{len(SAMPLES)} texts: scripts, emoji, controls, specials spelled out"]
    if gauge.worst:
        raise Broken(f"came back changed: {lost}; or declare lossy = True")
    return gauge


@check("ids within the vocabulary", "tokenizer")
def within(bench: Bench) -> Gauge:
    """Ids are below vocab_size; text never yields the id that ends a document."""
    tokenizer, gauge = _trained(bench), Gauge(0.0, "ids outside")
    if not 0 <= tokenizer.eot < tokenizer.vocab_size:
        raise Broken(f"eot = {tokenizer.eot} is not below vocab_size = {tokenizer.vocab_size}")
    for text in SAMPLES:
        ids = np.asarray(list(tokenizer.encode(text)), dtype=np.int64)
        if (ids == tokenizer.eot).any():
            raise Broken(f"the text {text[:30]!r} yields eot, the end of a document")
        gauge.see(((ids < 0) | (ids >= tokenizer.vocab_size)).sum(), f"vocab_size {tokenizer.vocab_size:,}")
    return gauge


@check("bytes counted", "tokenizer")
def lengths(bench: Bench) -> Gauge:
    """byte_lengths of a text's ids sum to its UTF-8 bytes: bits per byte rest on it. Specials count none."""
    tokenizer, gauge = _trained(bench), Gauge(0.0, "bytes off")
    table = np.asarray(tokenizer.byte_lengths)
    if table.shape != (tokenizer.vocab_size,) or table[tokenizer.eot] != 0:
        raise Broken(f"byte_lengths has shape {table.shape}, or eot stands for {table[tokenizer.eot]} bytes")
    for text in SAMPLES:
        ids = list(tokenizer.encode(text))
        exact = tokenizer.decode(ids) == text
        if exact or not getattr(tokenizer, "lossy", False):
            gauge.see(abs(int(table[ids].sum()) - len(text.encode())), f"{len(text.encode())} bytes")
    if not gauge.tried:
        raise NotApplicable("declared lossy, and no text of the sample came back as it was")
    gauge.tried = [f"{len(gauge.tried)} texts"]
    return gauge


@check("saved and loaded alike", "tokenizer")
def reloaded(bench: Bench) -> Gauge:
    """A tokenizer built anew that loads what was saved encodes alike, with the same fingerprint; so does its
    ``encode_batch``, if it has one."""
    tokenizer, gauge = _trained(bench), Gauge(0.0, "texts encoded otherwise")
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save(Path(folder))
        other = bench.cls()
        other.load(Path(folder))
        for text in SAMPLES:
            gauge.see(float(list(other.encode(text)) != list(tokenizer.encode(text))), f"{len(SAMPLES)} texts")
        if has_batches(other):
            ids, counts = encode_all(other, SAMPLES)
            rows = np.split(ids, np.cumsum(counts)[:-1])
            pairs = zip(rows, SAMPLES, strict=True)
            gauge.see(float(sum(row.tolist() != list(tokenizer.encode(text)) for row, text in pairs)), "in a batch")
        if other.fingerprint() != tokenizer.fingerprint():
            raise Broken("the loaded tokenizer has another fingerprint")
    return gauge


@check("a sample is a function of its index", "data")
def pure(bench: Bench) -> Gauge:
    """Sample j is the same whichever batch it is in, in which order one asks, and from another instance."""
    data, other, gauge = _prepared(bench), _prepared(bench), Gauge(0.0, "samples that differ")
    for split in ("train", "val"):
        first = np.concatenate([data.batch(split, i, 4) for i in range(6)])
        if first.dtype != np.int64 or first.shape != (24, 65):
            raise Broken(f"batch gives {first.shape} {first.dtype}; it is (B, T + 1) int64")
        for size in (1, 3, 8, 24):
            again = np.concatenate([data.batch(split, i, size) for i in reversed(range(24 // size))][::-1])
            gauge.see((again != first).any(1).sum(), f"{split}, batches of {size}, backwards")
        again = np.concatenate([other.batch(split, i, 8) for i in range(3)])
        gauge.see((again != first).any(1).sum(), "another instance")
    return gauge


@check("an epoch has every window once", "data")
def epochs(bench: Bench) -> Gauge:
    """The second epoch holds the windows of the first; none is lost, none comes twice."""
    data, gauge = _prepared(bench), Gauge(0.0, "windows lost or repeated,")
    for split in ("train", "val"):
        count = data.windows(split)
        if count > TOO_MANY:
            raise NotApplicable(f"{count:,} windows in {split}: too many to compare one by one")
        epochs = [[data.batch(split, e * count + i, 1).tobytes() for i in range(count)] for e in (0, 1)]
        gauge.see(count - len(set(epochs[0])), f"{split} of {count:,} windows, first epoch")
        gauge.see(len(set(epochs[0]) ^ set(epochs[1])), f"{split} of {count:,} windows, second epoch")
    return gauge


@check("splits are disjoint", "data")
def disjoint(bench: Bench) -> Gauge:
    """No validation window is a training window."""
    data, gauge = _prepared(bench), Gauge(0.0, "windows in both")
    if max(data.windows("train"), data.windows("val")) > TOO_MANY:
        raise NotApplicable(f"{data.windows('train'):,} windows: too many to compare one by one")
    train, val = ({data.batch(s, i, 1).tobytes() for i in range(data.windows(s))} for s in ("train", "val"))
    gauge.see(len(train & val), f"{len(train):,} training and {len(val):,} validation windows")
    return gauge


@check("prepared once, with one fingerprint", "data")
def prepared(bench: Bench) -> Gauge:
    """prepare() again changes nothing, and two instances agree on the fingerprint."""
    data, gauge = _prepared(bench), Gauge(note="equal fingerprints")
    before, sample = data.fingerprint(), data.batch("train", 0, 4)
    data.prepare()
    if data.fingerprint() != before or (data.batch("train", 0, 4) != sample).any():
        raise Broken("a second prepare() changes the data or its fingerprint")
    if _prepared(bench).fingerprint() != before:
        raise Broken("two instances of the same data have different fingerprints")
    gauge.see(0, "prepare() twice, two instances")
    return gauge


def _trained(bench):
    """The tokenizer, trained on a sample where it learns; NotApplicable where its vocabulary can't be had here."""
    tokenizer = bench.cls()
    try:
        if hasattr(tokenizer, "train"):
            tokenizer.train(list(SAMPLES[:1]) * 3 + ["The cat sat on the mat. " * 20])
        tokenizer.encode("a")
    except (OSError, ValueError) as error:
        raise NotApplicable(f"its vocabulary can't be had here: {str(error)[:160]}") from error
    return tokenizer


def _prepared(bench, seed=0):
    """The data, prepared with the bench's tokenizer; NotApplicable where it can't be had here."""
    data = bench.cls(plain_part("tokenizer")(), 64, seed)
    try:
        if bench.missing:
            raise ValueError(bench.missing)
        data.prepare()
    except (OSError, ValueError) as error:
        bench.missing = str(error)[:160]
        raise NotApplicable(f"it can't be had here: {bench.missing}") from error
    return data
