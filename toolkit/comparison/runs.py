"""From folders to plain records: runs, the plan that they answer, and which run belongs to which arm."""

from __future__ import annotations

import glob
import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from toolkit.comparison import schema
from toolkit.store import journal, seal
from toolkit.store.disk import read_json

METRIC, ALPHA, EFFECT = "val_full/loss_nats", 0.05, 0.02
CURVE = "val/loss_nats"  # what is measured along the way; METRIC is measured once, at the end
SEED = "Experiment.seed"
LARGEST = 1e100  # a value beyond it is no measurement: its square would be none that a float holds
LOWER_IS_BETTER = ("loss_nats", "bits_per_byte", "perplexity")  # what the toolkit writes; others have to be declared


@dataclass(frozen=True)
class Run:
    """One run as its folder tells it. A run that a plan asks for and that was never begun has no facts and no rows.
    ``damage`` says, a sentence each, what in the folder is not what was written; ``is_whole`` is False where that may
    concern the result, and then the run has no value."""

    path: Path
    facts: dict
    state: str
    step: int
    reason: str
    rows: list[dict] = field(repr=False)
    seed: int
    arm: str = ""
    lr: float | None = None
    purpose: str = "judged"
    damage: tuple[str, ...] = ()
    is_whole: bool = True
    edits: tuple[str, ...] = ()
    is_sealed: bool = False
    asked: int | None = None  # the seed of the job that the run answers

    @property
    def name(self) -> str:
        return self.path.name

    @property
    def config(self) -> dict:
        return self.facts.get("config", {})

    @property
    def steps(self) -> int:
        return self.facts.get("steps", 0)

    def value(self, metric: str) -> float | None:
        """The metric at the end of the budget; None for a run that did not get there, that got there without one, or
        that is damaged."""
        if self.state != "done" or not self.is_whole:
            return None
        found = [row[metric] for row in self.rows if row.get("step") == self.steps and metric in row]
        return found[-1] if found and _finite(found[-1]) else None

    def outcome(self, metric: str) -> str:
        """finished, diverged, damaged or unfinished. A run that ended without a finite value has diverged as well."""
        if self.value(metric) is not None:
            return "finished"
        if not self.is_whole:
            return "damaged"
        ends = [row[metric] for row in self.rows if metric in row and not _finite(row[metric])]
        return "diverged" if self.state == "diverged" or ends else "unfinished"

    def curve(self, metric: str) -> tuple[np.ndarray, np.ndarray]:
        """Steps and finite values of a metric, by step."""
        found = {row["step"]: row[metric] for row in self.rows if metric in row and _finite(row[metric])}
        points = sorted(found.items())
        return np.array([step for step, _ in points], dtype=float), np.array([value for _, value in points])

    def seconds_per_step(self) -> float | None:
        """The median, so that a pause of the machine does not count."""
        _, milliseconds = self.curve("time/step_ms")
        return float(np.median(milliseconds)) / 1000 if len(milliseconds) else None

    def history(self) -> list[dict]:
        """Every metric that does not depend on the clock."""
        return [{key: value for key, value in row.items() if not key.startswith("time/")} for row in self.rows]


@dataclass(frozen=True)
class Plan:
    """What is asked. ``declared`` is False where it was gathered from the runs, and then nothing was said in advance:
    ``factor`` is empty and ``effect`` the default."""

    name: str
    question: str
    baseline: str
    arms: tuple[str, ...]
    declared: bool
    factor: tuple[str, ...] = ()
    metric: str = METRIC
    alpha: float = ALPHA
    effect: float = EFFECT
    budget: dict = field(default_factory=dict)
    match: dict | None = None
    lr: dict | None = None
    folder: Path | None = None
    edited: str = ""
    departures: tuple[str, ...] = ()  # what the command line asks for in place of what was declared
    strays: tuple[str, ...] = ()  # runs in the folder that no job names


def direction(metric: str, higher_is_better: bool | None) -> None:
    """Raise ValueError for a metric of which it is not known that lower is better: nothing is assumed."""
    if higher_is_better is None and metric.rpartition("/")[2] not in LOWER_IS_BETTER:
        raise ValueError(
            f"the metric {metric!r}: is lower better, or higher? Write Ablation.higher_is_better = False where lower is"
        )
    if higher_is_better:
        raise ValueError(f"the metric {metric!r}: higher is better, which comparisons can't judge yet; use a loss")


def find(patterns: Sequence[str], plan_file: str | None, baseline: str | None) -> tuple[Plan, list[Run]]:
    """The plan and the runs that the command line names: a plan folder, or run folders and globs, each of which may
    be given to an arm by name: ``wide='runs/wide-*'``. Raises ValueError for what is not there."""
    if not patterns:
        raise ValueError("name a plan's folder, or run folders: python -m toolkit.compare runs/PLAN")
    first = Path(patterns[0])
    if plan_file is not None and (first / "config.gin").is_file():
        first = first.parent  # a run of the plan was named; all of its runs are compared
    written = first / "plan.json"
    if plan_file is None and len(patterns) == 1 and written.is_file():
        return planned(written, first, baseline)
    if plan_file is not None and Path(plan_file).suffix == ".json":
        return planned(Path(plan_file), first, baseline)
    if plan_file is not None:
        if not written.is_file():
            raise ValueError(f"--plan {plan_file}: {first} has no plan.json; name the folder that toolkit.ablate wrote")
        plan, runs = planned(written, first, baseline)
        if _sha256(Path(plan_file)) != _plan(written)[0].get("sha256"):
            plan = replace(plan, edited=plan.edited or f"{plan_file} is not the plan that was run")
        return plan, runs
    return gathered(patterns, baseline)


