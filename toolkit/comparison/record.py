"""The comparison as one JSON object. All outputs but the pictures are made from it, so that they agree."""

from __future__ import annotations

import csv
import io
from dataclasses import asdict

from toolkit.comparison.results import ArmResult, Comparison
from toolkit.comparison.runs import Run
from toolkit.output.escape import cell, uncell

FEW_ARMS, FEW_NAMES = 6, 3  # names in the headline: of all arms together; of one group if there are more arms


def record(comparison: Comparison) -> dict:
    """The record: a dict of plain JSON values, with None for whatever is missing."""
    plan = comparison.plan
    out = {
        "name": plan.name,
        "question": plan.question,
        "baseline": plan.baseline,
        "metric": comparison.metric,
        "unit": comparison.unit,
        "lower_is_better": True,
        "alpha": comparison.alpha,
        "effect": comparison.effect,
        "declared": plan.declared,
        "factor": list(plan.factor),
        "budget": plan.budget or None,
        "match": plan.match,
        "noise_sd": comparison.noise,
        "noise_df": comparison.noise_df,
        "arms": [_arm_record(arm, comparison) for arm in comparison.arms],
        "banners": [asdict(banner) for banner in comparison.banners],
        "notes": list(comparison.notes),
        "excluded": [{"run": run.name, "arm": run.arm, "reason": reason} for run, reason in comparison.excluded],
        "runs": [_run_record(run, comparison.metric) for arm in comparison.arms for run in arm.runs],
        "selection_runs": [_run_record(run, comparison.metric) for run in comparison.selection],
        "environment": _environment(comparison),
        "folder": str(plan.folder) if plan.folder else None,
    }
    out["headline"] = headline(out)
    return out


def headline(record: dict) -> str:
    """All verdicts in one sentence. Few arms are named, many are counted."""
    by_word: dict[str, list[dict]] = {}
    for arm in record["arms"][1:]:
        by_word.setdefault(arm["verdict"], []).append(arm)
    if not by_word:
        return "There is only one arm, so there is nothing to compare."
    few = len(record["arms"]) - 1 <= FEW_ARMS
    phrases = {
        "better": f"better than {record['baseline']}",
        "worse": f"worse than {record['baseline']}",
        "equivalent": f"equivalent to {record['baseline']}",
        "inconclusive": "inconclusive",
        "identical": f"identical to {record['baseline']} (no verdict)",
        "difference": "a difference, but no verdict",
    }
    groups = [(by_word[word], phrase) for word, phrase in phrases.items() if word in by_word]
    if few:
        return "; ".join(f"{', '.join(arm['arm'] for arm in arms)}: {phrase}" for arms, phrase in groups) + "."
    counted = [f"{len(arms)} {phrase}{_examples(arms)}" for arms, phrase in groups]
    return f"Of {len(record['arms']) - 1} arms: {'; '.join(counted)}."


def _examples(arms: list[dict]) -> str:
    """Names for a counted group: " (rope, alibi)"; if there are many, only " (the furthest: alibi, -0.1012)"."""
    if len(arms) <= FEW_NAMES:
        return f" ({', '.join(arm['arm'] for arm in arms)})"
    decided = [arm for arm in arms if arm["difference"] is not None and arm["verdict"] in ("better", "worse")]
    if not decided:
        return ""
    furthest = max(decided, key=lambda arm: abs(arm["difference"]))
    return f" (the furthest: {furthest['arm']}, {furthest['difference']:+.4f})"


def table(record: dict) -> str:
    """The content of compare.csv, with one row for each arm. A text that a spreadsheet would run as a formula gets an
    apostrophe in front."""
    keys = list(record["arms"][0])
    flat = [key for key in keys if key not in ("why", "configuration", "lr")]
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(map(cell, [*flat, "best_lr", "lr_sensitivity", "metric", "effect", "alpha", "excluded"]))
    excluded = "; ".join(f"{one['run']}: {one['reason']}" for one in record["excluded"])
    for arm in record["arms"]:
        lr = arm["lr"] or {}
        cells = [arm[key] for key in flat] + [lr.get("best"), lr.get("sensitivity")]
        writer.writerow(map(cell, [*cells, record["metric"], record["effect"], record["alpha"], excluded]))
    return text.getvalue()


def read_table(text: str) -> list[dict[str, str]]:
    """Read the rows of compare.csv, without the apostrophes that ``table`` added."""
    return [{key: uncell(value) for key, value in row.items()} for row in csv.DictReader(io.StringIO(text))]


def _arm_record(arm: ArmResult, comparison: Comparison) -> dict:
    judgement, time_to_target = arm.judgement, arm.time_to_target
    verdict = judgement.verdict if judgement else None
    evidence = judgement.evidence if judgement else None
    difference = evidence.difference if evidence else None
    facts = next((run.facts for run in arm.runs if run.facts), {})
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
        "pairing": judgement.pairing if judgement else "",
        # of two pairs, the correlation is always 1 or -1
        "correlation": difference.correlation if difference and difference.n_arm > 2 else None,
        "detectable": evidence.detectable if evidence else None,
        "target": time_to_target.target if time_to_target else None,
        "steps_to_target": time_to_target.steps if time_to_target else None,
        "flops_to_target": time_to_target.flops if time_to_target else None,
        "seconds_to_target": time_to_target.seconds if time_to_target else None,
        "within_steps": time_to_target.last_step if time_to_target else None,
        "parameters": facts.get("parameters", {}).get("total"),
        "flops_per_token": facts.get("flops_per_token"),
        "tokens": facts.get("tokens"),
        "configuration": list(arm.configuration),
        "lr": None if arm.tuned is None else asdict(arm.tuned) | {"sensitivity": arm.tuned.sensitivity},
    }


def _run_record(run: Run, metric: str) -> dict:
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


def _environment(comparison: Comparison) -> dict:
    facts = next((run.facts for arm in comparison.arms for run in arm.runs if run.facts), {})
    names = ("device", "device_name", "threads", "precision", "python", "packages", "commit", "dirty", "data")
    return {name: facts.get(name) for name in names}
