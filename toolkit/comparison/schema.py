"""The types of all values in the JSON files that a comparison reads. A file may come from anybody, so a file with a
value of another type is refused here, before anything computes with it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Required

from annotated_types import Ge, Gt, Len, Lt
from pydantic import ConfigDict, TypeAdapter, ValidationError, with_config
from typing_extensions import TypedDict

from toolkit.output.escape import line, shorten

Integer = Annotated[int, Ge(-(2**63)), Lt(2**63)]  # json itself reads integers of any size
Scalar = str | Integer | float | bool | None  # values that are compared and shown, but not used in computations
Number = Integer | Annotated[float, Ge(-1.7e308), Lt(1.7e308)]
MAX_FAULTS_LISTED = 3  # at most so many faults of a file are listed


def _object(name: str, /, **fields: Any) -> Any:
    """The type of a JSON object. Every field may be missing, and other fields are allowed."""
    return with_config(ConfigDict(strict=True, extra="allow"))(TypedDict(name, fields, total=False))


CONFIG = _object(
    "config",
    **dict.fromkeys(
        (f"Experiment.{knob}" for knob in ("steps", "batch_size", "seq_len", "accumulate", "eval_windows", "seed")),
        Integer,
    ),
)
FACTS = _object(
    "facts",
    name=str,
    config=Required[CONFIG],
    steps=Required[Integer],
    seed=Required[Integer],
    tokens=Required[Integer],
    final=dict[str, Any],
    **dict.fromkeys(("code", "init"), dict[str, str]),
    **dict.fromkeys(("started", "ended"), Number),
    **dict.fromkeys(("config_sha256", "package_sha256", "products", "attention"), str | None),
    parameters=dict[str, Number | None],
    flops_per_token=Number | None,
    packages=dict[str, Scalar],
    windows=dict[str, Integer],
    resumed=list[_object("resumed", step=Integer, changed=dict[str, Annotated[list, Len(2, 2)]], damaged=list[str])]
    | None,
    seconds=Number | None,
    **dict.fromkeys(("precision", "compiled", "device", "device_name", "threads", "python", "commit", "dirty"), Scalar),
    **dict.fromkeys(("data", "tokenizer", "weights_sha256", "from"), Scalar),
)
WRITTEN = _object("written", size=Required[Integer], sha256=Required[str])
STATUS = _object("status", state=str, step=Integer, reason=Scalar, journal=dict[str, WRITTEN])
SETTLED = _object("settled", knob=str | None, knobs=dict[str, str] | None)
PLAN = _object(
    "plan",
    name=str,
    question=str | None,
    baseline=str,
    arms=dict[str, Any],
    factor=list[str] | None,
    metric=str | None,
    higher_is_better=bool | None,
    alpha=Annotated[Number, Gt(0), Lt(1)] | None,
    effect=Annotated[Number, Gt(0)] | None,
    budget=_object("budget", of=str, amount=Number, steps=dict[str, Integer] | None) | None,
    match=SETTLED | None,
    lr=SETTLED | None,
    jobs=list[
        _object("job", arm=Required[str], seed=Required[Integer], run=Required[str], lr=Number | None, purpose=str)
    ],
)
_KINDS = {"facts.json": FACTS, "status.json": STATUS}


def check(file: Path, value: dict) -> None:
    """Raise ValueError if a value in facts.json, status.json or plan.json (any other file name) has a type that the
    comparison can't use. An empty ``value`` passes: it stands for a missing file."""
    if not value:
        return
    try:
        TypeAdapter(_KINDS.get(file.name, PLAN)).validate_python(value)
    except ValidationError as error:
        faults = {".".join(map(str, fault["loc"])): fault["msg"] for fault in error.errors()}
        listed = "; ".join(
            f"{shorten(line(key), 80)}: {message}" for key, message in list(faults.items())[:MAX_FAULTS_LISTED]
        )
        more = f"; and {len(faults) - MAX_FAULTS_LISTED} more" if len(faults) > MAX_FAULTS_LISTED else ""
        raise ValueError(
            f"{file}: a value is not of the kind that toolkit wrote there: {listed}{more}; restore the file from a copy"
        ) from None


def journal(value: object) -> dict:
    """The sizes and hashes of journal files in a checkpoint's manifest; {} if a type is wrong."""
    try:
        return TypeAdapter(dict[str, WRITTEN]).validate_python(value)
    except ValidationError:
        return {}
