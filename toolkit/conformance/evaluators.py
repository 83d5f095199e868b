"""Checks of an evaluator: what its scores may depend on, what it may change, and which items it refuses.

Parts with a knob ``paths`` are checked with the first items of their files, in copies that the checks change."""

from __future__ import annotations

import contextlib
import copy
import json
import math
import random
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any, SupportsFloat

import numpy as np
import torch
from torch import Tensor

from toolkit.conformance.bench import Bench
from toolkit.conformance.lines import Broken, Gauge, NotApplicable, check
from toolkit.conformance.purity import generator_states, generators_restored, is_same, state_of
from toolkit.conformance.readers import (
    LN2,
    NO_FILES,
    File,
    Items,
    ScriptedReader,
    difference,
    instance,
    items_of,
    new_reader,
    prepared,
    scripted,
)
from toolkit.measures import Score

ROUNDING = 1e-4  # batches of another size add the same numbers in another order
REPEATED = 1e-6
MARK = "qzxv"  # a word that no text has
ANSWERS = ("answer", "answers", "label", "gold", "target", "targets", "solution", "expected", "reference", "references")
Leaf = tuple[str | int, ...]  # the place of a value in an item: ("choices", 0)


@check(
    "scores do not depend on the batch size",
    "evaluator",
    look_at="means of batches, padding, and whatever reads reader.batch_tokens; take means over all items or tokens",
)
def batch_size(bench: Bench) -> Gauge:
    """The values and the items' values are the same, but for rounding, if the reader computes 1, 100, 700 or 100,000
    tokens at a time."""
    gauge = Gauge(ROUNDING, "largest difference")
    with items_of(bench) as items:
        expected = prepared(bench, items).evaluate(new_reader(bench, batch_tokens=1))
        for size in (100, 700, 100_000):
            scores = prepared(bench, items).evaluate(new_reader(bench, batch_tokens=size))
            gauge.record(difference(scores, expected, f"with {size} tokens in a batch"), f"batch_tokens={size}")
    return gauge


@check(
    "scores do not depend on the item order",
    "evaluator",
    look_at="state from one item to the next, ids made from line numbers, and the order of `paths`",
)
def order(bench: Bench) -> Gauge:
    """The values and the items' ids and values are the same if the items stand in another order in their file, and if
    the files of ``paths`` are given in another order."""
    gauge = Gauge(ROUNDING, "largest difference")
    with items_of(bench) as items:
        if not items.files:
            raise NotApplicable(NO_FILES)
        reader = new_reader(bench)
        if any(file.is_json and len(file.rows) > 1 for file in items.files):
            expected = prepared(bench, items).evaluate(reader)
            for number, name in enumerate(("backwards", "shuffled")):
                files = [File(file.name, _reordered(file.rows, number), file.text) for file in items.files]
                scores = prepared(bench, items.write(name, files)).evaluate(reader)
                gauge.record(difference(scores, expected, f"with the items {name}"), f"items {name}")
        paths = items.write("halves", [half for file in items.files for half in _halves(file)])
        with contextlib.suppress(ValueError):  # too short for the part
            expected = prepared(bench, paths).evaluate(reader)
            scores = prepared(bench, paths[::-1]).evaluate(reader)
            gauge.record(difference(scores, expected, "with `paths` backwards"), f"{len(paths)} files backwards")
    if not gauge.tried:
        raise NotApplicable("its files are too short to be divided")
    return gauge


def _reordered(rows: list[dict[str, object]], number: int) -> list[dict[str, object]]:
    return rows[::-1] if number == 0 else random.Random(1).sample(rows, len(rows))


def _halves(file: File) -> list[File]:
    stem, dot, suffix = file.name.partition(".")
    rows, cut = len(file.rows) // 2, file.text.find("\n", len(file.text) // 2) + 1
    first = File(f"{stem}_first{dot}{suffix}", file.rows[:rows], file.text[:cut])
    second = File(f"{stem}_second{dot}{suffix}", file.rows[rows:], file.text[cut:])
    return [half for half in (first, second) if half.rows or half.text]


