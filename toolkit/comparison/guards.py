"""Guards: checks for whatever makes a comparison of runs unfair or invalid. Each guard reads only the run folders and
reports the values that violate it. A clean plan causes no report.

``check`` runs all guards. Those here look at the design: arms, configs, sizes, budgets and seeds. The others are in
``integrity`` (files), ``environment`` (data, machine, code), ``spikes`` (training losses) and ``rates``."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from toolkit.comparison.banner import Banner, list_names, report_differences, show
from toolkit.comparison.environment import environment, evaluators, implementations, own_code
from toolkit.comparison.integrity import copies, damaged, edited, resumed
from toolkit.comparison.runs import PlanRecord, Run
from toolkit.comparison.spikes import spiked
from toolkit.config import keys

MAX_PACE_RATIO = 1.5  # for a budget in seconds: largest allowed ratio of step times within an arm
MAX_PARAMETER_DIFFERENCE, MAX_FLOPS_DIFFERENCE = 0.01, 0.02  # allowed, relative to the baseline


def check(plan: PlanRecord, judged: list[Run], selection: list[Run]) -> list[Banner]:
    """Run every guard on the judged runs. Guards on equal set-ups also check the selection runs."""
    if plan.table:
        return [*ends(judged), *(seeds(plan, judged, selection) if plan.table.seed else ())]
    started = [run for run in judged if run.facts]
    started_and_selection = started + [run for run in selection if run.facts]
    return [
        *edited(plan),
        *damaged([*judged, *selection]),
        *copies(started_and_selection),
        *config(plan, started_and_selection),
        *sizes(plan, started),
        *tokens(plan, started),
        *environment(started_and_selection),
        *implementations(plan, started_and_selection),
        *evaluators(started_and_selection),
        *own_code(started_and_selection),
        *untuned(plan, started_and_selection),
        *overlapping(plan, started),
        *no_op(plan, started),
        *seeds(plan, judged, selection),
        *resumed(started_and_selection),
        *spiked(started_and_selection),
    ]


def untuned(plan: PlanRecord, runs: list[Run]) -> Iterable[Banner]:
    """Optimizers are compared, but no learning rate was tuned for each arm."""
    optimizers = {run.arm: show(run.config.get("Experiment.optimizer")) for run in runs}
    if plan.declared and not plan.lr and len(set(optimizers.values())) > 1:
        listed = ", ".join(f"{arm} {str(name).removeprefix('@')}" for arm, name in optimizers.items())
        yield Banner(
            "rates not tuned",
            f"optimizers differ ({listed}), but no learning rate was tuned: each arm is judged at the rate in its "
            "config; set Ablation.lr_grid to tune the rate of each arm",
        )


def overlapping(plan: PlanRecord, runs: list[Run]) -> Iterable[Banner]:
    """With a budget in seconds: runs that overlapped in time, or step times that differ too much within an arm."""
    if plan.budget.get("of") != "seconds":
        return
    timed = sorted((r for r in runs if {"started", "ended"} <= r.facts.keys()), key=lambda run: run.facts["started"])
    pairs = [(a.name, b.name) for a, b in zip(timed, timed[1:], strict=False) if b.facts["started"] < a.facts["ended"]]
    if pairs:
        listed = list_names(name for pair in pairs for name in pair)
        yield Banner(
            "jobs at once", f"the budget is time, but these runs overlapped and may have slowed down: {listed}"
        )
    for arm in plan.arms:
        paces = {run.name: pace for run in runs if run.arm == arm and (pace := run.seconds_per_step())}
        if paces and max(paces.values()) > MAX_PACE_RATIO * min(paces.values()):
            slow, fast = max(paces, key=paces.__getitem__), min(paces, key=paces.__getitem__)
            ratio = paces[slow] / paces[fast]
            text = f"the budget is time, but a step of {slow} took {ratio:.1f} times as long as a step of {fast}"
            yield Banner("step times", text)


def config(plan: PlanRecord, runs: list[Run]) -> Iterable[Banner]:
    """Config keys that differ from the baseline's and that the factor does not cover."""
    base = next((run for run in runs if run.arm == plan.baseline), None)
    if base is None:
        return
    for arm in plan.arms:
        stray: dict[str, str] = {}
        for run in runs:
            if run.arm == arm:
                changed = independent(base.config, run.config)
                stray |= {key: text for key, text in changed.items() if not _is_allowed(plan, run, base, key)}
        if not plan.declared and len(stray) == 1 and arm != plan.baseline:
            continue  # no factor was declared: the only difference is the comparison
        if stray:
            count = "1 key differs" if len(stray) == 1 else f"{len(stray)} keys differ"
            scope = "outside the factor" if plan.declared else "at once, and no plan says which of them is the factor"
            yield Banner("config", f"{arm}: {count} {scope}: {'; '.join(stray.values())}")


