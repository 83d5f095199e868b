"""What can make a comparison of runs unfair or void. Each guard looks at the runs' folders alone, and says what it
found with the values that offend; together they find nothing on a clean plan."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase

import numpy as np

from toolkit.comparison.runs import SEED, Plan, Run

PACE = 1.5  # how many times as long one run's steps may take as another's of its arm, where the budget is time
PARAMETERS, FLOPS = 0.01, 0.02  # relative difference from the baseline that is let pass
SPIKE_SD, SPIKE_NATS, PAST = 8.0, 0.2, 5  # a spike: both of these above the median of so many points before it


@dataclass(frozen=True)
class Banner:
    """One violation: which guard, and what it saw."""

    guard: str
    text: str


def check(plan: Plan, judged: list[Run], selection: list[Run]) -> list[Banner]:
    """Every guard, over the runs that are judged; those that chose a learning rate have to agree with them too."""
    begun = [run for run in judged if run.facts]
    both = begun + [run for run in selection if run.facts]
    found = [
        *edited(plan),
        *damaged([*judged, *selection]),
        *copies(both),
        *config(plan, both),
        *sizes(plan, begun),
        *tokens(plan, begun),
        *environment(both),
        *implementations(plan, both),
        *own_code(both),
        *untuned(plan, both),
        *overlapping(plan, begun),
        *no_op(plan, begun),
        *seeds(plan, judged, selection),
        *resumed(both),
        *spiked(both),
    ]
    return found


def edited(plan: Plan) -> Iterable[Banner]:
    """The plan is another than the one that was run, or it does not speak of all runs."""
    if plan.edited:
        yield Banner("plan edited", plan.edited)
    if plan.strays:
        yield Banner("runs without a job", f"no job of the plan names {some(plan.strays)}, which lie in its folder")


def damaged(runs: list[Run]) -> Iterable[Banner]:
    """Files that are not what was written, or that contradict each other."""
    for run in runs:
        for sentence in run.damage:
            yield Banner("damaged", f"{run.name}: {sentence}")
        for sentence in run.edits:
            yield Banner("edited", f"{run.name}: {sentence}")


def copies(runs: list[Run]) -> Iterable[Banner]:
    """Runs of different seeds that are one run: the same weights, or, where these are not known, the same rows."""
    groups: dict[str, list[Run]] = {}
    for run in runs:
        rows = json.dumps(run.history(), sort_keys=True) if run.rows else ""
        if one := run.facts.get("weights_sha256") or rows:
            groups.setdefault(one, []).append(run)
    for members in groups.values():
        seeds, places = {job_seed(run) for run in members}, {(run.arm, run.seed) for run in members}
        if len(seeds) > 1 or len(places) < len(members):
            names = some(run.name for run in members)
            yield Banner("one run twice", f"{names} have the same weights or the same rows: they are one run")


def job_seed(run: Run) -> int:
    """The seed that a run was asked for, by its job, else by its own facts."""
    return run.seed if run.asked is None else run.asked


def implementations(plan: Plan, runs: list[Run]) -> Iterable[Banner]:
    """Matrix products, or the attention of one name, that came from other code in some runs."""
    if any(fnmatchcase("Experiment.precision", pattern) for pattern in plan.factor):
        return
    yield from _differ([run for run in runs if "products" in run.facts], "products", lambda run: run.facts["products"])
    kernels: dict[str, list[tuple[Run, str]]] = {}
    for run in runs:
        for told in (run.facts.get("attention") or "").split(", "):
            name, _, how = told.partition(": ")
            kernels.setdefault(name, []).append((run, how))
    for name, found in kernels.items():
        ways = {run.path: how for run, how in found}
        yield from _differ([run for run, _ in found], f"attention {name}", lambda run, ways=ways: ways[run.path])


def own_code(runs: list[Run]) -> Iterable[Banner]:
    """A part of somebody's own that is not the same in all runs that have it."""
    names = {name for run in runs for name in run.facts.get("code", {})}
    for name in sorted(names):
        having = [run for run in runs if name in run.facts.get("code", {})]
        yield from _differ(having, f"code/{name}", lambda run, name=name: short(run.facts["code"][name]))


def untuned(plan: Plan, runs: list[Run]) -> Iterable[Banner]:
    """The optimizer is what is compared, and each arm was given the baseline's learning rate."""
    optimizers = {run.arm: show(run.config.get("Experiment.optimizer")) for run in runs}
    if plan.declared and not plan.lr and len(set(optimizers.values())) > 1:
        listed = ", ".join(f"{arm} {str(name).removeprefix('@')}" for arm, name in optimizers.items())
        yield Banner(
            "rates not tuned",
            f"optimizers differ ({listed}), and no arm's learning rate was tuned: each is judged at the rate that the "
            "plan happens to give; use Ablation.lr_grid",
        )


