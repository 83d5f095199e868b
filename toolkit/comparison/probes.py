"""``compare --probes``: where each arm changed first. Makes arrays for ``located`` from what the probes of runs saw."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypedDict

import numpy as np
from numpy.typing import NDArray

from toolkit.comparison import located
from toolkit.comparison.banner import list_names
from toolkit.comparison.located import Cells
from toolkit.comparison.results import IDENTICAL, ArmResult, Comparison
from toolkit.comparison.runs import Run
from toolkit.probed import rows
from toolkit.probed.rows import Key, ProbeTable

Tables = list[tuple[Run, ProbeTable]]
LISTED = 12  # most cells of an arm's first step that the record lists


class CellRecord(TypedDict):
    """A cell that differs: one statistic of one module (or parameter; "" is the whole model) at one step.

    arm_mean, baseline_mean  means over the seeds
    size_sd     difference in standard deviations of the seeds
    p_adjusted  p of the difference, adjusted for all cells of the arm; None without a test
    """

    step: int
    probe: str
    statistic: str
    module: str
    arm_mean: float
    baseline_mean: float
    size_sd: float
    p_adjusted: float | None


class ArmProbes(TypedDict):
    """What changed first in an arm.

    origin       where paired runs begin to differ: before this cell, everything is equal to the last bit; None if that
                 can't be told, as for runs that aren't paired
    first        the cells of the earliest step with a difference beyond the noise of seeds, at most LISTED of
                 ``count``, the location first; empty without a difference
    steps        those at which both arms have rows
    cells        how many cells were tested; ``equal_cells`` more are equal in every seed
    only_in_arm, only_in_baseline  how many statistics of modules just one of the two has
    notes        what limits the answer
    """

    arm: str
    paired: bool
    seeds: int
    baseline_seeds: int
    steps: list[int]
    cells: int
    equal_cells: int
    origin: CellRecord | None
    first: list[CellRecord]
    count: int
    only_in_arm: int
    only_in_baseline: int
    notes: list[str]


class ProbesRecord(TypedDict):
    """The key "probes" of compare.json. ``alpha`` is that of one arm: the plan's, shared by all arms."""

    alpha: float
    arms: list[ArmProbes]


@dataclass(frozen=True)
class ArmCells:
    """The cells of an arm and the baseline: values ``(steps, keys, runs)`` and their tests ``(steps, keys)``. ``first``
    holds the (step, key) indices of the origin and of the cells that differ at the earliest step."""

    name: str
    keys: tuple[Key, ...]
    steps: tuple[int, ...]
    arm: NDArray[np.float64]
    base: NDArray[np.float64]
    cells: Cells
    depth: dict[str, int]
    first: list[tuple[int, int]]


def changes(comparison: Comparison) -> tuple[ProbesRecord, list[ArmCells]]:
    """Find for each arm what changed first. Returns the record, and the cells of each arm that could be tested. Raises
    ValueError if no run of the baseline, or of any other arm, has rows of probes."""
    tables = {arm.name: _tables(arm) for arm in comparison.arms}
    base, others = comparison.baseline, comparison.arms[1:]
    if not tables[base.name] or not any(tables[arm.name] for arm in others):
        whose = f"of the baseline {base.name}" if not tables[base.name] else f"beside those of {base.name}"
        raise ValueError(
            f"--probes: no run {whose} has rows of probes; run the arms again with the overlay gin/probe/all.gin, or "
            "with other parts in Experiment.probes"
        )
    alpha = comparison.alpha / len(others)
    examined = [_examine(arm, base, tables[arm.name], tables[base.name], alpha) for arm in others]
    return {"alpha": alpha, "arms": [record for record, _ in examined]}, [cells for _, cells in examined]


def _tables(arm: ArmResult) -> Tables:
    """The runs of an arm that have rows of probes and are not damaged, with their tables."""
    tables = [(run, rows.read(run.rows)) for run in arm.runs if run.is_whole]
    return [(run, table) for run, table in tables if table.keys]


