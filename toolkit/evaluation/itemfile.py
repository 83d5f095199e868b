"""The files of items: for each evaluator and step, a JSON line for each item with its value of each metric. Next to
them, units.json has the unit of each metric."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from toolkit.measures import Score
from toolkit.store import seal
from toolkit.store.disk import read_json, write_bytes, write_json

FOLDER = "evaluations"  # in a run's folder
UNITS = "units.json"


def path(folder: Path, name: str, step: int) -> Path:
    """The file of an evaluator's items at a step."""
    return folder / name / f"step-{step:08d}.jsonl"


def write(folder: Path, step: int, measured: Mapping[str, Mapping[str, Score]]) -> None:
    """Write {"item": id, METRIC: value, ...} for each item of each evaluator, and the units of its metrics. An
    evaluator without items gets no file. Raises OSError."""
    for name, scores in measured.items():
        items: dict[str, dict[str, float]] = {}
        for metric, score in scores.items():
            for item, value in score.items.items():
                items.setdefault(item, {})[metric] = float(value)
        file = path(folder, name, step)
        if scores:
            file.parent.mkdir(parents=True, exist_ok=True)
            unit_of = {metric: score.unit for metric, score in scores.items()}
            if unit_of != _read_units(file.parent):
                write_json(file.parent / UNITS, unit_of)
        if items:
            lines = (json.dumps({"item": item} | values) + "\n" for item, values in items.items())
            write_bytes(file, "".join(lines).encode())


def read(file: Path) -> dict[str, dict[str, float]]:
    """Read a file of items: {item: {metric: value}}. Raises OSError, and ValueError that names a line that ``write``
    does not write."""
    items: dict[str, dict[str, float]] = {}
    for number, line in enumerate(file.read_bytes().splitlines(), start=1):
        try:
            row = json.loads(line)
            item = row.pop("item")
            values = {metric: float(value) for metric, value in row.items()}
        except (ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError):
            raise ValueError(f"{file}:{number}: not a line of items; restore the file from a copy") from None
        if not isinstance(item, str) or item in items:
            raise ValueError(f"{file}:{number}: an item must have a name of its own; restore the file from a copy")
        items[item] = values
    return items


def units(folder: Path) -> dict[str, str]:
    """{metric: unit} of all evaluators in a run's folder, by the names ``eval/NAME/METRIC``. Files that can't be read
    are left out."""
    return {
        f"eval/{file.parent.name}/{metric}": unit
        for file in sorted(folder.glob(f"{FOLDER}/*/{UNITS}"))
        for metric, unit in _read_units(file.parent).items()
    }


def names(folder: Path, step: int) -> list[str]:
    """The files of items of a step, relative to the run's folder, with slashes."""
    return sorted(file.relative_to(folder).as_posix() for file in folder.glob(f"{FOLDER}/*/step-{step:08d}.jsonl"))


def remove_from(folder: Path, start: int) -> None:
    """Remove the files of step ``start`` and of later steps: an earlier attempt of the run wrote them."""
    for file in folder.glob("*/step-*.jsonl"):
        step = file.stem.removeprefix("step-")
        if step.isdigit() and int(step) >= start:
            file.unlink()


def _read_units(folder: Path) -> dict[str, str]:
    try:
        content = read_json(folder / UNITS)
    except ValueError:
        return {}
    return {metric: unit for metric, unit in content.items() if isinstance(unit, str) and metric != seal.KEY}
