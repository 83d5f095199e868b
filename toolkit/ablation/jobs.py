"""The queue of a plan's jobs: starts or resumes each one on a launcher, and chooses learning rates on the way."""

from __future__ import annotations

import contextlib
import signal
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from toolkit.ablation import display
from toolkit.ablation.progress import JobProgress, choose, read_progress
from toolkit.comparison.runs import ENDED
from toolkit.output.errors import PREEMPTED
from toolkit.store.disk import write_json

if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import FrameType

    from toolkit.ablation.launch import Handle, Launcher, Task
    from toolkit.ablation.plan import Job, Plan

POLL = 0.2  # seconds between two checks of the running jobs


class JobQueue:
    """Runs jobs of a plan (default: all) on a launcher. Jobs that have ended are left alone; interrupted jobs are
    resumed.

    ``record`` is the content of plan.json. A learning rate that is chosen on the way is added to it and saved."""

    def __init__(
        self, plan: Plan, folder: Path, record: dict[str, Any], launcher: Launcher, jobs: list[Job] | None = None
    ):
        self.plan, self.folder, self.record, self.launcher = plan, folder, record, launcher
        self.jobs = plan.jobs if jobs is None else jobs
        self.progress = {job.run: read_progress(folder / job.run, plan.ablation.metric) for job in self.jobs}
        self.queue = [job for job in self.jobs if self.progress[job.run].state not in ENDED]
        self.ended_before = len(self.jobs) - len(self.queue)
        self.running: dict[str, tuple[Job, Handle, int]] = {}  # run -> (job, handle, step at its start)
        self.signals: list[int] = []
        self.signals_handled = 0
        self.terminal = False  # whether a live table is shown
        self.started_at: dict[str, float] = {}

    def run(self) -> int:
        """Run until no job is left or a signal arrives. Returns the exit code: 0 if every job ended, 1 if not, 130
        after SIGINT, PREEMPTED after any other signal. Raises ValueError as ``choose`` does."""
        from rich.live import Live

        from toolkit.rundir import report

        for job in self.queue:
            self.progress[job.run].state = "waiting"
        self.terminal = report.console.is_terminal
        self._print(display.opening_line(self))
        live = Live(console=report.console, auto_refresh=False) if self.terminal else None
        with _collect_signals(self.signals), live or contextlib.nullcontext(), self._stop_jobs_on_exit():
            while (self.queue and not self.signals) or self.running:
                self._start_jobs()
                if self.queue and not self.running and not any(map(self._is_ready, self.queue)):
                    break  # the remaining jobs need a learning rate that can't be chosen: its runs failed
                time.sleep(POLL)
                self._poll_jobs()
                if live:
                    live.update(display.table(self), refresh=True)
            if live:
                live.update(display.table(self), refresh=True)
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
        if len(self.signals) > self.signals_handled:
            self.signals_handled = len(self.signals)
            self._print("stopping: jobs save and end; the same command continues them; a second signal ends them now")
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
        """Whether a process of an earlier ablate, which was killed, still runs the job."""
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
            {rate: [self.progress[other.run] for other in selection_jobs if other.lr == rate] for rate in rates},
            higher_is_better=bool(self.record.get("higher_is_better")),
        )
        self.record["lr"]["chosen"][job.arm] = rate
        write_json(self.folder / "plan.json", self.record)
        self._print(f"{job.arm}: learning rate {rate:g}, the best of {len(rates)}")
        return True

    def _report_end(self, job: Job, progress: JobProgress) -> None:
        missing = f", without {self.plan.ablation.metric}" if progress.state == "done" else ""
        value = missing if progress.metric is None else f", {self.plan.ablation.metric} {progress.metric:.4f}"
        reason = ""
        if progress.state in ("failed", "diverged"):
            reason = f"; {display.last_error(self.folder / 'logs' / f'{job.run}.log')}"
        elapsed = display.duration(time.time() - self.started_at[job.run])
        state = f"{progress.state} at step {progress.step:,}"
        self._print(f"{job.run}: {state}{value}, {elapsed}{reason}; {display.summary(self)}")

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


@contextlib.contextmanager
def _collect_signals(caught: list[int]) -> Iterator[None]:
    """Append SIGTERM, SIGINT and SIGHUP (the terminal was closed) to a list; restore the old handlers on exit."""
    numbers = [signal.SIGTERM, signal.SIGINT]
    if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # not under nohup
        numbers.append(signal.SIGHUP)

    def collect(number: int, frame: FrameType | None) -> None:
        caught.append(number)

    old_handlers = {number: signal.signal(number, collect) for number in numbers}
    try:
        yield
    finally:
        for number, handler in old_handlers.items():
            signal.signal(number, handler)
