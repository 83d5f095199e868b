"""Turns runs into a Comparison: values, pairing, verdicts and guards. All statistics come from ``statistics``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from scipy import stats

from toolkit.comparison import guards, rates, statistics, unfinished
from toolkit.comparison.banner import list_names, short, show
from toolkit.comparison.looks import ArmValues, Looking
from toolkit.comparison.origin import Table
from toolkit.comparison.resolution import resolve
from toolkit.comparison.results import (
    IDENTICAL,
    ArmResult,
    Comparison,
    Evidence,
    Judgement,
    MetricResolution,
    TimeToTarget,
    curve_metric,
    unit,
)
from toolkit.comparison.runitems import ItemEvidence, ItemReader
from toolkit.comparison.runitems import counts as item_counts
from toolkit.comparison.runs import METRIC, PlanRecord, Run
from toolkit.comparison.statistics import Verdict
from toolkit.config import keys
from toolkit.config.spelling import suggest
from toolkit.store.factsfile import Facts

BITS = "val_full/bits_per_byte"
EVALUATED = "eval/"  # metrics of evaluators begin with it
FINAL = ("val_full/", EVALUATED)  # metrics of the last evaluation that are resolved
NO_EFFECT = "no smallest effect of interest was named (--effect), so no arm can be equivalent"


def compare(plan: PlanRecord, runs: list[Run], exclude: Sequence[tuple[str, str]], effect: float | None) -> Comparison:
    """Compare every arm of the plan with the baseline. ``exclude`` holds (run, reason); ``effect`` replaces the plan's
    smallest effect of interest. Raises ValueError if an exclusion does not name exactly one run."""
    excluded = [(_run_named(runs, name), reason) for name, reason in exclude]
    excluded_paths = {run.path for run, _ in excluded}
    kept = [run for run in runs if run.path not in excluded_paths]
    judged = [run for run in kept if run.purpose == "judged"]
    selection = [run for run in kept if run.purpose == "selection"]

    metric, smallest_effect, notes = _metric_and_effect(plan, judged, effect)
    looking = Looking(plan, judged, metric)
    judged = looking.due(judged)
    arms = {name: _arm_result(name, [run for run in judged if run.arm == name], metric) for name in plan.arms}
    noise, noise_df = statistics.noise_floor([[v for _, v in arm.values] for arm in arms.values() if arm.values])
    judgements = _judgements(plan, judged, arms, metric, smallest_effect, noise, looking)
    looks = {name: each.look for name, each in judgements.items() if each.look}
    tuned = {name: rates.tune(plan, name, judged, selection, metric) for name in arms}
    targets = _times_to_target(arms, plan.baseline, curve_metric(metric)) if not plan.table else {}
    results = [
        replace(
            arm,
            judgement=judgements.get(name),
            time_to_target=targets.get(name),
            tuned=tuned[name],
            configuration=_config_differences(arm, arms[plan.baseline]) if name != plan.baseline else (),
            divergence_p=unfinished.divergence_p(arm, arms[plan.baseline]) if name != plan.baseline else None,
        )
        for name, arm in arms.items()
    ]

    by_item, item_notes = _by_item(arms, plan, metric, smallest_effect, judgements)
    results = [replace(arm, by_item=by_item.get(arm.name)) for arm in results]

    banners = [*looking.banners(looks), *guards.check(plan, judged, selection)]
    banners += rates.check({name: rate for name, rate in tuned.items() if rate})
    return Comparison(
        plan=plan,
        metric=metric,
        effect=smallest_effect,
        alpha=plan.alpha,
        arms=tuple(results),
        selection=tuple(selection),
        excluded=tuple(excluded),
        banners=tuple(banners),
        notes=(*notes, *looking.notes(looks), *_without_metric(judged, metric), *_notes(results, kept), *item_notes),
        noise=noise if noise_df > 0 else None,
        noise_df=noise_df,
        unit=_units(judged).get(metric) or unit(metric),
        resolutions=_resolutions(arms, plan, metric, judgements),
        looks_reached=looking.reached,
        stopped=looking.stopped,
    )


def _run_named(runs: list[Run], name: str) -> Run:
    matches = [run for run in runs if run.name == name or run.path == Path(name)]
    if len(matches) != 1:
        problem = "several runs have this name" if matches else "run not found"
        raise ValueError(f"--exclude {name}: {problem}; the runs are {list_names(run.name for run in runs)}")
    return matches[0]


def _metric_and_effect(
    plan: PlanRecord, judged: list[Run], effect: float | None
) -> tuple[str, float | None, list[str]]:
    """The metric, the smallest effect of interest in its unit, and notes on what differs from the plan. If tokenizers
    differ, the metric is bits per byte, since nats of different tokens can't be compared."""
    if plan.table:
        return plan.metric, plan.effect, _notes_on_table(plan, plan.table)
    notes = list(plan.departures)
    if plan.declared and effect is not None and effect != plan.effect:
        notes.append(f"effect: declared {plan.effect:g}, judged at {effect:g}")
    metric, smallest_effect = plan.metric, plan.effect if effect is None else effect
    assert smallest_effect is not None  # only a table may have none
    if metric == METRIC and len({run.facts.get("tokenizer") for run in judged if run.facts}) > 1:
        nats_and_bits = [(run.value(METRIC), run.value(BITS)) for run in judged if run.arm == plan.baseline]
        scale = next((bits / nats for nats, bits in nats_and_bits if nats and bits), 1.0)
        metric, nats, smallest_effect = BITS, smallest_effect, smallest_effect * scale
        notes.append(
            f"tokenizers differ, so the metric is {BITS} instead of {METRIC}; the smallest effect of {nats:g} "
            f"{unit(METRIC)} corresponds to {smallest_effect:.4g} {unit(BITS)}"
        )
    if not plan.declared:
        notes.append(
            "no plan: nothing was declared before these runs started; the smallest effect of interest is "
            f"{smallest_effect:g}; earlier looks at these runs are not known, and not charged"
        )
    return metric, smallest_effect, notes


