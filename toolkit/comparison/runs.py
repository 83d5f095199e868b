"""Reads folders: the runs, the plan they belong to, and the arm of each run."""

from __future__ import annotations

import glob
import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

import numpy as np

from toolkit.comparison import schema
from toolkit.comparison.origin import Table
from toolkit.config import keys
from toolkit.config.layers import statements
from toolkit.evaluation import itemfile
from toolkit.store import journal, seal
from toolkit.store.disk import read_json
from toolkit.store.factsfile import Facts
from toolkit.store.journal import Extent

METRIC, ALPHA, EFFECT = "val_full/loss_nats", 0.05, 0.02
CURVE = "val/loss_nats"  # measured during training; METRIC is measured once, at the end
LARGEST = 1e100  # larger values are not measurements; their squares would overflow a float
EVALUATED = ("val/", "val_full/", "eval/")  # metrics that are measured between training steps
ENDED = ("done", "diverged")  # states of a run that ablate leaves alone
LOWER_IS_BETTER = ("loss_nats", "bits_per_byte", "perplexity")  # metrics that the toolkit writes


@dataclass(frozen=True)
class Run:
    """One run, read from its folder. A planned run that was never started has no facts and no rows. ``damage`` holds a
    sentence for each file that changed after it was written; if this may affect the result, ``is_whole`` is False and
    the run has no value. ``edits`` holds a sentence for each contradiction between files."""

    path: Path
    facts: Facts
    state: str
    step: int
    reason: str
    rows: list[dict[str, Any]] = field(repr=False)
    seed: int
    arm: str = ""
    lr: float | None = None
    purpose: str = "judged"
    damage: tuple[str, ...] = ()
    is_whole: bool = True
    edits: tuple[str, ...] = ()
    is_sealed: bool = False
    requested_seed: int | None = None  # the seed in the plan's job for this run
    extents: dict[str, Extent] = field(default_factory=dict, repr=False)  # of the run's files when it ended
    units: dict[str, str] = field(default_factory=dict, repr=False)  # of the metrics of its evaluators

    @property
    def name(self) -> str:
        return self.path.name

    @property
    def config(self) -> dict[str, Any]:
        return self.facts.get("config", {})

    @property
    def steps(self) -> int:
        return self.facts.get("steps", 0)

    def value(self, metric: str) -> float | None:
        """The metric at the end of the budget. Evaluations are written after the last training step, at ``steps``; what
        is measured in a training step, such as a probe's value, was last written one step before. None if the run did
        not get that far, if the value is missing or not finite, or if the run is damaged."""
        if self.state != "done" or not self.is_whole:
            return None
        last_steps = (self.steps,) if metric.startswith(EVALUATED) else (self.steps, self.steps - 1)
        for step in last_steps:
            values = [row[metric] for row in self.rows if row.get("step") == step and metric in row]
            if values:
                return values[-1] if _is_finite(values[-1]) else None
        return None

    def final_metrics(self) -> list[str]:
        """The metrics in the rows at the last step of the budget, in their order."""
        rows = [row for row in self.rows if row.get("step") == self.steps]
        return list(dict.fromkeys(name for row in rows for name in row))

    def outcome(self, metric: str) -> str:
        """One of "finished", "diverged", "damaged" and "unfinished". A run with a non-finite value has diverged."""
        if self.value(metric) is not None:
            return "finished"
        if not self.is_whole:
            return "damaged"
        non_finite = [row[metric] for row in self.rows if metric in row and not _is_finite(row[metric])]
        return "diverged" if self.state == "diverged" or non_finite else "unfinished"

    def curve(self, metric: str) -> tuple[np.ndarray, np.ndarray]:
        """(steps, values) of a metric, ordered by step, without values that aren't finite."""
        value_at_step = {row["step"]: row[metric] for row in self.rows if metric in row and _is_finite(row[metric])}
        points = sorted(value_at_step.items())
        return np.array([step for step, _ in points], dtype=float), np.array([value for _, value in points])

    def seconds_per_step(self) -> float | None:
        """The median time of a training step, which a pause of the machine does not change; None without data."""
        _, milliseconds = self.curve("time/step_ms")
        return float(np.median(milliseconds)) / 1000 if len(milliseconds) else None

    def history(self) -> list[dict[str, Any]]:
        """All rows of metrics.jsonl, without the columns that depend on the clock."""
        return [{key: value for key, value in row.items() if not key.startswith("time/")} for row in self.rows]