@check(
    "scores do not depend on earlier calls",
    "evaluator",
    look_at="attributes that evaluate() changes, and random generators without a seed or kept between calls",
)
def afresh(bench: Bench) -> Gauge:
    """A model's scores are the same when they are measured again, before and after another model, after another
    prepare(), and by another instance."""
    gauge = Gauge(REPEATED, "largest difference")
    with items_of(bench) as items:
        reader, part = new_reader(bench), prepared(bench, items)
        expected = part.evaluate(reader)
        gauge.record(difference(part.evaluate(reader), expected, "in a second call"), "second call")
        other = new_reader(bench, seed=1)
        of_other = prepared(bench, items).evaluate(other)
        gauge.record(difference(part.evaluate(other), of_other, "for a second model"), "a second model")
        gauge.record(difference(part.evaluate(reader), expected, "after another model"), "after another model")
        part.prepare()
        gauge.record(difference(part.evaluate(reader), expected, "after a second prepare()"), "prepare() again")
        fresh = prepared(bench, items).evaluate(reader)
        gauge.record(difference(fresh, expected, "in another instance"), "another instance")
    return gauge


@check("measuring does not change the model", "evaluator")
def unchanged(bench: Bench) -> Gauge:
    """evaluate() changes no weight, buffer or gradient, no module's training mode, requires_grad or hooks, and no
    setting of torch."""
    reader = new_reader(bench)
    for parameter in reader.model.parameters():
        parameter.grad = torch.full_like(parameter, 0.5)  # as in training, so that zero_grad() is seen
    with items_of(bench) as items:
        part, before = prepared(bench, items), state_of(reader.model)
        part.evaluate(reader)
        after = state_of(reader.model)
    changed = [name for name in before | after if not is_same(before.get(name), after.get(name))]
    if changed:
        raise Broken(
            f"evaluate() changes {', '.join(changed[:3])}{' and more' if len(changed) > 3 else ''}, and must change "
            "nothing: the model that it gets is in training; remove train(), eval(), hooks and in-place operations"
        )
    gauge = Gauge(note=f"{len(before)} weights, gradients, modes, hooks and settings")
    gauge.record(0, "one call")
    return gauge


@check(
    "uses no global random generator",
    "evaluator",
    look_at="torch.rand, np.random and random; use np.random.default_rng(seed) or random.Random(seed)",
)
def no_global_draws(bench: Bench) -> Gauge:
    """The constructor, prepare() and evaluate() leave the global random generators of torch, numpy and Python as they
    were, and the scores do not depend on their seeds."""
    gauge, measured = Gauge(REPEATED, "largest difference between seeds"), []
    reader = new_reader(bench)
    with items_of(bench) as items, generators_restored():
        for seed in (1, 2):
            torch.manual_seed(seed)
            np.random.seed(seed)
            random.seed(seed)
            before = generator_states()
            measured.append(prepared(bench, items).evaluate(reader))
            moved = [name for name, state in generator_states().items() if state != before[name]]
            if moved:
                raise Broken(
                    f"it draws from the global generator of {' and '.join(moved)}, which training uses, and must leave "
                    "it as it was: a run would change when it is measured; use a generator of its own with a fixed "
                    "seed, such as np.random.default_rng(0)"
                )
    gauge.record(difference(measured[1], measured[0], "with another seed"), "seeds 1 and 2")
    return gauge


@check("scores are finite numbers with a unit", "evaluator")
def form(bench: Bench) -> Gauge:
    """evaluate() returns {metric: Score} with finite numbers, a unit, names without white space and finite items, and
    ``higher_is_better`` is True or False."""
    with items_of(bench) as items:
        part = prepared(bench, items)
        scores = part.evaluate(new_reader(bench))
    if not isinstance(getattr(part, "higher_is_better", None), bool):
        raise Broken(
            "higher_is_better is not True or False, and must be, so that `compare` knows which model is better"
        )
    if not isinstance(scores, Mapping) or not scores or not all(isinstance(s, Score) for s in scores.values()):
        raise Broken(f"evaluate() returned {scores!r:.80}, and must return {{metric: toolkit.measures.Score}}; fill it")
    for name, score in scores.items():
        if not isinstance(name, str) or not re.fullmatch(r"[^\s/]+(/[^\s/]+)*", name) or not name.isprintable():
            raise Broken(
                f"{name!r} can't be the name of a metric, eval/NAME/METRIC, which must have no white space and no "
                "empty part; use letters, digits and _"
            )
        if not isinstance(score.unit, str) or not score.unit.strip():
            raise Broken(f"{name} has no unit: {score.unit!r}, and must have one; write 'fraction' or 'nats', say")
        _check_number(score.value, name)
        for item, value in score.items.items():
            if not isinstance(item, str) or not item:
                raise Broken(f"{item!r} is the id of an item of {name}, and must be text; use the id of the Item")
            _check_number(value, f"{name} of the item {item}")
    gauge = Gauge(note=", ".join(f"{name} [{score.unit}]" for name, score in list(scores.items())[:4]))
    gauge.record(0, f"{len(scores)} metrics")
    return gauge


