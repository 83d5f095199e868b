"""Evaluators: they measure a trained model through a Reader -> {metric: Score}.

Items are read from files (toolkit/evaluation/items.py). If there are several files, each metric is also given file by
file, as METRIC/STEM for the file STEM.jsonl. Sources: lm-evaluation-harness is Gao et al. 2024,
https://github.com/EleutherAI/lm-evaluation-harness."""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Annotated, Literal, NamedTuple

import numpy as np
from annotated_types import Ge, MinLen

from toolkit.evaluation import windows
from toolkit.evaluation.items import Item, fingerprint, read_items, text_of
from toolkit.measures import Score, mean
from toolkit.protocols import Reader
from toolkit.registry import register
from toolkit.text import textfiles

Paths = Annotated[list[str], MinLen(1)]
Separator = Annotated[str, MinLen(1)] | None
Count = Annotated[int, Ge(1)]


@register("evaluator")
class TextLoss:
    """The loss on other texts: ``bits_per_byte`` and ``loss_nats`` (mean per token). Each document is read after the
    token ``eot``. Items are the bits per byte of each document; the metric is that of all documents together.

    ``paths``, ``separator`` and ``column`` are those of TextFiles (gin/data/text_files.gin), and so are the documents:
    surrounding blank lines are cut off. Bytes are the UTF-8 bytes of the tokens; special tokens have none."""

    higher_is_better = False

    def __init__(self, paths: Paths, separator: Separator = "<|endoftext|>", column: str = "text"):
        self.paths, self.separator, self.column = paths, separator, column
        self.items: list[Item] = []

    def prepare(self) -> None:
        self.items = _documents(self, self.paths, self.separator, self.column)

    def fingerprint(self) -> str:
        return fingerprint(self.items, "TextLoss")

    def evaluate(self, reader: Reader) -> dict[str, Score]:
        documents = reader.nats([text_of(item, "text") for item in self.items])
        nats = [float(document.nats.sum()) for document in documents]
        tokens = [len(document.nats) for document in documents]
        text_bytes = [int(document.byte_lengths.sum()) for document in documents]
        bits, loss = {}, {}
        for suffix, group in _groups(self.items).items():
            values = {self.items[i].id: _ratio(nats[i] / math.log(2), text_bytes[i]) for i in group if text_bytes[i]}
            total, count = math.fsum(nats[i] for i in group), sum(text_bytes[i] for i in group)
            bits[f"bits_per_byte{suffix}"] = Score(_ratio(total / math.log(2), count), "bits/byte", values)
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
        self.items = _documents(self, self.paths, self.separator, self.column)

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
        self.items = _read(self, self.paths, ["sentence_good", "sentence_bad"])
        for item in self.items:
            _filled(item, "sentence_good")
            _filled(item, "sentence_bad")

    def fingerprint(self) -> str:
        return fingerprint(self.items, "MinimalPairs", self.by, self.prefix)

    def evaluate(self, reader: Reader) -> dict[str, Score]:
        fields = ("sentence_good", "sentence_bad")
        sentences = reader.nats([self.prefix + text_of(item, field) for item in self.items for field in fields])
        cost = [each.nats.sum() / (len(each.nats) if self.by == "token" else 1) for each in sentences]
        wins = [
            1.0 if good < bad else 0.5 if good == bad else 0.0 for good, bad in zip(cost[::2], cost[1::2], strict=True)
        ]
        return _shares("accuracy", self.items, wins)


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
        self.items = _read(self, self.paths, [])
        self.questions = [_question(item) for item in self.items]

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
        return _shares("accuracy", self.items, by_sum) | _shares("accuracy_per_byte", self.items, by_byte)


@register("evaluator")
class LastWord:
    """Share of texts whose last word the model continues with, if it takes the likeliest token each time (LAMBADA,
    Paperno et al. 2016, arXiv:1606.06031). Items have the field ``text``; the last word begins at the last space."""

    higher_is_better = True

    def __init__(self, paths: Paths):
        self.paths = paths
        self.items: list[Item] = []

    def prepare(self) -> None:
        self.items = _read(self, self.paths, ["text"])
        for item in self.items:
            before, _, word = _filled(item, "text").rpartition(" ")
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
        return _shares("accuracy", self.items, [float(each.is_greedy) for each in words])


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
        self.items = _numbered("prompt", rows) + (_read(self, self.paths, ["prompt"]) if self.paths else [])
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
        return _shares("match", self.items, matches) | {"distinct_2": distinct}


