"""What an evaluator is checked with: small models to read with, readers whose replies are known, and copies of its
items that are changed on purpose."""

from __future__ import annotations

import contextlib
import functools
import glob
import hashlib
import itertools
import json
import math
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from toolkit.conformance.bench import Bench, plain_part, with_knobs
from toolkit.conformance.lines import Broken, NotApplicable
from toolkit.evaluation import builtin
from toolkit.evaluation.reader import Reader
from toolkit.measures import Continuation, Score, TokenNats
from toolkit.protocols import Evaluator
from toolkit.text.compressed import opened
from toolkit.text.jsonstream import JSONError, values

ITEMS, CHARACTERS, NEW_TOKENS = 12, 3000, 12  # at most so many of a file, and of a text that is generated
CONTEXTS = (256, 1024, 64)  # the model's context in tokens: the first in which the part measures something
LN2 = math.log(2)
NO_FILES = "it has no knob `paths`, or no file in it"


class ShortReader(Reader):
    """A reader that generates few tokens, which keeps the check fast."""

    def generate(
        self, prompts: Sequence[str], max_tokens: int, stop: Sequence[str] = (), temperature: float = 0.0
    ) -> list[str]:
        return super().generate(prompts, min(max_tokens, NEW_TOKENS), stop, temperature)


class ScriptedReader(Reader):
    """A reader whose replies do not come from a model, and which records what it is asked.

    A token has 1, 2 or 3 bytes, and ln 2 nats per byte. ``draw`` other than None multiplies the nats of each text by a
    factor from 0.5 to 1.5, which depends on ``draw`` and on the text that is predicted, not on its context."""

    draw: int | None = None

    def __init__(self, *arguments: object) -> None:
        super().__init__(*arguments)  # type: ignore[arg-type]  # what new_reader passes
        self.texts: list[str] = []
        self.pairs: list[tuple[str, str]] = []
        self.prompts: list[str] = []

    def nats(self, texts: Sequence[str]) -> list[TokenNats]:
        self.texts += texts
        lengths = [self._lengths(text) for text in texts]
        return [TokenNats(LN2 * self._factor(t) * each, each) for t, each in zip(texts, lengths, strict=True)]

    def token_nats(self, sequences: Sequence[Sequence[int]]) -> list[np.ndarray]:
        texts = [" ".join(map(str, ids)) for ids in sequences]
        self.texts += texts
        return [np.full(len(ids), LN2 * self._factor(text)) for ids, text in zip(sequences, texts, strict=True)]

    def token_greedy(self, sequences: Sequence[Sequence[int]]) -> list[np.ndarray]:
        texts = [" ".join(map(str, ids)) for ids in sequences]
        self.texts += texts
        return [np.full(len(ids), self._factor(text) < 1) for ids, text in zip(sequences, texts, strict=True)]

    def continuations(self, pairs: Sequence[tuple[str, str]]) -> list[Continuation]:
        self.pairs += [(context, text) for context, text in pairs]
        replies = []
        for _, text in pairs:
            lengths, factor = self._lengths(text), self._factor(text)
            replies.append(Continuation(float(LN2 * factor * lengths.sum()), len(lengths), factor < 1))
        return replies

    def generate(
        self, prompts: Sequence[str], max_tokens: int, stop: Sequence[str] = (), temperature: float = 0.0
    ) -> list[str]:
        self.prompts += prompts
        return ["once"] * len(prompts)

    def _lengths(self, text: str) -> np.ndarray:
        """The bytes of each token of a text, as int64."""
        total, lengths = len(text.encode()), list[int]()
        for length in itertools.cycle((1, 2, 3)):
            if total <= 0:
                return np.array(lengths, dtype=np.int64)
            lengths.append(min(length, total))
            total -= length
        raise AssertionError("cycle() does not end")

    def _factor(self, text: str) -> float:
        if self.draw is None:
            return 1.0
        digest = hashlib.sha256(f"{self.draw} {text.strip()}".encode(errors="replace")).digest()
        return 0.5 + int.from_bytes(digest[:8], "big") / 2**64


def new_reader(
    bench: Bench, cls: type[Reader] = ShortReader, batch_tokens: int = 4096, seed: int = 0, max_len: int | None = None
) -> Reader:
    """A reader with a model of its own. Equal seeds give equal weights. ``max_len`` is chosen for the part."""
    tokenizer, length = plain_part("tokenizer")(), max_len or _context(bench)
    model = bench.model(seed=seed, size=(tokenizer.vocab_size, length)).eval()
    return cls(model, tokenizer, length, batch_tokens, 0)


def scripted(bench: Bench, draw: int | None = None) -> ScriptedReader:
    """A ScriptedReader."""
    reader = new_reader(bench, ScriptedReader)
    assert isinstance(reader, ScriptedReader)
    reader.draw = draw
    return reader


@functools.lru_cache(maxsize=4)
def _context(bench: Bench) -> int:
    for length in CONTEXTS:
        with contextlib.suppress(ValueError), items_of(bench) as items:
            scores = prepared(bench, items).evaluate(new_reader(bench, max_len=length))
            if scores and all(math.isfinite(score.value) for score in scores.values()):
                return length
    return CONTEXTS[0]


