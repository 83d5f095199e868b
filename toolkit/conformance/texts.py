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


@check("decoding restores any Unicode text", "tokenizer")
def round_trip(bench: Bench) -> Gauge:
    """decode(encode(text)) is the text, unless the tokenizer declares ``lossy = True``."""
    tokenizer = _trained_tokenizer(bench)
    gauge, changed_texts = Gauge(0.0, "texts that changed"), []
    for text in SAMPLES:
        is_same = tokenizer.decode(list(tokenizer.encode(text))) == text
        if not is_same:
            changed_texts.append(text[:30])
        gauge.record(0.0 if is_same or getattr(tokenizer, "lossy", False) else 1.0, f"{len(text)} characters")
    if changed_texts and getattr(tokenizer, "lossy", False):
        gauge.note = f"declared lossy: {len(changed_texts)} of {len(SAMPLES)} texts changed"
    gauge.tried = [f"{len(SAMPLES)} texts: scripts, emoji, control characters, names of special tokens"]
    if gauge.worst:
        raise Broken(
            f"decode(encode(text)) must give the text, and changed {changed_texts}; look at normalisation, stripping "
            "and unknown characters, or declare lossy = True"
        )
    return gauge


@check("ids are within the vocabulary", "tokenizer", look_at="vocab_size, which must count the special tokens")
def ids_in_range(bench: Bench) -> Gauge:
    """Ids lie in 0 ... vocab_size - 1, and no text contains the id that ends a document."""
    tokenizer, gauge = _trained_tokenizer(bench), Gauge(0.0, "ids outside the vocabulary")
    if not 0 <= tokenizer.eot < tokenizer.vocab_size:
        raise Broken(f"eot is {tokenizer.eot} and must be from 0 to vocab_size - 1 = {tokenizer.vocab_size - 1}")
    for text in SAMPLES:
        ids = np.asarray(list(tokenizer.encode(text)), dtype=np.int64)
        if (ids == tokenizer.eot).any():
            raise Broken(
                f"the text {text[:30]!r} is encoded to ids with eot = {tokenizer.eot}, the end of a document; no text "
                "may contain it; encode the names of special tokens as ordinary text"
            )
        gauge.record(((ids < 0) | (ids >= tokenizer.vocab_size)).sum(), f"vocab_size {tokenizer.vocab_size:,}")
    return gauge


@check(
    "byte_lengths add up to the text",
    "tokenizer",
    look_at="byte_lengths, which counts UTF-8 bytes, not characters",
)
def lengths(bench: Bench) -> Gauge:
    """The byte_lengths of a text's ids add up to its UTF-8 bytes, which bits per byte need; that of eot is 0."""
    tokenizer, gauge = _trained_tokenizer(bench), Gauge(0.0, "difference in bytes")
    byte_lengths = np.asarray(getattr(tokenizer, "byte_lengths", None))
    if byte_lengths.shape != (tokenizer.vocab_size,) or byte_lengths[tokenizer.eot] != 0:
        raise Broken(f"byte_lengths must have the shape (vocab_size,) = ({tokenizer.vocab_size},) and be 0 for eot")
    for text in SAMPLES:
        ids = list(tokenizer.encode(text))
        is_same = tokenizer.decode(ids) == text
        if is_same or not getattr(tokenizer, "lossy", False):
            gauge.record(abs(int(byte_lengths[ids].sum()) - len(text.encode())), f"{len(text.encode())} bytes")
    if not gauge.tried:
        raise NotApplicable("it declares lossy = True, and decoding changed every text of the sample")
    gauge.tried = [f"{len(gauge.tried)} texts"]
    return gauge


@check(
    "save() and load() keep the encoding",
    "tokenizer",
    look_at="what was learnt but not saved, and encode_batch, which must give the ids of encode",
)
def reloaded(bench: Bench) -> Gauge:
    """A new tokenizer that loads the saved files gives the same ids, also through ``encode_batch`` if it has one, and
    the same fingerprint."""
    tokenizer, gauge = _trained_tokenizer(bench), Gauge(0.0, "texts with other ids")
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
            raise Broken(
                "the loaded tokenizer has another fingerprint, and must have the same; compute it from the knobs and "
                "from what was learnt, without paths, times or hash()"
            )
    return gauge


