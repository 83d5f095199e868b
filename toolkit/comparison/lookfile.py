"""looks.jsonl in a plan's folder: what was judged, when, by which command, and on which seeds.

Each line is a JSON object with its seal. A line is written if an arm was judged on seeds, or got a verdict, that no
earlier line has; to compare the same runs again adds nothing. The whole file is replaced at once, so that a process
that is killed leaves the old file or the new one."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import filelock

from toolkit.comparison import schema
from toolkit.store import seal
from toolkit.store.disk import write_text

if TYPE_CHECKING:
    from toolkit.comparison.results import Comparison

NAME = "looks.jsonl"
VERSION = 1
WAIT = 10  # seconds for another process that is writing the file
STOPPED = ("better", "worse", "equivalent", "identical")  # with such a verdict, ablate starts no more runs of an arm


@dataclass(frozen=True)
class LookFile:
    """The rows of a looks.jsonl. ``damage`` is a sentence about lines that can't be used; empty if there are none."""

    rows: tuple[schema.LookRow, ...] = ()
    damage: str = ""

    def of(self, baseline: str, metric: str, arm: str) -> list[schema.LookArm]:
        """All judgements of an arm against this baseline in this metric, in the order of the file."""
        same = (row for row in self.rows if (row["baseline"], row["metric"]) == (baseline, metric))
        return [row["arms"][arm] for row in same if arm in row["arms"]]

    def stop(self, baseline: str, metric: str, arm: str) -> schema.LookArm | None:
        """The judgement with which ``ablate`` stopped an arm; None if it did not."""
        decisions = LookFile(tuple(row for row in self.rows if row["by"] == "ablate")).of(baseline, metric, arm)
        return next((each for each in decisions if each["verdict"] in STOPPED), None)


def read(folder: Path) -> LookFile:
    """Read the file of a plan's folder. A file that is missing has no rows. Lines that are damaged, or that a newer
    version wrote, are left out and reported."""
    path = folder / NAME
    if not path.is_file():
        return LookFile()
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError as error:
        return LookFile(damage=f"{path} can't be read ({error.strerror})")
    rows, bad = [], []
    for number, line in enumerate(lines, 1):
        row = _row(line)
        if row is not None:
            rows.append(row)
        elif line.strip():
            bad.append(number)
    listed = ", ".join(map(str, bad[:6])) + (" ..." if len(bad) > 6 else "")
    damage = f"{path}: line {listed} is damaged or of a newer version, so earlier looks may not be charged"
    return LookFile(tuple(rows), damage if bad else "")


def _row(line: str) -> schema.LookRow | None:
    try:
        value = json.loads(line)
        if not isinstance(value, dict) or seal.seal(value) != value:
            return None
        schema.check(Path(NAME), value)
    except (ValueError, RecursionError):
        return None
    return cast(schema.LookRow, value) if value["version"] == VERSION else None


def save(comparison: Comparison, by: str) -> str:
    """Write what was judged into the plan's folder; ``by`` is the command. Returns a sentence if that is not possible,
    else "". Without a plan there is no folder for it, and nothing is written."""
    plan = comparison.plan
    if not (plan.declared and plan.folder):
        return ""
    header = {
        "baseline": plan.baseline,
        "metric": comparison.metric,
        "alpha": comparison.alpha,
        "effect": comparison.effect,
        "looks": list(plan.looks),
        "spending": plan.spending if plan.looks else "pocock",
    }
    arms: dict[str, schema.LookArm] = {}
    for arm in comparison.arms:
        if arm.judgement and arm.judgement.look and arm.judgement.evidence:
            look, evidence = arm.judgement.look, arm.judgement.evidence
            arms[arm.name] = {
                "seeds": list(look.seeds),
                "n": look.count,
                "share": look.share,
                "verdict": arm.judgement.verdict.word,
                "look": look.name,
                "p": evidence.difference.p,
            }
    return write(plan.folder, by, header, arms)


def write(folder: Path, by: str, header: Mapping[str, Any], arms: Mapping[str, schema.LookArm]) -> str:
    """Add a row with those of ``arms`` that the file does not have yet; none if it has them all. ``header`` has the
    baseline, the metric, alpha, the effect, the looks and the spending. A decision of ``ablate`` is written even if
    ``compare`` saw it before. Returns a sentence if the file can't be written, as in a read-only folder; else ""."""
    path = folder / NAME
    try:
        if not _new(read(folder), by, header, arms):  # without a lock, which would write into the folder
            return ""
        with filelock.FileLock(folder / f".{NAME}.lock", timeout=WAIT):
            new = _new(read(folder), by, header, arms)
            if new:
                row = {"version": VERSION, "by": by, "time": datetime.now(UTC).isoformat(timespec="seconds")}
                before = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
                before += "\n" * (bool(before) and not before.endswith("\n"))
                write_text(path, before + json.dumps(seal.seal({**row, **header, "arms": new})) + "\n")
    except (OSError, filelock.Timeout) as error:
        return (
            f"{path} can't be written ({error}), so this look is not recorded, and later looks can't be charged for it"
        )
    return ""


def _new(
    file: LookFile, by: str, header: Mapping[str, Any], arms: Mapping[str, schema.LookArm]
) -> dict[str, schema.LookArm]:
    rows = tuple(row for row in file.rows if (row["by"] == by or by != "ablate") and row["effect"] == header["effect"])
    before = LookFile(rows)

    def is_known(name: str, arm: schema.LookArm) -> bool:
        same = before.of(header["baseline"], header["metric"], name)
        return any(each["seeds"] == arm["seeds"] and each["verdict"] == arm["verdict"] for each in same)

    return {name: arm for name, arm in arms.items() if not is_known(name, arm)}
