"""Guards: checks for whatever makes a comparison of runs unfair or invalid. Each guard reads only the run folders and
reports the values that violate it. A clean plan causes no report."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np

from toolkit.comparison.runs import PlanRecord, Run
from toolkit.config import keys

MAX_PACE_RATIO = 1.5  # for a budget in seconds: largest allowed ratio of step times within an arm
MAX_PARAMETER_DIFFERENCE, MAX_FLOPS_DIFFERENCE = 0.01, 0.02  # allowed, relative to the baseline
SPIKE_SD, SPIKE_NATS, SPIKE_WINDOW = 8.0, 0.2, 5  # a spike is this far above the median before it


@dataclass(frozen=True)
class Banner:
    """One violation: the guard's name, and a sentence with the offending values."""

    guard: str
    text: str


def check(plan: PlanRecord, judged: list[Run], selection: list[Run]) -> list[Banner]:
    """Run every guard on the judged runs. Guards on equal set-ups also check the selection runs."""
    started = [run for run in judged if run.facts]
    started_and_selection = started + [run for run in selection if run.facts]
    banners = [
        *edited(plan),
        *damaged([*judged, *selection]),
        *copies(started_and_selection),
        *config(plan, started_and_selection),
        *sizes(plan, started),
        *tokens(plan, started),
        *environment(started_and_selection),
        *implementations(plan, started_and_selection),
        *own_code(started_and_selection),
        *untuned(plan, started_and_selection),
        *overlapping(plan, started),
        *no_op(plan, started),
        *seeds(plan, judged, selection),
        *resumed(started_and_selection),
        *spiked(started_and_selection),
    ]
    return banners


def edited(plan: PlanRecord) -> Iterable[Banner]:
    """The plan differs from the one that was run, or its folder holds runs that it does not list."""
    if plan.edited:
        yield Banner("plan edited", plan.edited)
    if plan.runs_without_job:
        yield Banner(
            "runs without a job",
            f"no job of the plan names {list_names(plan.runs_without_job)}, which lie in its folder",
        )


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
            yield Banner("one run twice", f"{names} have the same weights or the same rows: they are one run")


def job_seed(run: Run) -> int:
    """The seed that a run was meant to have: its job's, or without a job the seed in its facts."""
    return run.seed if run.requested_seed is None else run.requested_seed


def implementations(plan: PlanRecord, runs: list[Run]) -> Iterable[Banner]:
    """Matrix products, or an attention of the same name, that were computed by different code in different runs."""
    if keys.matches("Experiment.precision", plan.factor):
        return
    yield from _report_differences(
        [run for run in runs if "products" in run.facts], "products", lambda run: run.facts["products"]
    )
    kernels: dict[str, list[tuple[Run, str]]] = {}
    for run in runs:
        for entry in (run.facts.get("attention") or "").split(", "):
            name, _, implementation = entry.partition(": ")
            kernels.setdefault(name, []).append((run, implementation))
    for name, runs_of_kernel in kernels.items():
        by_path = {run.path: implementation for run, implementation in runs_of_kernel}
        yield from _report_differences(
            [run for run, _ in runs_of_kernel], f"attention {name}", lambda run, by_path=by_path: by_path[run.path]
        )


def own_code(runs: list[Run]) -> Iterable[Banner]:
    """A user's own part whose code differs between the runs that use it."""
    names = {name for run in runs for name in run.facts.get("code", {})}
    for name in sorted(names):
        users = [run for run in runs if name in run.facts.get("code", {})]
        yield from _report_differences(users, f"code/{name}", lambda run, name=name: short(run.facts["code"][name]))