def overlapping(plan: Plan, runs: list[Run]) -> Iterable[Banner]:
    """A budget of time, and runs that shared the machine."""
    if plan.budget.get("of") != "seconds":
        return
    timed = sorted((r for r in runs if {"started", "ended"} <= r.facts.keys()), key=lambda run: run.facts["started"])
    pairs = [(a.name, b.name) for a, b in zip(timed, timed[1:], strict=False) if b.facts["started"] < a.facts["ended"]]
    if pairs:
        yield Banner(
            "jobs at once", f"the budget is time, and {some(name for pair in pairs for name in pair)} overlapped"
        )
    for arm in plan.arms:
        paces = {run.name: pace for run in runs if run.arm == arm and (pace := run.seconds_per_step())}
        if paces and max(paces.values()) > PACE * min(paces.values()):
            slow, fast = max(paces, key=paces.get), min(paces, key=paces.get)
            ratio = paces[slow] / paces[fast]
            yield Banner("step times", f"the budget is time, and a step of {slow} took {ratio:.1f} times one of {fast}")


def config(plan: Plan, runs: list[Run]) -> Iterable[Banner]:
    """Keys that differ from the baseline's beyond the factor."""
    base = next((run for run in runs if run.arm == plan.baseline), None)
    if base is None:
        return
    for arm in plan.arms:
        beyond: dict[str, str] = {}
        for run in runs:
            if run.arm == arm:
                changed = independent(base.config, run.config)
                beyond |= {key: text for key, text in changed.items() if not _allowed(plan, run, base, key)}
        if not plan.declared and len(beyond) == 1 and arm != plan.baseline:
            continue  # no factor was declared: the one thing that differs is what is compared
        if beyond:
            count = f"{len(beyond)} key{'s' if len(beyond) > 1 else ''}"
            asked = "beyond the factor" if plan.declared else "at once, and no plan says which of them is the factor"
            yield Banner(
                "config",
                f"{arm}: {count} differ{'' if len(beyond) > 1 else 's'} {asked}: " + "; ".join(beyond.values()),
            )


def independent(base: dict, other: dict) -> dict[str, str]:
    """Keys that differ, each with both values. The knobs of a part that one side alone builds are left out: they are
    there because a slot differs, and the slot is listed."""
    parts = [{key.rpartition(".")[0] for key in one} for one in (base, other)]
    found = {}
    for key in {**base, **other}:
        was, now = base.get(key, "absent"), other.get(key, "absent")
        alone = key.rpartition(".")[0] in parts[0] ^ parts[1]
        later = (was, now) in (("absent", None), (None, "absent"))  # an older toolkit did not have this knob
        if key != SEED and was != now and not alone and not later:
            found[key] = f"{key} {show(was)} -> {show(now)}"
    return found


def _allowed(plan: Plan, run: Run, base: Run, key: str) -> bool:
    if any(fnmatchcase(key, pattern) for pattern in plan.factor):
        return True
    settled = [knob_of(one, arm) for one in (plan.match, plan.lr) for arm in (run.arm, base.arm)]
    if any(fnmatchcase(key, knob) for knob in settled if knob):
        return True
    steps = plan.budget.get("steps") or {}
    return key == "Experiment.steps" and run.config.get(key) == steps.get(run.arm) and base.arm in steps


def knob_of(settled: dict | None, arm: str) -> str | None:
    """The knob, or a pattern of it, that the plan itself sets for an arm: for its size, or for its learning rate."""
    settled = settled or {}
    return (settled.get("knobs") or {}).get(arm) or settled.get("knob")


def sizes(plan: Plan, runs: list[Run]) -> Iterable[Banner]:
    """Parameters more than 1 % apart, FLOPs per token more than 2 %, or all FLOPs where those are the budget."""
    whole = plan.budget.get("of") == "flops"

    def flops(run):
        per_token = run.facts.get("flops_per_token")
        return per_token * run.facts.get("tokens", 0) if per_token and whole else per_token

    def parameters(run):
        return run.facts.get("parameters", {}).get("total")

    yield from _apart(plan, runs, "parameters", parameters, PARAMETERS)
    yield from _apart(plan, runs, "training FLOPs" if whole else "FLOPs per token", flops, FLOPS)


def _apart(plan: Plan, runs: list[Run], what: str, of: Callable, most: float) -> Iterable[Banner]:
    counts: dict[str, dict[int, list[Run]]] = {arm: {} for arm in plan.arms}
    for run in runs:
        if of(run):
            counts[run.arm].setdefault(of(run), []).append(run)
    base = max(counts[plan.baseline], key=lambda value: len(counts[plan.baseline][value]), default=None)
    for arm, by_value in counts.items():
        for value, members in by_value.items():
            if base and abs(value - base) > most * base:
                who = arm if len(by_value) == 1 else some(run.name for run in members)
                text = f"{who} has {value:,} {what}, {plan.baseline} {base:,}: {value / base - 1:+.1%}"
                yield Banner(what, f"{text} (more than {most:.0%} apart)")


