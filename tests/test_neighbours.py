"""Threads that wait spin for a short time, and a run says once that other processes use its cores."""

import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from plans import COMMON, write_plan
from runs import facts, small_run

from benchmarks.neighbours import bars
from toolkit import changes, openmp, settle
from toolkit.comparison.guards import independent
from toolkit.neighbours import Neighbours
from toolkit.plan import read

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize("given, told", [
    ({}, "GOMP_SPINCOUNT=1000"),
    ({"GOMP_SPINCOUNT": "77"}, "GOMP_SPINCOUNT=77"),
    ({"OMP_WAIT_POLICY": "passive"}, "OMP_WAIT_POLICY=passive"),
    ({"KMP_BLOCKTIME": "5"}, "KMP_BLOCKTIME=5"),
])  # fmt: skip
def test_the_spin_is_bounded_unless_the_user_says_how_to_wait(given, told):
    code = "import toolkit.openmp, os; print(toolkit.openmp.in_force(), os.environ.get('GOMP_SPINCOUNT'))"
    for first, expected in (("", told), ("import torch; ", None)):
        environment = {k: v for k, v in os.environ.items() if k not in openmp.OWN} | given
        environment["PYTHONPATH"] = str(ROOT)
        done = subprocess.run([sys.executable, "-c", first + code], env=environment, capture_output=True, text=True)
        said, _, value = done.stdout.strip().rpartition(" ")
        assert value == given.get("GOMP_SPINCOUNT", "None" if given else "1000")
        assert said == (
            expected or (told if given else "GOMP_SPINCOUNT=1000 without effect: torch was loaded before toolkit")
        )


@pytest.mark.parametrize("readings, threads, fewer", [
    ([(0, 0, 0, 2), (5, 1, 10, 2), (10, 2, 20, 2)], 2, 1),  # others take 1.8 of 2 cores: told once
    ([(0, 0, 0, 64), (5, 285, 320, 64)], 64, 57),  # 7 of 64: one thread would be far slower
    ([(0, 0, 0, 64), (5, 80, 320, 64)], 16, 0),  # three more jobs of 16 threads each: everyone has the cores it needs
    ([(0, 0, 0, 2), (5, 10, 10, 2)], 2, 0),  # all of it is this process
    ([(0, 0, 0, 2), (5, 1, 4, 2)], 2, 0),  # there is room: this process waits for something else
    ([(0, 0, 0, 2), (5, 1, 10, 2)], 1, 0),  # one thread waits for no other
    ([(0, 0, 0, 2), (1, 0.2, 2, 2)], 2, 0),  # too short to tell
    ([None, None], 2, 0),
])  # fmt: skip
def test_a_busy_machine_is_told_once(readings, threads, fewer, caplog, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    given = iter(readings)
    with caplog.at_level(logging.WARNING):
        neighbours = Neighbours(lambda: next(given))
        for _ in readings[1:]:
            neighbours.look()
    assert len(caplog.records) == bool(fewer)
    assert not fewer or f"-p 'Experiment.threads = {fewer}' is likely faster" in caplog.text
    assert readings[0] is None or readings[0][3] > 2 or not fewer or "use 1.8 of 2 cores" in caplog.text


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity") or os.cpu_count() < 2, reason="takes a core of several")
def test_only_the_cores_that_this_process_may_use_count():
    code = "import os; os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})\n"
    code += "from toolkit.neighbours import Neighbours; print(Neighbours()._before[3])"
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.stdout == "1\n", done.stderr


def test_this_machine_can_be_read():
    before = Neighbours()._before
    assert before is None or (before[3] >= 1 and before[2] > before[1] >= 0)


def test_threads_are_bound_recorded_and_told_when_they_change(tmp_path, caplog):
    before = torch.get_num_threads()
    try:
        assert small_run(tmp_path, "a", "--stop-at", "4", bindings=("Experiment.threads = 1",)) == 0
        assert facts(tmp_path / "a")["threads"] == 1 and "SPIN" in facts(tmp_path / "a")["spin"].upper()
        assert small_run(tmp_path, "a", "--resume", bindings=("Experiment.threads = 2",)) == 0
        assert "was trained with 1 threads and goes on with 2" in caplog.text
        assert facts(tmp_path / "a")["threads"] == 2
    finally:
        torch.set_num_threads(before)


def test_a_knob_that_came_later_is_no_change_while_it_has_its_default():
    before = {"Experiment.steps": 5, "GPT.dim": 8}
    now = before | {"Experiment.threads": None}
    assert changes.difference(before, now) == {}
    assert changes.difference(before, now | {"Experiment.threads": 2}) == {"Experiment.threads": ["absent", 2]}
    assert changes.difference({"GPT.dim": 8}, {"GPT.dim": 8, "AdamW.eps": 1e-8}) != {}  # a part that was not there


def test_a_plan_trains_and_measures_on_the_threads_that_it_binds(tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    plan = read(write_plan(tmp_path, common=[*COMMON, "Experiment.threads = 2"]))
    assert settle.threads_for(None, plan) == 2
    apart = {"rope": ["Experiment.threads = 1"], "none": ["Experiment.threads = 2"]}
    several = read(write_plan(tmp_path, "several", arms=apart, factor=["Experiment.threads"]))
    assert settle.threads_for(None, several) == 2  # room for the largest
    assert settle.threads_for(None, read(write_plan(tmp_path, "without"))) == 3
    used = {}
    monkeypatch.setattr(
        settle, "_seconds_per_step", lambda e, device: used.setdefault(e.threads, torch.get_num_threads())
    )
    before = torch.get_num_threads()
    settle.measure(list(several.arms.values()), 3)
    assert used == {1: 1, 2: 2} and torch.get_num_threads() == before


def test_a_knob_that_came_later_fires_no_guard():
    before = {"Experiment.steps": 5, "GPT.dim": 8}
    assert independent(before, before | {"Experiment.threads": None}) == {}
    assert independent(before | {"Experiment.threads": None}, before) == {}
    assert "Experiment.threads" in independent(before, before | {"Experiment.threads": 1})


def test_the_bars_are_ratios_of_medians():
    quiet = {"default": [98.0, 99.0, 10.0], "long spin": [100.0], "one thread": [60.0]}
    beside = {"default": [40.0], "long spin": [1.0], "one thread": [50.0]}
    found = bars({0: quiet, 4: beside})
    assert [(round(figure, 3), wanted) for _, figure, wanted in found] == [(0.98, 0.98), (0.8, 0.8)]