def planned(file: Path, folder: Path, baseline: str | None) -> tuple[Plan, list[Run]]:
    """What plan.json says, and the run of each of its jobs, begun or not."""
    said, edited = _plan(file)
    arms = tuple(said["arms"])
    chosen = baseline or said["baseline"]
    if chosen not in arms:
        raise ValueError(f"--baseline {chosen}: the arms are {', '.join(arms)}")
    direction(said.get("metric") or METRIC, said.get("higher_is_better"))
    copy = folder / "plan.gin"
    if not edited and copy.is_file() and "sha256" in said and _sha256(copy) != said["sha256"]:
        edited = f"{copy} is not the plan that was run: its SHA-256 is not the one in plan.json"
    plan = Plan(
        name=said["name"],
        question=said.get("question") or "",
        baseline=chosen,
        arms=(chosen, *(arm for arm in arms if arm != chosen)),
        declared=True,
        factor=tuple(said.get("factor") or ()),
        metric=said.get("metric") or METRIC,
        alpha=said.get("alpha") or ALPHA,
        effect=said.get("effect") or EFFECT,
        budget=said.get("budget") or {},
        match=said.get("match"),
        lr=said.get("lr"),
        folder=folder,
        edited=edited,
        departures=(f"baseline: declared {said['baseline']}, judged against {chosen}",) * (chosen != said["baseline"]),
        strays=_strays(folder, {job["run"] for job in said["jobs"]}),
    )
    runs = []
    for job in said["jobs"]:
        run = read_run(folder / job["run"])
        seed = run.seed if run.facts else job["seed"]
        runs.append(
            replace(
                run,
                arm=job["arm"],
                lr=job.get("lr"),
                purpose=job.get("purpose", "judged"),
                seed=seed,
                asked=job["seed"],
            )
        )
    return plan, runs


def gathered(patterns: Sequence[str], baseline: str | None) -> tuple[Plan, list[Run]]:
    """Arms without a plan: runs whose config differs in nothing but the seed, or that were given a name."""
    named: list[tuple[str, Run]] = []
    for pattern in patterns:
        arm, _, rest = pattern.partition("=") if re.match(r"[A-Za-z0-9_. -]+=", pattern) else ("", "", pattern)
        if arm and Path(pattern).exists():  # a folder may have an equals sign in its name
            arm, rest = "", pattern
        folders = [Path(path) for path in sorted(glob.glob(rest)) or [rest]]
        if len(folders) == 1 and not (folders[0] / "config.gin").is_file():
            folders = sorted(path.parent for path in folders[0].glob("*/config.gin")) or folders
        found = [folder for folder in folders if (folder / "config.gin").is_file()]
        if not found:
            raise ValueError(f"{rest}: there is no run there, nor a plan: a run's folder holds config.gin")
        named += [(arm, read_run(folder)) for folder in found]
    paths = [run.path.resolve() for _, run in named]
    twice = {str(path) for path in paths if paths.count(path) > 1}
    if twice:
        raise ValueError(f"{', '.join(sorted(twice))}: named twice; a run counts once")
    groups: dict[str, list[Run]] = {}
    for arm, run in named:
        rest = {key: value for key, value in run.config.items() if key != SEED}
        groups.setdefault(arm or json.dumps(rest, sort_keys=True), []).append(run)
    names: dict[str, str] = {}
    for key, runs in groups.items():
        stems = {re.sub(r"[-_.]?(s|seed)?[-_]?\d+$", "", run.name) or run.name for run in runs}
        name = key if not key.startswith("{") else stems.pop() if len(stems) == 1 else runs[0].name
        names[key] = name if name not in names.values() else runs[0].name
    arms = tuple(names.values())
    chosen = baseline or arms[0]
    if chosen not in arms:
        raise ValueError(f"--baseline {chosen}: the arms are {', '.join(arms)}")
    order = (chosen, *(arm for arm in arms if arm != chosen))
    plan = Plan(
        name=" and ".join(order) if len(order) < 4 else "comparison",
        question="",
        baseline=chosen,
        arms=order,
        declared=False,
    )
    return plan, [replace(run, arm=names[key]) for key, runs in groups.items() for run in runs]