def _check_number(value: object, what: str) -> None:
    if isinstance(value, bool | Tensor) or not isinstance(value, SupportsFloat) or not math.isfinite(value):
        raise Broken(f"{what} is {value!r:.40}, and must be a finite number; look at divisions by 0, and use float()")


@check(
    "each byte of a text is counted once",
    "evaluator",
    look_at="tokens or characters counted as bytes, texts counted twice, and bytes of a context without its nats",
)
def bytes_once(bench: Bench) -> Gauge:
    """With a reader that gives ln 2 nats per byte, every metric in bits per byte is 1, and every metric in nats per
    byte is ln 2. Texts have letters of two bytes, and tokens have 1, 2 or 3 bytes."""
    gauge = Gauge(1e-9, "distance to 1 bit per byte")
    with items_of(bench) as items:
        files = [File(file.name, _accented(file.rows), _accented(file.text)) for file in items.files]
        try:
            part = prepared(bench, items.write("accented", files))
        except ValueError:
            part = prepared(bench, items)  # it refuses the changed texts
        for name, score in part.evaluate(scripted(bench)).items():
            unit = f"{score.unit} {name}".lower().replace("/", " per ").replace("_", " ").replace("-", " ")
            expected = 1.0 if "bits per byte" in unit else LN2 if "nats per byte" in unit else None
            if expected is None:
                continue
            for value in (score.value, *score.items.values()):
                gauge.record(abs(value / expected - 1), name)
    if not gauge.tried:
        raise NotApplicable("it has no metric in bits or nats per byte")
    return gauge


def _accented(value: Any) -> Any:
    """A value with é in place of e in all of its texts, but not in the names of fields."""
    if isinstance(value, str):
        return value.replace("e", "é")
    if isinstance(value, list):
        return [_accented(each) for each in value]
    return {key: _accented(each) for key, each in value.items()} if isinstance(value, dict) else value


@check(
    "scores depend on the model",
    "evaluator",
    look_at="what the model's replies are used for; a score that ignores them measures the items",
)
def depends(bench: Bench) -> Gauge:
    """Readers with other nats give other scores. Tested for parts that ask for nats or continuations."""
    gauge = Gauge(0.0, "scores that are always the same")
    with items_of(bench) as items:
        readers = [scripted(bench, draw) for draw in range(16)]
        measured = [prepared(bench, items).evaluate(reader) for reader in readers]
    if not readers[0].texts and not readers[0].pairs:
        raise NotApplicable("it asks for no nats and no continuations")
    distinct = {tuple(score.value for score in scores.values()) for scores in measured}
    gauge.record(float(len(distinct) == 1), "16 readers")
    return gauge


@check("the model is not shown the answer", "evaluator")
def not_shown(bench: Bench) -> Gauge:
    """The model does not read what it must predict. Each of the first items is put into a file of its own and changed:

    - A word is replaced by a word that no text has. It must not occur in the context and in the continuation of one
      pair, unless all continuations of this context do (options that are listed).
    - A number, a letter or a copy of another text of the item is changed. If this changes contexts but no continuation,
      it must not change the scores: it would be the right answer, shown to the model.
    - A field with the name of an answer (``ANSWERS``) must not change a prompt of ``generate``.

    It does not find answers that are shown in another form (translated, in other words), or under other names to
    ``generate``, and what comes from elsewhere than ``paths``."""
    tried = 0
    with items_of(bench) as items:
        for file in items.json_files():
            for row in file.rows[:3]:
                tried += _check_item(bench, items, file.name, row)
    if not tried:
        raise NotApplicable("it gives the model no context and no prompt")
    gauge = Gauge(note=f"{tried} changes of items, none in a context and its continuation")
    gauge.record(0, f"{tried} changes")
    return gauge


