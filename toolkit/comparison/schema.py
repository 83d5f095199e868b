"""The JSON files that a comparison reads, by the kind of each value. A file may come from anybody: one with a value of
another kind is refused here, by name, before anything computes with it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Required

from annotated_types import Gt, Len, Lt
from pydantic import ConfigDict, TypeAdapter, ValidationError, with_config
from typing_extensions import TypedDict

from toolkit.escape import line, shorten

Scalar = str | int | float | bool | None  # compared and shown, never computed with
Number = int | float
MOST = 3  # faults of a file that are listed


def _object(name: str, /, **fields: Any) -> Any:
    """The type of a JSON object: all of its fields may be missing, and there may be others."""
    return with_config(ConfigDict(strict=True, extra="allow"))(TypedDict(name, fields, total=False))


CONFIG = _object(
    "config",
    **dict.fromkeys(
        (f"Experiment.{knob}" for knob in ("steps", "batch_size", "seq_len", "accumulate", "eval_windows", "seed")),
        int,
    ),
)
FACTS = _object(
    "facts",
    name=str,
    config=Required[CONFIG],
    steps=Required[int],
    seed=Required[int],
    tokens=Required[int],
    parameters=dict[str, Number | None],
    flops_per_token=Number | None,
    packages=dict[str, Scalar],
    windows=dict[str, int],
    resumed=list[_object("resumed", step=int, changed=dict[str, Annotated[list, Len(2, 2)]])] | None,
    seconds=Number | None,
    **dict.fromkeys(("precision", "compiled", "device", "device_name", "threads", "python", "commit", "dirty"), Scalar),
    **dict.fromkeys(("data", "tokenizer", "weights_sha256", "from"), Scalar),
)
STATUS = _object("status", state=str, step=int, reason=Scalar)
SETTLED = _object("settled", knob=str | None, knobs=dict[str, str] | None)
PLAN = _object(
    "plan",
    name=str,
    question=str | None,
    baseline=str,
    arms=dict[str, Any],
    factor=list[str] | None,
    metric=str | None,
    alpha=Annotated[Number, Gt(0), Lt(1)] | None,
    effect=Annotated[Number, Gt(0)] | None,
    budget=_object("budget", of=str, amount=Number, steps=dict[str, int] | None) | None,
    match=SETTLED | None,
    lr=SETTLED | None,
    jobs=list[_object("job", arm=Required[str], seed=Required[int], run=Required[str], lr=Number | None, purpose=str)],
)
_KINDS = {"facts.json": FACTS, "status.json": STATUS}


def check(file: Path, value: dict) -> None:
    """Raise ValueError where a value in plan.json (under any name), facts.json or status.json is of another kind than
    the comparison needs. An empty ``value`` passes: there is no file."""
    if not value:
        return
    try:
        TypeAdapter(_KINDS.get(file.name, PLAN)).validate_python(value)
    except ValidationError as error:
        faults = {".".join(map(str, fault["loc"])): fault["msg"] for fault in error.errors()}
        told = "; ".join(f"{shorten(line(key), 80)}: {message}" for key, message in list(faults.items())[:MOST])
        more = f"; and {len(faults) - MOST} more" if len(faults) > MOST else ""
        raise ValueError(
            f"{file}: a value is not of the kind that toolkit wrote there: {told}{more}; restore the file from a copy"
        ) from None
