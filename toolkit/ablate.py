"""``python -m toolkit.ablate PLAN.gin``: run every job of a plan, each in its own process and folder."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import math
import os
import shutil
import signal
import statistics
import time
from dataclasses import dataclass
from pathlib import Path

from toolkit.command import PREEMPTED, run_command

ENDED = ("done", "diverged")
POLL = 0.2  # seconds between two looks at the jobs


def main(argv: list[str] | None = None) -> int:
    """The command. Returns the exit code; raises ValueError for what the user can mend."""
    arguments = _arguments(argv)  # first, so that --help is quick
    from toolkit import report
    from toolkit.config import ConfigError
    from toolkit.plan import read

    plan = read(arguments.plan)
    folder = Path(arguments.runs) / plan.name
    if arguments.dry_run:
        _dry_run(plan, folder, arguments)
    if plan.confounds:
        raise ConfigError("\n".join(plan.confounds))
    if arguments.dry_run:
        return 0
    folder.mkdir(parents=True, exist_ok=True)
    with _alone(folder):
        record = settle(plan, folder, arguments)
        launcher = _launcher(arguments, folder, record["threads"], _devices(plan))
        try:
            code = Schedule(plan, folder, record, launcher).run()
        finally:
            launcher.close()
    report.say(f"compare: python -m toolkit.compare {folder}")
    return code


def settle(plan, folder: Path, arguments) -> dict:
    """Write plan.gin, plan.json and common.gin, or check the plan against those that are there: arms and seeds may have
    been added, nothing else. Measures what a budget in seconds needs. Returns plan.json. Raises ConfigError."""
    from toolkit.config import ConfigError

    before = _read_json(folder / "plan.json")
    threads = before.get("threads") or threads_for(arguments.jobs, plan)
    budget = before.get("budget", {})
    seconds = budget.get("seconds_per_step")
    same = budget.get("of") == plan.budget[0] and budget.get("amount") == plan.budget[1]
    if plan.budget[0] == "seconds":
        seconds = {name: value for name, value in (seconds or {}).items() if same}
        seconds |= measure([arm for arm in plan.arms.values() if arm.name not in seconds], threads, rounds=3)
    plan.set_steps(seconds, budget.get("steps") if same else None)
    record = as_record(plan, threads, seconds if plan.budget[0] == "seconds" else None)
    if before:
        changed = changes(before, record)
        if changed:
            remedy = "only arms and seeds may be added; restore the plan, or run it under another name or --runs"
            lines = "\n".join(f"  {line}" for line in changed)
            raise ConfigError(f"{folder} was begun with another {plan.path.name}; {remedy}:\n{lines}")
        if before.get("lr") and record["lr"]:
            record["lr"]["chosen"] = {**before["lr"].get("chosen", {})}
    stale = _stale(plan, folder, record)
    if stale:
        lines = "\n".join(f"  {line}" for line in stale)
        remedy = "restore it, or take another --runs"
        raise ConfigError(f"{folder}: a gin file or a part has changed since; {remedy}:\n{lines}")
    shutil.copyfile(plan.path, folder / "plan.gin")
    layer = plan.common
    lines = [f"import {module}" for module in layer.imports] + plan.common_bindings
    (folder / "common.gin").write_text("# What every arm has.\n" + "\n".join(lines) + "\n", encoding="utf-8")
    _write_json(folder / "plan.json", record)
    return record


def as_record(plan, threads: int, seconds: dict[str, float] | None) -> dict:
    """What plan.json holds."""
    ablation, arms = plan.ablation, plan.arms.values()
    of, amount = plan.budget
    width = {arm.name: arm.width for arm in arms if arm.width}
    matched = lr = None
    if ablation.match:
        matched = {
            "of": ablation.match,
            "knob": _one([knob for knob, _, _ in width.values()]),
            "knobs": {name: knob for name, (knob, _, _) in width.items()},
            "widths": {name: value for name, (_, value, _) in width.items()},
            "residual": {name: residual for name, (_, _, residual) in width.items()},
        }
    if plan.rates:
        knobs = {arm.name: arm.lr_knob for arm in arms}
        lr = {"knob": _one(list(knobs.values())), "knobs": knobs, "grid": plan.rates, "chosen": {}}
    return {
        "name": plan.name,
        "question": ablation.question,
        "baseline": plan.baseline.name,
        "arms": {arm.name: {"overlays": arm.overlays, "bindings": arm.bindings} for arm in arms},
        "common": {"overlays": plan.common_overlays, "bindings": plan.common_bindings},
        "factor": plan.factor,
        "seeds": ablation.seeds,
        "selection_seeds": ablation.selection_seeds,
        "metric": ablation.metric,
        "alpha": ablation.alpha,
        "effect": ablation.effect,
        "budget": {
            "of": of,
            "amount": amount,
            "steps": {arm.name: arm.steps for arm in arms},
            "seconds_per_step": seconds,
        },
        "match": matched,
        "lr": lr,
        "threads": threads,
        "jobs": [dataclasses.asdict(job) for job in plan.jobs],
        "sha256": plan.sha256,
    }


def changes(before: dict, now: dict) -> list[str]:
    """What differs between two plan.json beyond added arms and seeds."""
    lines = []

    def compare(key, was, new):
        if isinstance(was, dict) and isinstance(new, dict):
            for name, value in was.items():
                compare(f"{key}.{name}", value, new.get(name))
        elif was != new:
            lines.append(f"{key}: {json.dumps(was)} there, {json.dumps(new)} here")

    for key in ("question", "baseline", "common", "factor", "metric", "alpha", "effect", "budget", "match"):
        compare(key, before[key], now[key])
    for name, value in before["arms"].items():
        if name not in now["arms"]:
            lines.append(f"arms: {name} is gone")
        else:
            compare(f"arms.{name}", value, now["arms"][name])
    for key in ("seeds", "selection_seeds"):
        gone = [seed for seed in before[key] if seed not in now[key]]
        if gone:
            lines.append(f"{key}: {', '.join(map(str, gone))} gone")
    compare("lr", _without_chosen(before["lr"]), _without_chosen(now["lr"]))
    return lines


def measure(arms: list, threads: int, rounds: int = 1) -> dict[str, float]:
    """Seconds per training step of each arm, alone on this machine, on random tokens. Evaluations, samples and
    checkpoints are no part of it. Rounds take turns over the arms and the fastest counts, since what else the machine
    does only slows it down."""
    import torch

    from toolkit import distributed, report

    before, device, measured = torch.get_num_threads(), distributed.setup(), {}
    torch.set_num_threads(threads)
    for number in range(rounds):
        for arm in arms:
            report.say(f"measuring {arm.name}" + (f", round {number + 1} of {rounds}" if rounds > 1 else ""))
            seconds = _seconds_per_step(arm.config.build(), device)
            measured[arm.name] = min(seconds, measured.get(arm.name, math.inf))
    torch.set_num_threads(before)
    return measured


def _seconds_per_step(experiment, device):
    import torch

    from toolkit.train import autocast, build, is_compiled

    parts = build(experiment, device)
    if is_compiled(experiment, device):
        parts.objective.compile(fullgraph=True, dynamic=False)
    processes = experiment.devices if isinstance(experiment.devices, int) else max(1, torch.cuda.device_count())
    shape = (max(1, experiment.batch_size // (experiment.accumulate * processes)), experiment.seq_len)
    ids = torch.randint(parts.tokenizer.vocab_size, shape, device=device)
    times = []
    while len(times) < 7 or (sum(times[2:]) < 0.5 and len(times) < 100):  # the first two allocate, and compile
        begun = time.perf_counter()
        for _ in range(experiment.accumulate):
            with autocast(experiment, device):
                objective = parts.objective(ids, ids)[0]
            objective.backward()
        torch.nn.utils.clip_grad_norm_(parts.model.parameters(), 1.0).item()
        parts.optimizer.step()
        parts.optimizer.zero_grad(set_to_none=True)
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - begun)
    return statistics.median(times[2:])


def threads_for(jobs: int | None, plan) -> int:
    """CPU threads of each job: an equal share. Recorded, since sums in another order are other sums."""
    given = os.environ.get("OMP_NUM_THREADS", "")
    return int(given) if given.isdigit() and int(given) > 0 else max(1, (os.cpu_count() or 1) // (jobs or 1))


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
    status = _read_json(folder / "status.json")
    if not status:
        return Standing("waiting")
    found = Standing(status.get("state", "failed"), status.get("step", 0))
    if found.state == "done":
        found.seconds = _read_json(folder / "facts.json").get("seconds")
    for row in reversed(_last_rows(folder / "metrics.jsonl")):
        if found.state != "done":
            found.step = max(found.step, row.get("step", 0))
        if found.loss is None:
            found.loss = row.get("train/loss_nats")
        if found.step_ms is None:
            found.step_ms = row.get("time/step_ms")
        if found.metric is None:
            found.metric = row.get(metric)
    return found


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

        from toolkit import report

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
        from toolkit.launch import Task

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
        _write_json(self.folder / "plan.json", self.record)
        self._say(f"{job.arm}: learning rate {rate:g}, the best of {len(rates)}")
        return True

    # ---- what is shown ---------------------------------------------------------------------------------------------

    def table(self):
        """Every job, or, where they don't fit the terminal, those that matter now."""
        from rich.table import Table

        from toolkit import report

        room = report.console.height - 6
        shown = [job for job in self.jobs]
        if len(shown) > room:
            weight = {"running": 0, "failed": 1, "diverged": 1, "waiting": 2, "stopped": 2}
            first = sorted(shown, key=lambda job: weight.get(self.standing[job.run].state, 3))[: max(1, room)]
            shown = [job for job in self.jobs if job in first]
        table = Table(box=None, pad_edge=False, padding=(0, 3, 0, 0), caption=self._summary(), caption_justify="left")
        for title in ("arm", "seed", *(["lr"] if self.plan.rates else []), "state"):
            table.add_column(title)
        for title in ("step", "loss", "left"):
            table.add_column(title, justify="right")
        style = {"running": "bold", "failed": "red", "diverged": "yellow", "done": "green"}
        for job in shown:
            found, steps = self.standing[job.run], self.plan.arms[job.arm].steps
            rate = [f"{job.lr:g}" if job.lr is not None else "best"] if self.plan.rates else []
            loss = found.metric if found.metric is not None else found.loss
            left = _duration(self._left(job)) if found.state in ("running", "waiting") else ""
            row = [job.arm, str(job.seed), *rate, found.state, f"{found.step:,}/{steps:,}"]
            table.add_row(*row, "" if loss is None else f"{loss:.4f}", left, style=style.get(found.state))
        return table

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
        return f"{counts}; about {_duration(sum(left) / max(1, min(self.launcher.slots, len(left))))} left"

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
        took = _duration(time.time() - self.begun[job.run])
        self._say(f"{job.run}: {found.state} at step {found.step:,}{value}, {took}{reason}; {self._summary()}")

    def _say(self, text):
        from toolkit import report

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