def tokens(plan: Plan, runs: list[Run]) -> Iterable[Banner]:
    """Training tokens that differ, unless the budget is one of time or FLOPs; steps that are not the plan's."""
    if plan.budget.get("of") not in ("flops", "seconds"):
        yield from _differ(runs, "tokens", lambda run: run.facts.get("tokens"), _number)
    planned = plan.budget.get("steps") or {}
    off = [
        f"{run.name} {run.steps:,} for {planned[run.arm]:,}"
        for run in runs
        if run.steps != planned.get(run.arm, run.steps)
    ]
    if off:
        yield Banner("budget", f"steps that are not the plan's: {'; '.join(off)}")


def environment(runs: list[Run]) -> Iterable[Banner]:
    """What has to be the same for all runs, whatever is compared."""

    def fact(*names):
        return lambda run: tuple(run.facts.get(name) for name in names)

    def evaluation(run):
        val = run.facts.get("windows", {}).get("val")
        return (show(run.config.get("Experiment.eval_windows")), val, short(run.facts.get("data")))

    def order(run):
        sizes = (show(run.config.get("Experiment.batch_size")), show(run.config.get("Experiment.seq_len")))
        return (short(run.facts.get("data")), *sizes)

    def versions(run):
        packages = {"python": run.facts.get("python"), **run.facts.get("packages", {})}
        return tuple(sorted((name, str(version)) for name, version in packages.items()))

    def words(*names):
        return lambda value: ", ".join(f"{n} {v}" for n, v in zip(names, value, strict=True))

    yield from _differ(runs, "tokenizer", lambda run: short(run.facts.get("tokenizer")))
    yield from _differ(runs, "evaluation set", evaluation, words("eval_windows", "of", "data"))
    yield from _differ(runs, "batch order", order, words("data", "batch_size", "seq_len"))
    yield from _differ(runs, "precision", fact("precision", "compiled"), words("", "compiled"))
    yield from _differ(runs, "device", fact("device", "device_name"), words("", ""))
    on_cpu = [run for run in runs if run.facts.get("device") == "cpu"]
    yield from _differ(on_cpu, "threads", lambda run: run.facts.get("threads"))
    groups = _groups(runs, versions)
    if len(groups) > 1:
        common = set.intersection(*map(set, groups))
        only = {tuple(pair for pair in key if pair not in common): names for key, names in groups.items()}
        yield Banner("versions", _list(only, lambda pairs: ", ".join(f"{n} {v}" for n, v in pairs) or "none of these"))
    yield from _differ(runs, "commit", lambda run: str(run.facts.get("commit"))[:12])
    unknown = [run for run in runs if not run.facts.get("commit") and run.facts.get("package_sha256")]
    yield from _differ(unknown, "code", lambda run: short(run.facts["package_sha256"]))
    dirty = _groups(runs, lambda run: bool(run.facts.get("dirty")))
    if True in dirty:
        yield Banner("dirty tree", f"the code had changes that no commit holds: {_names(dirty[True], dirty)}")


def no_op(plan: Plan, runs: list[Run]) -> Iterable[Banner]:
    """An arm whose run is the baseline's at the same seed."""
    for arm in plan.arms:
        same = [run.seed for run, _ in identical(plan, runs, arm)]
        if same:
            at = f"at seed{'s' if len(same) > 1 else ''} {', '.join(map(str, same))}"
            changed = any(
                independent(a.config, b.config) or a.config.keys() ^ b.config.keys()
                for b, a in identical(plan, runs, arm)
            )
            why = "what it changes never took effect" if changed else "its config is the baseline's"
            yield Banner("no-op", f"{arm} is identical to {plan.baseline} {at}: {why}")


def identical(plan: Plan, runs: list[Run], arm: str) -> list[tuple[Run, Run]]:
    """Pairs (run, the baseline's at that seed) with the same final weights, or the same metrics in every row."""
    base = {run.seed: run for run in runs if run.arm == plan.baseline}
    pairs = [(run, base[run.seed]) for run in runs if run.arm == arm != plan.baseline and run.seed in base]
    return [(run, other) for run, other in pairs if _same(run, other)]


def _same(run: Run, other: Run) -> bool:
    weights = run.facts.get("weights_sha256")
    if weights is not None and weights == other.facts.get("weights_sha256"):
        return True
    return bool(run.rows) and run.history() == other.history()


