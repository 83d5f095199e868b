"""Parts for the benchmarks: generated text with any vocabulary size, read from real token files, without a download."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated

import numpy as np
from annotated_types import Gt

from toolkit.protocols import Tokenizer
from toolkit.registry import register
from toolkit.text.tokens import TokenFiles, reads_token_files


@register("tokenizer")
class Numbers:
    """Text that consists of decimal ids with spaces between them: ``size`` ids, of which the last one is eot."""

    lossy = False

    def __init__(self, size: Annotated[int, Gt(1)] = 8192):
        self.vocab_size, self.eot = size, size - 1
        self.byte_lengths = np.array([len(str(i)) + 1 for i in range(size - 1)] + [0])

    def encode(self, text: str) -> list[int]:
        return [int(word) for word in text.split()]

    def decode(self, ids: Sequence[int]) -> str:
        return " ".join(str(i) for i in ids)

    def fingerprint(self) -> str:
        return f"Numbers {self.vocab_size}"

    def save(self, folder: Path) -> None:
        """Does nothing: nothing is learned."""

    def load(self, folder: Path) -> None:
        """Does nothing: nothing is learned."""


@register("data")
@reads_token_files
class ZipfNumbers:
    """``documents`` documents of 200 ids: id i is drawn with a probability proportional to 1 / (i + 1), much as words
    are (Zipf 1935)."""

    def __init__(self, tokenizer: Tokenizer, seq_len: int, seed: int, documents: Annotated[int, Gt(0)] = 2000):
        self.size, self.documents = tokenizer.vocab_size - 1, documents
        self.files = TokenFiles(tokenizer, seq_len, seed, self._documents, self._source)

    def _source(self) -> dict:
        return {"zipf": self.size, "documents": self.documents}

    def _documents(self, split: str) -> Iterator[str]:
        rng = np.random.default_rng(split == "val")
        share = 1 / np.arange(1, self.size + 1)
        for _ in range(self.documents if split == "train" else 20):
            yield " ".join(map(str, rng.choice(self.size, 200, p=share / share.sum())))


@register("logger")
class Clock:
    """Records when each training row arrived: ``seen`` is a list of (step, seconds, processor seconds)."""

    seen: list[tuple[int, float, float]] = []

    def __init__(self, run_dir: Path, start_step: int):
        self.seen.clear()

    def log(self, step: int, metrics: dict[str, float]) -> None:
        if "train/loss_nats" in metrics:
            self.seen.append((step, time.perf_counter(), time.process_time()))

    def text(self, step: int, name: str, text: str) -> None:
        """Does nothing."""

    def close(self, summary: dict[str, float]) -> None:
        """Does nothing."""