def _dry_run(plan, folder: Path, arguments) -> None:
    """Print arms and jobs, with the time that they would take here."""
    from rich.table import Table

    from toolkit import report
    from toolkit.plan import differing

    before = _read_json(folder / "plan.json")
    threads = before.get("threads") or threads_for(arguments.jobs, plan)
    seconds = measure(list(plan.arms.values()), threads)
    known = before.get("budget", {})
    plan.set_steps({**seconds, **(known.get("seconds_per_step") or {})}, known.get("steps"))
    say, base = report.say, plan.baseline
    say(f"\n{plan.name}: {plan.ablation.question}")
    say(
        f"baseline {base.name}; factor {', '.join(plan.factor) or 'none declared'}; metric {plan.ablation.metric}, "
        f"effect {plan.ablation.effect:g}, alpha {plan.ablation.alpha:g}\n"
    )
    matched, of = plan.ablation.match is not None, plan.budget[0]
    titles = ["arm", "parameters", "FLOPs/token", "steps", "s/step", *(["width", "residual"] if matched else [])]
    table = Table(box=None, pad_edge=False, padding=(0, 3, 0, 0))
    for title in titles:
        table.add_column(title, justify="left" if title == "arm" else "right")
    for arm in plan.arms.values():
        row = [arm.name, _against(arm.parameters, base.parameters), _against(arm.flops_per_token, base.flops_per_token)]
        row += [f"{arm.steps:,}", f"{seconds[arm.name]:.3g}"]
        if matched:
            _, value, residual = arm.width
            row += ["as it is" if value is None else f"{value:,}", f"{residual:+,}"]
        table.add_row(*row)
    report.console.print(table)
    for arm in list(plan.arms.values())[1:]:
        flat, keys = arm.config.flat, differing(base.config.flat, arm.config.flat)
        say(f"{arm.name} differs in " + ", ".join(f"{key} = {flat.get(key, 'absent')}" for key in keys))
        for count, name, limit in (("parameters", "params", 0.01), ("flops_per_token", "flops", 0.02)):
            mine, theirs = getattr(arm, count), getattr(base, count)
            if mine and theirs and abs(mine / theirs - 1) > limit:
                what = count.replace("flops_per_token", "FLOPs per token")
                say(f"note: {arm.name} has {mine / theirs - 1:+.1%} {what}; Ablation.match = '{name}' would equal them")
    say(f"budget: {plan.budget[1]:g} {of}" + (f"; matched: {plan.ablation.match}" if matched else "") + "\n")
    estimate = {arm.name: arm.steps * seconds[arm.name] * (1 + _evaluations(arm)) for arm in plan.arms.values()}
    table = Table(box=None, pad_edge=False, padding=(0, 3, 0, 0))
    for title in ("job", "purpose", "steps", "time", "state"):
        table.add_column(title, justify="right" if title in ("steps", "time") else "left")
    total = 0.0
    for job in plan.jobs:
        found = standing(folder / job.run, plan.ablation.metric)
        total += 0.0 if found.state in ENDED else estimate[job.arm]
        state = found.state if found.state in ENDED or not found.step else f"to be resumed at {found.step:,}"
        table.add_row(job.run, job.purpose, f"{plan.arms[job.arm].steps:,}", _duration(estimate[job.arm]), state)
    report.console.print(table)
    jobs = arguments.jobs or 1
    say(
        f"{len(plan.jobs)} jobs, about {_duration(total / jobs)} with {jobs} at once and {threads} threads each, as "
        f"measured here; start-up and the last, whole validation come on top"
    )


