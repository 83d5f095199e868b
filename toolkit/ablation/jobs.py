"""Runs the jobs of a plan on a launcher: reads each job's progress from its folder, starts or resumes it, and
shows a live table."""

from __future__ import annotations

import contextlib
import json
import math
import signal
import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from toolkit.output.errors import PREEMPTED
from toolkit.store import factsfile
from toolkit.store.disk import read_json_or_warn, write_json

if TYPE_CHECKING:
    from collections.abc import Iterator

    from rich.table import Table

    from toolkit.ablation.launch import Launcher, Task
    from toolkit.ablation.plan import Job, Plan

ENDED = ("done", "diverged")
POLL = 0.2  # seconds between two checks of the running jobs


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
    for row in reversed(_last_rows(folder / "metrics.jsonl")):
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
    return value if type(value) in (int, float) else None


class JobQueue:
    """Runs all jobs of a plan on a launcher. Jobs that have ended are left alone; interrupted jobs are resumed.

    ``record`` is the content of plan.json. A learning rate that is chosen on the way is added to it and saved."""

    def __init__(self, plan: Plan, folder: Path, record: dict, launcher: Launcher):
        self.plan, self.folder, self.record, self.launcher = plan, folder, record, launcher
        self.jobs = plan.jobs
        self.progress = {job.run: read_progress(folder / job.run, plan.ablation.metric) for job in self.jobs}
        self.queue = [job for job in self.jobs if self.progress[job.run].state not in ENDED]
        self.ended_before = len(self.jobs) - len(self.queue)
        self.running: dict[str, tuple] = {}  # run -> (job, handle, step at its start)
        self.signals: list[int] = []
        self.started_at: dict[str, float] = {}

    def run(self) -> int:
        """Run until no job is left or a signal arrives. Returns the exit code: 0 if every job ended, 1 if not, 130
        after SIGINT, PREEMPTED after any other signal. Raises ValueError as ``choose`` does."""
        from rich.live import Live

        from toolkit.rundir import report

        for job in self.queue:
            self.progress[job.run].state = "waiting"
        self.terminal = report.console.is_terminal
        self._print(self._opening_line())
        live = Live(console=report.console, auto_refresh=False) if self.terminal else contextlib.nullcontext()
        with _collect_signals(self.signals), live, self._stop_jobs_on_exit():
            while (self.queue and not self.signals) or self.running:
                self._start_jobs()
                if self.queue and not self.running and not any(map(self._is_ready, self.queue)):
                    break  # the remaining jobs need a learning rate that can't be chosen: its runs failed
                time.sleep(POLL)
                self._poll_jobs()
                if self.terminal:
                    live.update(self.table(), refresh=True)
            if self.terminal:
                live.update(self.table(), refresh=True)
        return self._exit_code()

    @contextlib.contextmanager
    def _stop_jobs_on_exit(self) -> Iterator[None]:
        """On exit, also after an exception, ask every running job to save and stop."""
        try:
            yield
        finally:
            for _, handle, _ in self.running.values():
                handle.stop()

    def _start_jobs(self) -> None:
        while len(self.running) < self.launcher.slots and not self.signals:
            job = next((job for job in self.queue if self._is_ready(job) and not self._is_locked(job)), None)
            if job is None:
                return
            self.queue.remove(job)
            progress = self.progress[job.run]
            self.running[job.run] = (job, self.launcher.submit(self._task(job)), progress.step)
            self.started_at[job.run] = time.time()
            progress.state = "running"
            self._print(f"{job.run}: {'resumed' if progress.step else 'started'}")

    def _poll_jobs(self) -> None:
        if self.signals and self.signals[-1] is not None:
            self.signals.append(None)  # marks the signals so far as handled
            self._print("stopping: jobs save and end; the same command goes on with them; once more ends them at once")
            for _, handle, _ in self.running.values():
                handle.stop()
        for run, (job, handle, start_step) in list(self.running.items()):
            exit_code = handle.poll()
            progress = self.progress[run] = read_progress(self.folder / run, self.plan.ablation.metric)
            if exit_code is None:
                progress.state = "running"
                continue
            del self.running[run]
            if progress.state not in ENDED:
                preempted = exit_code == PREEMPTED and progress.step > start_step and not self.signals
                stopped = self.signals and progress.state != "failed"
                progress.state = "waiting" if preempted else "stopped" if stopped else "failed"
                if preempted:
                    self.queue.append(job)
            self._report_end(job, progress)

    def _task(self, job: Job) -> Task:
        from toolkit.ablation.launch import Task

        arm = self.plan.arms[job.arm]
        common_overlay = (
            [str(self.folder / "common.gin")] if self.plan.common_bindings or self.plan.common.imports else []
        )
        overlays = [*self.plan.common_overlays, *common_overlay, *arm.overlays]
        flags = [flag for binding in self.plan.bindings(job, self._learning_rate(job)) for flag in ("-p", binding)]
        return Task(
            name=job.run,
            arguments=(*overlays, *flags, "--runs", str(self.folder), "--name", job.run),
            folder=(self.folder / job.run).resolve(),
            log=(self.folder / "logs" / f"{job.run}.log").resolve(),
            cwd=Path.cwd(),
            environment={"OMP_NUM_THREADS": str(self.record["threads"])},
        )

    def _learning_rate(self, job: Job) -> float | None:
        return job.lr if job.lr is not None or not self.plan.rates else self.record["lr"]["chosen"][job.arm]

    def _is_locked(self, job: Job) -> bool:
        """Whether a process of an earlier ablate, which was killed, still works on the job."""
        import filelock

        if not (self.folder / job.run).is_dir():
            return False
        lock = filelock.FileLock(self.folder / job.run / ".lock")
        try:
            lock.acquire(timeout=0)
        except filelock.Timeout:
            return True
        lock.release()
        return False

    def _is_ready(self, job: Job) -> bool:
        """Whether a job can start. With a learning-rate grid, a judged job waits until its arm's rate is chosen. The
        rate is chosen here, and saved to plan.json, once all of the arm's selection jobs have ended."""
        if not self.plan.rates or job.purpose == "selection" or job.arm in self.record["lr"]["chosen"]:
            return True
        selection_jobs = [other for other in self.jobs if other.arm == job.arm and other.purpose == "selection"]
        if any(self.progress[other.run].state not in ENDED for other in selection_jobs):
            return False
        rates = self.plan.rates[job.arm]
        rate = choose(
            {rate: [self.progress[other.run] for other in selection_jobs if other.lr == rate] for rate in rates}
        )
        self.record["lr"]["chosen"][job.arm] = rate
        write_json(self.folder / "plan.json", self.record)
        self._print(f"{job.arm}: learning rate {rate:g}, the best of {len(rates)}")
        return True

    # ---- what is shown ---------------------------------------------------------------------------------------------

    def table(self) -> Table:
        """The live table: every job, or in a short terminal the most urgent ones (running, failed, then waiting)."""
        from toolkit.output.terminal import Column, grid
        from toolkit.rundir import report

        rows_available = report.console.height - 6
        shown = [job for job in self.jobs]
        if len(shown) > rows_available:
            priority = {"running": 0, "failed": 1, "diverged": 1, "waiting": 2, "stopped": 2}
            most_urgent = sorted(shown, key=lambda job: priority.get(self.progress[job.run].state, 3))[
                : max(1, rows_available)
            ]
            shown = [job for job in self.jobs if job in most_urgent]
        columns = [Column("arm", name=True), Column("seed", gives_way=4)]
        columns += [Column("lr", gives_way=3)] if self.plan.rates else []
        columns += [Column("state"), Column("step", right=True, gives_way=2), Column("loss", right=True)]
        columns.append(Column("left", right=True, gives_way=1))
        table, _ = grid(columns, map(self._table_row, shown), report.console.width, lines=1)
        table.caption, table.caption_justify = self._summary(), "left"
        return table

    def _table_row(self, job: Job) -> list[tuple[str, str]]:
        progress, steps = self.progress[job.run], self.plan.arms[job.arm].steps
        rate = [f"{job.lr:g}" if job.lr is not None else "best"] if self.plan.rates else []
        loss = progress.metric if progress.metric is not None else progress.loss
        left = duration(self._seconds_left(job)) if progress.state in ("running", "waiting") else ""
        row = [job.arm, str(job.seed), *rate, progress.state, f"{progress.step:,}/{steps:,}"]
        style = {"running": "bold", "failed": "red", "diverged": "yellow", "done": "green"}.get(progress.state, "")
        return [(cell, style) for cell in (*row, "" if loss is None else f"{loss:.4f}", left)]

    def _seconds_left(self, job: Job) -> float | None:
        """Estimated seconds that a job still needs; None without data. The pace is that of a finished run, first of the
        same arm, then of any arm; without one, it is the time of a logged step."""
        progress, steps = self.progress[job.run], self.plan.arms[job.arm].steps
        same_arm_first = sorted(self.jobs, key=lambda other: other.arm != job.arm)
        whole_runs = [
            each.seconds / each.step for each in (self.progress[other.run] for other in same_arm_first) if each.seconds
        ]
        step_times_ms = [self.progress[other.run].step_ms for other in (job, *same_arm_first)]
        seconds_per_step = next(iter([*whole_runs, *(ms / 1000 for ms in step_times_ms if ms)]), None)
        return None if seconds_per_step is None else (steps - progress.step) * seconds_per_step

    def _summary(self) -> str:
        open_jobs = [job for job in self.jobs if self.progress[job.run].state in ("running", "waiting")]
        seconds_left = [self._seconds_left(job) for job in open_jobs]
        states = [progress.state for progress in self.progress.values()]
        counts = ", ".join(f"{states.count(state)} {state}" for state in dict.fromkeys(states))
        if not open_jobs or None in seconds_left:
            return counts
        return (
            f"{counts}; about {duration(sum(seconds_left) / max(1, min(self.launcher.slots, len(seconds_left))))} left"
        )

    def _opening_line(self) -> str:
        before = f", {self.ended_before} of them ended before" if self.ended_before else ""
        slots = min(self.launcher.slots, len(self.jobs))
        at_once = f", {slots} at once" if slots > 1 else ""
        return f"{self.folder}: {len(self.jobs)} jobs{before}{at_once}"

    def _report_end(self, job: Job, progress: JobProgress) -> None:
        missing = f", without {self.plan.ablation.metric}" if progress.state == "done" else ""
        value = missing if progress.metric is None else f", {self.plan.ablation.metric} {progress.metric:.4f}"
        reason = ""
        if progress.state in ("failed", "diverged"):
            reason = f"; {_last_line(self.folder / 'logs' / f'{job.run}.log')}"
        elapsed = duration(time.time() - self.started_at[job.run])
        self._print(
            f"{job.run}: {progress.state} at step {progress.step:,}{value}, {elapsed}{reason}; {self._summary()}"
        )

    def _print(self, text: str) -> None:
        from toolkit.rundir import report

        if not self.terminal or not self.running or "failed" in text or "stopping" in text:
            report.say(text)

    def _exit_code(self) -> int:
        states = [progress.state for progress in self.progress.values()]
        if any(signal.SIGINT == number for number in self.signals):
            return 130
        if self.signals:
            return PREEMPTED
        return 0 if all(state in ENDED for state in states) else 1