def independent(base: dict[str, Any], other: dict[str, Any]) -> dict[str, str]:
    """The differences that may confound a comparison, as {key: "key before -> after"}."""
    differences = keys.independent_differences(base, other)
    return {key: f"{key} {show(before)} -> {show(after)}" for key, (before, after) in differences.items()}


def _is_allowed(plan: PlanRecord, run: Run, base: Run, key: str) -> bool:
    if keys.matches(key, plan.factor):
        return True
    set_by_plan = [knob_of(setting, arm) for setting in (plan.match, plan.lr) for arm in (run.arm, base.arm)]
    if keys.matches(key, filter(None, set_by_plan)):
        return True
    steps = plan.budget.get("steps") or {}
    return key == "Experiment.steps" and run.config.get(key) == steps.get(run.arm) and base.arm in steps


def knob_of(setting: dict[str, Any] | None, arm: str) -> str | None:
    """The knob (or a pattern for it) that the plan itself sets for an arm; ``setting`` is plan.match or plan.lr."""
    setting = setting or {}
    return (setting.get("knobs") or {}).get(arm) or setting.get("knob")


def sizes(plan: PlanRecord, runs: list[Run]) -> Iterable[Banner]:
    """Parameters more than 1 % from the baseline's, or FLOPs per token more than 2 %. With a budget in FLOPs, the total
    training FLOPs are compared instead."""
    budget_is_flops = plan.budget.get("of") == "flops"

    def flops(run: Run) -> int | None:
        per_token = run.facts.get("flops_per_token")
        return per_token * run.facts.get("tokens", 0) if per_token and budget_is_flops else per_token

    def parameters(run: Run) -> int | None:
        return run.facts.get("parameters", {}).get("total")

    yield from _report_far_from_baseline(plan, runs, "parameters", parameters, MAX_PARAMETER_DIFFERENCE)
    yield from _report_far_from_baseline(
        plan, runs, "training FLOPs" if budget_is_flops else "FLOPs per token", flops, MAX_FLOPS_DIFFERENCE
    )


def _report_far_from_baseline(
    plan: PlanRecord, runs: list[Run], quantity: str, value_of: Callable[[Run], int | None], tolerance: float
) -> Iterable[Banner]:
    counts: dict[str, dict[int, list[Run]]] = {arm: {} for arm in plan.arms}
    for run in runs:
        if value := value_of(run):
            counts[run.arm].setdefault(value, []).append(run)
    base = max(counts[plan.baseline], key=lambda value: len(counts[plan.baseline][value]), default=None)
    for arm, by_value in counts.items():
        for value, members in by_value.items():
            if base and abs(value - base) > tolerance * base:
                subject = arm if len(by_value) == 1 else list_names(run.name for run in members)
                text = f"{subject} has {value:,} {quantity}, {plan.baseline} has {base:,}: {value / base - 1:+.1%}"
                yield Banner(quantity, f"{text} (at most {tolerance:.0%} is allowed)")