def seeds(plan: Plan, judged: list[Run], selection: list[Run]) -> Iterable[Banner]:
    """Arms on other seeds than the baseline's, a seed run twice, a judged seed that had chosen the learning rate."""
    by_arm = {arm: sorted(run.seed for run in judged if run.arm == arm) for arm in plan.arms}
    if len({tuple(sorted(set(found))) for found in by_arm.values()}) > 1:
        listed = "; ".join(f"{arm} {', '.join(map(str, found)) or 'none'}" for arm, found in by_arm.items())
        yield Banner("unequal seeds", listed)
    twice = {arm: sorted({seed for seed in found if found.count(seed) > 1}) for arm, found in by_arm.items()}
    for arm, found in twice.items():
        if found:
            yield Banner("repeated seeds", f"{arm} has more than one run of seed {', '.join(map(str, found))}")
    used = sorted({run.seed for run in selection} & {run.seed for run in judged})
    if used:
        yield Banner(
            "selection seeds", f"seed {', '.join(map(str, used))} chose the learning rate and is judged as well"
        )


def resumed(runs: list[Run]) -> Iterable[Banner]:
    """Runs that did not run in one go."""
    for run in runs:
        for one in run.facts.get("resumed") or []:
            changed = "; ".join(f"{key} {show(a)} -> {show(b)}" for key, (a, b) in one.get("changed", {}).items())
            yield Banner("resumed", f"{run.name} at step {one.get('step')}{': ' + changed if changed else ''}")
        if run.facts.get("from"):
            yield Banner("resumed", f"{run.name} began from {run.facts['from']}")


def spiked(runs: list[Run]) -> Iterable[Banner]:
    """Training losses that jump, after warm-up, far above those just before them, and steps left out for that."""
    for run in runs:
        left_out, count = run.curve("skipped/count")
        if len(count):
            yield Banner("spiked", f"{run.name}: {count[-1]:.0f} steps were left out, the last at {left_out[-1]:,.0f}")
        steps, loss = run.curve("train/loss_nats")
        warm = [value for key, value in run.config.items() if key.endswith(".warmup_steps") and isinstance(value, int)]
        after = steps >= max(warm, default=run.steps // 10)
        steps, loss = steps[after], loss[after]
        at = spikes(loss)
        if len(at):
            worst = at[np.argmax(loss[at])]
            count = f"{len(at)} point{'s' if len(at) > 1 else ''}"
            before = np.median(loss[max(0, worst - PAST) : worst])
            text = f"{run.name}: training loss {loss[worst]:.3f} at step {steps[worst]:,.0f}, {before:.3f} before it"
            yield Banner("spiked", f"{text} ({count} above {SPIKE_SD:g} robust sd and {SPIKE_NATS:g} nats)")


def spikes(loss: np.ndarray) -> np.ndarray:
    """Indices of points that lie SPIKE_SD robust standard deviations and SPIKE_NATS above the median of the PAST
    points before them. A loss that falls, however fast, has none."""
    if len(loss) <= PAST + 1:
        return np.array([], dtype=int)
    rise = np.array([loss[i] - np.median(loss[i - PAST : i]) for i in range(PAST, len(loss))])
    change = np.diff(loss)  # from point to point, so that the trend adds little to the spread
    sd = (
        1.4826 * np.median(np.abs(change - np.median(change))) / np.sqrt(2)
    )  # of a normal, from its absolute deviations
    return PAST + np.flatnonzero(rise > max(SPIKE_SD * sd, SPIKE_NATS))


def _differ(runs: list[Run], what: str, of: Callable, words: Callable = str) -> Iterable[Banner]:
    groups = _groups(runs, of)
    if len(groups) > 1:
        yield Banner(what, _list(groups, words))


def _number(value: int | None) -> str:
    return "not known" if value is None else f"{value:,}"


def _groups(runs: list[Run], of: Callable) -> dict[object, list[Run]]:
    groups: dict[object, list[Run]] = {}
    for run in runs:
        groups.setdefault(of(run), []).append(run)
    return groups


def _list(groups: dict[object, list[Run]], words: Callable) -> str:
    """ "float32 (rope), bfloat16 (alibi-s1)": an arm by its name where no other group has a run of it."""
    return " against ".join(f"{words(value).strip()} ({_names(of, groups)})" for value, of in groups.items())


def _names(members: list[Run], groups: dict[object, list[Run]]) -> str:
    elsewhere = {run.arm for other in groups.values() if other is not members for run in other}
    return some(run.name if run.arm in elsewhere else run.arm for run in members)


def some(names: Iterable[str], most: int = 6) -> str:
    """Names, each once; beyond ``most`` of them a count."""
    names = list(dict.fromkeys(names))
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def short(fingerprint: object) -> str:
    """The first characters of a fingerprint: enough to tell two apart."""
    return str(fingerprint)[:12]


def show(value: object) -> str:
    """A value of a config in a line of text."""
    return str(value) if not isinstance(value, float) else f"{value:g}"
