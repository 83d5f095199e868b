"""What is done about other processes on the cores of a run: threads sleep, keep together, and it is said once."""

import logging
import os
import platform
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from plans import COMMON, write_plan
from runs import facts, small_run

from benchmarks.neighbours import bars
from toolkit.ablation import settle
from toolkit.ablation.plan import read
from toolkit.comparison.guards import independent
from toolkit.config import changes
from toolkit.cpu import cores, openmp
from toolkit.cpu import neighbours as neighbours_module
from toolkit.cpu.neighbours import Neighbours

ROOT = Path(__file__).parent.parent


libgomp = pytest.mark.skipif(openmp._parallel() is None, reason="torch computes with another OpenMP than libgomp")


@libgomp
def test_threads_that_wait_sleep_while_a_short_spin_is_held_and_spin_before_and_after():
    code = """
import time, torch
from toolkit.cpu.openmp import ShortSpin
torch.set_num_threads(2)
values, spin = torch.ones(1000, 1000), ShortSpin()
def seconds_of_cpu():
    before = time.process_time()
    for _ in range(20):
        values.add(1)
        time.sleep(0.05)
    return time.process_time() - before
seconds_of_cpu()
before = seconds_of_cpu()
spin.hold(), spin.hold()
time.sleep(0.1)
held = seconds_of_cpu()
spin.release(), spin.release()
time.sleep(0.1)
print(before, held, seconds_of_cpu(), torch.get_num_threads())
"""
    environment = {k: v for k, v in os.environ.items() if k not in openmp.OWN} | {"PYTHONPATH": str(ROOT)}
    environment["OMP_NUM_THREADS"] = "2"
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    before, held, after, threads = map(float, done.stdout.split())
    assert held < before / 2 and held < after / 2 and threads == 2


@pytest.mark.parametrize("name, value", [("GOMP_SPINCOUNT", "77"), ("OMP_WAIT_POLICY", "passive")])
def test_a_user_says_how_threads_wait(name, value, monkeypatch):
    monkeypatch.setenv(name, value)
    spin = openmp.ShortSpin()
    spin.hold()
    assert not spin.held and openmp.in_force() == f"{name}={value}"
    monkeypatch.delenv(name)
    for other in openmp.OWN:
        monkeypatch.delenv(other, raising=False)
    assert "=" not in openmp.in_force()


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity") or os.cpu_count() < 2, reason="moves threads between cores")
def test_threads_keep_to_few_cores_in_short_slices_while_those_are_held_and_no_longer():
    allowed, other = os.sched_getaffinity(0), []
    before = _slice_of(os.getpid())
    ended = threading.Event()
    thread = threading.Thread(target=lambda: (other.append(threading.get_native_id()), ended.wait()))
    thread.start()
    few = cores.FewCores()
    try:
        few.hold(1)
        assert len(os.sched_getaffinity(0)) == 1 and os.sched_getaffinity(other[0]) == os.sched_getaffinity(0)
        few.hold(2)  # once is enough
        assert len(os.sched_getaffinity(0)) == 1
        assert before is None or _slice_of(os.getpid()) == _slice_of(other[0]) == cores.SLICE
        assert os.getpriority(os.PRIO_PROCESS, other[0]) == os.getpriority(os.PRIO_PROCESS, 0)
    finally:
        few.release()
        ended.set()
        thread.join()
    assert os.sched_getaffinity(0) == allowed
    assert _slice_of(os.getpid()) == before


def _slice_of(thread: int) -> int | None:
    """Nanoseconds; None where Linux does not tell, as before 6.12, or has no such call for this processor."""
    schedule = Path(f"/proc/{thread}/sched")
    lines = schedule.read_text().splitlines() if schedule.exists() and platform.machine() in cores.SCHED_SETATTR else []
    return next((int(line.split(":")[1]) for line in lines if line.startswith("se.slice")), None)


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity") or os.cpu_count() < 2, reason="moves threads between cores")
def test_threads_are_back_on_all_cores_if_the_system_refuses_half_way(monkeypatch):
    allowed, set_slice = os.sched_getaffinity(0), cores._set_slice

    def refuse(thread, nanoseconds):
        if nanoseconds:
            raise PermissionError("no slices here")
        set_slice(thread, nanoseconds)

    monkeypatch.setattr(cores, "_set_slice", refuse)
    few = cores.FewCores()
    few.hold(1)
    assert not few.held and os.sched_getaffinity(0) == allowed


