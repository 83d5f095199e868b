"""The jobs of a plan on a launcher: how each stands by its folder, what to start, what to resume, and a live table."""

from __future__ import annotations

import contextlib
import json
import math
import signal
import statistics
import time
from dataclasses import dataclass
from pathlib import Path

from toolkit.output.errors import PREEMPTED
from toolkit.store.disk import read_json_or_warn, write_json

ENDED = ("done", "diverged")
POLL = 0.2  # seconds between two looks at the jobs


@dataclass
class Standing:
    """How one job stands, as its folder tells."""

    state: str  # waiting, running, or what status.json says of the end
    step: int = 0
    loss: float | None = None
    step_ms: float | None = None
    metric: float | None = None
    seconds: float | None = None  # of the whole run, once it is done


def standing(folder: Path, metric: str) -> Standing:
    """Read a job's folder. "running" is what the run last said: whether it is true, the launcher knows."""
    status = read_json_or_warn(folder / "status.json")
    if not status:
        return Standing("waiting")
    state = status.get("state")
    found = Standing(state if isinstance(state, str) else "failed", _count(status.get("step")))
    if found.state == "done":
        found.seconds = _number(read_json_or_warn(folder / "facts.json").get("seconds"))
    for row in reversed(_last_rows(folder / "metrics.jsonl")):
        if found.state != "done":
            found.step = max(found.step, _count(row.get("step")))
        if found.loss is None:
            found.loss = _number(row.get("train/loss_nats"))
        if found.step_ms is None:
            found.step_ms = _number(row.get("time/step_ms"))
        if found.metric is None:
            found.metric = _number(row.get(metric))
    return found


def _count(value: object) -> int:
    return value if type(value) is int else 0


def _number(value: object) -> float | None:
    """A number of a file; None for what is none."""
    return value if type(value) in (int, float) else None


