"""Keys of a flat config, ``scope/Part.knob``: how they are spelled, and which of them differ between two configs.

A flat config is {key: JSON value}, as in facts.json. Plans, comparisons and resumed runs all ask here, so that what
``ablate`` refuses and what ``compare`` reports can't disagree."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase
from typing import NamedTuple

ABSENT = "absent"  # shown in place of the value of a knob that a config lacks
SEED = "Experiment.seed"
PROBE_EVERY = "Experiment.probe_every"
REFERENCE = re.compile(r"@((?:[\w.]+/)*)([\w.]+)")  # "@scope/module.Part", the text of a reference


class Key(NamedTuple):
    """The three pieces of a key; ``spell(*key)`` joins them. The scope of an unscoped key is ""."""

    part: str
    knob: str
    scope: str


def spell(part: str, knob: str, scope: str = "") -> str:
    """The key of a part's knob in a scope."""
    return scoped(f"{part}.{knob}", scope)


def scoped(name: str, scope: str) -> str:
    """``scope/name``, or the name alone if the scope is ""."""
    return f"{scope}/{name}" if scope else name


def split_scope(scoped_name: str) -> tuple[str, str]:
    """(scope, name) of ``scope/name``; the scope may be ""."""
    scope, _, name = scoped_name.rpartition("/")
    return scope, name


def split(key: str) -> Key:
    """The pieces of a key. Without a dot, all of it is the knob, as in the name of a macro."""
    scope, name = split_scope(key)
    part, _, knob = name.rpartition(".")
    return Key(part, knob, scope)


def owner(key: str) -> str:
    """``scope/Part``: the part as built in its scope, to which the knob belongs."""
    part, _, scope = split(key)
    return scoped(part, scope)


def without_scope(key: str) -> str:
    """``Part.knob``."""
    return split_scope(key)[1]


def bare(name: str) -> str:
    """The name of a part without its module: ``Part`` for ``module.Part``."""
    return name.rpartition(".")[2]


def bound_by(binding: str) -> str:
    """The key that the text of a binding, ``scope/module.Part.knob = value``, binds; the module is left out."""
    part, knob, scope = split(binding.split("=")[0].strip())
    return spell(bare(part), knob, scope) if part else scoped(knob, scope)


def enclosing(scope: str) -> list[str]:
    """The scope itself and all scopes around it, the innermost first: "a/b", "a" and ""."""
    levels = scope.split("/") if scope else []
    return ["/".join(levels[:depth]) for depth in range(len(levels), -1, -1)]


def matches(key: str, patterns: Iterable[str]) -> bool:
    """Whether a key matches one of the patterns, such as those of a plan's factor; "*" stands for any text."""
    return any(fnmatchcase(key, pattern) for pattern in patterns)


def differences(before: Mapping[str, object], now: Mapping[str, object]) -> dict[str, tuple[object, object]]:
    """{key: (value before, value now)} of all keys that differ; ABSENT stands for a missing value. References to the
    same part are equal, whether or not they name its module."""
    return {
        key: (before.get(key, ABSENT), now.get(key, ABSENT))
        for key in {**before, **now}
        if not (key in before and key in now and _are_equal(before[key], now[key]))
    }


def independent_differences(
    before: Mapping[str, object], now: Mapping[str, object]
) -> dict[str, tuple[object, object]]:
    """The differences that may confound a comparison of two arms. Three kinds are left out: knobs of a part that only
    one side builds, since they follow from a slot that differs too; a knob that is None or an empty list on one side
    and missing on the other, since one toolkit lacks it; the seed, and how often probes observe."""
    built_before, built_now = ({owner(key) for key in flat} for flat in (before, now))
    return {
        key: pair
        for key, pair in differences(before, now).items()
        if owner(key) in built_before & built_now
        and key not in (SEED, PROBE_EVERY)
        and not (before.get(key) in (None, []) and now.get(key) in (None, []))
    }


def _are_equal(one: object, other: object) -> bool:
    return one == other or _without_modules(one) == _without_modules(other)


def _without_modules(value: object) -> object:
    """The JSON value with references spelled without the module: "@wide/Part" for "@wide/module.Part"."""
    if isinstance(value, str) and (reference := REFERENCE.fullmatch(value)):
        return f"@{reference[1]}{bare(reference[2])}"
    if isinstance(value, list):
        return [_without_modules(item) for item in value]
    if isinstance(value, dict):
        return {_without_modules(key): _without_modules(item) for key, item in value.items()}
    return value
