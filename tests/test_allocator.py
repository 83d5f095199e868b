"""Memory that is kept: seen from outside, by the pages that the system had to clear."""

import subprocess
import sys

import pytest

FAULTS = """
import resource, sys
import numpy as np
from toolkit.allocator import keep_freed_memory
kept = keep_freed_memory() if sys.argv[1] == "keep" else False
def large():
    np.ones(8_000_000)  # 64 MB, mapped on its own by default
large()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(5):
    large()
print(int(kept), resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(what: str) -> tuple[bool, int]:
    done = subprocess.run([sys.executable, "-c", FAULTS, what], capture_output=True, text=True, check=True)
    kept, count = map(int, done.stdout.split())
    return bool(kept), count


@pytest.mark.skipif(sys.platform != "linux", reason="the switch is glibc's")
def test_freed_memory_is_used_again_without_new_pages():
    kept, count = faults("keep")
    if not kept:
        pytest.skip("not glibc")
    assert count < 100 < faults("leave")[1]
