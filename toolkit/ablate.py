"""``python -m toolkit.ablate PLAN.gin``: run every job of a plan, each in its own process and folder."""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import shlex
from pathlib import Path
from typing import TYPE_CHECKING

from toolkit.command import run_command

if TYPE_CHECKING:
    from collections.abc import Iterator

    from toolkit.ablation.launch import Launcher
    from toolkit.ablation.plan import Job, Plan
    from toolkit.ablation.planfile import Arm
    from toolkit.ablation.progress import JobProgress

log = logging.getLogger("toolkit")
FEW_JOBS = 20  # a dry run lists up to this many jobs without --verbose


def main(argv: list[str] | None = None) -> int:
    """Run the command. Returns the exit code; raises ValueError for an error that the user can correct."""
    arguments = _arguments(argv)  # before the slow imports, so that --help is quick
    from toolkit.ablation import stopping
    from toolkit.ablation.plan import read
    from toolkit.ablation.settle import settle
    from toolkit.config.layers import ConfigError
    from toolkit.rundir import report
    from toolkit.store.disk import refuse_links

    plan = read(arguments.plan)
    folder = Path(arguments.runs) / plan.name
    if arguments.dry_run:
        _dry_run(plan, folder, arguments)
    if plan.confounds:
        raise ConfigError("\n".join(plan.confounds))
    if arguments.dry_run:
        return 0
    folder.mkdir(parents=True, exist_ok=True)
    refuse_links(folder)
    with _locked(folder):
        record = settle(plan, folder, arguments)
        launcher = _launcher(arguments, folder, record["threads"], _devices_per_job(plan))
        try:
            code = stopping.run(plan, folder, record, launcher)
        finally:
            launcher.close()
    if code in (0, 1):
        _print_verdicts(folder)
    report.say(f"compare: python -m toolkit.compare {shlex.quote(str(folder))}")
    return code


def _print_verdicts(folder: Path) -> None:
    """Print the verdicts so far, one arm per line. An error is only logged, because the jobs have ended already."""
    from toolkit.ablation import stopping
    from toolkit.comparison import record, screen
    from toolkit.rundir import report

    try:
        results = record.record(stopping.judge(folder))
    except Exception as error:  # the folder can't be compared, or the comparison has a bug
        log.warning("the runs can't be compared: %s: %s", type(error).__name__, error)
        return
    report.say("")
    screen.answer(results, report.console)
    if fired_guards := {banner["guard"] for banner in results["banners"]}:
        report.say(f"guards fired: {', '.join(sorted(fired_guards))}; see compare for the reasons")
    report.say("")


