"""Check a knob's value: kind, type, range, and that files and tensors can hold it."""

from __future__ import annotations

import functools
import re
import typing
from collections.abc import Iterator
from typing import Any

from pydantic import ConfigDict, TypeAdapter, ValidationError

from toolkit.config import keys
from toolkit.config.layers import Reference, show
from toolkit.protocols import KINDS
from toolkit.registry import CATALOG, Entry

STRICT = ConfigDict(strict=True, arbitrary_types_allowed=True, allow_inf_nan=False)
LARGEST = 2**63 - 1
TOO_LARGE = f"an integer must lie between {-LARGEST} and {LARGEST}: torch and numpy hold no larger ones"


def find_part(name: str) -> Entry | None:
    """The part of a name, or None. The part's module, or the end of it, may precede the name: ``attention.Name``."""
    entry = CATALOG.get(keys.bare(name))
    return entry if entry and f".{entry.module}.{entry.name}".endswith(f".{name}") else None


def known_part(name: str) -> Entry:
    """The part of a name that was checked before."""
    entry = find_part(name)
    assert entry is not None, name
    return entry


def names_of(kind: str | None) -> list[str]:
    """The names of all registered parts of a kind."""
    return [entry.name for entry in CATALOG.values() if entry.kind == kind]


def kind_held(entry: Entry, knob: str) -> str | None:
    """The kind of part that a knob holds, or None. A knob with the name of a kind, or its plural, holds that kind; so
    does one whose name ends in a kind, if its annotation is a class (qk_norm)."""
    for name in (knob, knob.removesuffix("s")):
        if name in KINDS:
            return name
    kind = knob.rpartition("_")[2]
    kind = kind if kind in KINDS else kind.removesuffix("s")
    return kind if kind in KINDS and _has_classes(entry.hints.get(knob)) else None


def _has_classes(annotation: object) -> bool:
    """Whether an annotation, or one of its parts, is ``type``."""
    return annotation is type or any(map(_has_classes, typing.get_args(annotation)))


def check_value(entry: Entry, knob: str, value: object) -> Iterator[str]:
    """Problems of a value. A slot is checked by the kind that its name says, any other knob by its annotation."""
    kind, name = kind_held(entry, knob), keys.spell(entry.name, knob)
    if too_large(value):
        yield f"{name} = {show(value)[:40]}: {TOO_LARGE}"
    elif not _is_text(value):
        yield (
            f"{name} = {show(value)[:40]}: the text has half of a surrogate pair, which can't be written as UTF-8; "
            "remove it"
        )
    elif kind and not (value is None and not type_errors(entry, knob, None)):
        if problem := _slot_problem(entry, knob, kind, value):
            yield problem
    elif reasons := type_errors(entry, knob, value):
        yield f"{name} = {show(value)}: it {', or '.join(reasons)}"


def _slot_problem(entry: Entry, slot: str, kind: str, value: object) -> str | None:
    """What is wrong with a slot's value: no reference, another kind, an empty list, or a list where the slot holds one
    part; None if it is right."""
    name = keys.spell(entry.name, slot)
    for item in value if isinstance(value, list | tuple) else [value]:
        if not isinstance(item, Reference):
            example = next(iter(names_of(kind)), "Name")
            return f"{name} takes a reference to a {kind}, such as @{example}, not {show(item)}"
        if (other := known_part(item.name).kind) != kind:
            listed = ", ".join(names_of(kind))
            return f"{name} = {item}: {item} is of kind {other}; parts of kind {kind} are {listed}"
    if value == [] and entry.knobs[slot].default != ():
        return f"{name} = [] is empty; it needs at least one {kind}"
    if type_errors(entry, slot, value):
        expected = f"one {kind}, not a list" if isinstance(value, list) else f"a list: write [{show(value)}]"
        return f"{name} = {show(value)}: it takes {expected}"
    return None


def type_errors(entry: Entry, knob: str, value: object) -> list[str]:
    """Why a value does not fit the knob's annotation, in pydantic's words without the subject; empty if it fits."""
    try:
        _adapter(entry, knob).validate_python(_classes(value))
    except ValidationError as error:
        reasons = (each["msg"].removeprefix("Input ").removeprefix("Value ") for each in error.errors())
        return list(dict.fromkeys(reasons))
    return []


@functools.cache
def _adapter(entry: Entry, knob: str) -> TypeAdapter[object]:
    """pydantic's strict check of a knob's annotation; a knob without one accepts anything."""
    annotation: Any = entry.hints.get(knob, object)  # whatever a part's author wrote
    return TypeAdapter(annotation, config=STRICT)


def too_large(value: object) -> bool:
    """Whether a value has an integer that torch and numpy can't hold; lists, tuples and dicts are searched."""
    if isinstance(value, list | tuple):
        return any(map(too_large, value))
    if isinstance(value, dict):
        return any(map(too_large, [*value, *value.values()]))
    return isinstance(value, int) and not -LARGEST <= value <= LARGEST


def _is_text(value: object) -> bool:
    """Whether all text in a value can be written as UTF-8; lists, tuples and dicts are searched."""
    if isinstance(value, list | tuple):
        return all(map(_is_text, value))
    if isinstance(value, dict):
        return all(map(_is_text, [*value, *value.values()]))
    return not (isinstance(value, str) and re.search("[\ud800-\udfff]", value))


def _classes(value: object) -> object:
    """The value with references, alone or in a list, replaced by their classes."""
    if isinstance(value, Reference):
        return known_part(value.name).cls
    return type(value)(map(_classes, value)) if isinstance(value, list | tuple) else value