def _check_item(bench: Bench, items: Items, name: str, row: dict[str, object]) -> int:
    """Check one item. Returns how many changes were tried. Raises Broken."""

    def asked(row: dict[str, object]) -> tuple[ScriptedReader, dict[str, float]] | None:
        """What the part asks, and its scores; None if it refuses the item."""
        reader = scripted(bench, 0)
        try:
            scores = prepared(bench, items.write("one", [File(name, [row])])).evaluate(reader)
        except ValueError:
            return None
        return reader, {name: score.value for name, score in scores.items()}

    original = asked(row)
    if original is None or not (original[0].pairs or original[0].prompts):
        return 0
    tried, leaves = 0, list(_leaves(row))
    texts = [value for _, value in leaves if isinstance(value, str)]
    for leaf, value in leaves:
        for marked in _marked(value):
            if result := asked(_replaced(row, leaf, marked)):
                tried += 1
                _check_marks(leaf, result[0])
                _check_prompts(leaf, original[0], result[0])
        results = [each for other in _others(value, texts) if (each := asked(_replaced(row, leaf, other)))]
        tried += len(results)
        for reader, _ in results:
            _check_prompts(leaf, original[0], reader)
        readers = [reader for reader, _ in (original, *results)]
        contexts = {tuple(sorted(context for context, _ in reader.pairs)) for reader in readers}
        continuations = {tuple(sorted(text for _, text in reader.pairs)) for reader in readers}
        if len(contexts) > 1 and len(continuations) == 1 and any(scores != original[1] for _, scores in results):
            raise Broken(
                f"the field {_spelled(leaf)} changes the scores, so it is the right answer, and it changes the "
                "contexts, so the model is shown it; it must only be judged by it; leave the field out of the context"
            )
    return tried


def _check_marks(leaf: Leaf, reader: ScriptedReader) -> None:
    for context, text in reader.pairs:
        if MARK not in context or MARK not in text:
            continue
        options = {other.strip() for before, other in reader.pairs if before == context}
        if len(options) > 1 and all(option in context for option in options):
            continue  # the context lists all options
        raise Broken(
            f"a word of the field {_spelled(leaf)} is in the context {context[-60:]!r} and in its continuation "
            f"{text[:40]!r}, so the model has read what it must predict, and must not; end the context before it (if "
            "the measure is one of copying, write what is copied into a field of its own)"
        )


def _check_prompts(leaf: Leaf, original: ScriptedReader, changed: ScriptedReader) -> None:
    if str(leaf[0]).lower() in ANSWERS and sorted(original.prompts) != sorted(changed.prompts):
        raise Broken(
            f"the field {_spelled(leaf)} changes the prompt that the model continues, and an answer must not; leave "
            "it out of the prompt"
        )


def _leaves(value: object, place: Leaf = ()) -> Iterator[tuple[Leaf, object]]:
    """Each text, number and truth value in an item, with its place."""
    if isinstance(value, dict | list):
        for key, each in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _leaves(each, (*place, key))
    elif isinstance(value, str | int | float):
        yield place, value


def _replaced(row: dict[str, object], leaf: Leaf, value: object) -> dict[str, object]:
    changed = copy.deepcopy(row)
    inner: object = changed
    for key in leaf[:-1]:
        inner = inner[key]  # type: ignore[index]  # the leaf's own place
    inner[leaf[-1]] = value  # type: ignore[index]
    return changed


def _marked(value: object) -> list[str]:
    """A text with one of its first or last words replaced by MARK."""
    words = list(re.finditer(r"\w+", value)) if isinstance(value, str) else []
    chosen = words if len(words) < 5 else [words[0], words[1], words[-2], words[-1]]
    return [f"{value[: word.start()]}{MARK}{value[word.end() :]}" for word in chosen if isinstance(value, str)]


