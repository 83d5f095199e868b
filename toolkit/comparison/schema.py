"""The types of all values in the JSON files that a comparison reads. A file may come from anybody, so a file with a
value of another type is refused here, before anything computes with it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal, Required

from annotated_types import Ge, Gt, Len, Lt
from pydantic import ConfigDict, TypeAdapter, ValidationError, with_config
from typing_extensions import TypedDict

from toolkit.output.escape import line, shorten

Integer = Annotated[int, Ge(-(2**63)), Lt(2**63)]  # json itself reads integers of any size
Scalar = str | Integer | float | bool | None  # values that are compared and shown, but not used in computations
Number = Integer | Annotated[float, Ge(-1.7e308), Lt(1.7e308)]
MAX_FAULTS_LISTED = 3  # at most so many faults of a file are listed


STRICT = ConfigDict(strict=True, extra="allow")  # no conversions; fields that aren't listed may have any value


Config = TypedDict(
    "Config",
    {
        "Experiment.steps": Integer,
        "Experiment.batch_size": Integer,
        "Experiment.seq_len": Integer,
        "Experiment.accumulate": Integer,
        "Experiment.eval_windows": Integer,
        "Experiment.seed": Integer,
    },
    total=False,
)


class Resume(TypedDict, total=False):
    """An entry of "resumed" in facts.json; ``changed`` is {config key: [before, after]}."""

    step: Integer
    changed: dict[str, Annotated[list[Any], Len(2, 2)]]
    damaged: list[str]


Facts = TypedDict(
    "Facts",
    {
        "name": str,
        "config": Required[Config],
        "steps": Required[Integer],
        "seed": Required[Integer],
        "tokens": Required[Integer],
        "final": dict[str, Any],
        "code": dict[str, str],
        "evaluators": dict[str, str],
        "probes": list[str],
        "init": dict[str, str],
        "started": Number,
        "ended": Number,
        "config_sha256": str | None,
        "package_sha256": str | None,
        "products": str | None,
        "cpu": Scalar,
        "attention": str | None,
        "parameters": dict[str, Number | None],
        "flops_per_token": Number | None,
        "packages": dict[str, Scalar],
        "windows": dict[str, Integer],
        "resumed": list[Resume] | None,
        "seconds": Number | None,
        "precision": Scalar,
        "compiled": Scalar,
        "device": Scalar,
        "device_name": Scalar,
        "threads": Scalar,
        "python": Scalar,
        "commit": Scalar,
        "dirty": Scalar,
        "data": Scalar,
        "tokenizer": Scalar,
        "weights_sha256": Scalar,
        "from": Scalar,
    },
    total=False,
)


class Written(TypedDict, total=False):
    """The size and hash that a journal file had when it was vouched for."""

    size: Required[Integer]
    sha256: Required[str]


class Status(TypedDict, total=False):
    """status.json."""

    state: str
    step: Integer
    reason: Scalar
    journal: dict[str, Written]


class Settled(TypedDict, total=False):
    """A knob that the plan sets itself: one for all arms, or one for each arm."""

    knob: str | None
    knobs: dict[str, str] | None


class Budget(TypedDict, total=False):
    """The budget of a plan; ``steps`` is {arm: steps}."""

    of: str
    amount: Number
    steps: dict[str, Integer] | None


class Job(TypedDict, total=False):
    """One run of a plan."""

    arm: Required[str]
    seed: Required[Integer]
    run: Required[str]
    lr: Number | None
    purpose: str


class LookArm(TypedDict, total=False):
    """An arm in a row of looks.jsonl: the seeds that were judged, the number of values or pairs, its share of the
    planned one, the verdict, and p before Holm's adjustment (sequential if it is not the only look)."""

    seeds: Required[list[Integer]]
    n: Required[Integer]
    share: Required[Annotated[Number, Gt(1e-6), Lt(1e6)]]
    verdict: Required[str]
    look: str
    p: Number | None


class LookRow(TypedDict, total=False):
    """A row of looks.jsonl: one judgement of a plan. ``by`` is the command that made it."""

    version: Required[Integer]
    by: Required[str]
    time: str
    baseline: Required[str]
    metric: Required[str]
    alpha: Number
    effect: Required[Number]
    looks: list[Integer]
    spending: str
    arms: Required[dict[str, LookArm]]


class Plan(TypedDict, total=False):
    """plan.json."""

    name: str
    question: str | None
    baseline: str
    arms: dict[str, Any]
    factor: list[str] | None
    metric: str | None
    higher_is_better: bool | None
    alpha: Annotated[Number, Gt(0), Lt(1)] | None
    effect: Annotated[Number, Gt(0)] | None
    budget: Budget | None
    match: Settled | None
    lr: Settled | None
    looks: list[Annotated[Integer, Ge(2)]] | None
    planned_seeds: Annotated[Integer, Gt(0)] | None
    spending: Literal["obrien-fleming", "pocock"] | None
    jobs: list[Job]


for _kind in (Config, Resume, Facts, Written, Status, Settled, Budget, Job, LookArm, LookRow, Plan):
    with_config(STRICT)(_kind)
_PLAN: TypeAdapter[Any] = TypeAdapter(Plan)
_BY_NAME: dict[str, TypeAdapter[Any]] = {
    "facts.json": TypeAdapter(Facts),
    "status.json": TypeAdapter(Status),
    "looks.jsonl": TypeAdapter(LookRow),  # a row of it
}
_JOURNAL = TypeAdapter(dict[str, Written])


def check(file: Path, value: dict[str, Any]) -> None:
    """Raise ValueError if a value in facts.json, status.json, a row of looks.jsonl or plan.json (any other file name)
    has a type that the comparison can't use. An empty ``value`` passes: it stands for a missing file."""
    if not value:
        return
    try:
        _BY_NAME.get(file.name, _PLAN).validate_python(value)
    except ValidationError as error:
        faults = {".".join(map(str, fault["loc"])): fault["msg"] for fault in error.errors()}
        listed = "; ".join(
            f"{shorten(line(key), 80)}: {message}" for key, message in list(faults.items())[:MAX_FAULTS_LISTED]
        )
        more = f"; and {len(faults) - MAX_FAULTS_LISTED} more" if len(faults) > MAX_FAULTS_LISTED else ""
        raise ValueError(f"{file}: a value has the wrong type: {listed}{more}; restore the file from a copy") from None


def journal(value: object) -> dict[str, Written]:
    """The sizes and hashes of journal files in a checkpoint's manifest; {} if a type is wrong."""
    try:
        return _JOURNAL.validate_python(value)
    except ValidationError:
        return {}
