"""Evaluators: they measure a trained model through a Reader -> {metric: Score}.

Items are read from files (toolkit/evaluation/items.py); ``builtin:NAME`` is a built-in file
(toolkit/evaluation/builtin.py). If there are several files, each metric is also given file by file, as METRIC/STEM for
the file STEM.jsonl. Sources: lm-evaluation-harness is Gao et al. 2024,
https://github.com/EleutherAI/lm-evaluation-harness."""

from __future__ import annotations

import itertools
import math
import re
from typing import Annotated, Literal

import numpy as np
from annotated_types import Ge, MinLen

from toolkit.evaluation import windows
from toolkit.evaluation.items import Item, filled, fingerprint, numbered, read_items, text_of
from toolkit.evaluation.questions import Question, question
from toolkit.evaluation.scores import groups, shares
from toolkit.evaluation.texts import documents
from toolkit.measures import Score, mean
from toolkit.protocols import Reader
from toolkit.registry import register

Paths = Annotated[list[str], MinLen(1)]
Separator = Annotated[str, MinLen(1)] | None
Count = Annotated[int, Ge(1)]


@register("evaluator")
class TextLoss:
    """The loss on other texts: ``bits_per_byte`` and ``loss_nats`` (mean per token). Each document is read after the
    token ``eot``. Items are the bits per byte of each document; the metric is that of all documents together.

    ``paths``, ``separator`` and ``column`` are those of TextFiles (gin/data/text_files.gin), and so are the documents:
    surrounding blank lines are cut off. Bytes are the UTF-8 bytes of the tokens; special tokens have none. If no token
    has bytes, as for text in words that @Symbols does not know, there are no bits per byte."""

    higher_is_better = False

    def __init__(self, paths: Paths, separator: Separator = "<|endoftext|>", column: str = "text"):
        self.paths, self.separator, self.column = paths, separator, column
        self.items: list[Item] = []

    def prepare(self) -> None:
        self.items = documents("TextLoss", self.paths, self.separator, self.column)

    def fingerprint(self) -> str:
        return fingerprint(self.items, "TextLoss")

    def evaluate(self, reader: Reader) -> dict[str, Score]:
        documents = reader.nats([text_of(item, "text") for item in self.items])
        nats = [float(document.nats.sum()) for document in documents]
        tokens = [len(document.nats) for document in documents]
        text_bytes = [int(document.byte_lengths.sum()) for document in documents]
        bits, loss = {}, {}
        for suffix, group in groups(self.items).items():
            values = {self.items[i].id: nats[i] / math.log(2) / text_bytes[i] for i in group if text_bytes[i]}
            total, count = math.fsum(nats[i] for i in group), sum(text_bytes[i] for i in group)
            if count:
                bits[f"bits_per_byte{suffix}"] = Score(total / math.log(2) / count, "bits/byte", values)
            loss[f"loss_nats{suffix}"] = Score(_ratio(total, sum(tokens[i] for i in group)), "nats/token")
        return bits | loss


@register("evaluator")
class PositionLoss:
    """The loss by position in the context, in nats per token: ``nats_at/1-1``, ``nats_at/2-3``, ``nats_at/4-7`` and so
    on; the last one ends at the model's context. A token's position is the number of tokens that the model reads before
    it, ``eot`` included. Items are the means of each document.

    Documents are read as in TextLoss; one that is longer than the context is read in windows, and positions count from
    the beginning of a window. ``buckets`` lists the first positions of other buckets, in rising order. Positions that
    no document reaches have no metric."""

    higher_is_better = False

    def __init__(
        self,
        paths: Paths,
        separator: Separator = "<|endoftext|>",
        column: str = "text",
        buckets: Annotated[list[Count], MinLen(1)] | None = None,
    ):
        self.starts = buckets or [2**power for power in range(40)]
        if any(low >= high for low, high in itertools.pairwise(self.starts)):
            raise ValueError(f"PositionLoss.buckets = {buckets}: each number must be larger than the one before it")
        self.paths, self.separator, self.column = paths, separator, column
        self.items: list[Item] = []

    def prepare(self) -> None:
        self.items = documents("PositionLoss", self.paths, self.separator, self.column)

    def fingerprint(self) -> str:
        return fingerprint(self.items, "PositionLoss", self.starts)

    def evaluate(self, reader: Reader) -> dict[str, Score]:
        # A bucket that would hold nothing but the last position is joined to the one before.
        starts = self.starts[:1] + [start for start in self.starts[1:] if start < reader.max_len]
        sums, counts = np.zeros((2, len(self.items), len(starts)))
        for row, (nats, _) in enumerate(reader.nats([text_of(item, "text") for item in self.items])):
            bucket = np.searchsorted(starts, _positions(len(nats), reader.max_len), side="right")
            sums[row] = np.bincount(bucket, weights=nats, minlength=len(starts) + 1)[1:]  # 0: before the first bucket
            counts[row] = np.bincount(bucket, minlength=len(starts) + 1)[1:]
        scores = {}
        for place, (low, after) in enumerate(zip(starts, [*starts[1:], reader.max_len + 1], strict=True)):
            of, n = sums[:, place], counts[:, place]
            if n.any():
                values = {item.id: float(of[row] / n[row]) for row, item in enumerate(self.items) if n[row]}
                scores[f"nats_at/{low}-{after - 1}"] = Score(math.fsum(of) / float(n.sum()), "nats/token", values)
        return scores