def _others(value: object, texts: list[str]) -> list[object]:
    """Other values of a field that may say which answer is right: a truth value, a small number, a letter, or a copy
    of another text of the item."""
    if isinstance(value, bool):
        return [not value]
    if isinstance(value, int):
        return [other for other in range(6) if other != value]
    if isinstance(value, str) and len(value) == 1:
        group = next((group for group in ("ABCDE", "abcde", "012345") if value in group), "")
        return [other for other in group if other != value]
    if isinstance(value, str) and Counter(texts)[value] > 1:
        return [other for other in dict.fromkeys(texts) if other != value]
    return []


def _spelled(leaf: Leaf) -> str:
    return ".".join(map(str, leaf))


@check("a broken item is refused by file:line", "evaluator")
def refused(bench: Bench) -> Gauge:
    """prepare() raises a ValueError that names file and line for a line that is not JSON, for a value that is not an
    object, and for an object without its fields or with fields that are null. A file that does not exist is found by
    prepare(), not by the constructor, which reads nothing."""
    with items_of(bench) as items:
        if not items.files:
            raise NotApplicable(NO_FILES)
        _check_missing_file(bench, str(items.folder / "missing.jsonl"))
        file = items.json_files()[0]
        prepared(bench, items)
        nulls = json.dumps(dict.fromkeys(file.rows[0]))
        broken = {"text that is not JSON": "not JSON", "an array": "[1]", "an object without fields": "{}"}
        for number, (what, line) in enumerate((broken | {"an object whose fields are null": nulls}).items()):
            path = items.write(f"broken-{number}", [file], end=line)[0]
            where = f"{file.name}:{len(file.rows) + 1}"
            try:
                instance(bench, [path]).prepare()
            except ValueError as error:
                if where not in str(error):
                    raise Broken(
                        f"for {what} at {where}, the error must name file and line, but says: {str(error)[:160]}; put "
                        "item.where before the message"
                    ) from error
            else:
                raise Broken(
                    f"prepare() accepts {what} at {where}, and must raise a ValueError that names file and line; read "
                    "items with toolkit.evaluation.items.read_items, and their texts with text_of"
                )
    gauge = Gauge(note="refused with file and line")
    gauge.record(0, "not JSON, no object, no fields, null")
    return gauge


def _check_missing_file(bench: Bench, path: str) -> None:
    try:
        part = instance(bench, [path])
    except Exception as error:
        raise Broken(
            f"the constructor raised {type(error).__name__} for a file that does not exist; it must read nothing, as "
            "it is also called without the files; look for reads in __init__, and move them to prepare()"
        ) from error
    try:
        part.prepare()
    except ValueError:
        return
    raise Broken("prepare() accepts a path without a file, and must raise a ValueError; read all files in prepare()")


@check("the fingerprint covers the items", "evaluator")
def fingerprints(bench: Bench) -> Gauge:
    """Two instances with the same items have the same fingerprint, also after evaluate(). Other items, under the same
    file name, give another one."""
    gauge = Gauge(note="equal for equal items")
    with items_of(bench) as items:
        part = prepared(bench, items)
        before = part.fingerprint()
        if not isinstance(before, str) or not before:
            raise Broken(f"fingerprint() is {before!r:.40}, and must be text; return a hash of the items and the knobs")
        part.evaluate(new_reader(bench))
        if {part.fingerprint(), prepared(bench, items.write("copy")).fingerprint()} != {before}:
            raise Broken(
                "the same items in another folder, or evaluate(), give another fingerprint, and must not; compute it "
                "from the items and the knobs, without paths, times or hash()"
            )
        gauge.record(0, "two instances")
        if items.files:
            first = items.files[0]
            fewer = File(first.name, first.rows[1:], first.text[: len(first.text) // 2])
            if (fewer.rows or fewer.text) and _fingerprint(bench, items, fewer) == before:
                raise Broken(
                    "other items under the same file name have the same fingerprint, and must have another, since two "
                    "runs are compared only if it is equal; hash the items (toolkit.evaluation.items.fingerprint)"
                )
            gauge.record(0, "fewer items")
    return gauge


def _fingerprint(bench: Bench, items: Items, file: File) -> str:
    with contextlib.suppress(ValueError):  # too few items for the part
        return prepared(bench, items.write("fewer", [file, *items.files[1:]])).fingerprint()
    return ""
