"""Turns a table of results that anybody wrote into a plan and runs, so that ``assemble`` judges them as its own.

The table says nothing about how the runs were made. So there is no plan, no default for the smallest effect that
matters (a metric may have any unit), and ``origin`` lists the guards that can't be checked."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from toolkit.comparison import tablefile
from toolkit.comparison.origin import Table
from toolkit.comparison.runs import PlanRecord, Run
from toolkit.config.spelling import suggest
from toolkit.store import disk
from toolkit.store.factsfile import Facts

MAX_ARMS = 200  # more are a mistake: a column of numbers, for example
LOWER_IS_BETTER = "loss losses perplexity ppl nll bpb bpc bits nats ce crossentropy entropy error err wer cer".split()
OWN_COLUMNS = ("step", "line")  # of the rows that are built here
STATES = {"finished", "running", "crashed", "failed", "killed", "preempting", "preempted", "pending"}  # of W&B


@dataclass(frozen=True)
class Columns:
    """The names of the columns: of the arm, the metric, the seed and the step; the last two may be missing."""

    arm: str
    metric: str
    seed: str | None = None
    step: str | None = None

    @property
    def named(self) -> dict[str, str]:
        """{flag: column} of those that are there."""
        flags = {"--arm": self.arm, "--metric": self.metric, "--seed": self.seed, "--step": self.step}
        return {flag: column for flag, column in flags.items() if column is not None}


@dataclass(frozen=True)
class TableRun(Run):
    """A run of a table. ``title`` is its name; ``last_step`` is where its arm ends, 0 without a column of steps."""

    title: str = ""
    last_step: float = 0

    @property
    def name(self) -> str:
        return self.title

    @property
    def steps(self) -> int:
        return self.last_step  # type: ignore[return-value]  # a table may count epochs, 0.5 among them


@dataclass
class Series:
    """The rows of one run: (line, step, value) of each, where the value is None in an empty cell."""

    arm: str
    seed: int
    title: str
    place: str  # of its first row in the file
    points: list[tuple[int, float, float | None]] = field(default_factory=list)
    state: str = "done"

    @property
    def last(self) -> float:
        """The last step with a value, which may be nan; -1 if there is none."""
        return max((step for _, step, value in self.points if value is not None), default=-1)


def read(
    file: Path,
    columns: Columns,
    baseline: str | None,
    higher_is_better: bool | None,
    effect: float | None,
    command: Sequence[str],
) -> tuple[PlanRecord, list[Run]]:
    """Read a CSV file or JSON lines. ``baseline`` is an arm, by default that of the first row. ``higher_is_better`` is
    None if nobody said; then the metric's name has to tell. ``command`` are the words that repeat the comparison.
    Raises ValueError, which names the line, for whatever can't be judged."""
    if columns.step and not columns.seed:
        raise ValueError("--step: name the seeds too (--seed), since they tell which rows are one run")
    series, notes = _series(file, columns)
    table = Table(str(file), disk.sha256(file), tuple(command), columns.seed, columns.step, tuple(notes))
    return plan_of(table, series, columns.metric, baseline, higher_is_better, effect)


def plan_of(
    table: Table,
    series: list[Series],
    metric: str,
    baseline: str | None,
    higher_is_better: bool | None,
    effect: float | None,
) -> tuple[PlanRecord, list[Run]]:
    """The plan and the runs of series of values. Raises ValueError if there are too few or too many arms, or if the
    baseline is none of them."""
    arms = list(dict.fromkeys(each.arm for each in series))
    chosen = arms[0] if baseline is None else baseline
    if chosen not in arms:
        listed = ", ".join(map(tablefile.quote, arms[: tablefile.LISTED]))
        raise ValueError(f"--baseline {chosen}: not an arm{suggest(chosen, arms)}; the arms are {listed}")
    if len(arms) == 1:
        raise ValueError(f"{table.file}: only one arm, {tablefile.quote(arms[0])}, so there is nothing to compare")
    if len(arms) > MAX_ARMS:
        raise ValueError(f"{table.file}: {len(arms)} arms, at most {MAX_ARMS} can be compared; is the column right?")
    plan = PlanRecord(
        name=Path(table.file).name,
        question="",
        baseline=chosen,
        arms=(chosen, *(arm for arm in arms if arm != chosen)),
        declared=False,
        metric=_row_key(metric),
        higher_is_better=_direction(metric, higher_is_better),
        effect=effect,
        table=table,
    )
    longest = {arm: max(each.last for each in series if each.arm == arm) for arm in arms}
    return plan, [_run(each, plan.metric, longest[each.arm], Path(table.file)) for each in series]