@register("evaluator")
class MinimalPairs:
    """Share of pairs whose good sentence is likelier than the bad one (BLiMP, Warstadt et al. 2020, arXiv:1912.00582).
    A tie counts 1/2.

    Items have the fields ``sentence_good`` and ``sentence_bad``, as in BLiMP and BabyLM. A sentence is read after the
    token ``eot``. ``by`` is "sum", the probability of a whole sentence, or "token", the mean of its tokens. ``prefix``
    is put before each sentence and scored with it: ' ' gives the figures of lm-evaluation-harness."""

    higher_is_better = True

    def __init__(self, paths: Paths, by: Literal["sum", "token"] = "sum", prefix: str = ""):
        self.paths, self.by, self.prefix = paths, by, prefix
        self.items: list[Item] = []

    def prepare(self) -> None:
        self.items = read_items("MinimalPairs.paths", self.paths, ["sentence_good", "sentence_bad"])
        for item in self.items:
            filled(item, "sentence_good")
            filled(item, "sentence_bad")

    def fingerprint(self) -> str:
        return fingerprint(self.items, "MinimalPairs", self.by, self.prefix)

    def evaluate(self, reader: Reader) -> dict[str, Score]:
        fields = ("sentence_good", "sentence_bad")
        sentences = reader.nats([self.prefix + text_of(item, field) for item in self.items for field in fields])
        cost = [each.nats.sum() / (len(each.nats) if self.by == "token" else 1) for each in sentences]
        wins = [
            1.0 if good < bad else 0.5 if good == bad else 0.0 for good, bad in zip(cost[::2], cost[1::2], strict=True)
        ]
        return shares("accuracy", self.items, wins)


@register("evaluator")
class MultipleChoice:
    """Share of questions whose right answer is the likeliest choice: ``accuracy`` compares the nats of the choices,
    ``accuracy_per_byte`` the nats per UTF-8 byte. Of equal choices the first one counts.

    Items have the fields of HellaSwag (Zellers et al. 2019, arXiv:1905.07830), ARC (Clark et al. 2018,
    arXiv:1803.05457) or PIQA (Bisk et al. 2019, arXiv:1911.11641) as they are published, or ``context``, ``choices``
    and ``answer``, the number of the right choice from 0. Prompts are those of lm-evaluation-harness, and a choice
    follows after a space."""

    higher_is_better = True

    def __init__(self, paths: Paths):
        self.paths = paths
        self.items: list[Item] = []
        self.questions: list[Question] = []

    def prepare(self) -> None:
        self.items = read_items("MultipleChoice.paths", self.paths, [])
        self.questions = [question(item) for item in self.items]

    def fingerprint(self) -> str:
        return fingerprint(self.items, "MultipleChoice")

    def evaluate(self, reader: Reader) -> dict[str, Score]:
        pairs = [(question.context, " " + choice) for question in self.questions for choice in question.choices]
        continuations = iter(reader.continuations(pairs))
        by_sum, by_byte = [], []
        for _, choices, answer in self.questions:
            nats = np.array([each.nats for each in itertools.islice(continuations, len(choices))])
            lengths = np.array([len(choice.encode()) for choice in choices])
            by_sum.append(float(nats.argmin() == answer))
            by_byte.append(float((nats / lengths).argmin() == answer))
        return shares("accuracy", self.items, by_sum) | shares("accuracy_per_byte", self.items, by_byte)


@register("evaluator")
class LastWord:
    """Share of texts whose last word the model continues with, if it takes the likeliest token each time (LAMBADA,
    Paperno et al. 2016, arXiv:1606.06031). Items have the field ``text``; the last word begins at the last space."""

    higher_is_better = True

    def __init__(self, paths: Paths):
        self.paths = paths
        self.items: list[Item] = []

    def prepare(self) -> None:
        self.items = read_items("LastWord.paths", self.paths, ["text"])
        for item in self.items:
            before, _, word = filled(item, "text").rpartition(" ")
            if not before.strip() or not word.strip():
                raise ValueError(
                    f"{item.where}: 'text' must have a last word after a space, and words before it, not "
                    f"{text_of(item, 'text')[-40:]!r}"
                )

    def fingerprint(self) -> str:
        return fingerprint(self.items, "LastWord")

    def evaluate(self, reader: Reader) -> dict[str, Score]:
        parts = [text_of(item, "text").rpartition(" ") for item in self.items]
        words = reader.continuations([(before, space + word) for before, space, word in parts])
        return shares("accuracy", self.items, [float(each.is_greedy) for each in words])