@dataclass(frozen=True)
class PlanRecord:
    """The question that the runs answer. ``declared`` is False if there is no plan file; then the arms come from the
    runs, ``factor`` is empty and ``effect`` is the default. ``table`` is there if the values come from a table: then
    ``effect`` is None unless the user named one."""

    name: str
    question: str
    baseline: str
    arms: tuple[str, ...]
    declared: bool
    factor: tuple[str, ...] = ()
    metric: str = METRIC
    higher_is_better: bool = False
    alpha: float = ALPHA
    effect: float | None = EFFECT
    budget: dict[str, Any] = field(default_factory=dict)
    match: dict[str, Any] | None = None
    lr: dict[str, Any] | None = None
    seeds: tuple[int, ...] = ()  # of judged runs, in the plan's order
    looks: tuple[int, ...] = ()  # numbers of seeds; empty for one look at all of them
    planned_seeds: int = 0  # at the last look that was planned before the first one
    spending: str = "obrien-fleming"
    folder: Path | None = None
    edited: str = ""
    departures: tuple[str, ...] = ()  # sentences: what the command line changes in the declared plan
    runs_without_job: tuple[str, ...] = ()  # runs in the plan's folder that belong to none of its jobs
    table: Table | None = None


def higher_is_better(metric: str, declared: bool | None) -> bool:
    """Whether higher values of a metric are better: as declared, or False for the losses that the toolkit writes.
    Raises ValueError for another metric without a declaration."""
    if declared is None and metric.rpartition("/")[2] not in LOWER_IS_BETTER:
        raise ValueError(
            f"the metric {metric!r}: is lower better, or higher? Set Ablation.higher_is_better = False or True"
        )
    return bool(declared)


def find(patterns: Sequence[str], plan_file: str | None, baseline: str | None) -> tuple[PlanRecord, list[Run]]:
    """Read the plan and the runs that the command line names. ``patterns`` are a plan's folder, or run folders and
    globs; a name in front puts the runs into that arm: ``wide='runs/wide-*'``. Raises ValueError for a missing folder
    or run."""
    if not patterns:
        raise ValueError("name a plan's folder, or run folders: python -m toolkit.compare runs/PLAN")
    first = Path(patterns[0])
    if plan_file is not None and (first / "config.gin").is_file():
        first = first.parent  # the path is a run of the plan: compare all of the plan's runs
    plan_json = first / "plan.json"
    if plan_file is None and len(patterns) == 1 and plan_json.is_file():
        return runs_of_plan(plan_json, first, baseline)
    if plan_file is not None and Path(plan_file).suffix == ".json":
        return runs_of_plan(Path(plan_file), first, baseline)
    if plan_file is not None:
        if not plan_json.is_file():
            raise ValueError(f"--plan {plan_file}: {first} has no plan.json; name the folder that toolkit.ablate wrote")
        plan, runs = runs_of_plan(plan_json, first, baseline)
        if _sha256(Path(plan_file)) != _read_plan(plan_json)[0].get("sha256"):
            plan = replace(plan, edited=plan.edited or f"{plan_file} is not the plan that was run")
        return plan, runs
    return runs_without_plan(patterns, baseline)


def runs_of_plan(file: Path, folder: Path, baseline: str | None) -> tuple[PlanRecord, list[Run]]:
    """Read plan.json, and the run of each of its jobs, whether it was started or not."""
    content, edited = _read_plan(file)
    arms = tuple(content["arms"])
    chosen = baseline or content["baseline"]
    if chosen not in arms:
        raise ValueError(f"--baseline {chosen}: not an arm; the arms are {', '.join(arms)}")
    plan_gin = folder / "plan.gin"
    if not edited and plan_gin.is_file() and "sha256" in content and _sha256(plan_gin) != content["sha256"]:
        edited = f"{plan_gin} is not the plan that was run: its SHA-256 is not the one in plan.json"
    plan = PlanRecord(
        name=content["name"],
        question=content.get("question") or "",
        baseline=chosen,
        arms=(chosen, *(arm for arm in arms if arm != chosen)),
        declared=True,
        factor=tuple(content.get("factor") or ()),
        metric=content.get("metric") or METRIC,
        higher_is_better=higher_is_better(content.get("metric") or METRIC, content.get("higher_is_better")),
        alpha=content.get("alpha") or ALPHA,
        effect=content.get("effect") or EFFECT,
        budget=content.get("budget") or {},
        match=content.get("match"),
        lr=content.get("lr"),
        seeds=tuple(dict.fromkeys(job["seed"] for job in content["jobs"] if _purpose(job) == "judged")),
        looks=tuple(content.get("looks") or ()),
        planned_seeds=content.get("planned_seeds") or max(content.get("looks") or [0]),
        spending=content.get("spending") or "obrien-fleming",
        folder=folder,
        edited=edited,
        departures=(f"baseline: declared {content['baseline']}, judged against {chosen}",)
        * (chosen != content["baseline"]),
        runs_without_job=_runs_without_job(folder, {job["run"] for job in content["jobs"]}),
    )
    runs = []
    for job in content["jobs"]:
        run = read_run(folder / job["run"])
        seed = run.seed if run.facts else job["seed"]
        runs.append(
            replace(
                run,
                arm=job["arm"],
                lr=job.get("lr"),
                purpose=_purpose(job),
                seed=seed,
                requested_seed=job["seed"],
            )
        )
    return plan, runs


