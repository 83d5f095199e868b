"""From runs to the answer: values, pairing, verdicts, guards. Statistics are those of ``statistics``, and no others."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from scipy import stats

from toolkit.comparison import guards, rates, statistics
from toolkit.comparison.guards import Banner, short
from toolkit.comparison.rates import Tuned
from toolkit.comparison.runs import CURVE, METRIC, Plan, Run
from toolkit.comparison.statistics import Difference, Verdict

BITS = "val_full/bits_per_byte"
IDENTICAL = "identical"  # no verdict: there is nothing to judge


@dataclass(frozen=True)
class Reach:
    """When the mean validation curve of an arm first comes down to ``target``; steps are None where it never does."""

    target: float
    steps: float | None
    flops: float | None
    seconds: float | None
    within: int


@dataclass(frozen=True)
class Arm:
    """An arm with all its judged runs, and what they say. The baseline has neither a difference nor a verdict."""

    name: str
    runs: tuple[Run, ...]
    values: tuple[tuple[int, float], ...]  # (seed, value) of the runs that finished, by seed
    diverged: int
    unfinished: int
    diverged_interval: tuple[float, float]
    pairing: str = ""
    difference: Difference | None = None
    p_holm: float | None = None
    p_equivalence: float | None = None
    verdict: Verdict | None = None
    detectable: float | None = None
    reach: Reach | None = None
    tuned: Tuned | None = None
    configuration: tuple[str, ...] = ()  # what differs from the baseline

    @property
    def mean(self) -> float | None:
        return float(np.mean([value for _, value in self.values])) if self.values else None

    @property
    def sd(self) -> float | None:
        return float(np.std([value for _, value in self.values], ddof=1)) if len(self.values) > 1 else None

    @property
    def conditional(self) -> bool:
        """Whether the mean is over some of the runs only: those that finished."""
        return bool(self.diverged or self.unfinished)

    @property
    def losses(self) -> str:
        """What became of the runs that did not finish: "2 of 5 diverged (95 % interval 5 % to 85 %)"."""
        low, high = self.diverged_interval
        n, said = len(self.runs), []
        if self.diverged:
            said.append(f"{self.diverged} of {n} diverged (exact 95 % interval {low:.0%} to {high:.0%})")
        if self.unfinished:
            said.append(f"{self.unfinished} of {n} unfinished")
        return ", ".join(said)


@dataclass(frozen=True)
class Comparison:
    """All that the outputs show."""

    plan: Plan
    metric: str
    effect: float
    alpha: float
    arms: tuple[Arm, ...]  # the baseline first
    selection: tuple[Run, ...]
    excluded: tuple[tuple[Run, str], ...]
    banners: tuple[Banner, ...]
    notes: tuple[str, ...]
    noise: float | None
    noise_df: int

    @property
    def baseline(self) -> Arm:
        return self.arms[0]

    @property
    def curve_metric(self) -> str:
        """The metric along the way that belongs to the one at the end."""
        return self.metric.replace("val_full/", "val/") if self.metric.startswith("val_full/") else CURVE

    @property
    def unit(self) -> str:
        return {"loss_nats": "nats per token", "bits_per_byte": "bits per byte"}.get(
            self.metric.split("/")[-1], self.metric
        )


def compare(plan: Plan, runs: list[Run], exclude: Sequence[tuple[str, str]], effect: float | None) -> Comparison:
    """The whole comparison. Raises ValueError for an exclusion that names no run."""
    excluded = [(_named(runs, name), reason) for name, reason in exclude]
    out = {run.path for run, _ in excluded}
    kept = [run for run in runs if run.path not in out]
    judged = [run for run in kept if run.purpose == "judged"]
    selection = [run for run in kept if run.purpose == "selection"]
    departures = list(plan.departures)
    if plan.declared and effect is not None and effect != plan.effect:
        departures.append(f"effect: declared {plan.effect:g}, judged at {effect:g}")
    metric, effect, notes = _metric(plan, judged, plan.effect if effect is None else effect)
    notes = [*departures, *notes]
    if not plan.declared:
        notes.append(f"no plan: nothing was declared before these runs; the smallest effect of interest is {effect:g}")

    arms = {name: _arm(name, [run for run in judged if run.arm == name], metric) for name in plan.arms}
    base = arms[plan.baseline]
    paired, values, bases = {}, {}, {}
    for name, arm in arms.items():
        if name == plan.baseline:
            continue
        pairs, why = _pairing(arm, base, metric)
        arm = arms[name] = replace(arm, configuration=_changed(arm, base))
        if arm.values and base.values:
            arm = arms[name] = replace(arm, pairing=why)
        if not arm.pairing:
            arms[name] = replace(arm, verdict=Verdict("inconclusive", _nothing(arm, base)))
        elif _identical(plan, judged, arm, base):
            why = "Every run is the baseline's at the same seed, to the last digit: there is nothing to judge."
            arms[name] = replace(arm, verdict=Verdict(IDENTICAL, why))
        else:
            paired[name] = bool(pairs)
            values[name] = [a for a, _ in pairs] or [value for _, value in arm.values]
            bases[name] = [b for _, b in pairs] or [value for _, value in base.values]
    noise, df = statistics.noise_floor([[v for _, v in arm.values] for arm in arms.values() if arm.values])
    for name, (difference, p, q, verdict) in statistics.judge(values, bases, paired, effect, plan.alpha).items():
        sd, n = (difference.sd if difference.paired else noise), min(difference.n_arm, difference.n_base)
        strictest = plan.alpha / len(values)  # Holm's first step, which is what "needs n" is counted for as well
        least = statistics.detectable(sd, n, difference.paired, strictest) if n > 1 and sd else None
        arms[name] = replace(
            arms[name], difference=difference, p_holm=p, p_equivalence=q, verdict=verdict, detectable=least
        )
    for name, arm in arms.items():
        if arm.verdict and arm.difference and (lost := _survivors(arm, base)):
            arms[name] = replace(arm, verdict=Verdict("inconclusive", lost))
    tuned = {name: rates.tune(plan, name, judged, selection, metric) for name in arms}
    curve = metric.replace("val_full/", "val/") if metric.startswith("val_full/") else CURVE
    target = _mean_curve(base, curve)[1][-1:]
    for name, arm in arms.items():
        reach = _reach(arm, curve, float(target[0])) if len(target) and arm.values else None
        arms[name] = replace(arm, reach=reach, tuned=tuned[name])
        if arm.conditional:
            rest = f"its mean is conditional on the {len(arm.values)} that finished" if arm.values else "it has no mean"
            notes.append(f"{name}: {arm.losses}; {rest}")
    begun = [run for run in kept if run.facts]
    if begun and not any(run.facts.get("commit") for run in begun):
        notes.append("code: not known: no run has a commit")
    unsealed = [run.name for run in begun if not run.is_sealed]
    if unsealed:
        notes.append(f"damage to the files of {guards.some(unsealed)} can't be noticed: they carry no seals")
    if any(len(arm.values) == 1 for arm in arms.values()):
        notes.append("one seed shows a difference, never a verdict: run at least 3")
    banners = guards.check(plan, judged, selection)
    banners += rates.check({name: found for name, found in tuned.items() if found})
    known = df > 0
    return Comparison(
        plan,
        metric,
        effect,
        plan.alpha,
        tuple(arms.values()),
        tuple(selection),
        tuple(excluded),
        tuple(banners),
        tuple(notes),
        noise if known else None,
        df,
    )


def _named(runs: list[Run], name: str) -> Run:
    found = [run for run in runs if run.name == name or run.path == Path(name)]
    if len(found) != 1:
        known = guards.some(run.name for run in runs)
        raise ValueError(
            f"--exclude {name}: {'there is no such run' if not found else 'several runs are called that'}; "
            f"the runs are {known}"
        )
    return found[0]


def _metric(plan: Plan, runs: list[Run], effect: float) -> tuple[str, float, list[str]]:
    """The plan's metric, or bits per byte where tokenizers differ: nats of other tokens are another unit."""
    tokenizers = {run.facts.get("tokenizer") for run in runs if run.facts}
    if plan.metric != METRIC or len(tokenizers) < 2:
        return plan.metric, effect, []
    both = [(run.value(METRIC), run.value(BITS)) for run in runs if run.arm == plan.baseline]
    scale = next((bits / nats for nats, bits in both if nats and bits), 1.0)
    said = f"tokenizers differ, so the metric is {BITS} in place of {METRIC}"
    return BITS, effect * scale, [f"{said}, and the effect of {effect:g} nats is {effect * scale:.4g} of its bits"]


