"""The comparison as one JSON object. All outputs but the pictures are made from it, so that they agree."""

from __future__ import annotations

import csv
import io
from typing import Any, NotRequired, TypedDict

from toolkit.comparison.origin import Table
from toolkit.comparison.probes import ProbesRecord
from toolkit.comparison.rates import TunedRate
from toolkit.comparison.results import ArmResult, Comparison, MetricResolution
from toolkit.comparison.runs import PlanRecord, Run
from toolkit.comparison.sequential import Looks
from toolkit.output.escape import cell, uncell
from toolkit.store.factsfile import Facts

VERSION = 2  # of compare.json
FEW_ARMS, FEW_NAMES = 6, 3  # names in the headline: of all arms together; of one group if there are more arms


class RatePoint(TypedDict):
    """One learning rate of an arm: the values of its finished runs on the selection seeds, their mean, and how many
    runs there are."""

    lr: float
    mean: float | None
    values: list[float]
    runs: int


class Rates(TypedDict):
    """The learning rates of an arm: the grid, the best rate on it, and the rates of the judged runs."""

    points: list[RatePoint]
    best: float | None
    judged_at: list[float]
    sensitivity: float | None


class ArmRecord(TypedDict):
    """One arm. ``low`` and ``high`` are the ends of the interval; ``why`` is the reason for the verdict; ``needs`` is
    the number of seeds that an inconclusive arm needs. ``low_like`` and ``high_like`` are the ends of the interval for
    items like these, ``items`` their number. ``look`` is the look at which the arm was judged, in words, on
    ``look_n`` pairs or values; it is empty for one look at all planned seeds. If it is not, p is sequential and the
    interval is repeated (``sequential``). The shares are parts of the variance of the mean difference. Numbers
    without data are None, as all those of the baseline that compare it with itself."""

    arm: str
    verdict: str
    needs: int | None
    why: str
    runs: int
    n: int
    diverged: int
    diverged_low: float
    diverged_high: float
    diverged_p: float | None
    unfinished: int
    losses: str
    conditional: bool
    mean: float | None
    sd: float | None
    difference: float | None
    low: float | None
    high: float | None
    p: float | None
    p_holm: float | None
    p_equivalence: float | None
    in_noise_sd: float | None
    paired: bool | None
    pairs: int | None
    look: str
    look_n: int | None
    sequential: bool
    pairing: str
    correlation: float | None
    detectable: float | None
    items: int | None
    low_like: float | None
    high_like: float | None
    share_seeds: float | None
    share_items: float | None
    share_rest: float | None
    target: float | None
    steps_to_target: float | None
    flops_to_target: float | None
    seconds_to_target: float | None
    within_steps: int | None
    parameters: int | None
    flops_per_token: int | None
    tokens: int | None
    configuration: list[str]
    lr: Rates | None


class RunRecord(TypedDict):
    """One run; ``value`` is the metric at the end of the budget, ``seconds`` the time that the run took."""

    run: str
    path: str
    arm: str
    seed: int
    lr: float | None
    state: str
    outcome: str
    step: int
    value: float | None
    seconds: float | None
    reason: str


class ResolutionRecord(TypedDict):
    """What one metric can resolve. ``noise_sd`` is the noise between seeds, ``detectable`` the difference from the
    baseline that ``seeds`` seeds per arm detect with 80 % power, and ``largest`` the largest difference of two means:
    of the first arm in ``between`` minus the second. ``p`` belongs to "no two arms differ", and ``tells_apart`` is
    whether it is below alpha. ``by_verdict``: it is not, but an arm's verdict is better or worse. Numbers without data
    are None."""

    metric: str
    unit: str
    arms: int
    seeds: int
    items: int | None
    noise_sd: float | None
    detectable: float | None
    largest: float | None
    between: list[str] | None
    p: float | None
    tells_apart: bool | None
    by_verdict: bool


class BannerRecord(TypedDict):
    """What a guard reports."""

    guard: str
    text: str


class Exclusion(TypedDict):
    """A run that the user left out."""

    run: str
    arm: str
    reason: str


class TableRecord(TypedDict):
    """The table that the values come from, the guards that could be checked and those that could not, and the command
    that repeats the comparison."""

    file: str
    sha256: str
    seed: str | None
    step: str | None
    checked: list[str]
    not_known: list[str]
    command: str


class LooksRecord(TypedDict):
    """The planned looks: their numbers of seeds, and the plain p below which each one decides (not adjusted)."""

    seeds: list[int]
    spending: str
    levels: list[float]


class Record(TypedDict):
    """The content of compare.json. ``version`` counts its formats; the first had no version and no looks. ``effect``
    and ``noise_sd`` are in units of the metric; the baseline is the first of the arms. ``probes`` is there with
    --probes."""

    version: int
    name: str
    question: str
    baseline: str
    metric: str
    unit: str
    lower_is_better: bool
    alpha: float
    effect: float | None
    declared: bool
    looks: LooksRecord | None
    factor: list[str]
    budget: dict[str, Any] | None
    match: dict[str, Any] | None
    noise_sd: float | None
    noise_df: int
    arms: list[ArmRecord]
    resolution: list[ResolutionRecord]
    banners: list[BannerRecord]
    notes: list[str]
    excluded: list[Exclusion]
    runs: list[RunRecord]
    selection_runs: list[RunRecord]
    environment: dict[str, Any]
    folder: str | None
    headline: str
    table: TableRecord | None
    probes: NotRequired[ProbesRecord]