def _notes_on_table(plan: PlanRecord, table: Table) -> list[str]:
    effect = f"the smallest effect of interest is {plan.effect:g}" if plan.effect is not None else NO_EFFECT
    return [f"no plan: nothing was declared before these runs started; {effect}", *table.notes]


def _without_metric(runs: Sequence[Run], metric: str) -> list[str]:
    """A note on finished runs whose files do not have the metric, such as a probe's whose name is misspelt."""
    done = [run for run in runs if run.state == "done" and run.is_whole]
    without = [run for run in done if not any(metric in row for row in run.rows)]
    if not without:
        return []
    near = suggest(metric, dict.fromkeys(name for run in without for row in run.rows for name in row))
    return [f"{metric} is in no row of metrics.jsonl of {list_names(run.name for run in without)}{near}"]


def _notes(arms: Sequence[ArmResult], runs: Sequence[Run]) -> list[str]:
    """Notes on what limits the comparison: lost runs, unknown code, files without checksums, a single seed."""
    notes = []
    for arm in arms:
        if arm.conditional:
            finished = f"its mean covers only the {len(arm.values)} that finished" if arm.values else "it has no mean"
            notes.append(f"{arm.name}: {arm.losses}; {finished}")
    started = [run for run in runs if run.facts]
    if started and not any(run.facts.get("commit") for run in started):
        notes.append("code unknown: no run has a commit")
    unsealed = [run.name for run in started if not run.is_sealed]
    if unsealed:
        notes.append(f"the files of {list_names(unsealed)} have no checksums, so damage can't be detected")
    if any(len(arm.values) == 1 for arm in arms):
        notes.append("one seed shows a difference but can't give a verdict: run at least 3 seeds")
    return notes


