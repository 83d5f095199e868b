"""SIGTERM and SIGINT, in every phase of a run, once and twice: saved, exit 75, within 10 seconds, nothing corrupted."""

import os
import random
import shutil
import signal
import sys
import time

import pytest

from faults.world import LONG, assert_same, assert_sound, completed, finish, go, saves, straight
from toolkit.loop.signals import AGAIN, Interrupted, Signals
from toolkit.rundir.folder import RunDir
from toolkit.store.journal import read

pytestmark = pytest.mark.slow

LONG_ENOUGH = 60  # seconds of sleep in a phase: who waits for its end is late
PROMISED = 10  # seconds from the signal to the exit


def standing(point, n, tmp_path, seconds=LONG_ENOUGH):
    """Orders to sleep at a point, and a function that says whether the run has come there."""
    there = tmp_path / "there"
    orders = [{"point": point, "n": n, "do": "list", "to": str(there)}]
    return [*orders, {"point": point, "n": n, "do": "sleep", "seconds": seconds}], there.exists


def status(folder) -> dict:
    """status.json."""
    return RunDir(folder.parent, folder.name, resume=True).read("status.json")


def assert_ended_in_order(child, number, folder):
    """One signal: exit 75 in time, "preempted" at a step whose checkpoint is there and sound, no temporary."""
    began = time.time()
    child.signal(number)
    assert child.wait(60) == 75, child.said
    assert time.time() - began < PROMISED, f"{time.time() - began:.1f} s"
    told = status(folder)
    assert told["state"] == "preempted" and told["step"] == max(completed(folder), default=0)
    assert "Traceback" not in child.said
    assert_sound(folder)
    assert not list(folder.rglob("*.tmp*"))


@pytest.fixture
def base(tmp_path_factory):
    """Where the runs lie that several tests compare with."""
    return tmp_path_factory.getbasetemp()


@pytest.fixture
def small(base):
    """The straight run of 12 steps."""
    return straight(base)


# --- once


def in_training(number, fault, tmp_path, base):
    draw = random.Random(f"signal {number} {fault.repetition}")
    wanted, folder = draw.randrange(1, 140), tmp_path / "a"
    child = go(tmp_path, "a", bindings=LONG)
    child.until(lambda: [row for row in read(folder / "metrics.jsonl") if row["step"] >= wanted])
    assert_ended_in_order(child, number, folder)
    fault.happened = wanted <= status(folder)["step"] < 150
    finish(folder, fault, bindings=LONG)
    assert_same(straight(base, bindings=LONG), folder, 150)


@pytest.mark.fault(5, "SIGTERM while it trains", 14)
def test_sigterm_while_it_trains(fault, tmp_path, base):
    in_training(signal.SIGTERM, fault, tmp_path, base)


@pytest.mark.fault(6, "SIGINT while it trains", 3)
def test_sigint_while_it_trains(fault, tmp_path, base):
    in_training(signal.SIGINT, fault, tmp_path, base)


PHASES = {  # where the run is when the signal comes, and the step that it has then reached
    "building": ("build", 2, 0),  # the first is on the meta device
    "the first evaluation": ("evaluate", 2, 0),
    "an evaluation": ("evaluate", 5, 6),
    "a sample": ("sample", 4, 6),
    "the evaluation of the whole split at the end": ("evaluate", 9, 12),
    "the sample at the end": ("sample", 12, 12),
}


@pytest.mark.fault(5, "SIGTERM while it builds, evaluates or samples", 1)
@pytest.mark.parametrize("phase", PHASES)
def test_sigterm_while_it_builds_evaluates_or_samples(fault, phase, small, tmp_path):
    """What can be done again is dropped at once: these would take a minute. The resumed run does it again."""
    point, n, reached = PHASES[phase]
    orders, there = standing(point, n, tmp_path)
    child = go(tmp_path, "a", orders=orders)
    child.until(there)
    assert_ended_in_order(child, signal.SIGTERM, tmp_path / "a")
    fault.happened = status(tmp_path / "a")["step"] == reached
    finish(tmp_path / "a", fault)
    assert_same(small, tmp_path / "a", 12)