def _arm(name: str, runs: list[Run], metric: str) -> Arm:
    runs = sorted(runs, key=lambda run: (run.seed, run.name))
    values = tuple((run.seed, run.value(metric)) for run in runs if run.value(metric) is not None)
    diverged = sum(run.outcome(metric) == "diverged" for run in runs)
    interval = (0.0, 1.0)
    if runs:
        found = stats.binomtest(diverged, len(runs)).proportion_ci(method="exact")
        interval = (float(found.low), float(found.high))
    return Arm(name, tuple(runs), values, diverged, len(runs) - diverged - len(values), interval)


def _pairing(arm: Arm, base: Arm, metric: str) -> tuple[list[tuple[float, float]], str]:
    """Pairs of values by seed, and why; no pairs where the design gives none. The values have no say in it."""

    def order(run):
        sizes = [guards.show(run.config.get(f"Experiment.{name}")) for name in ("batch_size", "seq_len")]
        return (run.facts.get("data"), *sizes)

    runs = [run for run in (*arm.runs, *base.runs) if run.value(metric) is not None]
    commits = {str(run.facts.get("commit")) for run in runs}
    ours, theirs = dict(arm.values), dict(base.values)
    common = sorted(ours.keys() & theirs.keys())
    if len(ours) < len(arm.values) or len(theirs) < len(base.values):
        return [], "not paired (Welch): a seed was run twice"
    if len({order(run) for run in runs}) > 1:
        return [], "not paired (Welch): the batch order differs"
    if len(commits) > 1:
        differing = " and ".join(sorted(map(short, commits)))
        return [], f"not paired (Welch): the code differs ({differing}), so the initial values may too"
    if differing := _initial_difference(arm, base, common):
        return [], f"not paired (Welch): initial values differ ({differing})"
    asked = {run.seed for run in arm.runs} == {run.seed for run in base.runs}
    if not common or (len(common) < min(len(ours), len(theirs)) and not asked):
        return [], "not paired (Welch): the seeds are not the same"
    return [(ours[seed], theirs[seed]) for seed in common], "paired by seed: same batch order, same code"