# ---- the formats of multiple choice


class Question(NamedTuple):
    """A question: each choice follows after the context and a space. ``answer`` is the place of the right one."""

    context: str
    choices: list[str]
    answer: int


def _hellaswag(item: Item) -> Question:
    context = text_of(item, "ctx_a") + " " + text_of(item, "ctx_b").capitalize()
    choices = [_without_marks(choice) for choice in _texts(item, "endings", item.row["endings"])]
    context = _without_marks(f"{text_of(item, 'activity_label')}: {context}")
    return Question(context, _texts(item, "endings", choices), _place(item, "label", len(choices)))


def _without_marks(text: str) -> str:
    """HellaSwag's texts without the marks of WikiHow, such as [title]."""
    return re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". ")).replace("  ", " ")


def _arc(item: Item) -> Question:
    choices, labels = _labelled(item)
    return Question(f"Question: {_filled(item, 'question')}\nAnswer:", choices, _place(item, "answerKey", labels))


def _piqa(item: Item) -> Question:
    choices = [_filled(item, "sol1"), _filled(item, "sol2")]
    return Question(f"Question: {_filled(item, 'goal')}\nAnswer:", choices, _place(item, "label", 2))


def _plain(item: Item) -> Question:
    context = text_of(item, "context")
    if isinstance(item.row["choices"], dict):
        choices, labels = _labelled(item)
        return Question(context, choices, _place(item, "answer", labels))
    choices = _texts(item, "choices", item.row["choices"])
    return Question(context, choices, _place(item, "answer", len(choices)))


FORMATS: dict[tuple[str, ...], Callable[[Item], Question]] = {
    ("activity_label", "ctx_a", "ctx_b", "endings", "label"): _hellaswag,
    ("question", "choices", "answerKey"): _arc,
    ("goal", "sol1", "sol2", "label"): _piqa,
    ("context", "choices", "answer"): _plain,
}


def _question(item: Item) -> Question:
    """Read an item in the format whose fields it has. Raises ValueError if it has those of none."""
    for fields, convert in FORMATS.items():
        if item.row.keys() >= set(fields):
            return convert(item)
    formats = "; ".join(f"{convert.__name__[1:]}: {', '.join(fields)}" for fields, convert in FORMATS.items())
    raise ValueError(
        f"{item.where}: the fields {', '.join(item.row)} are those of no known format; the formats are {formats}"
    )


def _labelled(item: Item) -> tuple[list[str], list[str]]:
    """The texts and the labels of ARC's choices: {"text": [...], "label": [...]}."""
    choices = item.row["choices"]
    if not isinstance(choices, dict) or not choices.keys() >= {"text", "label"}:
        raise ValueError(f"{item.where}: 'choices' must be an object with the lists 'text' and 'label'")
    texts, labels = _texts(item, "choices", choices["text"]), _texts(item, "choices", choices["label"])
    if len(texts) != len(labels) or len(set(labels)) < len(labels):
        raise ValueError(f"{item.where}: 'choices' needs a label of its own for each of {len(texts)} texts")
    return texts, labels


def _texts(item: Item, field: str, value: object) -> list[str]:
    """A list of at least two texts that are not empty. Raises ValueError with file and line."""
    if (
        not isinstance(value, list)
        or len(value) < 2
        or not all(isinstance(each, str) and each.strip() for each in value)
    ):
        raise ValueError(f"{item.where}: {field!r} must be a list of two or more texts that are not empty")
    return value


def _place(item: Item, field: str, choices: int | list[str]) -> int:
    """The place of the right choice from a field: one of the labels ``choices``, or a number below ``choices``, which
    may be written as text. Raises ValueError with file and line."""
    value = item.row[field]
    allowed = choices if isinstance(choices, list) else [str(place) for place in range(choices)]
    if str(value) not in allowed:
        raise ValueError(f"{item.where}: {field!r} must be one of {', '.join(allowed)}, not {value!r}")
    return allowed.index(str(value))


# ---- items


