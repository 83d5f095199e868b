"""Turn text into token files once, and read windows and batches from them. Data parts hold a ``TokenFiles``."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import logging
import os
import sys
import textwrap
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from toolkit.text.encoding import Disagreement, Unencodable, encode_all, has_batches, referee
from toolkit.text.order import order
from toolkit.text.tokencache import cached
from toolkit.text.tokenfile import TokenFile

log = logging.getLogger("toolkit")

SPLITS = ("train", "val")
CHUNK = 1_000_000  # characters that one thread encodes at a time
TRAINING_TEXT = 100_000_000  # bytes of text that a tokenizer learns from, at most
VAL_SEED = 1_009  # replaces the run's seed: all seeds are validated on the same windows in the same order


class TokenFiles:
    """The tokens of one text under one tokenizer, on disk, and the samples of seq_len + 1 tokens cut from them.

    ``documents(split)`` yields the documents of "train" or "val" as str. Blank ones are left out, and
    ``tokenizer.eot`` is added to each of the others. ``source()`` returns a dict of JSON values that identifies the
    text (names, knobs, content hashes); it is called in ``prepare``. ``describe()`` is for messages: it returns a name
    of the text, and what to bind if a split has no document. The files are in ``$TOOLKIT_CACHE``, or else in the user's
    cache directory, in a folder named after source, tokenizer and format, so that they are never used for another text,
    knob or vocabulary.

    A tokenizer with ``train`` first learns from the train documents (at most 100 MB of their text). What it learnt is
    saved, and loaded the next time. ``train`` must not change a tokenizer that has learnt already, such as one loaded
    from a run. After ``prepare`` the tokenizer is the one that wrote the files.

    Batches are verified: ``prepare`` hashes token files up to 4 GiB, and builds them again, with a warning, if a bit
    has changed (hashing takes 4 s for 4 GiB, 10 ms for a small text). In larger files each block is compared with its
    digest when it is first read, so that training starts at once.

    Raises ValueError for an empty split, a split shorter than seq_len + 1 tokens, ids outside the vocabulary, and a
    damaged block of a large file; OSError when the disk fails, or the file shrinks while a run reads it. None of them
    leaves a half-written folder.
    """

    def __init__(
        self,
        tokenizer,
        seq_len: int,
        seed: int,
        documents: Callable[[str], Iterable[str]],
        source: Callable[[], dict],
        describe: Callable[[], tuple[str, str]] | None = None,
    ):
        self.tokenizer, self.seq_len, self.seed = tokenizer, seq_len, seed
        self.documents, self.source, self.describe = documents, source, describe or self._describe
        self._lock = threading.Lock()
        self._files: dict[str, TokenFile] = {}
        self._fingerprint, self._source = "", {}
        self.encoded_by: str | None = None  # set by prepare: "encode" or, say, "encode_batch: gigatoken 0.10.0"
        self._order = functools.lru_cache(maxsize=4)(self._permutation)  # two epochs of two splits

    def prepare(self) -> None:
        """Write the token files unless they exist. A second call returns at once. Other processes wait."""
        with self._lock:
            if self._files:
                return
            about = {"source": self.source(), "tokenizer": self.tokenizer.fingerprint()}
            self._source = about["source"]
            if hasattr(self.tokenizer, "train"):
                folder, learnt = cached("tokenizer", about, self._train)
                about["tokenizer"] = learnt["learnt"]
                self._load_tokenizer(folder, about["tokenizer"])
            folder, manifest = cached("tokens", about, self._encode)
            self._load_tokenizer(folder, about["tokenizer"])
            files = {}
            for split in SPLITS:
                files[split] = TokenFile(folder / f"{split}.bin", manifest["dtype"], self.tokenizer.vocab_size)
                if files[split].tokens != manifest["splits"][split]["tokens"]:
                    raise ValueError(
                        f"{files[split].path} holds {files[split].tokens} ids of {manifest['dtype']}, but "
                        f"{manifest['splits'][split]['tokens']} were written; delete {folder}, and it is built again"
                    )
                if files[split].tokens < self.seq_len + 1:
                    raise ValueError(
                        f"the {split} split has {files[split].tokens} tokens, but a sample takes seq_len + 1 = "
                        f"{self.seq_len + 1}; lower Experiment.seq_len or give the data more {split} text: "
                        f"it is {self.describe()[0]}"
                    )
            content = [about["tokenizer"], *(manifest["splits"][split]["sha256"] for split in SPLITS)]
            self._fingerprint = hashlib.sha256(json.dumps(content).encode()).hexdigest()
            self._files = files
            self.encoded_by = manifest.get("encoded_by")  # older files have no such entry

    def tokens(self, split: str) -> np.memmap:
        """All token ids of a split in order, (tokens,) uint16 or uint32, as a read-only memory map: for inspection.
        Batches are not read from this map. In files beyond 4 GiB its bytes are not verified."""
        file = self._file(split)
        return np.memmap(file.path, dtype=file.dtype, mode="r")

    def windows(self, split: str) -> int:
        """How many distinct samples a split has: window i covers tokens[i * T : i * T + T + 1] with T = seq_len."""
        return (self._file(split).tokens - 1) // self.seq_len

    def batch(self, split: str, index: int, size: int) -> np.ndarray:
        """Samples index * size ... index * size + size - 1 as (size, seq_len + 1) int64. Thread-safe.

        Sample j depends on (seed, split, j) alone: it is place j % W of epoch j // W, and each epoch goes through
        all W windows once, in an order seeded by (seed, epoch)."""
        windows = self.windows(split)
        places = (divmod(sample, windows) for sample in range(index * size, index * size + size))
        starts = [int(self._order(split, epoch)[place]) * self.seq_len for epoch, place in places]
        return self._file(split).rows(starts, self.seq_len + 1)

    def fingerprint(self) -> str:
        """Hex. Covers every token of both splits and the tokenizer."""
        self.prepare()
        return self._fingerprint

    def _file(self, split: str) -> TokenFile:
        """The token file of a split. Raises ValueError for an unknown split."""
        self.prepare()
        if split not in self._files:
            raise ValueError(f"there is no split {split!r}; splits are {', '.join(SPLITS)}")
        return self._files[split]

    def _permutation(self, split: str, epoch: int) -> Sequence[int]:
        """The order of a split's windows in one epoch."""
        return order(self.windows(split), [VAL_SEED if split == "val" else self.seed, epoch])

    def _texts(self, split: str) -> Iterator[str]:
        """The documents of a split without the blank ones. Lone surrogates, which JSON can escape but UTF-8 can't hold,
        become U+FFFD. Nothing is read before the first document is asked for."""
        for document in self.documents(split):
            if document and not document.isspace():
                if not document.isascii():
                    try:
                        document.encode()
                    except UnicodeEncodeError:
                        document = document.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
                yield document

    def _load_tokenizer(self, folder: Path, fingerprint: str) -> None:
        """Load the tokenizer from a cache folder. Raises ValueError unless it then has this fingerprint."""
        self.tokenizer.load(folder / "tokenizer")
        if self.tokenizer.fingerprint() != fingerprint:
            name = type(self.tokenizer).__name__
            raise ValueError(f"{name}.load does not bring back what {name}.save wrote: the fingerprints differ")

    def _describe(self) -> tuple[str, str]:
        """The default of ``describe``."""
        return f"the text {textwrap.shorten(json.dumps(self._source), 300)}", "give the data part more documents"

    def _refuse_changed_text(self) -> None:
        """Raise ValueError if the text has changed since ``prepare`` began: the folder's name stands for that text."""
        if self.source() != self._source:
            raise ValueError(f"the text changed while it was read; start again once it is whole: {self.describe()[0]}")

    def _train(self, folder: Path) -> dict:
        """Train the tokenizer, and save it in a cache folder; returns entries for the manifest."""
        self.tokenizer.train(_first_bytes(self._texts("train"), TRAINING_TEXT))
        (folder / "tokenizer").mkdir()
        self.tokenizer.save(folder / "tokenizer")
        self._refuse_changed_text()
        return {"learnt": self.tokenizer.fingerprint()}

    def _encode(self, folder: Path) -> dict:
        """Write the tokenizer and the token files of both splits; returns entries for the manifest."""
        (folder / "tokenizer").mkdir()
        self.tokenizer.save(folder / "tokenizer")  # first: this loads the vocabulary before threads need it
        dtype = np.dtype(np.uint16 if self.tokenizer.vocab_size <= 65_536 else np.uint32)
        splits, encoded_by = self._encode_splits(folder, dtype)
        self._refuse_changed_text()
        return {"dtype": dtype.name, "splits": splits, "encoded_by": encoded_by}

    def _encode_splits(self, folder: Path, dtype: np.dtype) -> tuple[dict, str]:
        """Write both splits; returns {split: counts} and what encoded them. Everything is encoded by the tokenizer's
        encode_batch, or, once the referee has found a difference in any chunk, everything by encode."""
        batches, name = has_batches(self.tokenizer), type(self.tokenizer).__name__
        encoder = getattr(self.tokenizer, "implementation", name) if batches else None  # built before threads need it
        while True:
            try:
                splits = {s: self._encode_split(folder / f"{s}.bin", s, dtype, batches) for s in SPLITS}
            except Disagreement as disagreement:
                log.warning(
                    "%s.encode_batch (%s) differs from %s.encode: %s. All is encoded again by encode, which takes "
                    "longer",
                    name,
                    encoder,
                    name,
                    disagreement,
                )
                batches = False
            else:
                return splits, f"encode_batch: {encoder}" if batches else "encode"

    def _encode_split(self, path: Path, split: str, dtype: np.dtype, batches: bool) -> dict:
        """Write the token ids of one split, in order; returns its counts and digest. Memory holds only the chunks that
        are being encoded. Raises ValueError for a split without documents."""
        count, digest, meter = {"tokens": 0, "documents": 0, "bytes": 0, "max_id": 0}, hashlib.sha256(), _Meter(split)
        encode = functools.partial(_encode_chunk, self.tokenizer, split, dtype, batches)
        with path.open("wb") as file, meter, self._named_document(split, count):
            for ids, documents, size in _map_in_order(encode, enumerate(_chunks(self._texts(split)))):
                file.write(ids.data)
                digest.update(ids.data)
                count["tokens"] += len(ids)
                count["documents"] += documents
                count["bytes"] += size
                count["max_id"] = max(count["max_id"], int(ids.max()))
                meter.advance(documents, size)
        if not count["documents"]:
            name, remedy = self.describe()
            counts = ", ".join(f"{sum(1 for _ in self._texts(split)):,} in {split}" for split in SPLITS)
            raise ValueError(
                f"no document with text in it falls to the {split} split of {name} (found: {counts}); {remedy}"
            )
        return count | {"sha256": digest.hexdigest()}

    @contextlib.contextmanager
    def _named_document(self, split: str, count: dict) -> Iterator[None]:
        """Turn Unencodable into a ValueError with the number of the document in its split. Chunks are encoded in order,
        so ``count["documents"]`` documents come before the chunk that failed."""
        try:
            yield
        except Unencodable as error:
            number = count["documents"] + error.place + 1
            raise ValueError(f"document {number:,} of the {split} split of {self.describe()[0]}: {error}") from error