def _evaluations(arm) -> float:
    """The time of a run's evaluations, as a share of its training: a forward pass is a third of a step."""
    flat = arm.config.flat
    get = {knob: flat[f"Experiment.{knob}"] for knob in ("eval_every", "eval_windows", "batch_size")}
    times = 2 + arm.steps // get["eval_every"]
    return times * get["eval_windows"] / get["batch_size"] / 3 / arm.steps


def _against(count: int | None, base: int | None) -> str:
    if count is None:
        return "unknown"
    return f"{count:,}" if not base or count == base else f"{count:,} ({count / base - 1:+.2%})"


def _stale(plan, folder: Path, record: dict) -> list[str]:
    """Runs whose config is not what their job's would be now."""
    lines = []
    for job in plan.jobs:
        was = _read_json(folder / job.run / "facts.json").get("config")
        lr = job.lr if job.lr is not None or not plan.rates else record["lr"]["chosen"].get(job.arm)
        if not was or (plan.rates and lr is None):
            continue
        now = plan.flat(job, lr)
        for key in [key for key in {**was, **now} if was.get(key, "absent") != now.get(key, "absent")]:
            lines.append(f"{job.run}: {key}: {was.get(key, 'absent')} there, {now.get(key, 'absent')} here")
    return lines


def _devices(plan) -> int:
    """GPUs that one job takes."""
    import torch

    wanted = [arm.config.flat["Experiment.devices"] for arm in plan.arms.values()]
    return max(torch.cuda.device_count() if each == "all" else each for each in wanted)


