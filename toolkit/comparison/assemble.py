"""Turns runs into a Comparison: values, pairing, verdicts and guards. All statistics come from ``statistics``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from scipy import stats

from toolkit.comparison import guards, rates, statistics
from toolkit.comparison.guards import Banner, short
from toolkit.comparison.rates import TunedRate
from toolkit.comparison.runs import CURVE, METRIC, PlanRecord, Run
from toolkit.comparison.statistics import Difference, Verdict
from toolkit.config import keys

BITS = "val_full/bits_per_byte"
IDENTICAL = "identical"  # stands in place of a verdict: there is nothing to judge


@dataclass(frozen=True)
class TimeToTarget:
    """What an arm needs until its mean validation curve first falls to ``target``: steps, training FLOPs and seconds.
    None if the curve never falls that far, or if a cost is unknown. ``last_step`` is where the curve ends."""

    target: float
    steps: float | None
    flops: float | None
    seconds: float | None
    last_step: int


@dataclass(frozen=True)
class ArmResult:
    """An arm with its judged runs and all results. The baseline has neither a difference nor a verdict."""

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
    time_to_target: TimeToTarget | None = None
    tuned: TunedRate | None = None
    configuration: tuple[str, ...] = ()  # what differs from the baseline

    @property
    def mean(self) -> float | None:
        return float(np.mean([value for _, value in self.values])) if self.values else None

    @property
    def sd(self) -> float | None:
        return float(np.std([value for _, value in self.values], ddof=1)) if len(self.values) > 1 else None

    @property
    def conditional(self) -> bool:
        """Whether some runs have no value, so that the mean covers only a part of the runs."""
        return bool(self.diverged or self.unfinished)

    @property
    def losses(self) -> str:
        """How many runs have no value, and why: "2 of 5 diverged (exact 95 % interval 5 % to 85 %)"; else empty."""
        low, high = self.diverged_interval
        n, phrases = len(self.runs), []
        if self.diverged:
            phrases.append(f"{self.diverged} of {n} diverged (exact 95 % interval {low:.0%} to {high:.0%})")
        if self.unfinished:
            phrases.append(f"{self.unfinished} of {n} unfinished")
        return ", ".join(phrases)


@dataclass(frozen=True)
class Comparison:
    """The whole comparison: everything that the outputs show."""

    plan: PlanRecord
    metric: str
    effect: float
    alpha: float
    arms: tuple[ArmResult, ...]  # the baseline first
    selection: tuple[Run, ...]
    excluded: tuple[tuple[Run, str], ...]
    banners: tuple[Banner, ...]
    notes: tuple[str, ...]
    noise: float | None
    noise_df: int

    @property
    def baseline(self) -> ArmResult:
        return self.arms[0]

    @property
    def curve_metric(self) -> str:
        """The metric measured during training that corresponds to the final one: "val/..." for "val_full/..."."""
        return self.metric.replace("val_full/", "val/") if self.metric.startswith("val_full/") else CURVE

    @property
    def unit(self) -> str:
        return {"loss_nats": "nats per token", "bits_per_byte": "bits per byte"}.get(
            self.metric.split("/")[-1], self.metric
        )


def compare(plan: PlanRecord, runs: list[Run], exclude: Sequence[tuple[str, str]], effect: float | None) -> Comparison:
    """Compare every arm of the plan with the baseline. ``exclude`` holds (run, reason); ``effect`` replaces the plan's
    smallest effect of interest. Raises ValueError if an exclusion does not name exactly one run."""
    excluded = [(_run_named(runs, name), reason) for name, reason in exclude]
    excluded_paths = {run.path for run, _ in excluded}
    kept = [run for run in runs if run.path not in excluded_paths]
    judged = [run for run in kept if run.purpose == "judged"]
    selection = [run for run in kept if run.purpose == "selection"]
    departures = list(plan.departures)
    if plan.declared and effect is not None and effect != plan.effect:
        departures.append(f"effect: declared {plan.effect:g}, judged at {effect:g}")
    metric, effect, notes = _choose_metric(plan, judged, plan.effect if effect is None else effect)
    notes = [*departures, *notes]
    if not plan.declared:
        notes.append(f"no plan: nothing was declared before these runs; the smallest effect of interest is {effect:g}")

    arms = {name: _arm_result(name, [run for run in judged if run.arm == name], metric) for name in plan.arms}
    baseline = arms[plan.baseline]
    paired, values, baseline_values = {}, {}, {}
    for name, arm in arms.items():
        if name == plan.baseline:
            continue
        pairs, explanation = _pairing(arm, baseline, metric)
        arm = arms[name] = replace(arm, configuration=_config_differences(arm, baseline))
        if arm.values and baseline.values:
            arm = arms[name] = replace(arm, pairing=explanation)
        if not arm.pairing:
            arms[name] = replace(arm, verdict=Verdict("inconclusive", _reason_no_values(arm, baseline)))
        elif _is_identical_to_baseline(plan, judged, arm, baseline):
            explanation = "Every run is the baseline's at the same seed, to the last digit: there is nothing to judge."
            arms[name] = replace(arm, verdict=Verdict(IDENTICAL, explanation))
        else:
            paired[name] = bool(pairs)
            values[name] = [a for a, _ in pairs] or [value for _, value in arm.values]
            baseline_values[name] = [b for _, b in pairs] or [value for _, value in baseline.values]
    noise, df = statistics.noise_floor([[v for _, v in arm.values] for arm in arms.values() if arm.values])
    for name, (difference, p_holm, p_equivalence, verdict) in statistics.judge(
        values, baseline_values, paired, effect, plan.alpha
    ).items():
        sd, n = (difference.sd if difference.paired else noise), min(difference.n_arm, difference.n_base)
        strictest = plan.alpha / len(values)  # Holm's first step; "needs n" uses it as well
        smallest_detectable = statistics.detectable(sd, n, difference.paired, strictest) if n > 1 and sd else None
        arms[name] = replace(
            arms[name],
            difference=difference,
            p_holm=p_holm,
            p_equivalence=p_equivalence,
            verdict=verdict,
            detectable=smallest_detectable,
        )
    for name, arm in arms.items():
        if arm.verdict and arm.difference and (caveat := _reason_divergence_voids(arm, baseline)):
            arms[name] = replace(arm, verdict=Verdict("inconclusive", caveat))
    tuned = {name: rates.tune(plan, name, judged, selection, metric) for name in arms}
    curve = metric.replace("val_full/", "val/") if metric.startswith("val_full/") else CURVE
    target = _mean_curve(baseline, curve)[1][-1:]
    for name, arm in arms.items():
        time_to_target = _time_to_target(arm, curve, float(target[0])) if len(target) and arm.values else None
        arms[name] = replace(arm, time_to_target=time_to_target, tuned=tuned[name])
        if arm.conditional:
            consequence = (
                f"its mean is conditional on the {len(arm.values)} that finished" if arm.values else "it has no mean"
            )
            notes.append(f"{name}: {arm.losses}; {consequence}")
    started = [run for run in kept if run.facts]
    if started and not any(run.facts.get("commit") for run in started):
        notes.append("code: not known: no run has a commit")
    unsealed = [run.name for run in started if not run.is_sealed]
    if unsealed:
        notes.append(f"damage to the files of {guards.list_names(unsealed)} can't be noticed: they carry no seals")
    if any(len(arm.values) == 1 for arm in arms.values()):
        notes.append("one seed shows a difference, never a verdict: run at least 3")
    banners = guards.check(plan, judged, selection)
    banners += rates.check({name: tuned_rate for name, tuned_rate in tuned.items() if tuned_rate})
    has_noise_estimate = df > 0
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
        noise if has_noise_estimate else None,
        df,
    )


def _run_named(runs: list[Run], name: str) -> Run:
    matches = [run for run in runs if run.name == name or run.path == Path(name)]
    if len(matches) != 1:
        known = guards.list_names(run.name for run in runs)
        raise ValueError(
            f"--exclude {name}: {'there is no such run' if not matches else 'several runs are called that'}; "
            f"the runs are {known}"
        )
    return matches[0]


def _choose_metric(plan: PlanRecord, runs: list[Run], effect: float) -> tuple[str, float, list[str]]:
    """Choose the metric: the plan's, or bits per byte if tokenizers differ, since nats of different tokens can't be
    compared. Returns (metric, effect in its unit, notes)."""
    tokenizers = {run.facts.get("tokenizer") for run in runs if run.facts}
    if plan.metric != METRIC or len(tokenizers) < 2:
        return plan.metric, effect, []
    nats_and_bits = [(run.value(METRIC), run.value(BITS)) for run in runs if run.arm == plan.baseline]
    scale = next((bits / nats for nats, bits in nats_and_bits if nats and bits), 1.0)
    reason = f"tokenizers differ, so the metric is {BITS} in place of {METRIC}"
    return BITS, effect * scale, [f"{reason}, and the effect of {effect:g} nats is {effect * scale:.4g} of its bits"]


def _arm_result(name: str, runs: list[Run], metric: str) -> ArmResult:
    runs = sorted(runs, key=lambda run: (run.seed, run.name))
    values = tuple((run.seed, run.value(metric)) for run in runs if run.value(metric) is not None)
    diverged = sum(run.outcome(metric) == "diverged" for run in runs)
    interval = (0.0, 1.0)
    if runs:
        confidence = stats.binomtest(diverged, len(runs)).proportion_ci(method="exact")
        interval = (float(confidence.low), float(confidence.high))
    return ArmResult(name, tuple(runs), values, diverged, len(runs) - diverged - len(values), interval)


def _pairing(arm: ArmResult, baseline: ArmResult, metric: str) -> tuple[list[tuple[float, float]], str]:
    """Pair the values of both arms by seed. Returns (pairs, reason); no pairs if the runs were not set up alike. Only
    the set-up decides, never the values."""

    def data_order(run: Run) -> tuple:
        sizes = [guards.show(run.config.get(f"Experiment.{name}")) for name in ("batch_size", "seq_len")]
        return (run.facts.get("data"), *sizes)

    runs = [run for run in (*arm.runs, *baseline.runs) if run.value(metric) is not None]
    commits = {str(run.facts.get("commit")) for run in runs}
    ours, theirs = dict(arm.values), dict(baseline.values)
    common = sorted(ours.keys() & theirs.keys())
    if len(ours) < len(arm.values) or len(theirs) < len(baseline.values):
        return [], "not paired (Welch): a seed was run twice"
    if len({data_order(run) for run in runs}) > 1:
        return [], "not paired (Welch): the batch order differs"
    if len(commits) > 1:
        differing = " and ".join(sorted(map(short, commits)))
        return [], f"not paired (Welch): the code differs ({differing}), so the initial values may too"
    if differing := _initial_difference(arm, baseline, common):
        return [], f"not paired (Welch): initial values differ ({differing})"
    same_seeds_planned = {run.seed for run in arm.runs} == {run.seed for run in baseline.runs}
    if not common or (len(common) < min(len(ours), len(theirs)) and not same_seeds_planned):
        return [], "not paired (Welch): the seeds are not the same"
    return [(ours[seed], theirs[seed]) for seed in common], "paired by seed: same batch order, same code"


def _initial_difference(arm: ArmResult, baseline: ArmResult, seeds: Sequence[int]) -> str:
    """The first tensor that has the same name and shape in both arms but different initial values at the same seed, as
    text; "" if there is none. Runs without recorded initial values are assumed to agree."""
    ours, theirs = ({run.seed: run.facts.get("init", {}) for run in result.runs} for result in (arm, baseline))
    for seed in seeds:
        for name, fingerprint in ours[seed].items():
            baseline_fingerprint = theirs[seed].get(name)
            comparable = (
                isinstance(fingerprint, str)
                and isinstance(baseline_fingerprint, str)
                and fingerprint.split(" ")[0] == baseline_fingerprint.split(" ")[0]
            )
            if comparable and fingerprint != baseline_fingerprint:
                return f"{name} at seed {seed}"
    return ""


def _reason_divergence_voids(arm: ArmResult, baseline: ArmResult) -> str:
    """Why diverged runs make the verdict void: the values of the favoured arm may be only its better runs. "" if the
    verdict stands."""
    favoured = {"better": arm, "worse": baseline, "equivalent": arm if arm.diverged else baseline}.get(arm.verdict.word)
    if favoured is None or not favoured.diverged:
        return ""
    low, high = favoured.diverged_interval
    return (
        f"{favoured.diverged} of {len(favoured.runs)} runs of {favoured.name} diverged (exact 95 % interval {low:.0%} "
        f"to {high:.0%}), and those that finished may be the better ones: on them alone it would be {arm.verdict.word}."
    )


def _is_identical_to_baseline(plan: PlanRecord, judged: list[Run], arm: ArmResult, baseline: ArmResult) -> bool:
    same = {run.seed for run, _ in guards.identical(plan, judged, arm.name)}
    common = dict(arm.values).keys() & dict(baseline.values).keys()
    return bool(common) and common <= same


def _reason_no_values(arm: ArmResult, baseline: ArmResult) -> str:
    empty = arm if not arm.values else baseline
    return f"No run of {empty.name} finished: {empty.losses or 'there are none'}."


def _config_differences(arm: ArmResult, baseline: ArmResult) -> tuple[str, ...]:
    """Config keys in which the arm differs from the baseline, and the knobs of parts that only the arm has."""
    ours, theirs = ([run.config for run in result.runs if run.facts] for result in (arm, baseline))
    if not (ours and theirs):
        return ()
    slots = guards.independent(theirs[0], ours[0])
    own_parts = set(map(keys.owner, ours[0])) - set(map(keys.owner, theirs[0]))
    knobs = [f"{key} = {guards.show(value)}" for key, value in ours[0].items() if keys.owner(key) in own_parts]
    return (*slots.values(), *knobs)


def _mean_curve(arm: ArmResult, metric: str) -> tuple[np.ndarray, np.ndarray]:
    """(steps, mean loss) over the seeds that finished, at the steps that all of them have."""
    finished = {seed for seed, _ in arm.values}
    curves = [dict(zip(*run.curve(metric), strict=True)) for run in arm.runs if run.seed in finished]
    steps = sorted(set.intersection(*map(set, curves))) if curves else []
    return np.array(steps), np.array([np.mean([curve[step] for curve in curves]) for step in steps])


def _time_to_target(arm: ArmResult, metric: str, target: float) -> TimeToTarget:
    steps, loss = _mean_curve(arm, metric)
    facts = next((run.facts for run in arm.runs if run.facts), {})
    below = np.flatnonzero(loss <= target)
    if not len(below):
        return TimeToTarget(target, None, None, None, int(steps[-1]) if len(steps) else 0)
    first = below[0]
    target_step = float(steps[first])
    if first:
        target_step = float(np.interp(target, [loss[first], loss[first - 1]], [steps[first], steps[first - 1]]))
    flops, tokens = facts.get("flops_per_token"), facts.get("tokens", 0) / (facts.get("steps") or 1)
    seconds = [s for s in (run.seconds_per_step() for run in arm.runs) if s is not None]
    return TimeToTarget(
        target,
        target_step,
        target_step * tokens * flops if flops else None,
        target_step * float(np.median(seconds)) if seconds else None,
        int(steps[-1]),
    )