def _dry_run(plan: Plan, folder: Path, arguments: argparse.Namespace) -> None:
    """Print the estimated time, one line per arm, and what each arm changes. Print the jobs too if there are at most
    ``FEW_JOBS`` or ``--verbose`` is given."""
    from toolkit.ablation import stopping
    from toolkit.ablation.display import duration
    from toolkit.ablation.progress import read_progress
    from toolkit.ablation.settle import measure, threads_for
    from toolkit.comparison.runs import ENDED
    from toolkit.config import keys
    from toolkit.output.escape import line
    from toolkit.rundir import report
    from toolkit.store.disk import read_json

    saved_plan = read_json(folder / "plan.json")
    threads = saved_plan.get("threads") or threads_for(arguments.jobs, plan)
    seconds = measure(list(plan.arms.values()), threads)
    saved_budget = saved_plan.get("budget", {})
    plan.set_steps({**seconds, **(saved_budget.get("seconds_per_step") or {})}, saved_budget.get("steps"))
    say, base, jobs = report.say, plan.baseline, arguments.jobs or 1
    job_seconds = {arm.name: arm.steps * seconds[arm.name] * (1 + _evaluation_share(arm)) for arm in plan.arms.values()}
    plan_jobs = stopping.remaining(plan, folder)
    progress = {job.run: read_progress(folder / job.run, plan.ablation.metric) for job in plan_jobs}
    total = sum(job_seconds[job.arm] for job in plan_jobs if progress[job.run].state not in ENDED)
    each = f"{threads} thread{'s' if threads > 1 else ''} each"
    say(f"\n{line(plan.name)}: {line(plan.ablation.question)}")
    at_most = "at most " if plan.ablation.looks else ""
    say(
        f"{at_most}{len(plan_jobs)} jobs, about {duration(total / jobs)} with {jobs} at once and {each}, "
        f"measured on this machine; start-up and the full validation at the end are not included"
    )
    say(
        f"baseline {base.name}; factor {', '.join(plan.factor) or 'none declared'}; metric {plan.ablation.metric}, "
        f"effect {plan.ablation.effect:g}, alpha {plan.ablation.alpha:g}\n"
    )
    for sentence in stopping.overview(plan):
        say(sentence)
    _print_arms(plan, seconds)
    for arm in list(plan.arms.values())[1:]:
        differences = keys.independent_differences(base.config.flat, arm.config.flat)
        say(f"{arm.name} differs in " + ", ".join(f"{key} = {value}" for key, (_, value) in differences.items()))
        for count, name, limit in (("parameters", "params", 0.01), ("flops_per_token", "flops", 0.02)):
            own, other = getattr(arm, count), getattr(base, count)
            if own and other and abs(own / other - 1) > limit:
                what = count.replace("flops_per_token", "FLOPs per token")
                say(f"note: {arm.name} has {own / other - 1:+.1%} {what}; Ablation.match = '{name}' makes them equal")
    matched = f"; matched: {plan.ablation.match}" if plan.ablation.match is not None else ""
    say(f"budget: {plan.budget[1]:g} {plan.budget[0]}{matched}\n")
    if arguments.verbose or len(plan_jobs) <= FEW_JOBS:
        _print_jobs(plan, plan_jobs, progress, job_seconds)
    else:
        ended = sum(each.state in ENDED for each in progress.values())
        say(f"{len(plan_jobs)} jobs, {ended} of them ended; --verbose lists them")


def _print_arms(plan: Plan, seconds: dict[str, float]) -> None:
    from toolkit.output.terminal import Column, grid
    from toolkit.rundir import report

    matched, base = plan.ablation.match is not None, plan.baseline
    drop_order = {"FLOPs/token": 3, "s/step": 2, "residual": 1}  # in a narrow terminal, 1 goes first
    titles = ["parameters", "FLOPs/token", "steps", "s/step", *(["width", "residual"] if matched else [])]
    columns = [Column("arm", name=True), *(Column(title, True, drop_order.get(title, 0)) for title in titles)]
    rows = []
    for arm in plan.arms.values():
        row = [arm.name, _versus(arm.parameters, base.parameters), _versus(arm.flops_per_token, base.flops_per_token)]
        row += [f"{arm.steps:,}", f"{seconds[arm.name]:.3g}"]
        if arm.width:
            _, value, residual = arm.width
            row += ["unchanged" if value is None else f"{value:,}", f"{residual:+,}"]
        rows.append(row)
    report.console.print(grid(columns, rows, report.console.width)[0])


def _print_jobs(plan: Plan, jobs: list[Job], progress: dict[str, JobProgress], job_seconds: dict[str, float]) -> None:
    from toolkit.ablation.display import duration
    from toolkit.comparison.runs import ENDED
    from toolkit.output.terminal import Column, grid
    from toolkit.rundir import report

    columns = [Column("job", name=True), Column("purpose", gives_way=2), Column("steps", True, 1), Column("time", True)]
    rows = []
    for job in jobs:
        state, step = progress[job.run].state, progress[job.run].step
        state = state if state in ENDED or not step else f"to be resumed at {step:,}"
        rows.append([job.run, job.purpose, f"{plan.arms[job.arm].steps:,}", duration(job_seconds[job.arm]), state])
    report.console.print(grid([*columns, Column("state")], rows, report.console.width)[0])