def _launcher(arguments, folder: Path, threads: int, devices: int):
    import torch

    from toolkit import launch

    options = dict(_option(text) for text in arguments.options)
    gpus = torch.cuda.device_count()
    if arguments.launcher == "slurm":
        logs = folder / "logs" / "slurm"
        return launch.Slurm(logs, arguments.jobs or 1000, {"cpus_per_task": threads} | options)
    if arguments.launcher == "ray":
        share = {"num_cpus": threads, "num_gpus": devices if gpus else 0}
        return launch.Ray(arguments.jobs or max(1, gpus // devices), share | options)
    if options:
        raise ValueError("--option goes with --launcher slurm or ray")
    if not gpus:
        return launch.Local([{}] * (arguments.jobs or 1))
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if os.environ.get("CUDA_VISIBLE_DEVICES") else None
    names = visible or [str(index) for index in range(gpus)]
    groups = [names[i : i + devices] for i in range(0, gpus - devices + 1, devices)]
    if not groups:
        raise ValueError(f"Experiment.devices = {devices}, but there are {gpus} GPUs")
    return launch.Local([{"CUDA_VISIBLE_DEVICES": ",".join(group)} for group in groups[: arguments.jobs]])


def _option(text: str) -> tuple[str, object]:
    key, equals, value = text.partition("=")
    if not equals:
        raise ValueError(f"--option {text!r}: write it as KEY=VALUE")
    return key, int(value) if value.lstrip("-").isdigit() else value


@contextlib.contextmanager
def _alone(folder: Path):
    import filelock

    lock = filelock.FileLock(folder / ".lock")
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout:
        raise ValueError(f"another ablate is at work in {folder}; wait, or take another --runs") from None
    try:
        yield
    finally:
        lock.release()


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


def _read_json(path: Path) -> dict:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


def _write_json(path: Path, value: dict) -> None:
    temporary = path.with_name(f"{path.name}.tmp")
    temporary.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
    os.replace(temporary, path)


def _one(knobs: list[str]) -> str | None:
    """A name for knobs that arms have: theirs, or a pattern where they differ."""
    distinct = list(dict.fromkeys(knobs))
    return distinct[0] if len(distinct) == 1 else f"*.{distinct[0].rpartition('.')[2]}" if distinct else None


def _without_chosen(lr: dict | None) -> dict | None:
    return lr and {key: value for key, value in lr.items() if key != "chosen"}


def _duration(seconds: float | None) -> str:
    if seconds is None:
        return ""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def _arguments(argv):
    parser = argparse.ArgumentParser(
        prog="python -m toolkit.ablate",
        description="Run the ablation that a plan describes; the same command goes on with one that was stopped.",
        epilog="Exit codes: 0 every job done or diverged, 1 some failed, 2 bad plan, 75 SIGTERM, 130 Ctrl-C.",
    )
    add = parser.add_argument
    add("plan", metavar="PLAN.gin", help="the plan, such as experiments/position/plan.gin")
    add("--runs", metavar="DIR", default="runs", help="the plan's runs go to DIR/NAME OF THE PLAN'S FOLDER")
    add("--jobs", metavar="N", type=int, help="jobs at once (default: 1 on a CPU, one per GPU)")
    add("--launcher", choices=("local", "slurm", "ray"), default="local", help="where jobs run (default: local)")
    add(
        "--option",
        dest="options",
        metavar="K=V",
        action="append",
        default=[],
        help="for Slurm (slurm_partition=gpu, timeout_min=60, cluster=local) or Ray (address=auto)",
    )
    add("--dry-run", action="store_true", help="print arms, jobs and the time they take, and stop")
    arguments = parser.parse_args(argv)
    if arguments.jobs is not None and arguments.jobs < 1:
        parser.error("--jobs takes 1 or more")
    return arguments


if __name__ == "__main__":
    run_command(main)