def _arm_result(name: str, runs: list[Run], metric: str) -> ArmResult:
    """The arm's runs and values; its other results are added later."""
    runs = sorted(runs, key=lambda run: (run.seed, run.name))
    values = tuple((run.seed, value) for run in runs if (value := run.value(metric)) is not None)
    diverged = sum(run.outcome(metric) == "diverged" for run in runs)
    interval = (0.0, 1.0)
    if runs:
        confidence = stats.binomtest(diverged, len(runs)).proportion_ci(method="exact")
        interval = (float(confidence.low), float(confidence.high))
    return ArmResult(name, tuple(runs), values, diverged, len(runs) - diverged - len(values), interval)


def _judgements(
    plan: PlanRecord,
    judged: list[Run],
    arms: dict[str, ArmResult],
    metric: str,
    effect: float | None,
    noise: float,
    looking: Looking,
) -> dict[str, Judgement]:
    """The judgement of each arm but the baseline. Arms with something to test are judged together, since Holm's method
    needs all of their p-values."""
    judgements: dict[str, Judgement] = {}
    pairings: dict[str, str] = {}
    values: dict[str, ArmValues] = {}
    judged_pairs: dict[str, tuple[ArmResult, ArmResult]] = {}
    for name in arms:
        if name == plan.baseline:
            continue
        seeds = looking.seeds(name)
        if seeds is not None and not seeds:
            judgements[name] = Judgement(Verdict("inconclusive", looking.waiting(name)), pairing="")
            continue
        arm, baseline = (_only(arms[each], seeds, metric) for each in (name, plan.baseline))
        if not (arm.values and baseline.values):
            judgements[name] = Judgement(Verdict("inconclusive", _reason_no_values(arm, baseline)), pairing="")
            continue
        pairs, pairings[name] = _pairing(arm, baseline, metric, plan.table)
        if _is_identical_to_baseline(plan, judged, arm, baseline):
            why = "Every run is identical to the baseline's run of the same seed, so there is nothing to judge."
            judgements[name] = Judgement(Verdict(IDENTICAL, why), pairings[name])
            continue
        judged_pairs[name] = arm, baseline
        values[name] = ArmValues.of(arm.values, baseline.values, bool(pairs))

    looks = looking.at(values, plan.alpha, effect)
    judged_arms = statistics.judge(
        {name: each.numbers[0] for name, each in values.items()},
        {name: each.numbers[1] for name, each in values.items()},
        {name: each.paired for name, each in values.items()},
        effect,
        plan.alpha,
        lower_is_better=not plan.higher_is_better,
        histories={name: look.history for name, look in looks.items() if look.history},
    )
    for name, (difference, p_holm, p_equivalence, verdict) in judged_arms.items():
        sd, n = (difference.sd if difference.paired else noise), min(difference.n_arm, difference.n_base)
        strictest = plan.alpha / len(values)  # Holm's first step; "needs n" uses it as well
        look = looks.get(name)
        if look and look.history:
            strictest = max(float(look.history.looks.levels(strictest)[-1]), statistics.LEAST)
        detectable = statistics.detectable(sd, n, difference.paired, strictest) if n > 1 and sd else None
        verdict = unfinished.reconsider(verdict, *judged_pairs[name], strictest, plan.higher_is_better)
        evidence = Evidence(difference, p_holm, p_equivalence, detectable)
        judgements[name] = Judgement(verdict, pairings[name], evidence, look)
    return judgements


def _only(arm: ArmResult, seeds: Sequence[int] | None, metric: str) -> ArmResult:
    """The arm with its runs of these seeds of the plan alone; with all of them for None."""
    if seeds is None:
        return arm
    return _arm_result(arm.name, [run for run in arm.runs if run.requested_seed in seeds], metric)