def choose(progress_by_rate: dict[float, list[JobProgress]]) -> float:
    """The learning rate with the lowest mean metric. Rates are ordered by their number of diverged runs first, then by
    the mean. Raises ValueError if a finished run has no value of the metric."""

    if any(
        progress.state == "done" and progress.metric is None for runs in progress_by_rate.values() for progress in runs
    ):
        raise ValueError("Ablation.metric is in no row of metrics.jsonl; val_full/loss_nats always is in the last")

    def rank(rate):
        values = [
            progress.metric
            for progress in progress_by_rate[rate]
            if progress.state == "done" and progress.metric is not None
        ]
        diverged = len(progress_by_rate[rate]) - len(values)
        return (diverged, statistics.fmean(values) if values else math.inf, rate)

    return min(progress_by_rate, key=rank)


@contextlib.contextmanager
def _collect_signals(caught: list) -> Iterator[None]:
    """Append SIGTERM, SIGINT and SIGHUP (the terminal was closed) to a list; restore the old handlers on exit."""
    numbers = [signal.SIGTERM, signal.SIGINT]
    if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # not under nohup
        numbers.append(signal.SIGHUP)
    old_handlers = {
        number: signal.signal(number, lambda received, frame: caught.append(received)) for number in numbers
    }
    try:
        yield
    finally:
        for number, handler in old_handlers.items():
            signal.signal(number, handler)


def _last_rows(path: Path, size: int = 8192) -> list[dict]:
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


def _last_line(path: Path) -> str:
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
