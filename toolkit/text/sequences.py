"""Sequences of random symbols, for questions about architecture: their rows, their epochs and their answers."""

from __future__ import annotations

import functools
import hashlib
import json
from typing import Any, Protocol, TypeVar

import numpy as np

from toolkit.protocols import Tokenizer
from toolkit.text.order import Permutation, order
from toolkit.text.tokens import VAL_SEED

BLOCK = 1024  # sequences that are drawn together
SPLITS = {"train": 0, "val": 1, "evaluator": 2}  # the second number of a seed, so that none draws another's sequences
IGNORED = -100  # the target of a position where no loss is computed


class Task(Protocol):
    """A task on random symbols. ``alphabet`` is a rising array of the ids that may be used as symbols.

    ``draw`` returns (count, length) ids from ``rng``. It raises ValueError, with what to change, for a length or an
    alphabet that is too small. ``answers`` returns, for rows (N, length) that it drew, where the model must answer:
    (N, length) bool. These tokens follow from the ones before."""

    def draw(self, rng: np.random.Generator, count: int, length: int, alphabet: np.ndarray) -> np.ndarray: ...

    def answers(self, rows: np.ndarray, alphabet: np.ndarray) -> np.ndarray: ...


def alphabet_of(tokenizer: Tokenizer) -> np.ndarray:
    """The ids of a tokenizer that stand for bytes, in rising order: the symbols."""
    return np.flatnonzero(np.asarray(tokenizer.byte_lengths))


def draw_rows(
    owner: str, task: Task, seed: tuple[int, ...], count: int, length: int, alphabet: np.ndarray
) -> np.ndarray:
    """(count, length) ids, in the smallest dtype that holds them. Row i depends on the task, ``seed``, i, ``length``
    and ``alphabet`` only. ``owner`` is the name of the part, for messages. Raises ValueError if the task does."""
    rows = np.empty((count, length), dtype=np.min_scalar_type(alphabet.max(initial=0)))
    for block, start in enumerate(range(0, count, BLOCK)):
        try:
            drawn = task.draw(np.random.default_rng((*seed, block)), BLOCK, length, alphabet)
        except ValueError as error:
            raise ValueError(f"{owner}: {error}") from error
        rows[start : start + BLOCK] = drawn[: count - start]
    return rows


class Sequences:
    """The samples of a task: the token ``eot``, then ``seq_len`` symbols. Evaluators read sequences in the same way.

    ``sizes`` has the number of sequences of "train" and of "val". Which sequences there are depends on the task and on
    ``corpus_seed``, never on the run's seed, which orders the training sequences. All are drawn in ``prepare`` and kept
    in memory. ``owner`` is the name of the data part, for messages. Raises ValueError if a sequence is drawn twice, so
    that no validation sequence is a training sequence."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        seq_len: int,
        seed: int,
        task: Task,
        sizes: dict[str, int],
        corpus_seed: int,
        owner: str,
    ):
        self.tokenizer, self.seq_len, self.seed, self.task = tokenizer, seq_len, seed, task
        self.sizes, self.corpus_seed, self.owner = sizes, corpus_seed, owner
        self._rows: dict[str, np.ndarray] = {}
        self._order = functools.lru_cache(maxsize=4)(self._permutation)  # two epochs of two splits

    def prepare(self) -> None:
        """Draw all sequences. A second call returns at once."""
        if self._rows:
            return
        name = type(self.tokenizer).__name__
        if hasattr(self.tokenizer, "train"):
            raise ValueError(
                f"Experiment.tokenizer = @{name} learns from text, and {self.owner} has none; bind @Symbols or @Bytes"
            )
        self._alphabet = alphabet_of(self.tokenizer)
        rows = {
            split: draw_rows(
                self.owner, self.task, (self.corpus_seed, SPLITS[split]), size, self.seq_len, self._alphabet
            )
            for split, size in self.sizes.items()
        }
        total = sum(map(len, rows.values()))
        distinct = {hashlib.blake2b(row.tobytes(), digest_size=16).digest() for each in rows.values() for row in each}
        if len(distinct) < total:
            raise ValueError(
                f"{self.owner}: {total - len(distinct)} of {total} sequences are drawn twice, since there are too few "
                f"different ones with {len(self._alphabet)} symbols and {self.seq_len} tokens; raise Symbols.symbols "
                f"or Experiment.seq_len, or lower {self.owner}.sequences"
            )
        digest = hashlib.sha256(json.dumps([self.owner, self.tokenizer.fingerprint(), self.seq_len]).encode())
        for each in rows.values():
            digest.update(each.astype(each.dtype.newbyteorder("<")).tobytes())
        self._fingerprint = digest.hexdigest()
        self._rows = rows

    def windows(self, split: str) -> int:
        """How many sequences a split has."""
        return len(self._split(split))

    def batch(self, split: str, index: int, size: int) -> np.ndarray:
        """Samples index * size ... index * size + size - 1 as (size, seq_len + 1) int64. Sample j is place j % W of
        epoch j // W, and each epoch goes through all W sequences once, in an order seeded by (seed, epoch)."""
        rows = self._split(split)
        places = (divmod(sample, len(rows)) for sample in range(index * size, index * size + size))
        samples = np.full((size, self.seq_len + 1), self.tokenizer.eot, dtype=np.int64)
        samples[:, 1:] = rows[[self._order(split, epoch)[place] for epoch, place in places]]
        return samples

    def targets(self, samples: np.ndarray) -> np.ndarray:
        """Samples (B, T+1) -> (B, T): the answers, and -100 elsewhere."""
        self.prepare()
        rows = samples[:, 1:]
        return np.where(self.task.answers(rows, self._alphabet), rows, IGNORED)

    def fingerprint(self) -> str:
        """Hex. Covers every token of both splits and the tokenizer."""
        self.prepare()
        return self._fingerprint

    def _split(self, split: str) -> np.ndarray:
        """The rows of a split. Raises ValueError for an unknown split."""
        self.prepare()
        if split not in self._rows:
            raise ValueError(f"unknown split {split!r}; splits are {', '.join(self._rows)}")
        return self._rows[split]

    def _permutation(self, split: str, epoch: int) -> Permutation:
        """The order of a split's sequences in one epoch."""
        return order(len(self._rows[split]), [VAL_SEED if split == "val" else self.seed, epoch])


class _HasSequences(Protocol):
    sequences: Sequences


Part = TypeVar("Part", bound=type)


def reads_sequences(cls: Part) -> Part:
    """Class decorator: a data part whose ``self.sequences`` is a Sequences gets the methods of the Data protocol."""

    def prepare(self: _HasSequences) -> None:
        self.sequences.prepare()

    def windows(self: _HasSequences, split: str) -> int:
        return self.sequences.windows(split)

    def batch(self: _HasSequences, split: str, index: int, size: int) -> np.ndarray:
        return self.sequences.batch(split, index, size)  # (size, seq_len + 1)

    def targets(self: _HasSequences, samples: np.ndarray) -> np.ndarray:
        return self.sequences.targets(samples)  # (B, T+1) -> (B, T)

    def fingerprint(self: _HasSequences) -> str:
        return self.sequences.fingerprint()

    methods: tuple[Any, ...] = (prepare, windows, batch, targets, fingerprint)
    for method in methods:
        setattr(cls, method.__name__, method)
    return cls
