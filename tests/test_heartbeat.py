"""The signs of life of two ranks, here in one process that holds both; with real processes in faults/test_ranks.py."""

import os
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch.distributed as dist

from toolkit.parallel import heartbeat
from toolkit.parallel.heartbeat import Heartbeat

BROKEN = RuntimeError("Connection closed by peer")


@pytest.fixture
def start(monkeypatch):
    """So many ranks that share a store, at steps 7, 8 and so on, and what they report."""
    monkeypatch.setattr(heartbeat, "INTERVAL", 0.05)
    monkeypatch.setattr(heartbeat, "GRACE", 0.5)

    def start(world):
        store, told = dist.HashStore(), []
        ranks = [Heartbeat(store, rank, world, 1, told.append) for rank in range(world)]
        for number, rank in enumerate(ranks):
            rank.step = 7 + number
        return *ranks, told

    return start


@pytest.fixture
def pair(start):
    return start(2)


def test_none_leaves_before_the_other(pair):
    zero, one, told = pair
    left = threading.Event()
    leaving = threading.Thread(target=lambda: (zero.leave(None, 10.0), left.set()))
    leaving.start()
    assert not left.wait(0.3)
    assert one.leave(None, 10.0) is None
    leaving.join(5.0)
    assert left.is_set() and zero.lost is None and not told


def test_one_that_fails_tells_the_other_why(pair):
    zero, one, told = pair
    assert one.leave(ValueError("no such file"), 10.0) is None
    lost = zero.leave(BROKEN, 10.0)
    assert str(lost).startswith("rank 1 (") and str(lost).endswith("has failed at step 8: ValueError: no such file")
    assert told == [str(lost)]


def test_a_rank_is_known_before_its_first_beat():
    store = dist.HashStore()
    first = Heartbeat(store, 0, 2, 1, print)
    assert store.check(["0"])
    first.leave(KeyboardInterrupt(), 1.0)


@pytest.mark.parametrize("silent", [0, 1])
def test_one_that_falls_silent_is_named_by_the_other(pair, silent):
    silenced, other = pair[silent], pair[1 - silent]
    assert not silenced._known.wait(0.2)
    silenced._over.set()  # its thread stops without a word
    lost = other.leave(BROKEN, 10.0)
    assert f"no sign of life from rank {silent} (" in str(lost) and str(lost).endswith(f"since step {7 + silent}")
    assert pair[2] == [str(lost)]  # rank 1 speaks where rank 0 can't


def test_the_first_that_can_speak_does_whoever_has_found_out(start):
    zero, one, two, told = start(3)
    assert not zero._known.wait(0.2)
    zero._over.set()
    lost = two.leave(BROKEN, 10.0)
    assert "rank 0 (" in str(lost) and not told
    assert str(one.leave(BROKEN, 10.0)) == str(lost) and told == [str(lost)]


def test_what_is_its_own_fault_stays_so_where_another_fails_as_well(pair):
    zero, one, told = pair
    assert one.leave(ValueError("no such file"), 10.0) is None
    assert zero._known.wait(2.0) and zero.leave(ValueError("no such file"), 10.0) is None and not told


def test_one_that_does_not_come_is_named_with_its_step(pair):
    zero, one, told = pair
    lost = zero.leave(RuntimeError("Timed out waiting 1800000ms for recv operation to complete"), 10.0)
    assert (
        "the other ranks waited too long (" in str(lost) and "rank 1 (" in str(lost) and str(lost).endswith("at step 8")
    )
    assert one.leave(BROKEN, 10.0).args == lost.args and told == [str(lost)]


def test_an_error_of_ones_own_is_blamed_on_nobody(pair):
    zero, one, told = pair
    assert zero.leave(RuntimeError("mat1 and mat2 shapes cannot be multiplied"), 10.0) is None
    assert "rank 0 (" in str(one.leave(BROKEN, 10.0)) and not told  # rank 0 says it itself


@pytest.mark.slow
def test_ranks_that_start_from_different_steps_refuse_without_torchrun_as_well():
    program = "from toolkit.parallel import distributed as d\nwith d.joined(9, print) as cpu:\n"
    program += "    d.agree('the step', 4 * d.rank(), cpu)"
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    env = os.environ | {"WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": port}
    env |= {"PYTHONPATH": str(Path(__file__).parent.parent)}
    command, pipe = [sys.executable, "-c", program], subprocess.PIPE
    ranks = [subprocess.Popen(command, env=env | {"RANK": str(r)}, stderr=pipe, text=True) for r in range(2)]
    for rank in ranks:
        _, errors = rank.communicate(timeout=120)
        assert rank.returncode == 1
        assert "ValueError: the ranks disagree on the step: 0 in rank 0, 4 in rank 1; give --runs a" in errors
