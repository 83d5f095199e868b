"""The files of items: for each evaluator and step, a JSON line for each item with its value of each metric."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from toolkit.measures import Score
from toolkit.store.disk import write_bytes


def path(folder: Path, name: str, step: int) -> Path:
    """The file of an evaluator's items at a step."""
    return folder / name / f"step-{step:08d}.jsonl"


def write(folder: Path, step: int, measured: Mapping[str, Mapping[str, Score]]) -> None:
    """Write {"item": id, METRIC: value, ...} for each item of each evaluator. An evaluator without items gets no file.
    Raises OSError."""
    for name, scores in measured.items():
        items: dict[str, dict[str, float]] = {}
        for metric, score in scores.items():
            for item, value in score.items.items():
                items.setdefault(item, {})[metric] = float(value)
        if items:
            file = path(folder, name, step)
            file.parent.mkdir(parents=True, exist_ok=True)
            lines = (json.dumps({"item": item} | values) + "\n" for item, values in items.items())
            write_bytes(file, "".join(lines).encode())


def read(file: Path) -> dict[str, dict[str, float]]:
    """Read a file of items: {item: {metric: value}}."""
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    return {row.pop("item"): row for row in rows}


def remove_from(folder: Path, start: int) -> None:
    """Remove the files of step ``start`` and of later steps: an earlier attempt of the run wrote them."""
    for file in folder.glob("*/step-*.jsonl"):
        step = file.stem.removeprefix("step-")
        if step.isdigit() and int(step) >= start:
            file.unlink()