def _pairing(
    arm: ArmResult, baseline: ArmResult, metric: str, table: Table | None
) -> tuple[list[tuple[float, float]], str]:
    """Pair the values of both arms by seed. Returns (pairs, reason); no pairs if the runs were not set up alike. Only
    the set-up decides, never the values."""

    def data_order(run: Run) -> tuple[object, ...]:
        sizes = [show(run.config.get(f"Experiment.{name}")) for name in ("batch_size", "seq_len")]
        return (run.facts.get("data"), *sizes)

    runs = [run for run in (*arm.runs, *baseline.runs) if run.value(metric) is not None]
    commits = {str(run.facts.get("commit")) for run in runs}
    ours, theirs = dict(arm.values), dict(baseline.values)
    common = sorted(ours.keys() & theirs.keys())
    if table and not table.seed:
        return [], table.no_pairing
    if len(ours) < len(arm.values) or len(theirs) < len(baseline.values):
        return [], "not paired (Welch's t test): a seed was run twice"
    if len({data_order(run) for run in runs}) > 1:
        return [], "not paired (Welch's t test): the batch order differs"
    if len(commits) > 1:
        differing = " and ".join(sorted(map(short, commits)))
        return [], f"not paired (Welch's t test): the code differs ({differing}), so initial values may differ too"
    if differing := _initial_difference(arm, baseline, common):
        return [], f"not paired (Welch's t test): initial values differ ({differing})"
    same_seeds_planned = {run.seed for run in arm.runs} == {run.seed for run in baseline.runs}
    if not common or (len(common) < min(len(ours), len(theirs)) and not same_seeds_planned):
        return [], "not paired (Welch's t test): the seeds differ"
    reason = table.pairing if table else "paired by seed: the batch order and the code are the same"
    return [(ours[seed], theirs[seed]) for seed in common], reason


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


def _by_item(
    arms: dict[str, ArmResult], plan: PlanRecord, metric: str, effect: float | None, judgements: dict[str, Judgement]
) -> tuple[dict[str, ItemEvidence], list[str]]:
    """Compare the paired arms item by item, if the metric is an evaluator's. Returns ({arm: evidence}, notes): on arms
    that can't be compared so, and on verdicts that do not hold for items like these."""
    reader, baseline = ItemReader(metric), {run.seed: run for run in arms[plan.baseline].runs}
    by_item: dict[str, ItemEvidence] = {}
    reasons: dict[str, list[str]] = {}
    notes = []
    for name, judgement in judgements.items():
        if judgement.evidence is None or effect is None or plan.table or not metric.startswith(EVALUATED):
            continue
        runs = {run.seed: run for run in arms[name].runs}
        common = sorted(dict(arms[name].values).keys() & dict(arms[plan.baseline].values).keys())
        if judgement.look:
            common = [seed for seed in common if seed in judgement.look.seeds]
        try:
            if not judgement.evidence.difference.paired:
                raise ValueError("the runs are not paired by seed")
            by_item[name] = reader.compare([(runs[seed], baseline[seed]) for seed in common], plan.alpha)
        except ValueError as error:
            reasons.setdefault(str(error), []).append(name)
            continue
        if reason := _reason_not_general(judgement.verdict.word, by_item[name], effect):
            notes.append(f"{name}: {judgement.verdict.word} on these {by_item[name].items:,} items, but {reason}")
    notes += [f"{list_names(names)}: no interval for items like these: {why}" for why, names in reasons.items()]
    return by_item, notes


def _reason_not_general(word: str, evidence: ItemEvidence, effect: float) -> str:
    """Why a verdict on these items does not hold for items like these; "" if it does, or if there is no interval."""
    low, high = evidence.low, evidence.high
    if low is None or high is None:
        return ""
    interval = f"that is not shown for items like these: their interval [{low:+.4g}, {high:+.4g}]"
    if word in ("better", "worse") and low <= 0 <= high:
        return f"{interval} includes zero"
    if word == "equivalent" and max(-low, high) >= effect:
        return f"{interval} is not inside \u00b1{effect:.4g}"
    return ""