def _purpose(job: dict[str, Any]) -> str:
    return job.get("purpose", "judged")


def runs_without_plan(patterns: Sequence[str], baseline: str | None) -> tuple[PlanRecord, list[Run]]:
    """Read runs without a plan. Runs with the same given name form an arm; runs without a name form an arm if their
    configs differ only in the seed."""
    named: list[tuple[str, Run]] = []
    for pattern in patterns:
        arm, _, path_pattern = pattern.partition("=") if re.match(r"[A-Za-z0-9_. -]+=", pattern) else ("", "", pattern)
        if arm and Path(pattern).exists():  # the equals sign is part of a folder's name
            arm, path_pattern = "", pattern
        folders = [Path(path) for path in sorted(glob.glob(path_pattern)) or [path_pattern]]
        if len(folders) == 1 and not (folders[0] / "config.gin").is_file():
            folders = sorted(path.parent for path in folders[0].glob("*/config.gin")) or folders
        run_folders = [folder for folder in folders if (folder / "config.gin").is_file()]
        if not run_folders:
            raise ValueError(
                f"{path_pattern}: no run or plan found; the folder of a run holds config.gin, that of a plan plan.json"
            )
        named += [(arm, read_run(folder)) for folder in run_folders]
    paths = [run.path.resolve() for _, run in named]
    twice = {str(path) for path in paths if paths.count(path) > 1}
    if twice:
        raise ValueError(f"{', '.join(sorted(twice))}: named twice; name each run once")
    groups: dict[str, list[Run]] = {}
    for arm, run in named:
        config_without_seed = {key: value for key, value in run.config.items() if key != keys.SEED}
        groups.setdefault(arm or json.dumps(config_without_seed, sort_keys=True), []).append(run)
    names: dict[str, str] = {}
    for key, runs in groups.items():
        stems = {re.sub(r"[-_.]?(s|seed)?[-_]?\d+$", "", run.name) or run.name for run in runs}
        name = key if not key.startswith("{") else stems.pop() if len(stems) == 1 else runs[0].name
        names[key] = name if name not in names.values() else runs[0].name
    arms = tuple(names.values())
    chosen = baseline or arms[0]
    if chosen not in arms:
        raise ValueError(f"--baseline {chosen}: not an arm; the arms are {', '.join(arms)}")
    order = (chosen, *(arm for arm in arms if arm != chosen))
    plan = PlanRecord(
        name=" and ".join(order) if len(order) < 4 else "comparison",
        question="",
        baseline=chosen,
        arms=order,
        declared=False,
    )
    return plan, [replace(run, arm=names[key]) for key, runs in groups.items() for run in runs]


def read_run(folder: Path) -> Run:
    """Read a run's folder. It may be in any state, and its files may be damaged or edited."""
    damage: list[str] = []
    facts = cast(Facts, _read_checked(folder / "facts.json", damage))  # schema.check has compared the types
    status = _read_checked(folder / "status.json", damage)
    is_whole = not damage
    journal_damage = _journal_damage(folder, status)
    if journal_damage:
        damage, is_whole = [*damage, journal_damage], False
    elif lines := journal.corrupt(folder / "metrics.jsonl"):
        numbers = ", ".join(map(str, lines[:6])) + (" ..." if len(lines) > 6 else "")
        damage.append(f"{folder / 'metrics.jsonl'}: line {numbers} can't be read")
    damage += [sentence for entry in facts.get("resumed") or [] for sentence in entry.get("damaged", [])]
    started = (folder / "config.gin").is_file()
    return Run(
        path=folder,
        facts=facts,
        state=status.get("state", "unknown") if started else "not begun",
        step=status.get("step", 0),
        reason=str(status.get("reason", "")).split("\n")[0],
        rows=journal.read(folder / "metrics.jsonl"),
        seed=facts.get("seed", -1),
        damage=tuple(damage),
        is_whole=is_whole,
        edits=tuple(_contradictions(folder, facts, status)),
        is_sealed=seal.KEY in facts,
        extents=status.get("journal", {}),
        units=itemfile.units(folder),
    )