class Held:
    """Counts what is asked of it."""

    def __init__(self):
        self.held, self.asked = False, []

    def hold(self, *count):
        self.asked += [] if self.held else [*count]
        self.held = True

    def release(self):
        self.held = False


def test_threads_are_moved_back_and_less_often_each_time(monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 8)
    full, quiet = (1, 2, 8, 8), (1, 2, 2, 8)  # seconds, of this process, of all, cores
    readings, total = [(0, 0, 0, 8)], [0, 0, 0]
    for each in [full, quiet, full, full, quiet, full, full, full, full]:
        total = [a + b for a, b in zip(total, each[:3], strict=True)]
        readings.append((*total, 8))
    given, spin, few = iter(readings), Held(), Held()
    neighbours = Neighbours(lambda: next(given), spin, few)
    seen = []
    for _ in readings[1:]:
        neighbours.look()
        seen.append((spin.held, few.held))
    yes, short, no = (True, True), (True, False), (False, False)
    assert seen == [yes, no, short, yes, no, short, short, short, yes]
    assert few.asked == [2, 2, 2]  # of 8 cores others use 6
    neighbours.close()
    assert not spin.held and not few.held


def test_one_of_several_processes_that_train_together_only_spins_less(monkeypatch, caplog):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 8)
    second, spin, few = iter(range(100)), Held(), Held()
    neighbours = Neighbours(lambda: _after(next(second), (1, 2, 8, 8)), spin, few, alone=False)
    for _ in range(2 * neighbours_module.LEAST):
        neighbours.look()
    assert spin.held and not few.held and not caplog.messages


def test_a_run_beside_others_gives_the_same_weights(tmp_path, monkeypatch):
    """What is done for a full machine, done all the time, changes no bit."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        assert small_run(tmp_path, "quiet") == 0
        monkeypatch.setattr(neighbours_module, "EVERY", 0.01)
        monkeypatch.setattr(neighbours_module, "_seconds", readings := FullMachine())
        assert small_run(tmp_path, "beside") == 0
    finally:
        torch.set_num_threads(before)
    assert readings.count > 2
    weights = [next((tmp_path / name / "checkpoints").glob("step-*/model.safetensors")) for name in ("quiet", "beside")]
    assert weights[0].read_bytes() == weights[1].read_bytes()
    assert len(os.sched_getaffinity(0)) == len(cores.FewCores().cores)


class FullMachine:
    """A reading by which others use every core to the full."""

    def __init__(self):
        self.count = 0

    def __call__(self, cores):
        self.count += 1
        return self.count, 0.1 * self.count, 2 * self.count, 2


@pytest.mark.parametrize("readings, threads, fewer", [
    ((1, 0.2, 2, 2), 2, 1),  # others take 1.8 of 2 cores: told once
    ((1, 57, 64, 64), 64, 57),  # 7 of 64: one thread would be far slower
    ((1, 16, 64, 64), 16, 0),  # three more jobs of 16 threads each: everyone has the cores it needs
    ((1, 2, 2, 2), 2, 0),  # all of it is this process
    ((1, 0.2, 0.8, 2), 2, 0),  # there is room: this process waits for something else
    ((1, 0.2, 2, 2), 1, 0),  # one thread waits for no other
    (None, 2, 0),
])  # fmt: skip
def test_a_full_machine_is_told_once_when_it_stays_full(readings, threads, fewer, caplog, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    second = iter(range(100))
    neighbours = Neighbours(lambda: _after(next(second), readings), Held(), Held())
    with caplog.at_level(logging.WARNING):
        for _ in range(neighbours_module.LEAST - 1):
            neighbours.look()
        assert not caplog.records
        for _ in range(5):
            neighbours.look()
    assert len(caplog.records) == bool(fewer)
    assert not fewer or f"-p 'Experiment.threads = {fewer}' may be faster" in caplog.text
    assert fewer != 1 or "use 1.8 of 2 cores" in caplog.text


def _after(seconds, each):
    return each and (*(seconds * value for value in each[:3]), each[3])


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity") or os.cpu_count() < 2, reason="takes a core of several")
def test_only_the_cores_that_this_process_may_use_count():
    code = "import os; os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})\n"
    code += "from toolkit.cpu.neighbours import Neighbours; print(Neighbours()._before[3])"
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
        assert facts(tmp_path / "a")["threads"] == 1 and facts(tmp_path / "a")["spin"] == openmp.in_force()
        assert small_run(tmp_path, "a", "--resume", bindings=("Experiment.threads = 2",)) == 0
        assert "was trained with 1 threads and continues with 2" in caplog.text
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