@register("evaluator")
class Induction:
    """The loss on random tokens that are repeated once, in nats per token: ``nats_second_half``, where a model with
    induction heads copies, and ``nats_first_half``, where nothing can be known (Olsson et al. 2022, arXiv:2209.11895).
    The first token of each half is left out, since nothing tells that the repetition begins.

    ``length`` is that of one half in tokens: the context must hold both. Tokens are drawn independently, all with the
    same probability, from the ids that stand for bytes. Sequence i depends on ``seed``, i and ``length`` only. Items
    are the sequences."""

    higher_is_better = False

    def __init__(self, length: Annotated[int, Ge(2)] = 16, sequences: Count = 64, seed: Annotated[int, Ge(0)] = 0):
        self.length, self.sequences, self.seed = length, sequences, seed
        self.min_context = 2 * length

    def prepare(self) -> None:
        """The sequences depend on the tokenizer, so they are drawn in ``evaluate``."""

    def fingerprint(self) -> str:
        return fingerprint([], "Induction", self.length, self.sequences, self.seed)

    def evaluate(self, reader: Reader) -> dict[str, Score]:
        if 2 * self.length > reader.max_len:
            raise ValueError(
                f"Induction.length = {self.length}: a sequence and its repetition have {2 * self.length} tokens, and "
                f"the model's context (Experiment.seq_len) has {reader.max_len}; set Induction.length to "
                f"{reader.max_len // 2} or less"
            )
        ordinary = np.flatnonzero(np.asarray(reader.tokenizer.byte_lengths))
        draws = [np.random.default_rng((self.seed, i)) for i in range(self.sequences)]
        halves = [ordinary[draw.integers(len(ordinary), size=self.length)].tolist() for draw in draws]
        sequences = reader.token_nats([half + half for half in halves])
        first = {f"sequence-{i}": float(nats[1 : self.length].mean()) for i, nats in enumerate(sequences)}
        second = {f"sequence-{i}": float(nats[self.length + 1 :].mean()) for i, nats in enumerate(sequences)}
        return {"nats_second_half": mean(second, "nats/token"), "nats_first_half": mean(first, "nats/token")}


@register("evaluator")
class Completion:
    """Generated continuations of prompts: ``match`` is the share of them that match, ``distinct_2`` the number of
    different pairs of successive words in all of them, divided by that of all pairs (Li et al. 2016, arXiv:1510.03055);
    0 without a pair.

    Prompts are ``prompts``, and the field ``prompt`` of the items in ``paths``. A continuation matches if the regular
    expression ``pattern`` is found in it (``re.search``), or one of ``words`` as a whole word. It has up to
    ``max_tokens`` tokens. ``temperature`` 0 takes the likeliest token; otherwise tokens are drawn with a seed that
    depends on the prompt and on the run's seed."""

    higher_is_better = True

    def __init__(
        self,
        prompts: list[str] | None = None,
        paths: list[str] | None = None,
        pattern: str | None = None,
        words: list[Annotated[str, MinLen(1)]] | None = None,
        max_tokens: Count = 64,
        temperature: Annotated[float, Ge(0)] = 0.0,
    ):
        if not prompts and not paths:
            raise ValueError("Completion has no prompt; bind Completion.prompts = ['...'], or Completion.paths")
        if bool(pattern) == bool(words):
            raise ValueError("Completion.pattern and Completion.words: bind exactly one of them")
        try:
            self.pattern = re.compile(pattern or rf"(?<!\w)(?:{'|'.join(map(re.escape, words or []))})(?!\w)")
        except re.error as error:
            raise ValueError(f"Completion.pattern = {pattern!r} is not a regular expression: {error}") from error
        self.prompts, self.paths = prompts or [], paths or []
        self.max_tokens, self.temperature = max_tokens, temperature
        self.items: list[Item] = []

    def prepare(self) -> None:
        rows = [("prompts", "Completion.prompts", prompt) for prompt in self.prompts]
        self.items = numbered("prompt", rows) + (
            read_items("Completion.paths", self.paths, ["prompt"]) if self.paths else []
        )
        for item in self.items:
            text_of(item, "prompt")

    def fingerprint(self) -> str:
        knobs = (self.pattern.pattern, self.max_tokens, self.temperature)
        return fingerprint(self.items, "Completion", *knobs)

    def evaluate(self, reader: Reader) -> dict[str, Score]:
        prompts = [text_of(item, "prompt") for item in self.items]
        texts = reader.generate(prompts, self.max_tokens, temperature=self.temperature)
        pairs = [pair for text in texts for pair in itertools.pairwise(text.split())]
        matches = [float(self.pattern.search(text) is not None) for text in texts]
        distinct = Score(len(set(pairs)) / max(1, len(pairs)), "fraction")
        return shares("match", self.items, matches) | {"distinct_2": distinct}


def _ratio(total: float, count: int) -> float:
    return total / count if count else math.nan


def _positions(count: int, max_len: int) -> np.ndarray:
    """(count,) how many tokens the model reads before each token of a text."""
    parts = [len(context) + np.arange(len(targets)) for context, targets in windows.rolling(range(count), -1, max_len)]
    return np.concatenate(parts) if parts else np.empty(0, dtype=np.int64)