def untuned(plan: PlanRecord, runs: list[Run]) -> Iterable[Banner]:
    """Optimizers are compared, but no learning rate was tuned for each arm."""
    optimizers = {run.arm: show(run.config.get("Experiment.optimizer")) for run in runs}
    if plan.declared and not plan.lr and len(set(optimizers.values())) > 1:
        listed = ", ".join(f"{arm} {str(name).removeprefix('@')}" for arm, name in optimizers.items())
        yield Banner(
            "rates not tuned",
            f"optimizers differ ({listed}), and no arm's learning rate was tuned: each is judged at the rate that the "
            "plan happens to give; use Ablation.lr_grid",
        )


def overlapping(plan: PlanRecord, runs: list[Run]) -> Iterable[Banner]:
    """With a budget in seconds: runs that overlapped in time, or step times that differ too much within an arm."""
    if plan.budget.get("of") != "seconds":
        return
    timed = sorted((r for r in runs if {"started", "ended"} <= r.facts.keys()), key=lambda run: run.facts["started"])
    pairs = [(a.name, b.name) for a, b in zip(timed, timed[1:], strict=False) if b.facts["started"] < a.facts["ended"]]
    if pairs:
        yield Banner(
            "jobs at once", f"the budget is time, and {list_names(name for pair in pairs for name in pair)} overlapped"
        )
    for arm in plan.arms:
        paces = {run.name: pace for run in runs if run.arm == arm and (pace := run.seconds_per_step())}
        if paces and max(paces.values()) > MAX_PACE_RATIO * min(paces.values()):
            slow, fast = max(paces, key=paces.get), min(paces, key=paces.get)
            ratio = paces[slow] / paces[fast]
            yield Banner("step times", f"the budget is time, and a step of {slow} took {ratio:.1f} times one of {fast}")


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
            count = f"{len(stray)} key{'s' if len(stray) > 1 else ''}"
            scope = "beyond the factor" if plan.declared else "at once, and no plan says which of them is the factor"
            yield Banner(
                "config",
                f"{arm}: {count} differ{'' if len(stray) > 1 else 's'} {scope}: " + "; ".join(stray.values()),
            )


def independent(base: dict, other: dict) -> dict[str, str]:
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


def knob_of(setting: dict | None, arm: str) -> str | None:
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
    plan: PlanRecord, runs: list[Run], quantity: str, value_of: Callable, tolerance: float
) -> Iterable[Banner]:
    counts: dict[str, dict[int, list[Run]]] = {arm: {} for arm in plan.arms}
    for run in runs:
        if value_of(run):
            counts[run.arm].setdefault(value_of(run), []).append(run)
    base = max(counts[plan.baseline], key=lambda value: len(counts[plan.baseline][value]), default=None)
    for arm, by_value in counts.items():
        for value, members in by_value.items():
            if base and abs(value - base) > tolerance * base:
                subject = arm if len(by_value) == 1 else list_names(run.name for run in members)
                text = f"{subject} has {value:,} {quantity}, {plan.baseline} {base:,}: {value / base - 1:+.1%}"
                yield Banner(quantity, f"{text} (more than {tolerance:.0%} apart)")


def tokens(plan: PlanRecord, runs: list[Run]) -> Iterable[Banner]:
    """Training tokens that differ, unless the budget is in seconds or FLOPs; and steps that differ from the plan's."""
    if plan.budget.get("of") not in ("flops", "seconds"):
        yield from _report_differences(runs, "tokens", lambda run: run.facts.get("tokens"), _count_or_unknown)
    planned = plan.budget.get("steps") or {}
    deviations = [
        f"{run.name} {run.steps:,} for {planned[run.arm]:,}"
        for run in runs
        if run.steps != planned.get(run.arm, run.steps)
    ]
    if deviations:
        yield Banner("budget", f"steps that are not the plan's: {'; '.join(deviations)}")