class Schedule:
    """All jobs of a plan on a launcher: what has ended is left alone, what was cut short resumed."""

    def __init__(self, plan, folder: Path, record: dict, launcher):
        self.plan, self.folder, self.record, self.launcher = plan, folder, record, launcher
        self.jobs = plan.jobs
        self.standing = {job.run: standing(folder / job.run, plan.ablation.metric) for job in self.jobs}
        self.queue = [job for job in self.jobs if self.standing[job.run].state not in ENDED]
        self.found_ended = len(self.jobs) - len(self.queue)
        self.running: dict[str, tuple] = {}  # run -> (job, handle, step at its start)
        self.signals: list[int] = []
        self.begun: dict[str, float] = {}

    def run(self) -> int:
        """Run until nothing is left, or a signal comes. Returns the exit code."""
        from rich.live import Live

        from toolkit.rundir import report

        for job in self.queue:
            self.standing[job.run].state = "waiting"
        self.terminal = report.console.is_terminal
        self._say(self._opening())
        live = Live(console=report.console, auto_refresh=False) if self.terminal else contextlib.nullcontext()
        with _signals(self.signals), live, self._none_left_behind():
            while (self.queue and not self.signals) or self.running:
                self._start()
                if self.queue and not self.running and not any(map(self._ready, self.queue)):
                    break  # what is left waits for a learning rate that can't be chosen
                time.sleep(POLL)
                self._look()
                if self.terminal:
                    live.update(self.table(), refresh=True)
            if self.terminal:
                live.update(self.table(), refresh=True)
        return self._ending()

    @contextlib.contextmanager
    def _none_left_behind(self):
        """Whatever goes wrong here, jobs that run are told to save and end."""
        try:
            yield
        finally:
            for _, handle, _ in self.running.values():
                handle.stop()

    def _start(self):
        while len(self.running) < self.launcher.slots and not self.signals:
            job = next((job for job in self.queue if self._ready(job) and not self._held(job)), None)
            if job is None:
                return
            self.queue.remove(job)
            found = self.standing[job.run]
            self.running[job.run] = (job, self.launcher.submit(self._task(job)), found.step)
            self.begun[job.run] = time.time()
            found.state = "running"
            self._say(f"{job.run}: {'resumed' if found.step else 'started'}")

    def _look(self):
        if self.signals and self.signals[-1] is not None:
            self.signals.append(None)  # seen
            self._say("stopping: jobs save and end; the same command goes on with them; once more ends them at once")
            for _, handle, _ in self.running.values():
                handle.stop()
        for run, (job, handle, began_at) in list(self.running.items()):
            code = handle.poll()
            found = self.standing[run] = standing(self.folder / run, self.plan.ablation.metric)
            if code is None:
                found.state = "running"
                continue
            del self.running[run]
            if found.state not in ENDED:
                preempted = code == PREEMPTED and found.step > began_at and not self.signals
                stopped = self.signals and found.state != "failed"
                found.state = "waiting" if preempted else "stopped" if stopped else "failed"
                if preempted:
                    self.queue.append(job)
            self._tell(job, found)

    def _task(self, job):
        from toolkit.ablation.launch import Task

        arm = self.plan.arms[job.arm]
        common = [str(self.folder / "common.gin")] if self.plan.common_bindings or self.plan.common.imports else []
        overlays = [*self.plan.common_overlays, *common, *arm.overlays]
        flags = [flag for binding in self.plan.bindings(job, self._rate(job)) for flag in ("-p", binding)]
        return Task(
            name=job.run,
            arguments=(*overlays, *flags, "--runs", str(self.folder), "--name", job.run),
            folder=(self.folder / job.run).resolve(),
            log=(self.folder / "logs" / f"{job.run}.log").resolve(),
            cwd=Path.cwd(),
            environment={"OMP_NUM_THREADS": str(self.record["threads"])},
        )

    def _rate(self, job):
        return job.lr if job.lr is not None or not self.plan.rates else self.record["lr"]["chosen"][job.arm]

    def _held(self, job) -> bool:
        """Whether a process that another, killed ablate had started is still at work on a job."""
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

    def _ready(self, job) -> bool:
        """Whether a job can start; a judged one of a learning-rate grid waits until its arm's rate is chosen."""
        if not self.plan.rates or job.purpose == "selection" or job.arm in self.record["lr"]["chosen"]:
            return True
        tried = [other for other in self.jobs if other.arm == job.arm and other.purpose == "selection"]
        if any(self.standing[other.run].state not in ENDED for other in tried):
            return False
        rates = self.plan.rates[job.arm]
        rate = choose({rate: [self.standing[other.run] for other in tried if other.lr == rate] for rate in rates})
        self.record["lr"]["chosen"][job.arm] = rate
        write_json(self.folder / "plan.json", self.record)
        self._say(f"{job.arm}: learning rate {rate:g}, the best of {len(rates)}")
        return True

    # ---- what is shown ---------------------------------------------------------------------------------------------

    def table(self):
        """Every job, or, where they don't fit the terminal, those that matter now."""
        from toolkit.output.terminal import Column, grid
        from toolkit.rundir import report

        room = report.console.height - 6
        shown = [job for job in self.jobs]
        if len(shown) > room:
            weight = {"running": 0, "failed": 1, "diverged": 1, "waiting": 2, "stopped": 2}
            first = sorted(shown, key=lambda job: weight.get(self.standing[job.run].state, 3))[: max(1, room)]
            shown = [job for job in self.jobs if job in first]
        columns = [Column("arm", name=True), Column("seed", gives_way=4)]
        columns += [Column("lr", gives_way=3)] if self.plan.rates else []
        columns += [Column("state"), Column("step", right=True, gives_way=2), Column("loss", right=True)]
        columns.append(Column("left", right=True, gives_way=1))
        table, _ = grid(columns, map(self._row, shown), report.console.width, lines=1)
        table.caption, table.caption_justify = self._summary(), "left"
        return table

    def _row(self, job) -> list[tuple[str, str]]:
        found, steps = self.standing[job.run], self.plan.arms[job.arm].steps
        rate = [f"{job.lr:g}" if job.lr is not None else "best"] if self.plan.rates else []
        loss = found.metric if found.metric is not None else found.loss
        left = duration(self._left(job)) if found.state in ("running", "waiting") else ""
        row = [job.arm, str(job.seed), *rate, found.state, f"{found.step:,}/{steps:,}"]
        style = {"running": "bold", "failed": "red", "diverged": "yellow", "done": "green"}.get(found.state, "")
        return [(cell, style) for cell in (*row, "" if loss is None else f"{loss:.4f}", left)]

    def _left(self, job) -> float | None:
        """Seconds that a job still needs: by whole runs of its arm, or of any, or by the steps so far."""
        found, steps = self.standing[job.run], self.plan.arms[job.arm].steps
        alike = sorted(self.jobs, key=lambda other: other.arm != job.arm)
        whole = [each.seconds / each.step for each in (self.standing[other.run] for other in alike) if each.seconds]
        paces = [self.standing[other.run].step_ms for other in (job, *alike)]
        pace = next(iter([*whole, *(ms / 1000 for ms in paces if ms)]), None)
        return None if pace is None else (steps - found.step) * pace

    def _summary(self) -> str:
        open_jobs = [job for job in self.jobs if self.standing[job.run].state in ("running", "waiting")]
        left = [self._left(job) for job in open_jobs]
        states = [found.state for found in self.standing.values()]
        counts = ", ".join(f"{states.count(state)} {state}" for state in dict.fromkeys(states))
        if not open_jobs or None in left:
            return counts
        return f"{counts}; about {duration(sum(left) / max(1, min(self.launcher.slots, len(left))))} left"

    def _opening(self) -> str:
        before = f", {self.found_ended} of them ended before" if self.found_ended else ""
        slots = min(self.launcher.slots, len(self.jobs))
        at_once = f", {slots} at once" if slots > 1 else ""
        return f"{self.folder}: {len(self.jobs)} jobs{before}{at_once}"

    def _tell(self, job, found):
        missing = f", without {self.plan.ablation.metric}" if found.state == "done" else ""
        value = missing if found.metric is None else f", {self.plan.ablation.metric} {found.metric:.4f}"
        reason = ""
        if found.state in ("failed", "diverged"):
            reason = f"; {_last_line(self.folder / 'logs' / f'{job.run}.log')}"
        took = duration(time.time() - self.begun[job.run])
        self._say(f"{job.run}: {found.state} at step {found.step:,}{value}, {took}{reason}; {self._summary()}")

    def _say(self, text):
        from toolkit.rundir import report

        if not self.terminal or not self.running or "failed" in text or "stopping" in text:
            report.say(text)

    def _ending(self) -> int:
        states = [found.state for found in self.standing.values()]
        if any(signal.SIGINT == number for number in self.signals):
            return 130
        if self.signals:
            return PREEMPTED
        return 0 if all(state in ENDED for state in states) else 1


