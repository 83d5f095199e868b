"""plan.json: the decisions of a plan before its first job, and which of them may still change later."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import statistics
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from toolkit.ablation import stopping
from toolkit.config import keys
from toolkit.config.changes import difference
from toolkit.store import factsfile, seal
from toolkit.store.disk import read_json, write_bytes, write_json, write_text

if TYPE_CHECKING:
    import argparse

    import torch

    from toolkit.ablation.plan import Plan
    from toolkit.ablation.planfile import Arm
    from toolkit.experiment import Experiment


def settle(plan: Plan, folder: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """Write plan.gin, plan.json and common.gin, and return the content of plan.json. If the folder already has a plan,
    first check that only arms and seeds were added. Measures the step times for a budget in seconds. Raises ConfigError
    if the plan, a gin file or a part has changed otherwise."""
    from toolkit.config.layers import ConfigError

    try:
        before = read_json(folder / "plan.json")
    except ValueError as error:
        raise ConfigError(str(error)) from error
    threads = before.get("threads") or threads_for(arguments.jobs, plan)
    budget = before.get("budget", {})
    seconds = budget.get("seconds_per_step")
    same_budget = budget.get("of") == plan.budget[0] and budget.get("amount") == plan.budget[1]
    if plan.budget[0] == "seconds":
        seconds = {name: value for name, value in (seconds or {}).items() if same_budget}
        seconds |= measure([arm for arm in plan.arms.values() if arm.name not in seconds], threads, rounds=3)
    plan.set_steps(seconds, budget.get("steps") if same_budget else None)
    record = as_record(plan, threads, seconds if plan.budget[0] == "seconds" else None)
    if before:
        changed = [*changes(before, record), *stopping.changes(before, record, folder)]
        if changed:
            remedy = "only arms and seeds may be added; restore the plan, or run it under another name or --runs"
            listed = "\n".join(f"  {line}" for line in changed)
            raise ConfigError(f"{folder} was started with a different {plan.path.name}; {remedy}:\n{listed}")
        record["planned_seeds"] = stopping.planned_seeds(before, record, folder)
        if before.get("lr") and record["lr"]:
            record["lr"]["chosen"] = {**before["lr"].get("chosen", {})}
    changed_configs = _changed_configs(plan, folder, record)
    if changed_configs:
        listed = "\n".join(f"  {line}" for line in changed_configs)
        remedy = "restore it, or choose another --runs"
        raise ConfigError(f"{folder}: a gin file or a part has changed since these runs started; {remedy}:\n{listed}")
    write_bytes(folder / "plan.gin", plan.path.read_bytes())
    layer = plan.common
    lines = [f"import {module}" for module in layer.imports] + plan.common_bindings
    write_text(folder / "common.gin", seal.seal_text("# What every arm has.\n" + "\n".join(lines) + "\n"))
    write_json(folder / "plan.json", record)
    return record


def as_record(plan: Plan, threads: int, seconds: dict[str, float] | None) -> dict[str, Any]:
    """The content of plan.json."""
    ablation, arms = plan.ablation, plan.arms.values()
    unit, amount = plan.budget
    width = {arm.name: arm.width for arm in arms if arm.width}
    match = lr = None
    if ablation.match:
        match = {
            "of": ablation.match,
            "knob": _common_name([knob for knob, _, _ in width.values()]),
            "knobs": {name: knob for name, (knob, _, _) in width.items()},
            "widths": {name: value for name, (_, value, _) in width.items()},
            "residual": {name: residual for name, (_, _, residual) in width.items()},
        }
    if plan.rates:
        knobs = {arm.name: arm.lr_knob for arm in arms}
        lr = {
            "knob": _common_name([knob for knob in knobs.values() if knob]),
            "knobs": knobs,
            "grid": plan.rates,
            "chosen": {},
        }
    return {
        "name": plan.name,
        "question": ablation.question,
        "baseline": plan.baseline.name,
        "arms": {arm.name: {"overlays": arm.overlays, "bindings": arm.bindings} for arm in arms},
        "common": {"overlays": plan.common_overlays, "bindings": plan.common_bindings},
        "factor": plan.factor,
        "seeds": ablation.seeds,
        "looks": ablation.looks,
        "planned_seeds": ablation.looks[-1] if ablation.looks else None,
        "spending": ablation.spending,
        "selection_seeds": ablation.selection_seeds,
        "metric": ablation.metric,
        "higher_is_better": ablation.higher_is_better,
        "alpha": ablation.alpha,
        "effect": ablation.effect,
        "budget": {
            "of": unit,
            "amount": amount,
            "steps": {arm.name: arm.steps for arm in arms},
            "seconds_per_step": seconds,
        },
        "match": match,
        "lr": lr,
        "threads": threads,
        "jobs": [dataclasses.asdict(job) for job in plan.jobs],
        "sha256": plan.sha256,
    }


def changes(old_record: dict[str, Any], new_record: dict[str, Any]) -> list[str]:
    """Differences between two plan.json, one line each. Added arms and seeds don't count."""
    lines = []

    def compare(key: str, old: object, new: object) -> None:
        if isinstance(old, dict) and isinstance(new, dict):
            for name, value in old.items():
                compare(f"{key}.{name}", value, new.get(name))
        elif old != new:
            lines.append(f"{key}: was {json.dumps(old)}, is now {json.dumps(new)}")

    for key in ("question", "baseline", "common", "factor", "metric", "alpha", "effect", "budget", "match"):
        compare(key, old_record[key], new_record[key])
    for name, value in old_record["arms"].items():
        if name not in new_record["arms"]:
            lines.append(f"arms: {name} was removed")
        else:
            compare(f"arms.{name}", value, new_record["arms"][name])
    for key in ("seeds", "selection_seeds"):
        removed = [seed for seed in old_record[key] if seed not in new_record[key]]
        if removed:
            lines.append(f"{key}: {', '.join(map(str, removed))} removed")
    compare("lr", _without_chosen(old_record["lr"]), _without_chosen(new_record["lr"]))
    return lines


