"""Encode the documents of a text and write their token ids, with several threads at work."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import logging
import os
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from toolkit.protocols import Tokenizer
from toolkit.text.encoding import Disagreement, Unencodable, encode_all, has_batches, referee

if TYPE_CHECKING:
    from rich.progress import Progress

log = logging.getLogger("toolkit")

SPLITS = ("train", "val")
CHUNK = 1_000_000  # characters that one thread encodes at a time

Item = TypeVar("Item")
Result = TypeVar("Result")


def write_splits(
    tokenizer: Tokenizer,
    texts: Callable[[str], Iterator[str]],
    describe: Callable[[], tuple[str, str]],
    folder: Path,
    dtype: np.dtype,
) -> tuple[dict[str, dict[str, Any]], str]:
    """Write the token ids of both splits into ``folder``; returns {split: counts} and what encoded them.

    ``texts(split)`` yields the documents; ``describe()`` returns a name of the text, and a remedy for a split without
    documents. Everything is encoded by the tokenizer's encode_batch, or, once the referee has found a difference in any
    chunk, everything by encode. Raises ValueError for an empty split, for a document that can't be encoded, and for ids
    outside the vocabulary."""
    batches, name = has_batches(tokenizer), type(tokenizer).__name__
    encoder = getattr(tokenizer, "implementation", name) if batches else None  # built before threads need it
    while True:
        try:
            splits = {
                split: _write_split(tokenizer, texts, describe, folder, split, dtype, batches) for split in SPLITS
            }
        except Disagreement as disagreement:
            log.warning(
                "%s.encode_batch (%s) differs from %s.encode: %s. Everything is encoded again by encode, which takes "
                "longer",
                name,
                encoder,
                name,
                disagreement,
            )
            batches = False
        else:
            return splits, f"encode_batch: {encoder}" if batches else "encode"


def _write_split(
    tokenizer: Tokenizer,
    texts: Callable[[str], Iterator[str]],
    describe: Callable[[], tuple[str, str]],
    folder: Path,
    split: str,
    dtype: np.dtype,
    batches: bool,
) -> dict[str, Any]:
    """Write the token ids of one split, in order; returns its counts and digest. Memory holds only the chunks that are
    being encoded. Raises ValueError for a split without documents."""
    count, digest, meter = {"tokens": 0, "documents": 0, "bytes": 0, "max_id": 0}, hashlib.sha256(), _Meter(split)
    encode = functools.partial(_encode_chunk, tokenizer, split, dtype, batches)
    with (folder / f"{split}.bin").open("wb") as file, meter, _named_document(describe, split, count):
        for ids, documents, size in _map_in_order(encode, enumerate(_chunks(texts(split)))):
            file.write(ids.data)
            digest.update(ids.data)
            count["tokens"] += len(ids)
            count["documents"] += documents
            count["bytes"] += size
            count["max_id"] = max(count["max_id"], int(ids.max()))
            meter.advance(documents, size)
    if not count["documents"]:
        name, remedy = describe()
        counts = ", ".join(f"{sum(1 for _ in texts(each)):,} in {each}" for each in SPLITS)
        raise ValueError(f"no document with text belongs to the {split} split of {name} (found: {counts}); {remedy}")
    return count | {"sha256": digest.hexdigest()}


@contextlib.contextmanager
def _named_document(describe: Callable[[], tuple[str, str]], split: str, count: dict[str, int]) -> Iterator[None]:
    """Turn Unencodable into a ValueError with the number of the document in its split. Chunks are encoded in order, so
    ``count["documents"]`` documents come before the chunk that failed."""
    try:
        yield
    except Unencodable as error:
        number = count["documents"] + error.place + 1
        raise ValueError(f"document {number:,} of the {split} split of {describe()[0]}: {error}") from error


def _chunks(documents: Iterable[str]) -> Iterator[list[str]]:
    """Lists of documents with CHUNK characters or more in all, but for the last: the work of one thread at a time."""
    chunk: list[str] = []
    length = 0
    for document in documents:
        chunk.append(document)
        length += len(document)
        if length >= CHUNK:
            yield chunk
            chunk, length = [], 0
    if chunk:
        yield chunk


def _encode_chunk(
    tokenizer: Tokenizer, split: str, dtype: np.dtype, batches: bool, numbered: tuple[int, list[str]]
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
                f"ids must lie in 0 ... vocab_size - 1; correct {name}.encode, {name}.eot or {name}.vocab_size"
            )
    ended_ids = np.insert(ids.astype(dtype, copy=False), np.cumsum(counts), tokenizer.eot)
    size = sum(len(document) if document.isascii() else len(document.encode()) for document in chunk)
    return ended_ids, len(chunk), size


def _map_in_order(work: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
    """As ``map``, but in threads: results come in order, and few items are in work at a time. tiktoken and tokenizers
    release the GIL while they work, but need it to return each document. So more threads than cores, or more than 8,
    would cost more than they gain."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    workers = min(cores, 8)
    pool = ThreadPoolExecutor(workers)
    waiting: deque[Future[Result]] = deque()
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
        self.split, self.documents, self.bytes, self.start = split, 0, 0, time.perf_counter()
        self.progress: Progress | None = None

    def __enter__(self) -> _Meter:
        return self

    def advance(self, documents: int, size: int) -> None:
        """Count documents, and ``size`` bytes of text, that are done; update the display."""
        self.documents, self.bytes = self.documents + documents, self.bytes + size
        if self.progress is None and sys.stderr.isatty() and time.perf_counter() - self.start > 1:
            from rich import console, progress

            self.progress = progress.Progress(
                progress.SpinnerColumn(),
                progress.TextColumn("{task.description}"),
                progress.FileSizeColumn(),
                progress.TransferSpeedColumn(),
                progress.TimeElapsedColumn(),
                console=console.Console(stderr=True),
            )
            self.progress.add_task("", total=None)
            self.progress.start()
        if self.progress is not None:
            text = f"tokenising {self.split}: {self.documents:,} documents"
            self.progress.update(self.progress.task_ids[0], completed=self.bytes, description=text)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        seconds, size = time.perf_counter() - self.start, self.bytes / 1e6
        if self.progress is not None:
            self.progress.stop()
        elif kind is None and seconds > 1:
            from rich.console import Console

            text = f"tokenised {self.split}: {self.documents:,} documents, {size:.1f} MB in {seconds:.0f} s"
            Console(stderr=True, highlight=False, force_jupyter=False).print(
                f"{text}, {size / seconds:.1f} MB/s", soft_wrap=True
            )
