"""Tasks on random symbols, for questions about architecture: recall, copy, induction. Each has a data part and an
evaluator of its accuracy. Only the answers, the tokens that follow from the ones before, count in the loss.

Symbols are the ids of the tokenizer that stand for bytes; @Symbols has as many as you like. The first one is the blank,
which fills the rest of a sequence. Shapes: N sequences, T tokens."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from typing import Annotated, Protocol

import numpy as np
from annotated_types import Ge, Gt, Le, Lt

from toolkit.measures import Score, mean
from toolkit.protocols import Reader, Tokenizer
from toolkit.registry import register
from toolkit.text.sequences import SPLITS, Sequences, Task, alphabet_of, draw_rows, reads_sequences

Count = Annotated[int, Gt(0)]
Seed = Annotated[int, Ge(0), Lt(2**32)]
LONGER = "make the sequences longer: Experiment.seq_len, or length in an evaluator"
Power = Annotated[float, Gt(0), Le(10)]


@register("data")
@reads_sequences
class AssociativeRecall:
    """Multi-query associative recall, MQAR (Arora et al. 2023, arXiv:2312.04927): ``pairs`` pairs of a key and its
    value, and later each key once more, as a query, with its value as the answer. Blanks fill the rest.

    Keys are distinct, and so are values: the keys are the first half of the symbols, without the blank, and the values
    the second half. A query is at slot g = 1, 2, ... of two tokens after the pairs, with a probability proportional to
    g^(power - 1): 1.0 is uniform, and the published 0.01 prefers short distances. Unlike in the authors' code, the
    answer follows its query in the text too, so that it is the next token."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        seq_len: int,
        seed: int,
        pairs: Count = 8,
        power: Power = 0.01,
        sequences: Count = 100_000,
        val_sequences: Count = 1000,
        corpus_seed: Seed = 0,
    ):
        sizes = {"train": sequences, "val": val_sequences}
        self.sequences = Sequences(
            tokenizer, seq_len, seed, _Recall(pairs, power), sizes, corpus_seed, type(self).__name__
        )


@register("data")
@reads_sequences
class Copy:
    """Random symbols, a blank, and the same symbols again, which are the answers. As many as fit into the sequence are
    copied, with a blank at the end if one token is left."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        seq_len: int,
        seed: int,
        sequences: Count = 100_000,
        val_sequences: Count = 1000,
        corpus_seed: Seed = 0,
    ):
        sizes = {"train": sequences, "val": val_sequences}
        self.sequences = Sequences(tokenizer, seq_len, seed, _Copy(), sizes, corpus_seed, type(self).__name__)


@register("data")
@reads_sequences
class InductionSequences:
    """Distinct random symbols, repeated up to the end of the sequence: the symbol after one that occurred before is the
    one that followed it then, as an induction head predicts (Olsson et al. 2022, arXiv:2209.11895).

    The number of symbols before the repetition is drawn for each sequence, from ``shortest`` to half of the sequence,
    so that no fixed distance helps. The answers are the repeated symbols but the first, which nothing announces."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        seq_len: int,
        seed: int,
        shortest: Count = 8,
        sequences: Count = 100_000,
        val_sequences: Count = 1000,
        corpus_seed: Seed = 0,
    ):
        sizes = {"train": sequences, "val": val_sequences}
        self.sequences = Sequences(
            tokenizer, seq_len, seed, _Induction(shortest), sizes, corpus_seed, type(self).__name__
        )


@register("evaluator")
class RecallAccuracy:
    """Share of the answers of AssociativeRecall that are the model's likeliest token, of all ids. Chance is 1 / pairs
    for a model that names any value of the sequence, and (1 + 1/2 + ... + 1/pairs) / pairs, 0.21 for 16 pairs, for one
    that leaves out the values that were answered before.

    ``length`` is that of a sequence in tokens, which must fit into the context; for a model that was trained on
    AssociativeRecall, use its Experiment.seq_len, and the same ``pairs`` and ``power``. Sequence i depends on i, the
    knobs and the tokenizer's ids only. No ``seed`` gives the sequences of a data part. Items are the sequences."""

    higher_is_better = True

    def __init__(
        self, pairs: Count = 8, power: Power = 0.01, length: Count = 64, sequences: Count = 256, seed: Seed = 0
    ):
        self.task, self.length, self.sequences, self.seed = _Recall(pairs, power), length, sequences, seed
        self.min_context = length

    def prepare(self) -> None:
        """The sequences depend on the tokenizer, so they are drawn in ``evaluate``."""

    def fingerprint(self) -> str:
        return _fingerprint(self)

    def evaluate(self, reader: Reader) -> dict[str, Score]:
        return _accuracy(self, reader)