def reads_token_files(cls: type) -> type:
    """Class decorator: a data part whose ``self.files`` is a TokenFiles gets the methods of the Data protocol."""
    cls.prepare = lambda self: self.files.prepare()
    cls.windows = lambda self, split: self.files.windows(split)
    cls.batch = lambda self, split, index, size: self.files.batch(split, index, size)
    cls.fingerprint = lambda self: self.files.fingerprint()
    cls.encoded_by = property(lambda self: self.files.encoded_by)
    return cls


def _first_bytes(documents: Iterable[str], limit: int) -> Iterator[str]:
    """Documents up to ``limit`` bytes of UTF-8 in all; the last one is cut."""
    for document in documents:
        size = len(document.encode())
        if size >= limit:
            yield document.encode()[:limit].decode(errors="ignore")
            return
        limit -= size
        yield document


def _chunks(documents: Iterable[str]) -> Iterator[list[str]]:
    """Lists of documents with CHUNK characters or more in all, but for the last: the work of one thread at a time."""
    chunk, length = [], 0
    for document in documents:
        chunk.append(document)
        length += len(document)
        if length >= CHUNK:
            yield chunk
            chunk, length = [], 0
    if chunk:
        yield chunk


def _encode_chunk(
    tokenizer, split: str, dtype: np.dtype, batches: bool, numbered: tuple
) -> tuple[np.ndarray, int, int]:
    """(ids, documents, bytes of text) of one chunk. ``numbered``: (number, chunk). ``batches``: use encode_batch, if
    the tokenizer has one, and check it by the referee. Raises Disagreement, Unencodable, and ValueError for ids outside
    the vocabulary."""
    number, chunk = numbered
    ids, counts = encode_all(tokenizer, chunk, batches)
    if batches and has_batches(tokenizer):
        referee(tokenizer, chunk, ids, counts, seed=number * 7_919)  # a prime, so that the places vary
    for extreme in (max(int(ids.max(initial=0)), tokenizer.eot), min(int(ids.min(initial=0)), tokenizer.eot)):
        if not 0 <= extreme < tokenizer.vocab_size:  # a narrower dtype would wrap them silently
            name = type(tokenizer).__name__
            raise ValueError(
                f"{name} gave the id {extreme} in the {split} split, but its vocab_size is {tokenizer.vocab_size}: "
                f"ids have to lie in 0 ... vocab_size - 1; correct {name}.encode, {name}.eot or {name}.vocab_size"
            )
    ended_ids = np.insert(ids.astype(dtype, copy=False), np.cumsum(counts), tokenizer.eot)
    size = sum(len(document) if document.isascii() else len(document.encode()) for document in chunk)
    return ended_ids, len(chunk), size


