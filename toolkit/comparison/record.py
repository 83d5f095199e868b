"""The comparison as one JSON object: what every output but the pictures is made of, so that none says another thing."""

from __future__ import annotations

import csv
import io
from dataclasses import asdict

from toolkit.comparison.assemble import Arm, Comparison
from toolkit.comparison.runs import Run
from toolkit.output.escape import cell, uncell

FEW_ARMS, FEW_NAMES = 6, 3  # arms that the first sentence names; of a group, where there are more


def record(comparison: Comparison) -> dict:
    """Plain values only; None for what there is not."""
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
        "arms": [_arm(arm, comparison) for arm in comparison.arms],
        "banners": [asdict(banner) for banner in comparison.banners],
        "notes": list(comparison.notes),
        "excluded": [{"run": run.name, "arm": run.arm, "reason": reason} for run, reason in comparison.excluded],
        "runs": [_run(run, comparison.metric) for arm in comparison.arms for run in arm.runs],
        "selection_runs": [_run(run, comparison.metric) for run in comparison.selection],
        "environment": _environment(comparison),
        "folder": str(plan.folder) if plan.folder else None,
    }
    out["headline"] = headline(out)
    return out


def headline(said: dict) -> str:
    """The verdicts in a sentence: arms by name while they are few, else counted."""
    by_word: dict[str, list[dict]] = {}
    for arm in said["arms"][1:]:
        by_word.setdefault(arm["verdict"], []).append(arm)
    if not by_word:
        return "There is one arm alone; nothing to compare it with."
    few = len(said["arms"]) - 1 <= FEW_ARMS
    tails = {
        "better": f"better than {said['baseline']}",
        "worse": f"worse than {said['baseline']}",
        "equivalent": f"equivalent to {said['baseline']}",
        "inconclusive": "inconclusive",
        "identical": f"identical to {said['baseline']}: no verdict",
        "difference": "a difference without a verdict",
    }
    groups = [(by_word[word], tail) for word, tail in tails.items() if word in by_word]
    if few:
        return "; ".join(f"{', '.join(arm['arm'] for arm in arms)}: {tail}" for arms, tail in groups) + "."
    counted = [f"{len(arms)} {tail}{_examples(arms)}" for arms, tail in groups]
    return f"Of {len(said['arms']) - 1} arms: {'; '.join(counted)}."


def _examples(arms: list[dict]) -> str:
    """ " (rope, alibi)"; of many that differ " (the furthest: alibi, -0.1012)"."""
    if len(arms) <= FEW_NAMES:
        return f" ({', '.join(arm['arm'] for arm in arms)})"
    apart = [arm for arm in arms if arm["difference"] is not None and arm["verdict"] in ("better", "worse")]
    if not apart:
        return ""
    furthest = max(apart, key=lambda arm: abs(arm["difference"]))
    return f" (the furthest: {furthest['arm']}, {furthest['difference']:+.4f})"


def table(said: dict) -> str:
    """compare.csv: a row for each arm. Texts that a spreadsheet would take for formulas have an apostrophe in front."""
    keys = list(said["arms"][0])
    flat = [key for key in keys if key not in ("why", "configuration", "lr")]
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(map(cell, [*flat, "best_lr", "lr_sensitivity", "metric", "effect", "alpha", "excluded"]))
    excluded = "; ".join(f"{one['run']}: {one['reason']}" for one in said["excluded"])
    for arm in said["arms"]:
        lr = arm["lr"] or {}
        cells = [arm[key] for key in flat] + [lr.get("best"), lr.get("sensitivity")]
        writer.writerow(map(cell, [*cells, said["metric"], said["effect"], said["alpha"], excluded]))
    return text.getvalue()


def read_table(text: str) -> list[dict[str, str]]:
    """The rows of compare.csv, texts as ``table`` was given them."""
    return [{key: uncell(value) for key, value in row.items()} for row in csv.DictReader(io.StringIO(text))]


def _arm(arm: Arm, comparison: Comparison) -> dict:
    found, reach = arm.difference, arm.reach
    facts = next((run.facts for run in arm.runs if run.facts), {})
    low, high = arm.diverged_interval
    return {
        "arm": arm.name,
        "verdict": arm.verdict.word if arm.verdict else "baseline",
        "needs": arm.verdict.needs if arm.verdict else None,
        "why": arm.verdict.why if arm.verdict else "",
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
        "difference": found.mean if found else None,
        "low": found.low if found else None,
        "high": found.high if found else None,
        "p": found.p if found else None,
        "p_holm": arm.p_holm,
        "p_equivalence": arm.p_equivalence,
        "in_noise_sd": found.mean / comparison.noise if found and comparison.noise else None,
        "paired": found.paired if found else None,
        "pairs": found.n_arm if found and found.paired else None,
        "pairing": arm.pairing,
        "correlation": found.correlation if found and found.n_arm > 2 else None,  # of two pairs it is 1 or -1 always
        "detectable": arm.detectable,
        "target": reach.target if reach else None,
        "steps_to_target": reach.steps if reach else None,
        "flops_to_target": reach.flops if reach else None,
        "seconds_to_target": reach.seconds if reach else None,
        "within_steps": reach.within if reach else None,
        "parameters": facts.get("parameters", {}).get("total"),
        "flops_per_token": facts.get("flops_per_token"),
        "tokens": facts.get("tokens"),
        "configuration": list(arm.configuration),
        "lr": None if arm.tuned is None else asdict(arm.tuned) | {"sensitivity": arm.tuned.sensitivity},
    }


def _run(run: Run, metric: str) -> dict:
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