def measure(arms: list[Arm], threads: int, rounds: int = 1) -> dict[str, float]:
    """Measure the seconds per training step of each arm on random tokens, one arm at a time on this machine.
    Evaluations, samples and checkpoints are not included. Every round measures all arms, and the fastest round counts:
    other work on the machine can only make a step slower."""
    import torch

    from toolkit.parallel import distributed
    from toolkit.rundir import report

    threads_before, device = torch.get_num_threads(), distributed.device()
    measured: dict[str, float] = {}
    for round_index in range(rounds):
        for arm in arms:
            torch.set_num_threads(_bound_threads(arm) or threads)
            report.say(f"measuring {arm.name}" + (f", round {round_index + 1} of {rounds}" if rounds > 1 else ""))
            seconds = _seconds_per_step(arm.config.build(), device)
            measured[arm.name] = min(seconds, measured.get(arm.name, math.inf))
    torch.set_num_threads(threads_before)
    return measured


def _seconds_per_step(experiment: Experiment, device: torch.device) -> float:
    """The median seconds of a training step on random tokens."""
    import torch

    from toolkit.experiment import build, is_compiled, micro_batch_size
    from toolkit.loop import step as training_step
    from toolkit.parallel.distributed import process_count

    parts = build(experiment, device)
    if is_compiled(experiment, device):
        parts.objective.compile(fullgraph=True, dynamic=False)
    shape = (micro_batch_size(experiment, process_count(experiment.devices)), experiment.seq_len)
    ids = torch.randint(parts.tokenizer.vocab_size, shape, device=device)
    times: list[float] = []
    while len(times) < 7 or (sum(times[2:]) < 0.5 and len(times) < 100):  # the first two allocate and compile
        start = time.perf_counter()
        training_step.gradient(experiment, parts.objective, [(ids, ids)] * experiment.accumulate, len(times), device)
        training_step.update(parts.optimizer)
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return statistics.median(times[2:])


def threads_for(jobs: int | None, plan: Plan) -> int:
    """CPU threads of each job: the largest number that the arms bind, if all of them bind one; else OMP_NUM_THREADS;
    else an equal share of the cores. plan.json records it, because the number of threads changes the order of sums and
    so their rounding."""
    bound_threads = [threads for arm in plan.arms.values() if (threads := _bound_threads(arm))]
    if len(bound_threads) == len(plan.arms):
        return max(bound_threads)
    environment_threads = os.environ.get("OMP_NUM_THREADS", "")
    if environment_threads.isdigit() and int(environment_threads) > 0:
        return int(environment_threads)
    return max(1, (os.cpu_count() or 1) // (jobs or 1))


def _bound_threads(arm: Arm) -> int | None:
    """The CPU threads that an arm's config asks for, or None."""
    threads = arm.config.flat["Experiment.threads"]
    return threads if isinstance(threads, int) else None


def _changed_configs(plan: Plan, folder: Path, record: dict[str, Any]) -> list[str]:
    """Lines about finished or started runs whose config differs from what their job would get now."""
    lines = []
    for job in plan.jobs:
        old_config = factsfile.read(folder / job.run).get("config")
        lr = job.lr if job.lr is not None or not plan.rates else record["lr"]["chosen"].get(job.arm)
        if not old_config or (plan.rates and lr is None):
            continue
        new_config = plan.flat(job, lr)
        for key, (old, new) in difference(old_config, new_config).items():
            lines.append(f"{job.run}: {key}: was {old}, is now {new}")
    return lines


def _common_name(knobs: list[str]) -> str | None:
    """One name for the knobs of all arms: the knob if they agree, else a pattern such as "*.lr"; None without knobs."""
    distinct = list(dict.fromkeys(knobs))
    if len(distinct) > 1:
        return keys.spell("*", keys.split(distinct[0]).knob)
    return distinct[0] if distinct else None


def _without_chosen(lr: dict[str, Any] | None) -> dict[str, Any] | None:
    return lr and {key: value for key, value in lr.items() if key != "chosen"}