def environment(runs: list[Run]) -> Iterable[Banner]:
    """Settings that have to be equal in all runs, whatever is compared: data, precision, device, versions, code."""

    def fact(*names: str) -> Callable:
        return lambda run: tuple(run.facts.get(name) for name in names)

    def evaluation(run: Run) -> tuple:
        val = run.facts.get("windows", {}).get("val")
        return (show(run.config.get("Experiment.eval_windows")), val, short(run.facts.get("data")))

    def order(run: Run) -> tuple:
        sizes = (show(run.config.get("Experiment.batch_size")), show(run.config.get("Experiment.seq_len")))
        return (short(run.facts.get("data")), *sizes)

    def versions(run: Run) -> tuple:
        packages = {"python": run.facts.get("python"), **run.facts.get("packages", {})}
        return tuple(sorted((name, str(version)) for name, version in packages.items()))

    def describe(*names: str) -> Callable:
        return lambda value: ", ".join(f"{n} {v}" for n, v in zip(names, value, strict=True))

    yield from _report_differences(runs, "tokenizer", lambda run: short(run.facts.get("tokenizer")))
    yield from _report_differences(runs, "evaluation set", evaluation, describe("eval_windows", "of", "data"))
    yield from _report_differences(runs, "batch order", order, describe("data", "batch_size", "seq_len"))
    yield from _report_differences(runs, "precision", fact("precision", "compiled"), describe("", "compiled"))
    yield from _report_differences(runs, "device", fact("device", "device_name"), describe("", ""))
    on_cpu = [run for run in runs if run.facts.get("device") == "cpu"]
    yield from _report_differences(on_cpu, "threads", lambda run: run.facts.get("threads"))
    groups = _groups(runs, versions)
    if len(groups) > 1:
        common = set.intersection(*map(set, groups))
        differing = {tuple(pair for pair in key if pair not in common): names for key, names in groups.items()}
        yield Banner(
            "versions",
            _describe_groups(differing, lambda pairs: ", ".join(f"{n} {v}" for n, v in pairs) or "none of these"),
        )
    yield from _report_differences(runs, "commit", lambda run: str(run.facts.get("commit"))[:12])
    unknown = [run for run in runs if not run.facts.get("commit") and run.facts.get("package_sha256")]
    yield from _report_differences(unknown, "code", lambda run: short(run.facts["package_sha256"]))
    dirty = _groups(runs, lambda run: bool(run.facts.get("dirty")))
    if True in dirty:
        yield Banner("dirty tree", f"the code had changes that no commit holds: {_names(dirty[True], dirty)}")


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
    """Arms with different seeds, a seed that was run twice, or a judged seed that also selected the learning rate."""
    by_arm = {arm: sorted(run.seed for run in judged if run.arm == arm) for arm in plan.arms}
    if len({tuple(sorted(set(arm_seeds))) for arm_seeds in by_arm.values()}) > 1:
        listed = "; ".join(f"{arm} {', '.join(map(str, arm_seeds)) or 'none'}" for arm, arm_seeds in by_arm.items())
        yield Banner("unequal seeds", listed)
    twice = {
        arm: sorted({seed for seed in arm_seeds if arm_seeds.count(seed) > 1}) for arm, arm_seeds in by_arm.items()
    }
    for arm, arm_seeds in twice.items():
        if arm_seeds:
            yield Banner("repeated seeds", f"{arm} has more than one run of seed {', '.join(map(str, arm_seeds))}")
    shared = sorted({run.seed for run in selection} & {run.seed for run in judged})
    if shared:
        yield Banner(
            "selection seeds", f"seed {', '.join(map(str, shared))} chose the learning rate and is judged as well"
        )


def resumed(runs: list[Run]) -> Iterable[Banner]:
    """Runs that were interrupted and resumed, or that started from another run."""
    for run in runs:
        for resume in run.facts.get("resumed") or []:
            changed = "; ".join(f"{key} {show(a)} -> {show(b)}" for key, (a, b) in resume.get("changed", {}).items())
            yield Banner("resumed", f"{run.name} at step {resume.get('step')}{': ' + changed if changed else ''}")
        if run.facts.get("from"):
            yield Banner("resumed", f"{run.name} began from {run.facts['from']}")