def tokens(plan: PlanRecord, runs: list[Run]) -> Iterable[Banner]:
    """Training tokens that differ, unless the budget is in seconds or FLOPs; and steps that differ from the plan's."""
    if plan.budget.get("of") not in ("flops", "seconds"):
        yield from report_differences(runs, "tokens", lambda run: run.facts.get("tokens"), _count_or_unknown)
    planned = plan.budget.get("steps") or {}
    deviations = [
        f"{run.name} has {run.steps:,} instead of {planned[run.arm]:,}"
        for run in runs
        if run.steps != planned.get(run.arm, run.steps)
    ]
    if deviations:
        yield Banner("budget", f"steps differ from the plan: {'; '.join(deviations)}")


def ends(runs: list[Run]) -> Iterable[Banner]:
    """The arms of a table with steps that end at different steps."""
    last = {run.arm: run.steps for run in runs}
    if len(set(last.values())) > 1:
        listed = "; ".join(f"{arm} {step:,g}" for arm, step in last.items())
        yield Banner("budget", f"the arms end at different steps: {listed}")


def no_op(plan: PlanRecord, runs: list[Run]) -> Iterable[Banner]:
    """An arm with a run that is identical to the baseline's run of the same seed."""
    for arm in plan.arms:
        seeds = [run.seed for run, _ in identical(plan, runs, arm)]
        if seeds:
            at = f"at seed{'s' if len(seeds) > 1 else ''} {', '.join(map(str, seeds))}"
            changed = any(keys.differences(a.config, b.config) for b, a in identical(plan, runs, arm))
            why = "what it changes never took effect" if changed else "its config is the baseline's"
            yield Banner("no-op", f"{arm} is identical to {plan.baseline} {at}: {why}")


def identical(plan: PlanRecord, runs: list[Run], arm: str) -> list[tuple[Run, Run]]:
    """Pairs (arm's run, baseline's run of that seed) with equal final weights, or with equal metrics in all rows."""
    base = {run.seed: run for run in runs if run.arm == plan.baseline}
    pairs = [(run, base[run.seed]) for run in runs if run.arm == arm != plan.baseline and run.seed in base]
    return [(run, other) for run, other in pairs if _has_same_results(run, other)]


def _has_same_results(run: Run, other: Run) -> bool:
    weights = run.facts.get("weights_sha256")
    if weights is not None and weights == other.facts.get("weights_sha256"):
        return True
    return bool(run.rows) and run.history() == other.history()


def seeds(plan: PlanRecord, judged: list[Run], selection: list[Run]) -> Iterable[Banner]:
    """Arms with different seeds (in a plan with looks, arms stop at different ones), a seed that was run twice, or a
    judged seed that also selected the learning rate."""
    by_arm = {arm: sorted(run.seed for run in judged if run.arm == arm) for arm in plan.arms}
    if not plan.looks and len({tuple(sorted(set(arm_seeds))) for arm_seeds in by_arm.values()}) > 1:
        listed = "; ".join(f"{arm} {', '.join(map(str, arm_seeds)) or 'none'}" for arm, arm_seeds in by_arm.items())
        yield Banner("unequal seeds", f"the arms have different seeds: {listed}")
    twice = {
        arm: sorted({seed for seed in arm_seeds if arm_seeds.count(seed) > 1}) for arm, arm_seeds in by_arm.items()
    }
    for arm, arm_seeds in twice.items():
        if arm_seeds:
            yield Banner("repeated seeds", f"{arm} has more than one run of seed {', '.join(map(str, arm_seeds))}")
    shared = sorted({run.seed for run in selection} & {run.seed for run in judged})
    if shared:
        listed = ", ".join(map(str, shared))
        yield Banner(
            "selection seeds", f"seed {listed} was used to choose the learning rate, so it can't be judged too"
        )


def _count_or_unknown(value: int | None) -> str:
    return "unknown" if value is None else f"{value:,}"