def _map_in_order(work: Callable, items: Iterable) -> Iterator:
    """As ``map``, but in threads: results come in order, and few items are in work at a time. tiktoken and tokenizers
    release the GIL while they work, but need it to return each document. So more threads than cores, or more than 8,
    would cost more than they gain."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    workers = min(cores, 8)
    pool, waiting = ThreadPoolExecutor(workers), deque()
    try:
        for item in items:
            waiting.append(pool.submit(work, item))
            if len(waiting) > 2 * workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


class _Meter:
    """Shows the progress of tokenising on stderr, if it takes over a second: live on a terminal, else a line at the
    end."""

    def __init__(self, split: str):
        self.split, self.documents, self.bytes, self.start, self.progress = split, 0, 0, time.perf_counter(), None

    def __enter__(self) -> _Meter:
        return self

    def advance(self, documents: int, size: int) -> None:
        """Count documents, and ``size`` bytes of text, that are done; update the display."""
        self.documents, self.bytes = self.documents + documents, self.bytes + size
        if self.progress is None and sys.stderr.isatty() and time.perf_counter() - self.start > 1:
            from rich import console, progress

            columns = (progress.SpinnerColumn(), progress.TextColumn("{task.description}"), progress.FileSizeColumn())
            columns += (progress.TransferSpeedColumn(), progress.TimeElapsedColumn())
            self.progress = progress.Progress(*columns, console=console.Console(stderr=True))
            self.progress.add_task("", total=None)
            self.progress.start()
        if self.progress is not None:
            text = f"tokenising {self.split}: {self.documents:,} documents"
            self.progress.update(self.progress.task_ids[0], completed=self.bytes, description=text)

    def __exit__(self, kind, *_) -> None:
        seconds, size = time.perf_counter() - self.start, self.bytes / 1e6
        if self.progress is not None:
            self.progress.stop()
        elif kind is None and seconds > 1:
            from rich.console import Console

            text = f"tokenised {self.split}: {self.documents:,} documents, {size:.1f} MB in {seconds:.0f} s"
            Console(stderr=True, highlight=False).print(f"{text}, {size / seconds:.1f} MB/s", soft_wrap=True)