def _evaluation_share(arm: Arm) -> float:
    """Estimate the time of a run's evaluations divided by the time of its training steps.

    A forward pass counts as a third of a training step."""
    experiment = arm.config.parts["", "Experiment"]
    every, windows, batch_size = (experiment[knob] for knob in ("eval_every", "eval_windows", "batch_size"))
    assert isinstance(every, int) and isinstance(windows, int) and isinstance(batch_size, int)  # the guard checked them
    return (2 + arm.steps // every) * windows / batch_size / 3 / arm.steps


def _versus(count: int | None, base: int | None) -> str:
    """A count as text, with its difference from the baseline's count in percent."""
    if count is None:
        return "unknown"
    return f"{count:,}" if not base or count == base else f"{count:,} ({count / base - 1:+.2%})"


def _devices_per_job(plan: Plan) -> int:
    """Return how many GPUs one job needs: the most that any arm asks for."""
    import torch

    requested = [arm.config.flat["Experiment.devices"] for arm in plan.arms.values()]
    return max(
        devices if isinstance(devices, int) else torch.cuda.device_count() for devices in requested
    )  # a string is "all"


def _launcher(arguments: argparse.Namespace, folder: Path, threads: int, devices: int) -> Launcher:
    """Build the launcher that ``--launcher`` names. Raises ValueError for ``--option`` with a local launcher, and if
    there are fewer GPUs than one job needs."""
    import torch

    from toolkit.ablation import launch

    options = dict(_parse_option(text) for text in arguments.options)
    gpus = torch.cuda.device_count()
    if arguments.launcher == "slurm":
        logs = folder / "logs" / "slurm"
        return launch.Slurm(logs, arguments.jobs or 1000, {"cpus_per_task": threads} | options)
    if arguments.launcher == "ray":
        resources = {"num_cpus": threads, "num_gpus": devices if gpus else 0}
        return launch.Ray(arguments.jobs or max(1, gpus // devices), resources | options)
    if options:
        raise ValueError("--option needs --launcher slurm or ray")
    if not gpus:
        return launch.Local([{}] * (arguments.jobs or 1))
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if os.environ.get("CUDA_VISIBLE_DEVICES") else None
    gpu_names = visible or [str(index) for index in range(gpus)]
    groups = [gpu_names[i : i + devices] for i in range(0, gpus - devices + 1, devices)]
    if not groups:
        raise ValueError(f"Experiment.devices = {devices}, but there are {gpus} GPUs")
    return launch.Local([{"CUDA_VISIBLE_DEVICES": ",".join(group)} for group in groups[: arguments.jobs]])


def _parse_option(text: str) -> tuple[str, object]:
    """Parse KEY=VALUE; a value of digits becomes an int. Raises ValueError without "="."""
    key, separator, value = text.partition("=")
    if not separator:
        raise ValueError(f"--option {text!r}: write it as KEY=VALUE")
    return key, int(value) if value.lstrip("-").isdigit() else value


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Lock the plan's folder. Raises ValueError while another process holds the lock."""
    import filelock

    lock = filelock.FileLock(folder / ".lock")
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout:
        raise ValueError(f"another ablate is using {folder}; wait, or choose another --runs") from None
    try:
        yield
    finally:
        lock.release()


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m toolkit.ablate",
        description="Run the ablation that a plan describes; the same command continues one that was stopped. With "
        "Ablation.looks, arms are judged at each look, and an arm with a verdict stops.",
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
    add("--verbose", action="store_true", help=f"with --dry-run: list the jobs even if they are more than {FEW_JOBS}")
    arguments = parser.parse_args(argv)
    if arguments.jobs is not None and arguments.jobs < 1:
        parser.error("--jobs takes 1 or more")
    return arguments


if __name__ == "__main__":
    run_command(main)