@register("evaluator")
class CopyAccuracy:
    """Share of the copied symbols of Copy that are the model's likeliest token, of all ids. Chance is 1 / the number of
    symbols. The knobs are those of RecallAccuracy. Items are the sequences."""

    higher_is_better = True

    def __init__(self, length: Count = 64, sequences: Count = 256, seed: Seed = 0):
        self.task, self.length, self.sequences, self.seed = _Copy(), length, sequences, seed
        self.min_context = length

    def prepare(self) -> None:
        """The sequences depend on the tokenizer, so they are drawn in ``evaluate``."""

    def fingerprint(self) -> str:
        return _fingerprint(self)

    def evaluate(self, reader: Reader) -> dict[str, Score]:
        return _accuracy(self, reader)


@register("evaluator")
class InductionAccuracy:
    """Share of the answers of InductionSequences that are the model's likeliest token, of all ids: the mean of the
    sequences, each of which counts the same. Chance for a model that names one of the n symbols of a sequence is 1 / n,
    with n from ``shortest`` to length / 2. The other knobs are those of RecallAccuracy. Items are the sequences."""

    higher_is_better = True

    def __init__(self, shortest: Count = 8, length: Count = 64, sequences: Count = 256, seed: Seed = 0):
        self.task, self.length, self.sequences, self.seed = _Induction(shortest), length, sequences, seed
        self.min_context = length

    def prepare(self) -> None:
        """The sequences depend on the tokenizer, so they are drawn in ``evaluate``."""

    def fingerprint(self) -> str:
        return _fingerprint(self)

    def evaluate(self, reader: Reader) -> dict[str, Score]:
        return _accuracy(self, reader)


class _Measure(Protocol):
    @property
    def task(self) -> Task: ...

    length: int
    sequences: int
    seed: int


def _fingerprint(part: _Measure) -> str:
    content = [type(part).__name__, repr(part.task), part.length, part.sequences, part.seed]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def _accuracy(part: _Measure, reader: Reader) -> dict[str, Score]:
    name = type(part).__name__
    if part.length > reader.max_len:
        raise ValueError(
            f"{name}.length = {part.length} is longer than the model's context (Experiment.seq_len), {reader.max_len} "
            f"tokens; set {name}.length to {reader.max_len} or less"
        )
    alphabet = alphabet_of(reader.tokenizer)
    rows = draw_rows(name, part.task, (part.seed, SPLITS["evaluator"]), part.sequences, part.length, alphabet)
    right = np.array(reader.token_greedy(rows.tolist()))
    answers = part.task.answers(rows, alphabet)
    shares = (right & answers).sum(1) / answers.sum(1)
    return {"accuracy": mean({f"sequence-{i}": float(share) for i, share in enumerate(shares)}, "fraction")}


# ---- tasks: what the sequences are, and where their answers are


