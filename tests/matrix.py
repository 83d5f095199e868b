"""The fault matrix: a pytest plugin that repeats each row, insists that its fault happened, and writes the score.

    python -m pytest tests/faults -m "" --repetitions 1 --reliability reliability.json

A test that carries ``@pytest.mark.fault(row, "what breaks", R)`` is collected max(1, R x ``--repetitions``) times. It
says through the fixture ``fault`` that the fault was there, what was lost, and how long the recovery took."""

from __future__ import annotations

import json
import platform
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch

ROWS = pytest.StashKey[dict]()
BOUND = 3.0  # rule of three: no failure in n repetitions leaves a rate below 3 / n, at 95 %


@dataclass
class Fault:
    """One repetition. ``happened`` is set by the test, once it has seen the fault with its own eyes."""

    repetition: int
    happened: bool = False
    lost_steps: int = 0  # steps that had to be done again although a checkpoint of them had been completed
    silent: int = 0  # wrong bytes that were taken for right ones
    recovery_seconds: list[float] = field(default_factory=list)


def pytest_addoption(parser):
    parser.addoption("--repetitions", type=float, default=0.0, help="share of each fault's repetitions, at least one")
    parser.addoption("--reliability", metavar="FILE", help="write the fault matrix's score to this file")


def pytest_configure(config):
    config.addinivalue_line("markers", "fault(row, name, repetitions): a row of the fault matrix")
    config.stash[ROWS] = {}


def pytest_generate_tests(metafunc):
    marker = metafunc.definition.get_closest_marker("fault")
    if marker:
        count = max(1, round(marker.args[2] * metafunc.config.getoption("--repetitions")))
        metafunc.parametrize("repetition", range(count), ids=[f"r{i}" for i in range(count)])


@pytest.fixture
def fault(request, repetition, record_property):
    """The repetition's record."""
    marker = request.node.get_closest_marker("fault")
    record = Fault(repetition)
    record_property("row", marker.args[0])
    record_property("fault", marker.args[1])
    yield record
    for name in ("lost_steps", "silent", "recovery_seconds"):
        record_property(name, getattr(record, name))


@pytest.hookimpl(wrapper=True)
def pytest_pyfunc_call(pyfuncitem):
    """A test that passes without its fault having happened fails; one that was skipped shows nothing either way."""
    result = yield
    record = pyfuncitem.funcargs.get("fault")
    if isinstance(record, Fault):
        assert record.happened, "the fault was never seen to happen, so that nothing was shown"
    return result


@pytest.hookimpl(trylast=True)
def pytest_runtest_logreport(report):
    told = dict(report.user_properties)
    if "row" in told and hasattr(report, "nodeid"):
        _seen.setdefault(report.nodeid, {})[report.when] = (report.outcome, told, _reason(report))


_seen: dict[str, dict] = {}


def _reason(report):
    return report.longrepr[2].removeprefix("Skipped: ") if report.skipped and report.longrepr else None


def summary() -> list[dict]:
    """A row of the table for each row of the matrix that was tried, from all tests seen so far."""
    rows: dict[int, dict] = {}
    for phases in _seen.values():
        _, told, _ = list(phases.values())[-1]
        row = rows.setdefault(told["row"], {"row": told["row"], "faults": [], "passes": 0, "repetitions": 0})
        if told["fault"] not in row["faults"]:
            row["faults"].append(told["fault"])
        skipped = [reason for outcome, _, reason in phases.values() if outcome == "skipped"]
        if skipped:
            row.setdefault("skipped", {})[told["fault"]] = skipped[0]
            continue
        row["repetitions"] += 1
        row["passes"] += all(outcome == "passed" for outcome, _, _ in phases.values())
        row["lost_steps"] = row.get("lost_steps", 0) + told.get("lost_steps", 0)
        row["silent"] = row.get("silent", 0) + told.get("silent", 0)
        row.setdefault("recovery_seconds", []).extend(told.get("recovery_seconds", []))
    for row in rows.values():
        seconds = row.pop("recovery_seconds", [])
        row["mean_recovery_seconds"] = round(sum(seconds) / len(seconds), 2) if seconds else None
        whole = row["repetitions"] and row["passes"] == row["repetitions"]
        row["failure_rate_below"] = min(1.0, BOUND / row["repetitions"]) if whole else None
    return [rows[number] for number in sorted(rows)]


def pytest_terminal_summary(terminalreporter, config):
    path = config.getoption("--reliability")
    rows = summary()
    if not (path and rows):
        return
    machine = {"python": platform.python_version(), "torch": torch.__version__, "system": platform.platform()}
    Path(path).write_text(json.dumps({"machine": machine, "rows": rows}, indent=1) + "\n", encoding="utf-8")
    terminalreporter.section("fault matrix")
    terminalreporter.write_line(f"{'row':>3}  {'passes':>9}  {'lost':>4}  {'silent':>6}  {'recovery':>8}  fault")
    for row in rows:
        passes = f"{row['passes']}/{row['repetitions']}"
        seconds = row["mean_recovery_seconds"]
        shown = f"{seconds:.1f} s" if seconds is not None else ""
        counts = f"{row.get('lost_steps', 0):>4}  {row.get('silent', 0):>6}  {shown:>8}"
        terminalreporter.write_line(f"{row['row']:>3}  {passes:>9}  {counts}  {'; '.join(row['faults'])}")
        for name, reason in row.get("skipped", {}).items():
            terminalreporter.write_line(f"     not tried: {name}: {reason}")
    total, passed = sum(row["repetitions"] for row in rows), sum(row["passes"] for row in rows)
    terminalreporter.write_line(f"{passed} of {total} repetitions in {len(rows)} rows passed; {path}")
