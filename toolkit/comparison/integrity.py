"""Guards on the files: the runs are those of the plan, each counts once, and nobody has edited or damaged them."""

from __future__ import annotations

import json
from collections.abc import Iterable

from toolkit.comparison.banner import Banner, list_names, show
from toolkit.comparison.runs import PlanRecord, Run


def edited(plan: PlanRecord) -> Iterable[Banner]:
    """The plan differs from the one that was run, or its folder holds runs that it does not list."""
    if plan.edited:
        yield Banner("plan edited", plan.edited)
    if plan.runs_without_job:
        listed = list_names(plan.runs_without_job)
        yield Banner("runs without a job", f"in the plan's folder, but in none of its jobs: {listed}")


def damaged(runs: list[Run]) -> Iterable[Banner]:
    """Files that changed after they were written, or that contradict each other."""
    for run in runs:
        for sentence in run.damage:
            yield Banner("damaged", f"{run.name}: {sentence}")
        for sentence in run.edits:
            yield Banner("edited", f"{run.name}: {sentence}")


def copies(runs: list[Run]) -> Iterable[Banner]:
    """Runs that should differ but are copies of one run: equal final weights or, if unknown, equal metrics."""
    groups: dict[str, list[Run]] = {}
    for run in runs:
        rows = json.dumps(run.history(), sort_keys=True) if run.rows else ""
        if content := run.facts.get("weights_sha256") or rows:
            groups.setdefault(content, []).append(run)
    for members in groups.values():
        seeds, jobs = {job_seed(run) for run in members}, {(run.arm, run.seed) for run in members}
        if len(seeds) > 1 or len(jobs) < len(members):
            names = list_names(run.name for run in members)
            yield Banner("one run twice", f"{names} have the same weights or the same metrics: they are copies")


def job_seed(run: Run) -> int:
    """The seed that a run was meant to have: its job's, or without a job the seed in its facts."""
    return run.seed if run.requested_seed is None else run.requested_seed


def resumed(runs: list[Run]) -> Iterable[Banner]:
    """Runs that were interrupted and resumed, or that started from another run."""
    for run in runs:
        for resume in run.facts.get("resumed") or []:
            changed = "; ".join(f"{key} {show(a)} -> {show(b)}" for key, (a, b) in resume.get("changed", {}).items())
            changes = f", with changes: {changed}" if changed else ""
            yield Banner("resumed", f"{run.name} was resumed at step {resume.get('step')}{changes}")
        if run.facts.get("from"):
            yield Banner("resumed", f"{run.name} started from {run.facts['from']}")