def choose(tried: dict[float, list[Standing]]) -> float:
    """The learning rate with the lowest mean metric; one at which a run diverged comes after those where none did."""

    if any(found.state == "done" and found.metric is None for each in tried.values() for found in each):
        raise ValueError("Ablation.metric is in no row of metrics.jsonl; val_full/loss_nats always is in the last")

    def rank(rate):
        values = [found.metric for found in tried[rate] if found.state == "done" and found.metric is not None]
        diverged = len(tried[rate]) - len(values)
        return (diverged, statistics.fmean(values) if values else math.inf, rate)

    return min(tried, key=rank)


@contextlib.contextmanager
def _signals(caught: list):
    """SIGTERM, SIGINT and a closed terminal's SIGHUP go into a list; as before at the end."""
    numbers = [signal.SIGTERM, signal.SIGINT]
    if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # nohup ignores it
        numbers.append(signal.SIGHUP)
    before = {number: signal.signal(number, lambda got, frame: caught.append(got)) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _last_rows(path: Path, size: int = 8192) -> list[dict]:
    """The rows at the end of a metrics.jsonl, which may be long and half written."""
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
    told = [line for line in lines if line.startswith("error:")]
    return f"{told[-1]} ({path})" if told else f"see {path}"


def duration(seconds: float | None) -> str:
    """ "41 s", "12 min", "1.5 h"; empty where it is not known."""
    if seconds is None:
        return ""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