def _initial_difference(arm: Arm, base: Arm, seeds: Sequence[int]) -> str:
    """A tensor that both arms have at a seed, in the same shape, and that began with other values; "" where none did.
    Runs that do not tell their initial values are taken as drawn alike."""
    ours, theirs = ({run.seed: run.facts.get("init", {}) for run in one.runs} for one in (arm, base))
    for seed in seeds:
        for name, told in ours[seed].items():
            other = theirs[seed].get(name)
            alike = isinstance(told, str) and isinstance(other, str) and told.split(" ")[0] == other.split(" ")[0]
            if alike and told != other:
                return f"{name} at seed {seed}"
    return ""


def _survivors(arm: Arm, base: Arm) -> str:
    """Why a verdict is not given where runs diverged, which may have been the worse ones; "" where it is given."""
    favoured = {"better": arm, "worse": base, "equivalent": arm if arm.diverged else base}.get(arm.verdict.word)
    if favoured is None or not favoured.diverged:
        return ""
    low, high = favoured.diverged_interval
    return (
        f"{favoured.diverged} of {len(favoured.runs)} runs of {favoured.name} diverged (exact 95 % interval {low:.0%} "
        f"to {high:.0%}), and those that finished may be the better ones: on them alone it would be {arm.verdict.word}."
    )


def _identical(plan: Plan, judged: list[Run], arm: Arm, base: Arm) -> bool:
    same = {run.seed for run, _ in guards.identical(plan, judged, arm.name)}
    common = dict(arm.values).keys() & dict(base.values).keys()
    return bool(common) and common <= same


def _nothing(arm: Arm, base: Arm) -> str:
    empty = arm if not arm.values else base
    return f"No run of {empty.name} finished: {empty.losses or 'there are none'}."


def _changed(arm: Arm, base: Arm) -> tuple[str, ...]:
    """Config keys in which the arm differs from the baseline, its own parts' knobs included."""
    ours, theirs = ([run.config for run in one.runs if run.facts] for one in (arm, base))
    if not (ours and theirs):
        return ()
    slots = guards.independent(theirs[0], ours[0])
    own = {key.rpartition(".")[0] for key in ours[0]} - {key.rpartition(".")[0] for key in theirs[0]}
    knobs = [f"{key} = {guards.show(value)}" for key, value in ours[0].items() if key.rpartition(".")[0] in own]
    return (*slots.values(), *knobs)


def _mean_curve(arm: Arm, metric: str) -> tuple[np.ndarray, np.ndarray]:
    """The mean over the seeds that finished, at the steps that all of them have."""
    finished = {seed for seed, _ in arm.values}
    curves = [dict(zip(*run.curve(metric), strict=True)) for run in arm.runs if run.seed in finished]
    steps = sorted(set.intersection(*map(set, curves))) if curves else []
    return np.array(steps), np.array([np.mean([curve[step] for curve in curves]) for step in steps])


def _reach(arm: Arm, metric: str, target: float) -> Reach:
    steps, loss = _mean_curve(arm, metric)
    facts = next((run.facts for run in arm.runs if run.facts), {})
    below = np.flatnonzero(loss <= target)
    if not len(below):
        return Reach(target, None, None, None, int(steps[-1]) if len(steps) else 0)
    at = below[0]
    found = float(steps[at])
    if at:
        found = float(np.interp(target, [loss[at], loss[at - 1]], [steps[at], steps[at - 1]]))
    flops, tokens = facts.get("flops_per_token"), facts.get("tokens", 0) / (facts.get("steps") or 1)
    seconds = [s for s in (run.seconds_per_step() for run in arm.runs) if s is not None]
    return Reach(
        target,
        found,
        found * tokens * flops if flops else None,
        found * float(np.median(seconds)) if seconds else None,
        int(steps[-1]),
    )
