"""Memory that is kept: seen from outside, by the pages that the system had to clear."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parent

FAULTS = """
import resource, sys
import numpy as np
from toolkit.cpu.allocator import keep_freed_memory
if sys.argv[1] == "train":
    from runs import facts, small_run
    from pathlib import Path
    small_run(Path(sys.argv[2]), "a")
    kept = facts(Path(sys.argv[2], "a"))["keeps_freed_memory"]
else:
    kept = keep_freed_memory() if sys.argv[1] == "keep" else False
def large():
    np.ones(8_000_000)  # 64 MB, mapped on its own by default
large()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(5):
    large()
print("\\n", int(kept), resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(*what: str) -> tuple[bool, int]:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(TESTS.parent), str(TESTS)])}
    command = [sys.executable, "-c", FAULTS, *what]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=TESTS.parent, env=environment)
    kept, count = map(int, done.stdout.splitlines()[-1].split())
    return bool(kept), count


@pytest.mark.skipif(sys.platform != "linux", reason="the switch is glibc's")
def test_freed_memory_is_used_again_without_new_pages():
    kept, count = faults("keep")
    if not kept:
        pytest.skip("not glibc")
    assert count < 100 < faults("leave")[1]


@pytest.mark.skipif(sys.platform != "linux", reason="the switch is glibc's")
def test_training_does_what_its_facts_say_of_freed_memory(tmp_path):
    kept, count = faults("train", str(tmp_path))
    assert (count < 100) == kept