@pytest.mark.fault(5, "SIGTERM while it tokenises", 1)
def test_sigterm_while_it_tokenises(fault, tmp_path):
    """No folder is left in the cache, and a resume says that it starts at 0."""
    cache = tmp_path / "cache"
    options = {"bindings": ("SyntheticStories.stories = 20_000",), "env": {"TOOLKIT_CACHE": str(cache)}}
    child = go(tmp_path, "a", **options)
    child.until(lambda: [path for path in cache.glob("tokens-*.tmp-*/train.bin") if path.stat().st_size])
    fault.happened = not list(cache.glob("tokens-*.tmp-*/manifest.json")) and child.running()
    assert_ended_in_order(child, signal.SIGTERM, tmp_path / "a")
    assert not [path for path in cache.iterdir() if path.is_dir()]
    child = go(tmp_path, "a", "--stop-at", "2", **options)
    assert child.wait() == 0 and "so it starts at step 0" in child.said
    assert completed(tmp_path / "a") == [2]


@pytest.mark.fault(5, "SIGTERM while it compiles", 1)
def test_sigterm_while_it_compiles(fault, tmp_path):
    if not shutil.which("g++"):
        pytest.skip("compiling on a CPU takes a C++ compiler")
    cache = tmp_path / "inductor"
    compiled = {"bindings": ("Experiment.compile = True",), "env": {"TORCHINDUCTOR_CACHE_DIR": str(cache)}}
    child = go(tmp_path, "a", **compiled)
    child.until(lambda: list(cache.rglob("*.cpp")))
    assert_ended_in_order(child, signal.SIGTERM, tmp_path / "a")
    fault.happened = status(tmp_path / "a")["step"] == 0
    finish(tmp_path / "a", fault, **compiled)
    assert completed(tmp_path / "a") == [8, 12]


def test_a_signal_that_python_swallows_ends_the_work_all_the_same(monkeypatch):
    """As in a finalizer, where it can only be printed; and not a second time while the work cleans up."""
    swallowed, cleaned = [], []
    monkeypatch.setattr(sys, "unraisablehook", swallowed.append)

    class Finalized:
        def __del__(self):
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.1)

    began = time.monotonic()
    with Signals() as signals, pytest.raises(Interrupted), signals.droppable():
        Finalized()
        assert len(swallowed) == 1 and swallowed[0].exc_type is Interrupted
        try:
            time.sleep(LONG_ENOUGH)
        finally:
            time.sleep(2.5 * AGAIN)
            cleaned.append(True)
    assert cleaned and time.monotonic() - began < PROMISED
    assert signal.getitimer(signal.ITIMER_REAL) == (0, 0)


@pytest.mark.fault(7, "SIGTERM in a save", 10)
def test_sigterm_in_a_save(fault, small, base, tmp_path):
    """At one of the points of step 4's, the last of which is its move to its place."""
    numbers = saves(base, "step-00000004")
    orders, there = standing("save", numbers[fault.repetition % len(numbers)], tmp_path, seconds=1)
    child = go(tmp_path, "a", orders=orders)
    child.until(there)
    fault.happened = "checkpoints" in (tmp_path / "there").read_text() and child.running()
    assert_ended_in_order(child, signal.SIGTERM, tmp_path / "a")
    finish(tmp_path / "a", fault)
    assert_same(small, tmp_path / "a", 12)


# --- twice


def twice(first, second, fault, small, tmp_path, point, n):
    """The first signal waits for what is under way, which takes a minute; the second does not."""
    orders, there = standing(point, n, tmp_path)
    child = go(tmp_path, "a", orders=orders)
    child.until(there)
    child.signal(first)
    time.sleep(1)
    assert child.running(), child.said
    began = time.time()
    child.signal(second)
    code = child.wait(30)
    assert code in (-second, 128 + second), child.said
    assert time.time() - began < 2
    fault.happened = True
    assert_sound(tmp_path / "a")
    finish(tmp_path / "a", fault)
    assert_same(small, tmp_path / "a", 12)


PAIRS = [(signal.SIGINT, signal.SIGINT), (signal.SIGTERM, signal.SIGTERM), (signal.SIGINT, signal.SIGTERM)]


@pytest.mark.fault(6, "a second signal while a step is finished", 1)
@pytest.mark.parametrize("pair", PAIRS, ids=lambda pair: "-".join(signal.name for signal in pair))
def test_a_second_signal_in_a_step_ends_it_at_once(fault, pair, small, tmp_path):
    twice(*pair, fault, small, tmp_path, "update", 7)


@pytest.mark.fault(6, "a second signal in a save", 4)
def test_a_second_signal_in_a_save_ends_it_at_once_and_corrupts_nothing(fault, small, base, tmp_path):
    number = saves(base, "step-00000008.tmp")[3 * fault.repetition]
    twice(signal.SIGINT, signal.SIGINT, fault, small, tmp_path, "save", number)
