"""``toolkit.runs``: runs as a table of pandas, for notebooks."""

from __future__ import annotations

import glob
import json
import logging
import math
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from toolkit.comparison.runs import Run, read_run, runs_of_plan
from toolkit.config import keys

if TYPE_CHECKING:
    from pandas import DataFrame

log = logging.getLogger("toolkit")
LAST = ["parameters", "tokens", "seconds", "device", "commit", "path", "damage"]  # the last columns of a run's line


def runs(patterns: str | Path | Iterable[str | Path], rows: bool = False) -> DataFrame:
    """Read runs into a pandas DataFrame.

    patterns  a folder or pattern such as "runs/*", or several. A folder is that of a run, that of a plan that
              ``toolkit.ablate`` has run, or one that holds runs
    rows      False: one line for each run. True: one line for each row of the runs' metrics.jsonl

    The columns of a line for a run: ``run`` (name), ``arm`` (of a plan; "" without one), ``seed``, ``state`` ("done",
    "stopped", "running", "diverged", ... , "not begun" for a job of a plan without a run), ``step`` (where it is) and
    ``steps`` (where it ends); the knobs of the config in which the runs differ, such as ``GPT.n_layer`` (None where the
    part is not built); the last value of every metric, such as ``val/loss_nats``; ``parameters``, ``tokens`` (of the
    whole run), ``seconds``, ``device``, ``commit``; ``path``; and ``damage``: what is wrong with the run's files, "" if
    nothing is. A run whose results may be affected by damage has no metrics, as in ``toolkit.compare``.

    The columns with ``rows``: ``run``, ``path``, ``step``, and every metric; NaN where a row lacks it. Training and
    evaluation at one step are two rows: ``frame.dropna(subset=["val/loss_nats"])`` selects the evaluations.

    Raises ValueError if a pattern matches no run, or pandas is missing. Damage is logged as a warning too."""
    try:
        import pandas
    except ImportError as error:
        raise ValueError("toolkit.runs needs pandas: python -m pip install pandas") from error
    if not isinstance(patterns, Iterable | Path):
        raise ValueError(f'patterns: {patterns!r} is no text; name runs, or a pattern: toolkit.runs("runs/*")')
    pattern_list = (patterns,) if isinstance(patterns, str | Path) else tuple(patterns)
    if not pattern_list:
        raise ValueError('name at least one run, or a pattern: toolkit.runs("runs/*")')
    by_path = {run.path.resolve(): run for pattern in pattern_list for run in _matching(str(pattern))}
    every_run = list(by_path.values())
    for run in every_run:
        if run.damage:
            log.warning("%s%s", "; ".join(run.damage), "" if run.is_whole else "; its metrics are left out")
    if rows:
        lines = [_row(run, row) for run in every_run if run.is_whole for row in run.rows]
        first, last = ["run", "path", "step"], []
    else:
        differing = _differing_keys(every_run)
        lines = [_line(run, differing) for run in every_run]
        first, last = ["run", "arm", "seed", "state", "step", "steps", *differing], LAST
    names = sorted({name for line in lines for name in line} - {*first, *last})
    return pandas.DataFrame(lines, columns=[*first, *names, *last])


def _matching(pattern: str) -> list[Run]:
    """The runs in all folders that match a pattern. Raises ValueError if there are none."""
    folders = [Path(path) for path in sorted(glob.glob(pattern)) or [pattern] if Path(path).is_dir()]
    matches = [run for folder in folders for run in _runs_in(folder)]
    if not matches:
        raise ValueError(
            f"{pattern}: no run or plan found; the folder of a run holds config.gin, that of a plan plan.json"
        )
    return matches


def _runs_in(folder: Path) -> list[Run]:
    """The run in a folder, or all runs of the plan in it, or the runs in its subfolders."""
    if (folder / "config.gin").is_file():
        return [read_run(folder)]
    plan = folder / "plan.json"
    if plan.is_file():
        try:
            return runs_of_plan(plan, folder, None)[1]
        except ValueError as error:
            log.warning("%s; its runs are read without their arms", error)
    return [read_run(config.parent) for config in sorted(folder.glob("*/config.gin"))]


def _differing_keys(runs: list[Run]) -> list[str]:
    """The config keys in which the runs differ, without the seed, which has a column."""
    configs = [run.config for run in runs if run.config]
    differing = {key for config in configs[1:] for key in keys.differences(configs[0], config)}
    return [key for key in dict.fromkeys(key for config in configs for key in config) if key in differing - {keys.SEED}]


def _line(run: Run, differing: Iterable[str]) -> dict[str, Any]:
    """The line of a run."""
    facts = run.facts
    metrics: dict[str, float] = {}
    for row in run.rows if run.is_whole else ():
        metrics |= _metrics(row)
    metrics.pop("tokens", None)  # so far; the column ``tokens`` is for the whole run
    return {
        "run": run.name,
        "arm": run.arm,
        "seed": run.seed if facts or run.arm else None,
        "state": run.state,
        "step": run.step,
        "steps": facts.get("steps"),
        **{key: _cell(run.config.get(key)) for key in differing},
        **metrics,
        "parameters": facts.get("parameters", {}).get("total"),
        "tokens": facts.get("tokens"),
        "seconds": facts.get("seconds"),
        "device": facts.get("device"),
        "commit": facts.get("commit"),
        "path": str(run.path),
        "damage": "; ".join(run.damage),
    }


def _row(run: Run, row: dict[str, Any]) -> dict[str, Any]:
    """The line of a row of metrics.jsonl."""
    return {"run": run.name, "path": str(run.path), "step": row["step"], **_metrics(row)}


def _metrics(row: dict[str, Any]) -> dict[str, float]:
    """The metrics in a row of metrics.jsonl; NaN for what is no number."""
    return {
        name: value if isinstance(value, int | float) and not isinstance(value, bool) else math.nan
        for name, value in row.items()
        if name != "step"
    }


def _cell(value: object) -> object:
    """A knob's value as pandas can group and sort it: a list or dict becomes JSON."""
    return json.dumps(value) if isinstance(value, list | dict) else value