@check("samples depend on their index only", "data", look_at="state between calls, and seeds made from a batch's index")
def pure(bench: Bench) -> Gauge:
    """Sample j does not depend on the batch size, on the order of calls, or on the instance."""
    data, other, gauge = _prepared_data(bench), _prepared_data(bench), Gauge(0.0, "samples that differ")
    for split in ("train", "val"):
        first = np.concatenate([data.batch(split, i, 4) for i in range(6)])
        if first.dtype != np.int64 or first.shape != (24, 65):
            raise Broken(
                f"6 batches of 4 samples have the shape {first.shape} and dtype {first.dtype}; they must have (24, 65) "
                "and int64: (size, seq_len + 1) each"
            )
        for size in (1, 3, 8, 24):
            again = np.concatenate([data.batch(split, i, size) for i in reversed(range(24 // size))][::-1])
            gauge.record((again != first).any(1).sum(), f"{split}, batches of {size}, backwards")
        again = np.concatenate([other.batch(split, i, 8) for i in range(3)])
        gauge.record((again != first).any(1).sum(), "another instance")
    return gauge


@check("each epoch has every window once", "data", look_at="windows(split), and the order drawn for each epoch")
def epochs(bench: Bench) -> Gauge:
    """Each epoch contains every window exactly once."""
    data, gauge = _prepared_data(bench), Gauge(0.0, "windows missing or repeated")
    for split in ("train", "val"):
        count = data.windows(split)
        if count > MAX_WINDOWS_COMPARED:
            raise NotApplicable(f"{count:,} windows in {split}: too many to compare one by one")
        epochs = [[data.batch(split, e * count + i, 1).tobytes() for i in range(count)] for e in (0, 1)]
        gauge.record(count - len(set(epochs[0])), f"{split} of {count:,} windows, first epoch")
        gauge.record(len(set(epochs[0]) ^ set(epochs[1])), f"{split} of {count:,} windows, second epoch")
    return gauge


@check("train and val do not overlap", "data", look_at="which documents go into which split, and duplicate texts")
def disjoint(bench: Bench) -> Gauge:
    """No validation window is a training window."""
    data, gauge = _prepared_data(bench), Gauge(0.0, "windows in both splits")
    if max(data.windows("train"), data.windows("val")) > MAX_WINDOWS_COMPARED:
        raise NotApplicable(f"{data.windows('train'):,} windows: too many to compare one by one")
    train, val = ({data.batch(s, i, 1).tobytes() for i in range(data.windows(s))} for s in ("train", "val"))
    gauge.record(len(train & val), f"{len(train):,} training and {len(val):,} validation windows")
    return gauge


@check("prepare() twice gives the same data", "data")
def prepared(bench: Bench) -> Gauge:
    """A second prepare() changes nothing, and two instances have the same fingerprint."""
    data, gauge = _prepared_data(bench), Gauge(note="equal fingerprints")
    before, sample = data.fingerprint(), data.batch("train", 0, 4)
    data.prepare()
    if data.fingerprint() != before or (data.batch("train", 0, 4) != sample).any():
        raise Broken(
            "a second prepare() changes the data or the fingerprint, and must change nothing; return at once if "
            "the data is prepared"
        )
    if _prepared_data(bench).fingerprint() != before:
        raise Broken(
            "two instances with the same knobs have different fingerprints, and must have the same; compute it from "
            "the knobs and the data, without paths, times or hash()"
        )
    gauge.record(0, "prepare() twice, two instances")
    return gauge


@check(
    "targets are next tokens or -100",
    "data",
    look_at="targets(samples): a shift by one, state between calls, and samples that it changes",
)
def targets(bench: Bench) -> Gauge:
    """``targets`` returns (B, T) int64: the next token, or -100 where no loss is computed. Each sample has a target,
    the targets of a sample do not depend on the others of its batch, and the samples stay as they are."""
    data, gauge = _prepared_data(bench), Gauge(0.0, "wrong targets")
    if not hasattr(data, "targets"):
        raise NotApplicable("it has no method targets: every next token is a target")
    counts = []
    for split in ("train", "val"):
        samples = data.batch(split, 0, 24)
        before = samples.copy()
        chosen = data.targets(samples)
        if (samples != before).any():
            raise Broken("targets() changes the samples that it is given, and must not; write into a copy")
        if chosen.dtype != np.int64 or chosen.shape != (24, 64):
            raise Broken(
                f"the targets of 24 samples have the shape {chosen.shape} and dtype {chosen.dtype}; they must have "
                "(24, 64) and int64: (B, T)"
            )
        is_target = chosen != -100
        if not is_target.any(1).all():
            raise Broken("a sample has no target, and must have one or more, or its loss is 0 / 0; give it one")
        gauge.record((is_target & (chosen != samples[:, 1:])).sum(), f"{split}, 24 samples: not the next token")
        alone = np.concatenate([data.targets(samples[i : i + 1]) for i in reversed(range(24))])[::-1]
        gauge.record((alone != chosen).sum(), f"{split}, one sample at a time, backwards")
        counts.append(is_target.mean())
    gauge.note = f"{100 * np.mean(counts):.0f} % of the tokens are targets"
    return gauge


def _trained_tokenizer(bench: Bench) -> Tokenizer:
    """A tokenizer, trained on a sample if it has train(). Raises NotApplicable if its vocabulary can't be loaded."""
    tokenizer = bench.cls()
    try:
        if hasattr(tokenizer, "train"):
            tokenizer.train(list(SAMPLES[:1]) * 3 + ["The cat sat on the mat. " * 20])
        tokenizer.encode("a")
    except (OSError, ValueError) as error:
        raise NotApplicable(f"its vocabulary can't be loaded here: {str(error)[:160]}") from error
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
        raise NotApplicable(f"its data can't be loaded here: {bench.unavailable}") from error
    return data
