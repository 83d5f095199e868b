"""Scores of items that are read from several files: for all of them, and file by file."""

from __future__ import annotations

from collections.abc import Sequence

from toolkit.evaluation.items import Item
from toolkit.measures import Score, mean


def groups(items: Sequence[Item]) -> dict[str, list[int]]:
    """{suffix of a metric: places of its items}: "" for all items and, with several files, "/STEM" for each file."""
    by_file: dict[str, list[int]] = {}
    for place, item in enumerate(items):
        by_file.setdefault("/" + item.id.partition("/")[0], []).append(place)
    return {"": list(range(len(items)))} | (by_file if len(by_file) > 1 else {})


def shares(metric: str, items: Sequence[Item], values: Sequence[float]) -> dict[str, Score]:
    """The scores of a metric that is a share of items, for all items and file by file."""
    return {
        metric + suffix: mean({items[place].id: values[place] for place in group}, "fraction")
        for suffix, group in groups(items).items()
    }