def _read_checked(file: Path, damage: list[str]) -> dict[str, Any]:
    """Read a run's JSON file. If it is damaged, return {} and add the reason to ``damage``."""
    try:
        content = read_json(file)
        schema.check(file, content)
    except ValueError as error:
        damage.append(str(error))
        return {}
    return content


def _journal_damage(folder: Path, status: dict[str, Any]) -> str | None:
    """Describe how metrics.jsonl differs from what was written, according to status.json or, if the run has not ended,
    to its newest intact checkpoint. None if there is no difference, or nothing to compare with."""
    vouched, must_be_complete = status.get("journal"), True
    for manifest in sorted(folder.glob("checkpoints/step-*/manifest.json"), reverse=True) if vouched is None else ():
        try:
            content = json.loads(manifest.read_text(encoding="utf-8"))
            if content.pop("sha256") == seal.digest(content):
                vouched, must_be_complete = schema.journal(content.get("journal")), False
                break
        except (OSError, ValueError, KeyError, AttributeError, RecursionError):
            continue
    rows = (vouched or {}).get("metrics.jsonl")
    return journal.damage(folder, {"metrics.jsonl": rows}, must_be_complete) if rows else None


def _contradictions(folder: Path, facts: Facts, status: dict[str, Any]) -> list[str]:
    """A sentence for each contradiction between files of a run."""
    contradictions = []
    try:
        config = seal.unseal_text((folder / "config.gin").read_text(encoding="utf-8-sig"))
    except (OSError, UnicodeDecodeError):
        config = seal.SealedText("")
    expected = facts.get("config_sha256")
    texts = (statements(config.text), config.text)  # older versions took the digest of all the text
    if config.problem or (expected and expected not in {hashlib.sha256(text.encode()).hexdigest() for text in texts}):
        contradictions.append("config.gin is not the config that the run was started with")
    last_rows = [row for row in journal.read(folder / "metrics.jsonl") if row["step"] == status.get("step")]
    for metric, value in facts.get("final", {}).items():
        logged = [row[metric] for row in last_rows if metric in row]
        if status.get("state") == "done" and logged and metric.startswith("val") and logged[-1] != value:
            contradictions.append(f"{metric} is {logged[-1]} in metrics.jsonl, but {value} in facts.json")
    return contradictions


def _read_plan(file: Path) -> tuple[dict[str, Any], str]:
    """Read a plan.json. Returns (content, how it differs from what ablate wrote or ""). Raises ValueError if it is not
    a valid plan."""
    edited = ""
    try:
        content = read_json(file)
    except ValueError as error:
        content = _read_without_seal(file, error)
        edited = f"{file} does not match its checksum: it was changed after toolkit.ablate wrote it"
    missing = [key for key in ("name", "baseline", "arms", "jobs") if key not in content]
    if missing:
        raise ValueError(f"{file}: not a valid plan, missing: {', '.join(missing)}")
    schema.check(file, content)
    bad_names = [job["run"] for job in content["jobs"] if not _is_name(job["run"])]
    if bad_names:
        raise ValueError(f"{file}: {bad_names[0]!r} is not a valid run name; restore the file from a copy")
    if unknown_arms := {job["arm"] for job in content["jobs"]} - set(content["arms"]):
        raise ValueError(
            f"{file}: a job names {min(unknown_arms)!r}, which is not an arm of the plan; restore the file from a copy"
        )
    if (looks := content.get("looks") or []) != sorted(set(looks)):
        raise ValueError(f"{file}: the looks {looks} do not increase; restore the file from a copy")
    if content["baseline"] not in content["arms"]:
        raise ValueError(f"{file}: the baseline {content['baseline']!r} is not an arm; restore the file from a copy")
    return content, edited


def _read_without_seal(file: Path, error: ValueError) -> dict[str, Any]:
    """Read a JSON file whose seal does not fit. Raises ``error`` again if it can't be read."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        raise error from None
    if not isinstance(content, dict):
        raise error
    return content


def _is_name(text: str) -> bool:
    """Whether a text is a plain file name, without a path."""
    return text not in ("", ".", "..") and not set(text) & set("/\\\0")


def _runs_without_job(folder: Path, planned_runs: set[str]) -> tuple[str, ...]:
    return tuple(sorted({path.parent.name for path in folder.glob("*/config.gin")} - planned_runs))


def _sha256(file: Path) -> str:
    if not file.is_file():
        raise ValueError(f"{file}: file not found")
    return hashlib.sha256(file.read_bytes()).hexdigest()


def _is_finite(value: object) -> bool:
    try:
        return isinstance(value, int | float) and not isinstance(value, bool) and abs(float(value)) < LARGEST
    except OverflowError:  # an integer too large for a float
        return False
