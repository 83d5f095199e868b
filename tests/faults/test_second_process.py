"""Two runs in one directory, and a lock that nobody holds any more."""

import json
import subprocess
import sys

import filelock
import pytest
from runs import small_run


@pytest.mark.fault(34, "a second process in the same run directory", 20)
def test_the_second_is_refused_and_the_first_unharmed(fault, tmp_path):
    assert small_run(tmp_path, "a", "--stop-at", "1") == 0
    with filelock.FileLock(tmp_path / "a" / ".lock"):
        fault.happened = True
        with pytest.raises(ValueError, match="another process is using"):
            small_run(tmp_path, "a", "--resume")
    assert small_run(tmp_path, "a", "--resume", "--stop-at", "2") == 0


@pytest.mark.fault(34, "a lock whose process was killed", 20)
def test_a_stale_lock_is_no_obstacle(fault, tmp_path):
    assert small_run(tmp_path, "a", "--stop-at", "1") == 0
    hold = "import filelock, os, signal, sys; filelock.FileLock(sys.argv[1]).acquire(); os.kill(os.getpid(), 9)"
    killed = subprocess.run([sys.executable, "-c", hold, str(tmp_path / "a" / ".lock")])
    fault.happened = killed.returncode == -9 and (tmp_path / "a" / ".lock").exists()
    assert small_run(tmp_path, "a", "--resume", "--stop-at", "2") == 0
    assert json.loads((tmp_path / "a" / "status.json").read_text())["step"] == 2