def record(comparison: Comparison) -> Record:
    """The record: a dict of plain JSON values, with None for whatever is missing."""
    plan = comparison.plan
    arms = [_arm_record(arm, comparison) for arm in comparison.arms]
    return {
        "version": VERSION,
        "name": plan.name,
        "question": plan.question,
        "baseline": plan.baseline,
        "metric": comparison.metric,
        "unit": comparison.unit,
        "lower_is_better": not comparison.plan.higher_is_better,
        "alpha": comparison.alpha,
        "effect": comparison.effect,
        "declared": plan.declared,
        "looks": _looks_record(plan),
        "factor": list(plan.factor),
        "budget": plan.budget or None,
        "match": plan.match,
        "noise_sd": comparison.noise,
        "noise_df": comparison.noise_df,
        "arms": arms,
        "resolution": [_resolution_record(each) for each in comparison.resolutions],
        "banners": [{"guard": banner.guard, "text": banner.text} for banner in comparison.banners],
        "notes": list(comparison.notes),
        "excluded": [{"run": run.name, "arm": run.arm, "reason": reason} for run, reason in comparison.excluded],
        "runs": [_run_record(run, comparison.metric) for arm in comparison.arms for run in arm.runs],
        "selection_runs": [_run_record(run, comparison.metric) for run in comparison.selection],
        "environment": _environment(comparison),
        "folder": str(plan.folder) if plan.folder else None,
        "headline": headline(plan.baseline, arms[1:]),
        "table": _table_record(plan.table) if plan.table else None,
    }


def headline(baseline: str, arms: list[ArmRecord]) -> str:
    """All verdicts in one sentence. Few arms are named, many are counted. ``arms`` are those besides the baseline."""
    by_word: dict[str, list[ArmRecord]] = {}
    for arm in arms:
        by_word.setdefault(arm["verdict"], []).append(arm)
    if not by_word:
        return "There is only one arm, so there is nothing to compare."
    phrases = {
        "better": f"better than {baseline}",
        "worse": f"worse than {baseline}",
        "equivalent": f"equivalent to {baseline}",
        "inconclusive": "inconclusive",
        "identical": f"identical to {baseline} (no verdict)",
        "difference": "a difference, but no verdict",
    }
    groups = [(by_word[word], phrase) for word, phrase in phrases.items() if word in by_word]
    if len(arms) <= FEW_ARMS:
        return "; ".join(f"{', '.join(arm['arm'] for arm in group)}: {phrase}" for group, phrase in groups) + "."
    counted = [f"{len(group)} {phrase}{_examples(group)}" for group, phrase in groups]
    return f"Of {len(arms)} arms: {'; '.join(counted)}."


def _examples(arms: list[ArmRecord]) -> str:
    """Names for a counted group: " (rope, alibi)"; if there are many, only " (the furthest: alibi, -0.1012)"."""
    if len(arms) <= FEW_NAMES:
        return f" ({', '.join(arm['arm'] for arm in arms)})"
    decided = [(arm["difference"], arm["arm"]) for arm in arms if arm["verdict"] in ("better", "worse")]
    differences = [(difference, name) for difference, name in decided if difference is not None]
    if not differences:
        return ""
    difference, name = max(differences, key=lambda pair: abs(pair[0]))
    return f" (the furthest: {name}, {difference:+.4f})"


def table(record: Record) -> str:
    """The content of compare.csv, with one row for each arm. A text that a spreadsheet would run as a formula gets an
    apostrophe in front."""
    flat = [key for key in record["arms"][0] if key not in ("why", "configuration", "lr")]
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(map(cell, [*flat, "best_lr", "lr_sensitivity", "metric", "effect", "alpha", "excluded"]))
    excluded = "; ".join(f"{one['run']}: {one['reason']}" for one in record["excluded"])
    for arm in record["arms"]:
        by_key: dict[str, object] = {**arm}
        rates = [arm["lr"]["best"], arm["lr"]["sensitivity"]] if arm["lr"] else [None, None]
        cells = [*(by_key[key] for key in flat), *rates]
        writer.writerow(map(cell, [*cells, record["metric"], record["effect"], record["alpha"], excluded]))
    return text.getvalue()


def read_table(text: str) -> list[dict[str, str]]:
    """Read the rows of compare.csv, without the apostrophes that ``table`` added."""
    return [{key: uncell(value) for key, value in row.items()} for row in csv.DictReader(io.StringIO(text))]


