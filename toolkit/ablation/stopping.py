"""A plan with looks: runs to a look, judges, and goes on with the baseline and the arms that have no verdict.

Nothing is kept but the runs and looks.jsonl: an arm has stopped if that file has its verdict, and its look follows from
its runs. The verdicts of a look are written before the first run after it starts. So a plan that was killed anywhere
continues with the same jobs."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from toolkit.ablation.progress import read_progress
from toolkit.comparison import lookfile
from toolkit.comparison.runs import ENDED
from toolkit.config.layers import ConfigError

if TYPE_CHECKING:
    from toolkit.ablation.launch import Launcher
    from toolkit.ablation.plan import Job, Plan
    from toolkit.comparison.results import Comparison


def run(plan: Plan, folder: Path, record: dict[str, Any], launcher: Launcher) -> int:
    """Run the jobs of a plan, from look to look if it has any. A job that fails is not tried again, and its arm is not
    judged at that look. Returns the exit code: that of ``JobQueue.run``, 1 if any job failed. Raises ConfigError if a
    look can't be written."""
    from toolkit.ablation.jobs import JobQueue
    from toolkit.rundir import report

    if not plan.ablation.looks:
        return JobQueue(plan, folder, record, launcher).run()
    tried: dict[str, Job] = {}
    code = 0
    while True:
        comparison = judge(folder)
        if tried:
            report.say(verdicts(comparison))
        states = {run: read_progress(folder / run, plan.ablation.metric).state for run in tried}
        failed = {run for run, state in states.items() if state not in ENDED}
        jobs = wanted(plan, comparison, {tried[run].arm for run in failed})
        if tried and tried.keys() >= {job.run for job in jobs}:
            return code
        queue = JobQueue(plan, folder, record, launcher, [job for job in jobs if job.run not in failed])
        tried |= {job.run: job for job in jobs}
        latest = queue.run()
        if latest not in (0, 1):
            return latest
        code = max(code, latest)


def judge(folder: Path) -> Comparison:
    """Judge the arms at the looks that their runs have reached, and write the verdicts to looks.jsonl. If that is not
    possible, a plan with looks can't go on: ConfigError."""
    from toolkit.comparison import assemble, runs

    comparison = assemble.compare(*runs.find([str(folder)], None, None), (), None)
    problem = lookfile.save(comparison, "ablate")
    if problem and comparison.plan.looks:
        raise ConfigError(problem)
    return replace(comparison, notes=(*comparison.notes, problem)) if problem else comparison


def wanted(plan: Plan, comparison: Comparison, failed: Collection[str] = ()) -> list[Job]:
    """The plan's jobs up to the next look. The undecided arms go from look to look together: an arm that is ahead waits
    for the others, but not for the arms in ``failed``. An arm that stopped has its jobs up to that look. The baseline
    has those of the arm that goes furthest."""
    looks, reached = plan.ablation.looks, comparison.looks_reached
    words = {arm.name: arm.judgement.verdict.word for arm in comparison.arms[1:] if arm.judgement}
    stopped = comparison.stopped | {name for name, word in words.items() if word in lookfile.STOPPED}
    following = min((reached[name] for name in words if name not in stopped and name not in failed), default=-1)
    places = {}
    for name in words:
        goes_on = name not in stopped and (name in failed or reached[name] == following)
        places[name] = min(reached[name], len(looks) - 1) if goes_on else max(0, reached[name] - 1)
    seeds = {name: looks[place] for name, place in places.items()}
    return _up_to(plan, {plan.baseline.name: max(seeds.values()), **seeds})


def remaining(plan: Plan, folder: Path) -> list[Job]:
    """All jobs of the plan but those that follow the look at which their arm stopped."""
    ablation, file = plan.ablation, lookfile.read(folder)
    stops = {arm: file.stop(plan.baseline.name, ablation.metric, arm) for arm in plan.arms}
    seeds = dict.fromkeys(plan.arms, len(ablation.seeds))
    for arm, stop in stops.items():
        if stop and ablation.looks:
            seeds[arm] = min(n for n in ablation.looks if set(stop["seeds"]) <= set(ablation.seeds[:n]))
    return _up_to(plan, seeds)


def _up_to(plan: Plan, seeds: dict[str, int]) -> list[Job]:
    """The plan's selection jobs, and the judged jobs of each arm's first seeds."""
    place = {seed: index for index, seed in enumerate(plan.ablation.seeds)}
    return [job for job in plan.jobs if job.purpose == "selection" or place[job.seed] < seeds[job.arm]]


def verdicts(comparison: Comparison) -> str:
    """A line with each arm's verdict and look."""
    parts = []
    for arm in comparison.arms[1:]:
        judgement = arm.judgement
        look = f" ({judgement.look.name})" if judgement and judgement.look and judgement.look.name else ""
        parts.append(f"{arm.name} {judgement.verdict.word if judgement else 'not judged'}{look}")
    return f"judged: {', '.join(parts)}"


def overview(plan: Plan) -> list[str]:
    """Lines for a dry run: the looks, their levels, and the jobs up to each look. Empty for a plan without looks."""
    from toolkit.comparison.sequential import Looks

    ablation, arms = plan.ablation, len(plan.arms)
    if not ablation.looks:
        return []
    levels = Looks.planned(ablation.looks, ablation.spending).levels(ablation.alpha)
    selection = sum(job.purpose == "selection" for job in plan.jobs)
    jobs = [selection + count * arms for count in ablation.looks]
    holm = f", before Holm's adjustment for {arms - 1} arms" if arms > 2 else ""
    return [
        f"looks at {', '.join(map(str, ablation.looks))} seeds ({ablation.spending}); a plain p decides if it is below "
        f"{', '.join(f'{level:.2g}' for level in levels)}{holm}",
        f"jobs up to each look if no arm stops: {', '.join(map(str, jobs))}; if every arm stops at the first look: "
        f"{jobs[0]} in all",
    ]


def changes(before: dict[str, Any], record: dict[str, Any], folder: Path) -> list[str]:
    """Changes of the looks that are refused once something was judged, one line each. Looks may be added at the end,
    with seeds."""
    if not (folder / lookfile.NAME).exists():
        return []
    old, new = before.get("looks") or [], record["looks"]
    lines = []
    if old != new[: len(old)] or (new and not old):
        lines.append(f"looks: was {old}, is now {new}; after the first look, they may only be added at the end")
    if old and before["spending"] != record["spending"]:
        lines.append(f"spending: was {before['spending']}, is now {record['spending']}")
    if old and before["seeds"] != record["seeds"][: len(before["seeds"])]:
        lines.append("seeds: in a plan with looks, seeds are added at the end of the list")
    return lines


def planned_seeds(before: dict[str, Any], record: dict[str, Any], folder: Path) -> int | None:
    """The number of seeds that was planned before the first look; looks at more may spend only what is in reserve."""
    is_judged = (folder / lookfile.NAME).exists()
    return before.get("planned_seeds") if is_judged else record["planned_seeds"]