def _examine(arm: ArmResult, base: ArmResult, ours: Tables, theirs: Tables, alpha: float) -> tuple[ArmProbes, ArmCells]:
    """The record of an arm, and its cells."""
    paired = _is_paired(arm)
    if paired:
        common = {run.seed for run, _ in ours} & {run.seed for run, _ in theirs}
        ours, theirs = (
            sorted(((run, table) for run, table in each if run.seed in common), key=lambda pair: pair[0].seed)
            for each in (ours, theirs)
        )
    keys_of, keys_of_base = (dict.fromkeys(key for _, table in each for key in table.keys) for each in (ours, theirs))
    steps_of, steps_of_base = ({step for _, table in each for step in table.steps} for each in (ours, theirs))
    keys, steps = tuple(key for key in keys_of if key in keys_of_base), tuple(sorted(steps_of & steps_of_base))
    values, base_values = _array(ours, steps, keys), _array(theirs, steps, keys)
    families = {family: i for i, family in enumerate(rows.statistics(keys))}
    family_of_key = [families[key.probe, key.statistic] for key in keys]
    cells = located.examine(values, base_values, family_of_key, paired)
    depth = rows.model_order(key.module for key in (*keys_of, *keys_of_base))
    depth_of_key = [depth[key.module] for key in keys]
    first = located.first(cells, depth_of_key, alpha)
    names = list(dict.fromkeys(key.probe for key in keys))
    probe_of_key = [names.index(key.probe) for key in keys]
    is_told = paired and len(ours) > 1
    origin = located.origin(values, base_values, family_of_key, depth_of_key, probe_of_key) if is_told else None
    marked = [origin, *(cell for cell in first if cell != origin)] if origin else first
    arm_cells = ArmCells(arm.name, keys, steps, values, base_values, cells, depth, marked)
    return {
        "arm": arm.name,
        "paired": paired,
        "seeds": len(ours),
        "baseline_seeds": len(theirs),
        "steps": list(steps),
        "cells": int(np.isfinite(cells.p).sum()),
        "equal_cells": int(cells.equal.sum()),
        "origin": _cell_record(arm_cells, *origin) if origin else None,
        "first": [_cell_record(arm_cells, step, key) for step, key in first[:LISTED]],
        "count": len(first),
        "only_in_arm": len(keys_of) - len(keys),
        "only_in_baseline": len(keys_of_base) - len(keys),
        "notes": _notes(arm, base, ours, theirs, len(keys) * len(steps)),
    }, arm_cells


def _is_paired(arm: ArmResult) -> bool:
    """Whether the comparison paired the arm's runs with the baseline's, by seed."""
    if arm.judgement and arm.judgement.verdict.word == IDENTICAL:
        return True
    return bool(arm.difference and arm.difference.paired)


def _array(tables: Tables, steps: Sequence[int], keys: Sequence[Key]) -> NDArray[np.float64]:
    """The values of runs, (steps, keys, runs), nan where a run has none."""
    values = np.full((len(steps), len(keys), len(tables)), np.nan)
    for i, (_, table) in enumerate(tables):
        row_of, column_of = ({item: i for i, item in enumerate(items)} for items in (table.steps, table.keys))
        common_rows = [(at, row_of[step]) for at, step in enumerate(steps) if step in row_of]
        common_columns = [(at, column_of[key]) for at, key in enumerate(keys) if key in column_of]
        if common_rows and common_columns:
            (to_rows, from_rows), (to_columns, from_columns) = (
                zip(*each, strict=True) for each in (common_rows, common_columns)
            )
            values[np.ix_(to_rows, to_columns, [i])] = table.values[np.ix_(from_rows, from_columns)][..., None]
    return values


def _cell_record(arm: ArmCells, step: int, key: int) -> CellRecord:
    return {
        "step": arm.steps[step],
        "probe": arm.keys[key].probe,
        "statistic": arm.keys[key].statistic,
        "module": arm.keys[key].module,
        "arm_mean": float(np.nanmean(arm.arm[step, key])),
        "baseline_mean": float(np.nanmean(arm.base[step, key])),
        "size_sd": float(arm.cells.size[step, key]),
        "p_adjusted": _number(arm.cells.p_adjusted[step, key]),
    }


def _number(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None


def _notes(arm: ArmResult, base: ArmResult, ours: Tables, theirs: Tables, cells: int) -> list[str]:
    """Sentences on what limits the answer."""
    notes = []
    for result, tables in ((base, theirs), (arm, ours)):
        if not tables:
            notes.append(f"{result.name} has no run with rows of probes")
            continue
        used = {run.path for run, _ in tables}
        if left_out := [run.name for run in result.runs if run.path not in used]:
            notes.append(f"left out, without whole rows of probes or without a partner: {list_names(left_out)}")
        last = max(table.steps[-1] for _, table in tables)
        if short := [run.name for run, table in tables if table.steps[-1] < last]:
            notes.append(f"stopped before step {last:,}: {list_names(short)}")
        for run, table in tables:
            if table.not_finite:
                key, count = next(iter(table.not_finite.items()))
                more = f" and {len(table.not_finite) - 1} more" if len(table.not_finite) > 1 else ""
                notes.append(f"{run.name}: values that are not finite are left out: {key} ({count} times){more}")
    if ours and theirs and not cells:
        notes.append("the arms have no statistic of a module at a step in common")
    if 1 in (len(ours), len(theirs)) and cells:
        notes.append("one seed can't tell a change from noise: run at least 3 seeds")
    return notes