def _arm_record(arm: ArmResult, comparison: Comparison) -> ArmRecord:
    judgement, time_to_target, by_item = arm.judgement, arm.time_to_target, arm.by_item
    verdict = judgement.verdict if judgement else None
    evidence = judgement.evidence if judgement else None
    look = judgement.look if judgement else None
    difference = evidence.difference if evidence else None
    facts = next((run.facts for run in arm.runs if run.facts), Facts())
    low, high = arm.diverged_interval
    return {
        "arm": arm.name,
        "verdict": verdict.word if verdict else "baseline",
        "needs": verdict.needs if verdict else None,
        "why": verdict.why if verdict else "",
        "runs": len(arm.runs),
        "n": len(arm.values),
        "diverged": arm.diverged,
        "diverged_low": low,
        "diverged_high": high,
        "diverged_p": arm.divergence_p,
        "unfinished": arm.unfinished,
        "losses": arm.losses,
        "conditional": arm.conditional,
        "mean": arm.mean,
        "sd": arm.sd,
        "difference": difference.mean if difference else None,
        "low": difference.low if difference else None,
        "high": difference.high if difference else None,
        "p": difference.p if difference else None,
        "p_holm": evidence.p_holm if evidence else None,
        "p_equivalence": evidence.p_equivalence if evidence else None,
        "in_noise_sd": difference.mean / comparison.noise if difference and comparison.noise else None,
        "paired": difference.paired if difference else None,
        "pairs": difference.n_arm if difference and difference.paired else None,
        "look": look.name if look else "",
        "look_n": look.count if look else None,
        "sequential": bool(look and look.history),
        "pairing": judgement.pairing if judgement else "",
        # of two pairs, the correlation is always 1 or -1
        "correlation": difference.correlation if difference and difference.n_arm > 2 else None,
        "detectable": evidence.detectable if evidence else None,
        "items": by_item.items if by_item else None,
        "low_like": by_item.low if by_item else None,
        "high_like": by_item.high if by_item else None,
        "share_seeds": by_item.share_seeds if by_item else None,
        "share_items": by_item.share_items if by_item else None,
        "share_rest": by_item.share_rest if by_item else None,
        "target": time_to_target.target if time_to_target else None,
        "steps_to_target": time_to_target.steps if time_to_target else None,
        "flops_to_target": time_to_target.flops if time_to_target else None,
        "seconds_to_target": time_to_target.seconds if time_to_target else None,
        "within_steps": time_to_target.last_step if time_to_target else None,
        "parameters": facts.get("parameters", {}).get("total"),
        "flops_per_token": facts.get("flops_per_token"),
        "tokens": facts.get("tokens"),
        "configuration": list(arm.configuration),
        "lr": None if arm.tuned is None else _rates_record(arm.tuned),
    }


def _looks_record(plan: PlanRecord) -> LooksRecord | None:
    if not plan.looks:
        return None
    shares = tuple(count / plan.planned_seeds for count in plan.looks)
    levels = Looks(plan.looks, shares, plan.spending).levels(plan.alpha)
    return {"seeds": list(plan.looks), "spending": plan.spending, "levels": levels.tolist()}


def _table_record(table: Table) -> TableRecord:
    return {
        "file": table.file,
        "sha256": table.sha256,
        "seed": table.seed,
        "step": table.step,
        "checked": table.checked,
        "not_known": table.not_known,
        "command": table.shell,
    }


def _resolution_record(resolution: MetricResolution) -> ResolutionRecord:
    result = resolution.result
    return {
        "metric": result.metric,
        "unit": resolution.unit,
        "arms": result.arms,
        "seeds": result.seeds,
        "items": resolution.items,
        "noise_sd": result.noise,
        "detectable": result.detectable,
        "largest": result.largest,
        "between": list(result.between) if result.between else None,
        "p": result.p,
        "tells_apart": result.tells_apart,
        "by_verdict": resolution.by_verdict,
    }


def _rates_record(tuned: TunedRate) -> Rates:
    points: list[RatePoint] = [
        {"lr": point.lr, "mean": point.mean, "values": list(point.values), "runs": point.runs} for point in tuned.points
    ]
    return {
        "points": points,
        "best": tuned.best,
        "judged_at": list(tuned.judged_at),
        "sensitivity": tuned.sensitivity,
    }


def _run_record(run: Run, metric: str) -> RunRecord:
    return {
        "run": run.name,
        "path": str(run.path),
        "arm": run.arm,
        "seed": run.seed,
        "lr": run.lr,
        "state": run.state,
        "outcome": run.outcome(metric),
        "step": run.step,
        "value": run.value(metric),
        "seconds": run.facts.get("seconds"),
        "reason": run.reason,
    }


def _environment(comparison: Comparison) -> dict[str, Any]:
    facts = next((run.facts for arm in comparison.arms for run in arm.runs if run.facts), Facts())
    return {
        "device": facts.get("device"),
        "device_name": facts.get("device_name"),
        "threads": facts.get("threads"),
        "precision": facts.get("precision"),
        "python": facts.get("python"),
        "packages": facts.get("packages"),
        "commit": facts.get("commit"),
        "dirty": facts.get("dirty"),
        "data": facts.get("data"),
    }