@dataclass(frozen=True)
class _Recall:
    pairs: int
    power: float

    def draw(self, rng: np.random.Generator, count: int, length: int, alphabet: np.ndarray) -> np.ndarray:
        slots, half = length // 2 - self.pairs, len(alphabet) // 2
        if slots < self.pairs:
            raise ValueError(
                f"pairs = {self.pairs}: they and their queries have {4 * self.pairs} tokens, and a sequence has "
                f"{length}; set pairs to {length // 4} or less, or {LONGER}"
            )
        if half - 1 < self.pairs:
            raise ValueError(
                f"pairs = {self.pairs}: the tokenizer has {len(alphabet)} symbols, which are {max(0, half - 1)} keys "
                f"and {len(alphabet) - half} values; set pairs to {max(0, half - 1)} or less, or Symbols.symbols to "
                f"{2 * self.pairs + 2} or more"
            )
        keys = alphabet[1 + _distinct(rng, count, half - 1, self.pairs)]
        values = alphabet[half + _distinct(rng, count, len(alphabet) - half, self.pairs)]
        weights = np.arange(1, slots + 1) ** (self.power - 1.0)
        gaps = _distinct(rng, count, slots, self.pairs, weights)
        rows = np.full((count, length), alphabet[0])
        rows[:, : 2 * self.pairs : 2], rows[:, 1 : 2 * self.pairs : 2] = keys, values
        np.put_along_axis(rows, 2 * (self.pairs + gaps), keys, axis=1)
        np.put_along_axis(rows, 2 * (self.pairs + gaps) + 1, values, axis=1)
        return rows

    def answers(self, rows: np.ndarray, alphabet: np.ndarray) -> np.ndarray:
        after_pairs = np.arange(rows.shape[1]) >= 2 * self.pairs
        return (rows >= alphabet[len(alphabet) // 2]) & after_pairs


@dataclass(frozen=True)
class _Copy:
    def draw(self, rng: np.random.Generator, count: int, length: int, alphabet: np.ndarray) -> np.ndarray:
        if length < 3 or len(alphabet) < 3:
            raise ValueError(
                f"a copy needs 3 tokens and 3 symbols or more, and has {length} and {len(alphabet)}; raise "
                f"Symbols.symbols, or {LONGER}"
            )
        copied = (length - 1) // 2
        rows = np.full((count, length), alphabet[0])
        rows[:, :copied] = alphabet[rng.integers(1, len(alphabet), size=(count, copied))]
        rows[:, copied + 1 : 2 * copied + 1] = rows[:, :copied]
        return rows

    def answers(self, rows: np.ndarray, alphabet: np.ndarray) -> np.ndarray:
        copied, place = (rows.shape[1] - 1) // 2, np.arange(rows.shape[1])
        return np.broadcast_to((place > copied) & (place <= 2 * copied), rows.shape)


@dataclass(frozen=True)
class _Induction:
    shortest: int

    def draw(self, rng: np.random.Generator, count: int, length: int, alphabet: np.ndarray) -> np.ndarray:
        longest = length // 2
        if length < 3:  # nothing but the first symbol is repeated, and that is no answer
            raise ValueError(f"a sequence needs 3 tokens or more, and has {length}; {LONGER}")
        if longest < self.shortest:
            raise ValueError(
                f"shortest = {self.shortest}: at most half of a sequence of {length} tokens is not repeated; set "
                f"shortest to {longest} or less, or {LONGER}"
            )
        if len(alphabet) - 1 < longest:
            raise ValueError(
                f"{length} tokens have up to {longest} distinct symbols and a blank, and the tokenizer has "
                f"{len(alphabet)}; set Symbols.symbols to {longest + 1} or more, or make the sequences shorter"
            )
        symbols = alphabet[1 + _distinct(rng, count, len(alphabet) - 1, longest)]
        period = rng.integers(self.shortest, longest + 1, size=(count, 1))
        return np.take_along_axis(symbols, np.arange(length) % period, axis=1)

    def answers(self, rows: np.ndarray, alphabet: np.ndarray) -> np.ndarray:
        period = 1 + (rows[:, 1:] == rows[:, :1]).argmax(1)  # the first symbol comes again
        return np.arange(rows.shape[1]) > period[:, None]


def _distinct(
    rng: np.random.Generator, count: int, size: int, chosen: int, weights: np.ndarray | float = 1.0
) -> np.ndarray:
    """(count, chosen) numbers below ``size``, distinct in each row: drawn one after the other, each with a probability
    proportional to its weight. The smallest of exponential variables with these rates are such a draw (Efraimidis and
    Spirakis 2006)."""
    return np.argsort(rng.standard_exponential((count, size)) / weights, axis=1)[:, :chosen]
