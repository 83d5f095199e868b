"""A banner is a violation of a fair comparison. The guards report banners, and this module has the phrases that they
share."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping
from dataclasses import dataclass
from typing import TypeVar

from toolkit.comparison.runs import Run

Value = TypeVar("Value", bound=Hashable)


@dataclass(frozen=True)
class Banner:
    """One violation: the guard's name, and a sentence with the offending values."""

    guard: str
    text: str


def report_differences(
    runs: list[Run], quantity: str, value_of: Callable[[Run], Value], describe: Callable[[Value], str] = str
) -> Iterable[Banner]:
    """A banner if the value of a quantity is not the same in all runs."""
    groups = group_by(runs, value_of)
    if len(groups) > 1:
        yield Banner(quantity, describe_groups(groups, describe))


def group_by(runs: list[Run], value_of: Callable[[Run], Value]) -> dict[Value, list[Run]]:
    """The runs of each value, in the order in which the values first occur."""
    groups: dict[Value, list[Run]] = {}
    for run in runs:
        groups.setdefault(value_of(run), []).append(run)
    return groups


def describe_groups(groups: Mapping[Value, list[Run]], describe: Callable[[Value], str]) -> str:
    """The groups as text: "float32 (rope) against bfloat16 (alibi-s1)"."""
    return " against ".join(f"{describe(value)} ({group_names(groups, value)})" for value in groups)


def group_names(groups: Mapping[Value, list[Run]], value: Value) -> str:
    """The names of a group's runs. An arm stands for its runs if no other group has a run of it."""
    elsewhere = {run.arm for other, members in groups.items() if other != value for run in members}
    return list_names(run.name if run.arm in elsewhere else run.arm for run in groups[value])


def list_names(names: Iterable[str], most: int = 6) -> str:
    """The names without repeats, separated by commas; after ``most`` of them only a count: "a, b and 3 more"."""
    distinct = list(dict.fromkeys(names))
    more = f" and {len(distinct) - most} more" if len(distinct) > most else ""
    return ", ".join(distinct[:most]) + more


def short(fingerprint: object) -> str:
    """The first 12 characters of a fingerprint, enough to tell two apart."""
    return str(fingerprint)[:12]


def show(value: object) -> str:
    """A config value as text."""
    return str(value) if not isinstance(value, float) else f"{value:g}"