def spiked(runs: list[Run]) -> Iterable[Banner]:
    """Training losses that jump, after warm-up, far above those just before; and steps that were skipped for that."""
    for run in runs:
        skipped_steps, count = run.curve("skipped/count")
        if len(count):
            yield Banner(
                "spiked", f"{run.name}: {count[-1]:.0f} steps were left out, the last at {skipped_steps[-1]:,.0f}"
            )
        steps, loss = run.curve("train/loss_nats")
        warm = [value for key, value in run.config.items() if key.endswith(".warmup_steps") and isinstance(value, int)]
        after_warmup = steps >= max(warm, default=run.steps // 10)
        steps, loss = steps[after_warmup], loss[after_warmup]
        spike_indices = spikes(loss)
        if len(spike_indices):
            worst = spike_indices[np.argmax(loss[spike_indices])]
            count = f"{len(spike_indices)} point{'s' if len(spike_indices) > 1 else ''}"
            median_before = np.median(loss[max(0, worst - SPIKE_WINDOW) : worst])
            text = (
                f"{run.name}: training loss {loss[worst]:.3f} at step {steps[worst]:,.0f}, "
                f"{median_before:.3f} before it"
            )
            yield Banner("spiked", f"{text} ({count} above {SPIKE_SD:g} robust sd and {SPIKE_NATS:g} nats)")


def spikes(loss: np.ndarray) -> np.ndarray:
    """Indices of points that lie more than SPIKE_SD robust standard deviations, and more than SPIKE_NATS, above the
    median of the SPIKE_WINDOW points before them. A loss that falls, however fast, has no spikes."""
    if len(loss) <= SPIKE_WINDOW + 1:
        return np.array([], dtype=int)
    rise = np.array([loss[i] - np.median(loss[i - SPIKE_WINDOW : i]) for i in range(SPIKE_WINDOW, len(loss))])
    change = np.diff(loss)  # differences between neighbours: the trend adds little to their spread
    sd = (
        1.4826 * np.median(np.abs(change - np.median(change))) / np.sqrt(2)
    )  # sd of a normal distribution, from its median absolute deviation
    return SPIKE_WINDOW + np.flatnonzero(rise > max(SPIKE_SD * sd, SPIKE_NATS))


def _report_differences(
    runs: list[Run], quantity: str, value_of: Callable, describe: Callable = str
) -> Iterable[Banner]:
    groups = _groups(runs, value_of)
    if len(groups) > 1:
        yield Banner(quantity, _describe_groups(groups, describe))


def _count_or_unknown(value: int | None) -> str:
    return "not known" if value is None else f"{value:,}"


def _groups(runs: list[Run], value_of: Callable) -> dict[object, list[Run]]:
    groups: dict[object, list[Run]] = {}
    for run in runs:
        groups.setdefault(value_of(run), []).append(run)
    return groups


def _describe_groups(groups: dict[object, list[Run]], describe: Callable) -> str:
    """The groups as text: "float32 (rope) against bfloat16 (alibi-s1)". An arm stands for its runs if no other
    group has a run of it."""
    return " against ".join(
        f"{describe(value).strip()} ({_names(members, groups)})" for value, members in groups.items()
    )


def _names(members: list[Run], groups: dict[object, list[Run]]) -> str:
    elsewhere = {run.arm for other in groups.values() if other is not members for run in other}
    return list_names(run.name if run.arm in elsewhere else run.arm for run in members)


def list_names(names: Iterable[str], most: int = 6) -> str:
    """The names without repeats, separated by commas; after ``most`` of them only a count: "a, b and 3 more"."""
    names = list(dict.fromkeys(names))
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def short(fingerprint: object) -> str:
    """The first 12 characters of a fingerprint, enough to tell two apart."""
    return str(fingerprint)[:12]


def show(value: object) -> str:
    """A config value as text."""
    return str(value) if not isinstance(value, float) else f"{value:g}"