@dataclass
class File:
    """A file of items: ``rows`` if it has JSON objects, else ``text``."""

    name: str
    rows: list[dict[str, object]] = field(default_factory=list)
    text: str = ""

    @property
    def is_json(self) -> bool:
        return bool(self.rows)

    def lines(self) -> list[str]:
        """The lines of the copy: one for each item, or those of the text."""
        if self.is_json:
            return [json.dumps(row, ensure_ascii=False) for row in self.rows]
        return self.text.splitlines()


@dataclass
class Items:
    """Copies of the first items of the part's files, in a temporary folder."""

    folder: Path
    files: list[File]

    def write(self, copy: str, files: Sequence[File] | None = None, end: str = "") -> list[str]:
        """Write files into a subfolder ``copy``, and a last line ``end``. Returns their paths."""
        paths = []
        for number, file in enumerate(self.files if files is None else files):
            path = self.folder / copy / str(number) / file.name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("\n".join(file.lines() + [end] * bool(end)) + "\n", encoding="utf-8")
            paths.append(str(path))
        return paths

    def json_files(self) -> list[File]:
        """The files with JSON objects. Raises NotApplicable if there are none."""
        if not self.files:
            raise NotApplicable(NO_FILES)
        files = [file for file in self.files if file.is_json]
        if not files:
            raise NotApplicable("its files are plain text, which has no items to change")
        return files


@contextlib.contextmanager
def items_of(bench: Bench) -> Iterator[Items]:
    """The items of the part; without files if it has none."""
    knob = bench.entry.knobs.get("paths")
    paths = bench.knobs.get("paths", None if knob is None or knob.default is knob.empty else knob.default)
    patterns = [paths] if isinstance(paths, str) else list(paths) if isinstance(paths, list | tuple) else []
    with tempfile.TemporaryDirectory() as folder:
        located = builtin.located("paths", [str(pattern) for pattern in patterns])
        yield Items(Path(folder), [_read(path) for pattern in located for path in _matches(pattern)])


def _matches(pattern: str) -> list[Path]:
    path = Path(os.path.expanduser(pattern))
    matches = [path] if path.is_file() else [Path(name) for name in sorted(glob.glob(str(path), recursive=True))]
    if not any(match.is_file() for match in matches):
        raise ValueError(f"paths: no file matches {pattern!r} (looked from {Path.cwd()})")
    return [match for match in matches if match.is_file()]


def _read(path: Path) -> File:
    """The first items of a file, or the beginning of a text."""
    name = path.stem if path.suffix in (".gz", ".zst", ".bz2", ".xz") else path.name
    with opened(path) as stream:
        text = stream.read(2**22).decode("utf-8-sig", errors="ignore")
    rows: list[dict[str, object]] = []
    with contextlib.suppress(JSONError):
        for _, value in itertools.islice(values(iter([text])), ITEMS):
            if not isinstance(value, dict):
                break
            rows.append(value)
    if len(text) > CHARACTERS:
        text = text[: text.rfind("\n", 0, CHARACTERS) + 1 or CHARACTERS]
    return File(name, rows, "" if rows else text)


def prepared(bench: Bench, items: Items | Sequence[str] = ()) -> Evaluator:
    """A new instance, prepared, that reads the items or the files of these paths. Raises NotApplicable if it can't be
    used here, and ValueError for items that it refuses."""
    try:
        part = instance(bench, items.write("plain") if isinstance(items, Items) else items)
        part.prepare()
    except (ImportError, OSError, ValueError) as error:
        if isinstance(error, ValueError) and not isinstance(error.__cause__, ImportError):
            raise
        raise NotApplicable(f"it can't be used here: {str(error)[:160]}") from error
    return part


def instance(bench: Bench, paths: Sequence[str] = ()) -> Evaluator:
    """A new instance that is not prepared."""
    knobs = bench.knobs | ({"paths": list(paths)} if paths else {})
    return with_knobs(bench.entry.cls, knobs)()


def difference(ours: Mapping[str, Score], theirs: Mapping[str, Score], when: str) -> float:
    """The largest difference between the values, and the items' values, of two measurements, relative to values above
    1. Raises Broken if their metrics, units or items are not the same."""
    names, others = ({(name, score.unit) for name, score in scores.items()} for scores in (ours, theirs))
    if names != others:
        changed = ", ".join(sorted(f"{name} [{unit}]" for name, unit in names ^ others)[:4])
        raise Broken(f"{when}, its metrics or their units change ({changed}), and must be the same; give fixed names")
    largest = 0.0
    for name, score in ours.items():
        other = theirs[name]
        if score.items.keys() != other.items.keys():
            changed = ", ".join(sorted(score.items.keys() ^ other.items.keys())[:3])
            raise Broken(
                f"{when}, the items of {name} have other ids ({changed}), and must have the same, so that two models "
                "can be compared item by item; make an id from the item's content, not from its place"
            )
        pairs = [(score.value, other.value), *((value, other.items[id]) for id, value in score.items.items())]
        for one, two in pairs:
            if not (math.isnan(one) and math.isnan(two)) and one != two:
                largest = max(largest, abs(one - two) / max(1.0, abs(two)))
                largest = math.inf if math.isnan(largest) else largest
    return largest