def read_run(folder: Path) -> Run:
    """A run's folder, whatever state it is in, and whatever somebody has put into it."""
    damage: list[str] = []
    facts, status = (_checked(folder / name, damage) for name in ("facts.json", "status.json"))
    is_whole = not damage
    journal_damage = _journal_damage(folder, status)
    if journal_damage:
        damage, is_whole = [*damage, journal_damage], False
    elif lines := journal.corrupt(folder / "metrics.jsonl"):
        numbers = ", ".join(map(str, lines[:6])) + (" ..." if len(lines) > 6 else "")
        damage.append(f"{folder / 'metrics.jsonl'}: line {numbers} can't be read")
    damage += [sentence for entry in facts.get("resumed") or [] for sentence in entry.get("damaged", [])]
    begun = (folder / "config.gin").is_file()
    return Run(
        path=folder,
        facts=facts,
        state=status.get("state", "unknown") if begun else "not begun",
        step=status.get("step", 0),
        reason=str(status.get("reason", "")).split("\n")[0],
        rows=journal.read(folder / "metrics.jsonl"),
        seed=facts.get("seed", -1),
        damage=tuple(damage),
        is_whole=is_whole,
        edits=tuple(_edits(folder, facts, status)),
        is_sealed=seal.KEY in facts,
    )


def _checked(file: Path, damage: list[str]) -> dict:
    """A JSON file of a run; {} where it is damaged, and why goes into ``damage``."""
    try:
        said = read_json(file)
        schema.check(file, said)
    except ValueError as error:
        damage.append(str(error))
        return {}
    return said


def _journal_damage(folder: Path, status: dict) -> str | None:
    """In what the rows are not those that were written: by status.json at the end of a run, else by its newest
    checkpoint. None also where nothing vouches for them."""
    covered, whole = status.get("journal"), True
    for manifest in sorted(folder.glob("checkpoints/step-*/manifest.json"), reverse=True) if covered is None else ():
        try:
            said = json.loads(manifest.read_text(encoding="utf-8"))
            if said.pop("sha256") == seal.digest(said):
                covered, whole = schema.journal(said.get("journal")), False
                break
        except (OSError, ValueError, KeyError, AttributeError, RecursionError):
            continue
    rows = (covered or {}).get("metrics.jsonl")
    return journal.damage(folder, {"metrics.jsonl": rows}, whole) if rows else None


def _edits(folder: Path, facts: dict, status: dict) -> list[str]:
    """Where files of a run contradict each other, a sentence each."""
    found = []
    try:
        config = seal.unseal_text((folder / "config.gin").read_text(encoding="utf-8-sig"))
    except (OSError, UnicodeDecodeError):
        config = seal.SealedText("")
    expected = facts.get("config_sha256")
    if config.problem or (expected and hashlib.sha256(config.text.encode()).hexdigest() != expected):
        found.append("config.gin is not the config that the run was started with")
    last = [row for row in journal.read(folder / "metrics.jsonl") if row["step"] == status.get("step")]
    for metric, value in facts.get("final", {}).items():
        shown = [row[metric] for row in last if metric in row]
        if status.get("state") == "done" and shown and metric.startswith("val") and shown[-1] != value:
            found.append(f"{metric} is {shown[-1]} in metrics.jsonl, but {value} in facts.json")
    return found


def _plan(file: Path) -> tuple[dict, str]:
    """What a plan.json says, and why it is not what was written. Raises ValueError where it can't be read as a plan."""
    edited = ""
    try:
        said = read_json(file)
    except ValueError as error:
        said = _unsealed(file, error)
        edited = f"{file} does not fit its seal: it is not what toolkit.ablate wrote"
    missing = [key for key in ("name", "baseline", "arms", "jobs") if key not in said]
    if missing:
        raise ValueError(f"{file}: this is no plan: {', '.join(missing)} is missing")
    schema.check(file, said)
    paths = [job["run"] for job in said["jobs"] if not _is_name(job["run"])]
    if paths:
        raise ValueError(f"{file}: {paths[0]!r} is no name of a run in this folder; restore the file from a copy")
    if strangers := {job["arm"] for job in said["jobs"]} - set(said["arms"]):
        raise ValueError(
            f"{file}: the plan has no arm {min(strangers)!r}, of which there are jobs; restore it from a copy"
        )
    if said["baseline"] not in said["arms"]:
        raise ValueError(f"{file}: the baseline {said['baseline']!r} is none of the arms; restore the file from a copy")
    return said, edited


def _unsealed(file: Path, error: ValueError) -> dict:
    """The content of a JSON file whose seal does not fit; the error where there is none."""
    try:
        said = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        raise error from None
    if not isinstance(said, dict):
        raise error
    return said


def _is_name(text: str) -> bool:
    """Whether a text names something that lies directly in a folder."""
    return text not in ("", ".", "..") and not set(text) & set("/\\\0")


def _strays(folder: Path, planned: set[str]) -> tuple[str, ...]:
    return tuple(sorted({path.parent.name for path in folder.glob("*/config.gin")} - planned))


def _sha256(file: Path) -> str:
    if not file.is_file():
        raise ValueError(f"{file}: there is no such file")
    return hashlib.sha256(file.read_bytes()).hexdigest()


def _finite(value: object) -> bool:
    try:
        return isinstance(value, int | float) and not isinstance(value, bool) and abs(float(value)) < LARGEST
    except OverflowError:  # an integer that no float can hold
        return False
