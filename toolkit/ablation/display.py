"""What ``ablate`` shows of its jobs: the live table, their states, and the time that they still need."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.table import Table

    from toolkit.ablation.jobs import JobQueue
    from toolkit.ablation.plan import Job


def table(queue: JobQueue) -> Table:
    """The live table: every job, or in a short terminal the most urgent ones (running, failed, then waiting)."""
    from toolkit.output.terminal import Column, grid
    from toolkit.rundir import report

    rows_available = report.console.height - 6
    shown = queue.jobs
    if len(shown) > rows_available:
        priority = {"running": 0, "failed": 1, "diverged": 1, "waiting": 2, "stopped": 2}
        most_urgent = sorted(shown, key=lambda job: priority.get(queue.progress[job.run].state, 3))[
            : max(1, rows_available)
        ]
        shown = [job for job in queue.jobs if job in most_urgent]
    columns = [Column("arm", name=True), Column("seed", gives_way=4)]
    columns += [Column("lr", gives_way=3)] if queue.plan.rates else []
    columns += [Column("state"), Column("step", right=True, gives_way=2), Column("loss", right=True)]
    columns.append(Column("left", right=True, gives_way=1))
    table, _ = grid(columns, [_table_row(queue, job) for job in shown], report.console.width, lines=1)
    table.caption, table.caption_justify = summary(queue), "left"
    return table


def _table_row(queue: JobQueue, job: Job) -> list[tuple[str, str]]:
    progress, steps = queue.progress[job.run], queue.plan.arms[job.arm].steps
    rate = [f"{job.lr:g}" if job.lr is not None else "best"] if queue.plan.rates else []
    loss = progress.metric if progress.metric is not None else progress.loss
    left = duration(_seconds_left(queue, job)) if progress.state in ("running", "waiting") else ""
    row = [job.arm, str(job.seed), *rate, progress.state, f"{progress.step:,}/{steps:,}"]
    style = {"running": "bold", "failed": "red", "diverged": "yellow", "done": "green"}.get(progress.state, "")
    return [(cell, style) for cell in (*row, "" if loss is None else f"{loss:.4f}", left)]


def _seconds_left(queue: JobQueue, job: Job) -> float | None:
    """Estimated seconds that a job still needs; None without data. The pace is that of a finished run, first of the
    same arm, then of any arm; without one, it is the time of a logged step."""
    progress, steps = queue.progress[job.run], queue.plan.arms[job.arm].steps
    same_arm_first = sorted(queue.jobs, key=lambda other: other.arm != job.arm)
    finished = [queue.progress[other.run] for other in same_arm_first]
    whole_runs = [each.seconds / each.step for each in finished if each.seconds and each.step]
    step_times_ms = [queue.progress[other.run].step_ms for other in (job, *same_arm_first)]
    seconds_per_step = next(iter([*whole_runs, *(ms / 1000 for ms in step_times_ms if ms)]), None)
    return None if seconds_per_step is None else (steps - progress.step) * seconds_per_step


def summary(queue: JobQueue) -> str:
    """The number of jobs in each state, and the time that they still need if it is known."""
    open_jobs = [job for job in queue.jobs if queue.progress[job.run].state in ("running", "waiting")]
    estimates = [_seconds_left(queue, job) for job in open_jobs]
    known = [seconds for seconds in estimates if seconds is not None]
    states = [progress.state for progress in queue.progress.values()]
    counts = ", ".join(f"{states.count(state)} {state}" for state in dict.fromkeys(states))
    if not open_jobs or len(known) < len(open_jobs):
        return counts
    return f"{counts}; about {duration(sum(known) / max(1, min(queue.launcher.slots, len(known))))} left"


def opening_line(queue: JobQueue) -> str:
    """The folder and the number of jobs, of those that ended before, and of those that run at once."""
    before = f", {queue.ended_before} of them already ended" if queue.ended_before else ""
    slots = min(queue.launcher.slots, len(queue.jobs))
    at_once = f", {slots} at once" if slots > 1 else ""
    return f"{queue.folder}: {len(queue.jobs)} jobs{before}{at_once}"


def last_error(path: Path) -> str:
    """The last error in a job's log, with the log's path."""
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    except OSError:
        lines = []
    errors = [line for line in lines if line.startswith("error:")]
    return f"{errors[-1]} ({path})" if errors else f"see {path}"


def duration(seconds: float | None) -> str:
    """A duration as text: "41 s", "12 min", "1.5 h"; empty for None."""
    if seconds is None:
        return ""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
