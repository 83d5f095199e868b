"""How far each job has come, read from its run folder; and the learning rate that did best."""

from __future__ import annotations

import contextlib
import json
import math
import statistics
from dataclasses import dataclass
from pathlib import Path

from toolkit.store import factsfile
from toolkit.store.disk import read_json_or_warn

LONG_END = 2**20  # bytes of metrics.jsonl: the rows of a few steps of any model


@dataclass
class JobProgress:
    """How far one job has come, read from its run folder."""

    state: str  # "waiting", "running", or the final state in status.json
    step: int = 0
    loss: float | None = None
    step_ms: float | None = None
    metric: float | None = None
    seconds: float | None = None  # duration of the whole run; None until it is done


def read_progress(folder: Path, metric: str) -> JobProgress:
    """Read a job's progress from its run folder. ``metric`` is a column of metrics.jsonl. The state "running" is what
    the run last wrote; only the launcher knows whether the process is still alive."""
    status = read_json_or_warn(folder / "status.json")
    if not status:
        return JobProgress("waiting")
    state = status.get("state")
    progress = JobProgress(state if isinstance(state, str) else "failed", _integer_or_zero(status.get("step")))
    if progress.state == "done":
        progress.seconds = _number_or_none(factsfile.read(folder).get("seconds"))
    rows = last_rows(folder / "metrics.jsonl")
    for column in ("train/loss_nats", metric) if progress.state == "done" else ("train/loss_nats",):
        if not any(column in row for row in rows):  # one row of the probes of a deep model is longer than the usual end
            rows = last_rows(folder / "metrics.jsonl", LONG_END)
            break
    for row in reversed(rows):
        if progress.state != "done":
            progress.step = max(progress.step, _integer_or_zero(row.get("step")))
        if progress.loss is None:
            progress.loss = _number_or_none(row.get("train/loss_nats"))
        if progress.step_ms is None:
            progress.step_ms = _number_or_none(row.get("time/step_ms"))
        if progress.metric is None:
            progress.metric = _number_or_none(row.get(metric))
    return progress


def _integer_or_zero(value: object) -> int:
    return value if type(value) is int else 0


def _number_or_none(value: object) -> float | None:
    """The value if it is a number, else None: a file may hold anything."""
    return value if isinstance(value, int | float) and not isinstance(value, bool) else None


def last_rows(path: Path, size: int = 8192) -> list[dict[str, object]]:
    """The rows in the last ``size`` bytes of a metrics.jsonl. Lines that aren't JSON objects are skipped, since the
    file may be cut anywhere."""
    try:
        with open(path, "rb") as file:
            file.seek(max(0, path.stat().st_size - size))
            lines = file.read().decode("utf-8", errors="replace").splitlines()
    except OSError:
        return []
    rows = []
    for line in lines:
        with contextlib.suppress(ValueError):
            rows.append(json.loads(line))
    return [row for row in rows if isinstance(row, dict)]


def choose(progress_by_rate: dict[float, list[JobProgress]], higher_is_better: bool = False) -> float:
    """The learning rate with the best mean metric. Rates are ordered by their number of diverged runs first, then by
    the mean. Raises ValueError if a finished run has no value of the metric."""
    if any(
        progress.state == "done" and progress.metric is None for runs in progress_by_rate.values() for progress in runs
    ):
        raise ValueError("Ablation.metric is in no row of metrics.jsonl; the last row always has val_full/loss_nats")

    def rank(rate: float) -> tuple[int, float, float]:
        values = [
            progress.metric
            for progress in progress_by_rate[rate]
            if progress.state == "done" and progress.metric is not None
        ]
        diverged, sign = len(progress_by_rate[rate]) - len(values), -1 if higher_is_better else 1
        return (diverged, sign * statistics.fmean(values) if values else math.inf, rate)

    return min(progress_by_rate, key=rank)
