"""The formats in which questions of multiple choice are published, and the prompts that lm-evaluation-harness (Gao et
al. 2024, https://github.com/EleutherAI/lm-evaluation-harness) makes of them."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import NamedTuple

from toolkit.evaluation.items import Item, filled, text_of


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
    return Question(f"Question: {filled(item, 'question')}\nAnswer:", choices, _place(item, "answerKey", labels))


def _piqa(item: Item) -> Question:
    choices = [filled(item, "sol1"), filled(item, "sol2")]
    return Question(f"Question: {filled(item, 'goal')}\nAnswer:", choices, _place(item, "label", 2))


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


def question(item: Item) -> Question:
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
