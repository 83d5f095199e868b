"""SIGKILL at random moments, at every point of a save, several times, and at the moments that matter most.

EXACT: rows, samples, weights, optimizer and progress of the resumed run equal the straight run's to the last bit."""

import random

import pytest
from runs import facts, small_run

from faults.world import LONG, assert_same, assert_sound, completed, content, finish, go, points, saves, straight
from toolkit.rundir.folder import RunDir

pytestmark = pytest.mark.slow


@pytest.fixture
def base(tmp_path_factory):
    """Where the runs lie that several tests compare with."""
    return tmp_path_factory.getbasetemp()


@pytest.fixture
def whole(base):
    """The straight run of LONG."""
    return straight(base, bindings=LONG)


@pytest.fixture
def small(base):
    """The straight run of 12 steps."""
    return straight(base)


@pytest.mark.fault(1, "kill -9 at a random moment", 50)
def test_a_run_that_is_killed_anywhere_loses_nothing(fault, whole, tmp_path, record_property):
    """From outside, at a moment drawn from all of the run's time, its start and its end included."""
    draw = random.Random(f"kill {fault.repetition}")
    longest = float((whole.parent / "seconds").read_text())
    while not fault.happened:  # a moment after the end strikes nothing: draw an earlier one
        moment = longest = draw.uniform(0, longest)
        fault.happened = go(tmp_path, f"a{moment:.3f}", fresh=True, bindings=LONG).killed_after(moment)
    folder = tmp_path / f"a{moment:.3f}"
    steps = completed(folder)
    record_property("killed", {"seconds": moment, "checkpoint": max(steps, default=None)})
    assert_sound(folder)
    finish(folder, fault, fresh=True, bindings=LONG)
    assert_same(whole, folder, 150)


@pytest.mark.fault(3, "two or three kills within one epoch", 20)
def test_a_run_that_is_killed_again_and_again_loses_nothing(fault, whole, tmp_path):
    draw = random.Random(f"kills {fault.repetition}")
    assert facts(whole)["windows"]["train"] > 150 * 4  # all within the first epoch
    kills, wanted = [], 2 + fault.repetition % 2
    while len(kills) < wanted:
        child = go(tmp_path, "a", bindings=LONG)
        seen = max(kills, default=-1)
        child.until(lambda: max(completed(tmp_path / "a"), default=-1) > seen)  # noqa: B023
        if child.killed_after(child.age + draw.uniform(0, 0.5)):
            kills.append(max(completed(tmp_path / "a")))
            assert_sound(tmp_path / "a")
    fault.happened = kills == sorted(set(kills)) and kills[-1] < 150
    finish(tmp_path / "a", fault, bindings=LONG)
    assert_same(whole, tmp_path / "a", 150)


# --- every point of a save


POINTS = 44  # repetitions; there are three times as many points, and each repetition takes every 44th


@pytest.mark.fault(2, "kill -9 at every point of a save", POINTS)
def test_a_kill_at_any_point_of_a_save_leaves_the_older_or_the_new_checkpoint(fault, small, base, tmp_path):
    numbers = random.Random(0).sample(saves(base), len(saves(base)))
    for number in numbers[fault.repetition % len(numbers) :: POINTS]:
        runs = tmp_path / str(number)
        runs.mkdir()
        child = go(runs, "a", orders=[{"point": "save", "n": number, "do": "kill"}])
        assert child.wait() == -9, f"point {number}: {child.said}"
        fault.happened = True
        assert_sound(runs / "a")
        finish(runs / "a", fault)
        assert_same(small, runs / "a", 12)


def test_the_points_of_a_save_are_all_there_is_to_it(base):
    """Each kind of change was seen, so that the row above strikes between any two of them."""
    kinds = {what.split()[0] for point, what in points(base) if point == "save"}
    assert kinds == {"mkdir", "open", "write", "fsync", "rename", "remove", "rmdir"}, kinds


# --- the moments that matter most


EPOCHS = ("SyntheticStories.stories = 2", "Experiment.batch_size = 8")  # one ends within the 12 steps
MOMENTS = {
    "before the last update of an epoch": ("update", "epoch"),
    "after the last update of an epoch": ("updated", "epoch"),
    "in an evaluation": ("evaluate", 3),
    "in a sample": ("sample", 3),
    "after the last update": ("updated", 12),
    "in the evaluation of the whole split at the end": ("evaluate", "end"),
    "in the sample at the end": ("sample", 11),
    "before status.json says that it is done": ("rename status.json", "end"),
}


@pytest.mark.fault(4, "kill -9 at the end of an epoch, in an evaluation, at the last step", 1)
@pytest.mark.parametrize("moment", MOMENTS)
def test_a_kill_where_one_thing_ends_and_another_begins(fault, moment, base, tmp_path):
    whole = straight(base, bindings=EPOCHS)
    point, n = MOMENTS[moment]
    if n == "epoch":
        windows = facts(whole)["windows"]["train"]
        assert 8 < windows < 11 * 8
        n = -(-windows // 8)
    elif n == "end":
        statuses = [where for where, _ in points(base)].count("rename status.json")
        n = {"evaluate": 2 * 3 + 1, "rename status.json": statuses}[point]
    child = go(tmp_path, "a", orders=[{"point": point, "n": n, "do": "kill"}], bindings=EPOCHS)
    fault.happened = child.wait() == -9
    assert_sound(tmp_path / "a")
    finish(tmp_path / "a", fault, bindings=EPOCHS)
    assert_same(whole, tmp_path / "a", 12)


@pytest.mark.fault(4, "resuming a run that is done", 1)
def test_a_finished_run_resumes_as_nothing_at_all(fault, tmp_path):
    assert small_run(tmp_path, "a") == 0
    before = content(tmp_path / "a")
    fault.happened = RunDir(tmp_path, "a", resume=True).finished(12)
    child = go(tmp_path, "a")
    assert child.wait() == 0 and "nothing to resume" in child.said
    assert content(tmp_path / "a") == before