def _direction(metric: str, higher_is_better: bool | None) -> bool:
    """Whether higher is better: as said, or False for a metric whose name is that of a loss."""
    if higher_is_better is not None:
        return higher_is_better
    words = re.split(r"[^a-z]+", metric.lower())
    if not set(words) & set(LOWER_IS_BETTER):
        raise ValueError(f"--metric {metric}: is lower better, or higher? Add --lower-is-better or --higher-is-better")
    return False


def _row_key(metric: str) -> str:
    return f"column {metric}" if metric in OWN_COLUMNS else metric


def _series(file: Path, columns: Columns) -> tuple[list[Series], list[str]]:
    """The runs of a file, and sentences on how they were read."""
    by_run: dict[tuple[str, int], Series] = {}
    counts: dict[str, int] = {}
    names = tablefile.columns(file)
    _check_columns(file, names, columns)
    empty, has_states = 0, {"Name", "State"} <= set(names) and _has_states(file)
    for row in tablefile.rows(file):
        arm = tablefile.label(row, columns.arm, file)
        counts[arm] = counts.get(arm, 0) + 1
        seed = tablefile.whole_number(row, columns.seed, file) if columns.seed else counts[arm]
        title = f"{arm} {'seed' if columns.seed else 'run'} {seed}"
        run = by_run.setdefault((arm, seed), Series(arm, seed, title, f"line-{row.line}"))
        if run.points and not columns.step:
            raise ValueError(
                f"{file}, lines {run.points[0][0]} and {row.line}: both are {tablefile.quote(title)}; if a run has "
                "several rows, name the column of steps (--step); if these are different runs, leave out --seed"
            )
        step = _step(row, columns.step, file)
        value = tablefile.number(row, columns.metric, file)
        empty += value is None
        run.points.append((row.line, step, value))
        if has_states and row.cells.get("State") != "finished":
            run.state = str(row.cells.get("State"))
    for run in by_run.values():
        _check_steps(file, run)
    return list(by_run.values()), _notes(columns, empty, has_states)


def _notes(columns: Columns, empty: int, has_states: bool) -> list[str]:
    notes = []
    if not columns.seed:
        notes.append("no column of seeds was named: the runs of an arm are numbered in the order of their rows")
    if has_states:
        notes.append("only runs whose State is finished count as finished")
    if empty and not columns.step:
        notes.append(
            f"{empty} cells of {columns.metric} are empty: these runs count as unfinished. If they diverged, write nan "
            "there, since then the runs that finished may be the better ones"
        )
    return notes


def _check_columns(file: Path, names: list[str], columns: Columns) -> None:
    for flag, column in columns.named.items():
        tablefile.require(file, names, column, flag)
    if len(set(columns.named.values())) < len(columns.named):
        listed = " ".join(f"{flag} {column}" for flag, column in columns.named.items())
        raise ValueError(f"{listed}: each flag needs a column of its own")


def _has_states(file: Path) -> bool:
    """Whether the column State holds the states of W&B's runs, as in its list of runs."""
    return all(row.cells.get("State") in STATES for row in tablefile.rows(file))


def _step(row: tablefile.Row, column: str | None, file: Path) -> float:
    if column is None:
        return 0
    step = tablefile.number(row, column, file)
    if step is None or not 0 <= step < 1e15:
        raise ValueError(
            f"{file}, line {row.line}: {column!r} is {tablefile.quote(row.cells.get(column))}, not a step (0 or more)"
        )
    return int(step) if step == int(step) else step


def _check_steps(file: Path, run: Series) -> None:
    """Raise ValueError if a run has two values at one step."""
    lines: dict[float, int] = {}
    for line, step, value in run.points:
        if value is not None and step in lines:
            raise ValueError(
                f"{file}, lines {lines[step]} and {line}: both are step {step:g} of {tablefile.quote(run.title)}"
            )
        if value is not None:
            lines[step] = line


def _run(series: Series, metric: str, longest: float, file: Path) -> Run:
    """A run with its rows. One that ends before the longest run of its arm did not finish."""
    state, reason, last = series.state, "", series.last
    if state != "done":
        reason = f"its state is {state}"
    elif last < longest:
        state, reason = "stopped", f"its last value is at step {last:g} of {longest:g}" if last >= 0 else "no value"
    rows: list[dict[str, Any]] = [
        {"step": step, "line": line, metric: value} for line, step, value in series.points if value is not None
    ]
    return TableRun(
        path=file / series.place,
        facts=Facts(),
        state=state,
        step=max(last, 0),  # type: ignore[arg-type]  # see TableRun.steps
        reason=reason,
        rows=rows,
        seed=series.seed,
        arm=series.arm,
        title=series.title,
        last_step=max(longest, 0),
    )
