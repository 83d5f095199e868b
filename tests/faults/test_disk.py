"""Disks that are full, files that may not grow, folders that can't be written."""

import os
import subprocess

import pytest
from runs import small_run

from faults.world import assert_same, assert_sound, completed, content, finish, go, mounted, saves, straight
from toolkit.rundir.folder import RunDir
from toolkit.store import checkpoint

pytestmark = pytest.mark.slow

WIDE = ("GPT.dim = 96",)  # checkpoints of 3 MB


def assert_ended_by_the_disk(folder, child, before=()):
    """Exit 4 with the reason, the truth in status.json, no temporary, and every checkpoint that lies there is sound."""
    assert child.wait() == 4, child.said
    assert "can't write" in child.said and "Traceback" not in child.said
    status = RunDir(folder.parent, folder.name, resume=True).read("status.json")
    assert status["state"] == "failed" or "status.json could not be updated (the run is failed)" in child.said
    if (folder / "checkpoints").exists():
        assert not list((folder / "checkpoints").glob("*.tmp*"))
        assert all(checkpoint.problem(path) is None for path in (folder / "checkpoints").iterdir())
    assert set(before) <= set(completed(folder))


@pytest.mark.fault(8, "the disk is too small for the checkpoints", 1)
@pytest.mark.parametrize("megabytes", [1, 2, 3, 5, 7, 9, 11])
def test_a_full_disk_costs_no_checkpoint_and_ends_in_exit_4(fault, megabytes, tmp_path, tmp_path_factory):
    """Between 1 and 12 MB, ever more of the run's checkpoints fit. With room it then goes on as if nothing had been."""
    with mounted(tmp_path / "disk", f"size={megabytes}m") as disk:
        child = go(disk, "a", bindings=WIDE)
        assert_ended_by_the_disk(disk / "a", child)
        fault.happened = "MB are free" in child.said or "No space left" in child.said
        assert "is not saved (1 of 3)" in child.said
        subprocess.run(["mount", "-o", "remount,size=64m", str(disk)], check=True)
        finish(disk / "a", fault, bindings=WIDE)
        assert_same(straight(tmp_path_factory.getbasetemp(), bindings=WIDE), disk / "a", 12)


def test_a_disk_of_20_mb_is_enough(tmp_path):
    """The other end of the sweep above: what it needs, it may have."""
    with mounted(tmp_path / "disk", "size=20m") as disk:
        child = go(disk, "a", bindings=WIDE)
        assert child.wait() == 0 and "not saved" not in child.said, child.said


@pytest.mark.fault(8, "others fill the disk in the middle of a save", 4)
def test_a_disk_that_fills_up_while_it_is_written_to(fault, tmp_path, tmp_path_factory):
    """After the check for space, at the first, third ... point of the save of step 4, and it stays full."""
    base = tmp_path_factory.getbasetemp()
    n = saves(base, "step-00000004.tmp", bindings=WIDE)[2 * fault.repetition]
    with mounted(tmp_path / "disk", "size=24m") as disk:
        full = {"point": "save", "n": n, "do": "fill", "to": str(disk / "others"), "leave": 500_000}
        child = go(disk, "a", orders=[full], bindings=WIDE)
        assert_ended_by_the_disk(disk / "a", child)
        told = "No space left" in child.said or "MB are free" in child.said  # the latter by the second try
        fault.happened = (disk / "others").stat().st_size > 1e6 and told
        (disk / "others").unlink()
        finish(disk / "a", fault, bindings=WIDE)
        assert_same(straight(base, bindings=WIDE), disk / "a", 12)


@pytest.mark.fault(9, "a limit on the size of files", 1)
@pytest.mark.parametrize("share", [0.15, 0.3, 0.45, 0.7, 0.99])
def test_a_limit_on_files_costs_no_checkpoint_and_ends_in_exit_4(fault, share, tmp_path, tmp_path_factory):
    """Below a share of state.pt, the larger of a checkpoint's files."""
    assert small_run(tmp_path, "a", "--stop-at", "4") == 0
    before = content(tmp_path / "a" / "checkpoints")
    size = (tmp_path / "a" / "checkpoints" / "step-00000004" / "state.pt").stat().st_size
    child = go(tmp_path, "a", orders=[{"limit": "RLIMIT_FSIZE", "bytes": int(share * size)}])
    assert_ended_by_the_disk(tmp_path / "a", child, before=[4])
    fault.happened = "File too large" in child.said
    assert content(tmp_path / "a" / "checkpoints") == before
    finish(tmp_path / "a", fault)
    assert_same(straight(tmp_path_factory.getbasetemp()), tmp_path / "a", 12)


# --- folders that can't be written


def refused(runs, tmp_path, *more, orders=()):
    """Exit 4 before anything is trained."""
    child = go(runs, "a", *more, orders=orders)
    assert child.wait() == 4, child.said
    assert "choose another folder with --runs" in child.said and "step " not in child.said


@pytest.mark.fault(35, "the disk is mounted read-only", 1)
@pytest.mark.parametrize("begun", [False, True], ids=["a new run", "a run that was begun"])
def test_a_read_only_disk_is_refused_before_training(fault, begun, tmp_path):
    with mounted(tmp_path / "disk", "size=20m") as disk:
        if begun:
            assert small_run(disk, "a", "--stop-at", "4") == 0
            assert_sound(disk / "a")
        before = content(disk)
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
        with pytest.raises(OSError, match="Read-only file system"):
            (disk / "probe").write_text("")
        fault.happened = True
        refused(disk, tmp_path)
        assert content(disk) == before


@pytest.mark.fault(35, "a file stands where the folder should", 1)
def test_a_file_in_the_way_is_refused_before_training(fault, tmp_path):
    (tmp_path / "runs").write_text("a file")
    fault.happened = True
    refused(tmp_path / "runs", tmp_path)
    assert (tmp_path / "runs").read_text() == "a file"


@pytest.mark.fault(35, "the folder belongs to somebody else", 1)
def test_a_folder_of_somebody_else_is_refused_before_training(fault, tmp_path):
    theirs = tmp_path / "runs"
    theirs.mkdir(mode=0o755)
    if os.geteuid() == 0:
        os.chown(theirs, 65534, 65534)
    else:
        theirs.chmod(0o555)
    refused(theirs, tmp_path, orders=[{"permissions": True}] if os.geteuid() == 0 else [])
    fault.happened = True
    assert list(theirs.iterdir()) == []