def _read(part: object, paths: Sequence[str], required: Sequence[str]) -> list[Item]:
    """Read the items of an evaluator. Raises ValueError as ``read_items`` does, for text that is not valid Unicode, and
    for two files of one name."""
    knob = f"{type(part).__name__}.paths"
    items = read_items(knob, paths, required)
    for item in items:
        try:
            json.dumps(item.row, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:  # JSON can escape it, but few tokenizers take it
            raise ValueError(
                f"{item.where}: the item has half of a surrogate pair, as in \\ud800; remove it"
            ) from error
    return _with_own_names(knob, items)


def _documents(part: object, paths: list[str], separator: str | None, column: str) -> list[Item]:
    """The documents of text files as items with the field ``text``; empty ones are left out."""
    name = type(part).__name__
    try:
        rows = [
            (path.name.partition(".")[0], f"{path}:{number}", text)
            for path in textfiles.find_files(paths)
            for number, document in enumerate(textfiles.documents(path, separator, column), start=1)
            if (text := _without_blank_lines(document))
        ]
    except ValueError as error:  # it names the knobs of TextFiles, which are the same here
        raise ValueError(str(error).replace("TextFiles.", f"{name}.")) from error
    if not rows:
        raise ValueError(f"{name}.paths = {paths}: the files have no text")
    return _with_own_names(f"{name}.paths", _numbered("text", rows))


def _numbered(field: str, rows: Iterable[tuple[str, str, str]]) -> list[Item]:
    """Items with one field from (name, where, text), with an id as ``read_items`` gives it: of the name and the
    text."""
    items, counts = [], dict[str, int]()
    for name, where, text in rows:
        key = f"{name}/{hashlib.sha256(text.encode(errors='replace')).hexdigest()[:12]}"
        counts[key] = counts.get(key, 0) + 1  # the same text twice
        items.append(Item(key if counts[key] == 1 else f"{key}#{counts[key]}", where, {field: text}))
    return items


def _with_own_names(knob: str, items: list[Item]) -> list[Item]:
    """The same items. Raises ValueError if two files would give their metrics the same name."""
    files: dict[str, str] = {}
    for item in items:
        stem, path = item.id.partition("/")[0], item.where.rpartition(":")[0]
        if files.setdefault(stem, path) != path:
            raise ValueError(
                f"{knob}: the metrics of {files[stem]} and {path} would both be called .../{stem}; rename one file"
            )
    return items


def _without_blank_lines(document: str) -> str:
    """A document without the blank lines at its start and end, as in TextFiles. Half of a surrogate pair becomes
    U+FFFD, as in training."""
    document = document.encode("utf-16", "surrogatepass").decode("utf-16", "replace").rstrip()
    indented = len(document) - len(document.lstrip())
    return document[document.rfind("\n", 0, indented) + 1 :]


def _filled(item: Item, field: str) -> str:
    """A field of an item that must be text, and not empty. Raises ValueError with file and line."""
    text = text_of(item, field)
    if not text.strip():
        raise ValueError(f"{item.where}: {field!r} is empty")
    return text


# ---- scores


def _groups(items: Sequence[Item]) -> dict[str, list[int]]:
    """{suffix of a metric: places of its items}: "" for all items and, with several files, "/STEM" for each file."""
    groups: dict[str, list[int]] = {}
    for place, item in enumerate(items):
        groups.setdefault("/" + item.id.partition("/")[0], []).append(place)
    return {"": list(range(len(items)))} | (groups if len(groups) > 1 else {})


def _shares(metric: str, items: Sequence[Item], values: Sequence[float]) -> dict[str, Score]:
    """The scores of a metric that is a share of items, for all items and file by file."""
    return {
        metric + suffix: mean({items[place].id: values[place] for place in group}, "fraction")
        for suffix, group in _groups(items).items()
    }


def _ratio(total: float, count: int) -> float:
    return total / count if count else math.nan


def _positions(count: int, max_len: int) -> np.ndarray:
    """(count,) how many tokens the model reads before each token of a text."""
    parts = [len(context) + np.arange(len(targets)) for context, targets in windows.rolling(range(count), -1, max_len)]
    return np.concatenate(parts) if parts else np.empty(0, dtype=np.int64)
