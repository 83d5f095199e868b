"""plan.json: what a plan has settled before its first job, and what may still change in it afterwards."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import statistics
import time
from pathlib import Path

from toolkit.config.changes import difference
from toolkit.store import seal
from toolkit.store.disk import read_json, read_json_or_warn, write_bytes, write_json, write_text


def settle(plan, folder: Path, arguments) -> dict:
    """Write plan.gin, plan.json and common.gin, or check the plan against those that are there: arms and seeds may have
    been added, nothing else. Measures what a budget in seconds needs. Returns plan.json. Raises ConfigError."""
    from toolkit.config.layers import ConfigError

    try:
        before = read_json(folder / "plan.json")
    except ValueError as error:
        raise ConfigError(str(error)) from error
    threads = before.get("threads") or threads_for(arguments.jobs, plan)
    budget = before.get("budget", {})
    seconds = budget.get("seconds_per_step")
    same = budget.get("of") == plan.budget[0] and budget.get("amount") == plan.budget[1]
    if plan.budget[0] == "seconds":
        seconds = {name: value for name, value in (seconds or {}).items() if same}
        seconds |= measure([arm for arm in plan.arms.values() if arm.name not in seconds], threads, rounds=3)
    plan.set_steps(seconds, budget.get("steps") if same else None)
    record = as_record(plan, threads, seconds if plan.budget[0] == "seconds" else None)
    if before:
        changed = changes(before, record)
        if changed:
            remedy = "only arms and seeds may be added; restore the plan, or run it under another name or --runs"
            lines = "\n".join(f"  {line}" for line in changed)
            raise ConfigError(f"{folder} was begun with another {plan.path.name}; {remedy}:\n{lines}")
        if before.get("lr") and record["lr"]:
            record["lr"]["chosen"] = {**before["lr"].get("chosen", {})}
    stale = _stale(plan, folder, record)
    if stale:
        lines = "\n".join(f"  {line}" for line in stale)
        remedy = "restore it, or take another --runs"
        raise ConfigError(f"{folder}: a gin file or a part has changed since; {remedy}:\n{lines}")
    write_bytes(folder / "plan.gin", plan.path.read_bytes())
    layer = plan.common
    lines = [f"import {module}" for module in layer.imports] + plan.common_bindings
    write_text(folder / "common.gin", seal.seal_text("# What every arm has.\n" + "\n".join(lines) + "\n"))
    write_json(folder / "plan.json", record)
    return record


def as_record(plan, threads: int, seconds: dict[str, float] | None) -> dict:
    """What plan.json holds."""
    ablation, arms = plan.ablation, plan.arms.values()
    of, amount = plan.budget
    width = {arm.name: arm.width for arm in arms if arm.width}
    matched = lr = None
    if ablation.match:
        matched = {
            "of": ablation.match,
            "knob": _one([knob for knob, _, _ in width.values()]),
            "knobs": {name: knob for name, (knob, _, _) in width.items()},
            "widths": {name: value for name, (_, value, _) in width.items()},
            "residual": {name: residual for name, (_, _, residual) in width.items()},
        }
    if plan.rates:
        knobs = {arm.name: arm.lr_knob for arm in arms}
        lr = {"knob": _one(list(knobs.values())), "knobs": knobs, "grid": plan.rates, "chosen": {}}
    return {
        "name": plan.name,
        "question": ablation.question,
        "baseline": plan.baseline.name,
        "arms": {arm.name: {"overlays": arm.overlays, "bindings": arm.bindings} for arm in arms},
        "common": {"overlays": plan.common_overlays, "bindings": plan.common_bindings},
        "factor": plan.factor,
        "seeds": ablation.seeds,
        "selection_seeds": ablation.selection_seeds,
        "metric": ablation.metric,
        "higher_is_better": ablation.higher_is_better,
        "alpha": ablation.alpha,
        "effect": ablation.effect,
        "budget": {
            "of": of,
            "amount": amount,
            "steps": {arm.name: arm.steps for arm in arms},
            "seconds_per_step": seconds,
        },
        "match": matched,
        "lr": lr,
        "threads": threads,
        "jobs": [dataclasses.asdict(job) for job in plan.jobs],
        "sha256": plan.sha256,
    }


def changes(before: dict, now: dict) -> list[str]:
    """What differs between two plan.json beyond added arms and seeds."""
    lines = []

    def compare(key, was, new):
        if isinstance(was, dict) and isinstance(new, dict):
            for name, value in was.items():
                compare(f"{key}.{name}", value, new.get(name))
        elif was != new:
            lines.append(f"{key}: {json.dumps(was)} there, {json.dumps(new)} here")

    for key in ("question", "baseline", "common", "factor", "metric", "alpha", "effect", "budget", "match"):
        compare(key, before[key], now[key])
    for name, value in before["arms"].items():
        if name not in now["arms"]:
            lines.append(f"arms: {name} is gone")
        else:
            compare(f"arms.{name}", value, now["arms"][name])
    for key in ("seeds", "selection_seeds"):
        gone = [seed for seed in before[key] if seed not in now[key]]
        if gone:
            lines.append(f"{key}: {', '.join(map(str, gone))} gone")
    compare("lr", _without_chosen(before["lr"]), _without_chosen(now["lr"]))
    return lines


def measure(arms: list, threads: int, rounds: int = 1) -> dict[str, float]:
    """Seconds per training step of each arm, alone on this machine, on random tokens. Evaluations, samples and
    checkpoints are no part of it. Rounds take turns over the arms and the fastest counts, since what else the machine
    does only slows it down."""
    import torch

    from toolkit.parallel import distributed
    from toolkit.rundir import report

    before, device, measured = torch.get_num_threads(), distributed.device(), {}
    for number in range(rounds):
        for arm in arms:
            torch.set_num_threads(arm.config.flat["Experiment.threads"] or threads)
            report.say(f"measuring {arm.name}" + (f", round {number + 1} of {rounds}" if rounds > 1 else ""))
            seconds = _seconds_per_step(arm.config.build(), device)
            measured[arm.name] = min(seconds, measured.get(arm.name, math.inf))
    torch.set_num_threads(before)
    return measured


def _seconds_per_step(experiment, device):
    import torch

    from toolkit.experiment import build, is_compiled, micro_batch_size, process_count
    from toolkit.loop import step as one_step

    parts = build(experiment, device)
    if is_compiled(experiment, device):
        parts.objective.compile(fullgraph=True, dynamic=False)
    shape = (micro_batch_size(experiment, process_count(experiment)), experiment.seq_len)
    ids = torch.randint(parts.tokenizer.vocab_size, shape, device=device)
    times = []
    while len(times) < 7 or (sum(times[2:]) < 0.5 and len(times) < 100):  # the first two allocate, and compile
        begun = time.perf_counter()
        one_step.gradient(experiment, parts.objective, [(ids, ids)] * experiment.accumulate, len(times), device)
        one_step.update(parts.optimizer)
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - begun)
    return statistics.median(times[2:])


def threads_for(jobs: int | None, plan) -> int:
    """CPU threads of each job: what the arms bind, the largest where they differ, else an equal share. Recorded, since
    sums in another order are other sums."""
    bound = [arm.config.flat["Experiment.threads"] for arm in plan.arms.values()]
    if all(bound):
        return max(bound)
    given = os.environ.get("OMP_NUM_THREADS", "")
    return int(given) if given.isdigit() and int(given) > 0 else max(1, (os.cpu_count() or 1) // (jobs or 1))


def _stale(plan, folder: Path, record: dict) -> list[str]:
    """Runs whose config is not what their job's would be now."""
    lines = []
    for job in plan.jobs:
        was = read_json_or_warn(folder / job.run / "facts.json").get("config")
        lr = job.lr if job.lr is not None or not plan.rates else record["lr"]["chosen"].get(job.arm)
        if not was or (plan.rates and lr is None):
            continue
        now = plan.flat(job, lr)
        for key, (then, new) in difference(was, now).items():
            lines.append(f"{job.run}: {key}: {then} there, {new} here")
    return lines


def _one(knobs: list[str]) -> str | None:
    """A name for knobs that arms have: theirs, or a pattern where they differ."""
    distinct = list(dict.fromkeys(knobs))
    return distinct[0] if len(distinct) == 1 else f"*.{distinct[0].rpartition('.')[2]}" if distinct else None


def _without_chosen(lr: dict | None) -> dict | None:
    return lr and {key: value for key, value in lr.items() if key != "chosen"}