def _resolutions(
    arms: dict[str, ArmResult], plan: PlanRecord, metric: str, judgements: dict[str, Judgement]
) -> tuple[MetricResolution, ...]:
    """What each metric of the runs' last evaluations can resolve. Arms that are identical to the baseline are left out:
    they say nothing about noise."""
    runs = [run for arm in arms.values() for run in arm.runs]
    metrics = dict.fromkeys(name for run in runs for name in run.final_metrics())
    evidence = [judgement.evidence for judgement in judgements.values() if judgement.evidence]
    paired = bool(evidence) and all(each.difference.paired for each in evidence)
    informative_arms = [
        arm for arm in arms.values() if arm.name not in judgements or judgements[arm.name].verdict.word != IDENTICAL
    ]
    counts = next((numbers for run in runs if (numbers := item_counts(run))), {})
    judged_apart = any(judgement.verdict.word in ("better", "worse") for judgement in judgements.values())
    units, resolutions = _units(runs), []
    for name in metrics:
        if name != metric and not name.startswith(FINAL):
            continue
        values = {
            arm.name: {
                (run.seed if paired else place): value
                for place, run in enumerate(arm.runs)
                if (value := run.value(name)) is not None
            }
            for arm in informative_arms
        }
        result = resolve(name, values, paired, plan.alpha)
        by_verdict = name == metric and judged_apart and not result.tells_apart
        if result.arms:
            resolutions.append(MetricResolution(result, units.get(name) or unit(name), counts.get(name), by_verdict))
    return tuple(resolutions)


def _units(runs: Sequence[Run]) -> dict[str, str]:
    return {metric: name for run in runs for metric, name in run.units.items()}


def _is_identical_to_baseline(plan: PlanRecord, judged: list[Run], arm: ArmResult, baseline: ArmResult) -> bool:
    same = {run.seed for run, _ in guards.identical(plan, judged, arm.name)}
    common = dict(arm.values).keys() & dict(baseline.values).keys()
    return bool(common) and common <= same


def _reason_no_values(arm: ArmResult, baseline: ArmResult) -> str:
    empty = arm if not arm.values else baseline
    return f"No run of {empty.name} finished: {empty.losses or 'it has no runs'}."


def _config_differences(arm: ArmResult, baseline: ArmResult) -> tuple[str, ...]:
    """Config keys in which the arm differs from the baseline, and the knobs of parts that only the arm has."""
    ours, theirs = ([run.config for run in result.runs if run.facts] for result in (arm, baseline))
    if not (ours and theirs):
        return ()
    slots = guards.independent(theirs[0], ours[0])
    own_parts = set(map(keys.owner, ours[0])) - set(map(keys.owner, theirs[0]))
    knobs = [f"{key} = {show(value)}" for key, value in ours[0].items() if keys.owner(key) in own_parts]
    return (*slots.values(), *knobs)


def _mean_curve(arm: ArmResult, metric: str) -> tuple[np.ndarray, np.ndarray]:
    """(steps, mean loss) over the seeds that finished, at the steps that all of them have."""
    finished = {seed for seed, _ in arm.values}
    curves = [dict(zip(*run.curve(metric), strict=True)) for run in arm.runs if run.seed in finished]
    steps = sorted(set.intersection(*map(set, curves))) if curves else []
    return np.array(steps), np.array([np.mean([curve[step] for curve in curves]) for step in steps])


def _times_to_target(arms: dict[str, ArmResult], baseline: str, curve: str) -> dict[str, TimeToTarget]:
    """What each arm with values needs to reach the baseline's last validation loss; {} if the baseline has none."""
    _, baseline_losses = _mean_curve(arms[baseline], curve)
    if not len(baseline_losses):
        return {}
    target = float(baseline_losses[-1])
    return {name: _time_to_target(arm, curve, target) for name, arm in arms.items() if arm.values}


def _time_to_target(arm: ArmResult, metric: str, target: float) -> TimeToTarget:
    steps, loss = _mean_curve(arm, metric)
    facts = next((run.facts for run in arm.runs if run.facts), Facts())
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
