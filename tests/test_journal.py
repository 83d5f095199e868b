"""metrics.jsonl is complete whatever happens to the disk and to the loggers, and the loop waits for none of them."""

import errno
import json
import subprocess
import sys
import threading
import time
import warnings
from pathlib import Path

import pytest

from toolkit.store import journal
from toolkit.store.journal import Entries, Journal, LoggerThread, read

ROOT = Path(__file__).parent.parent
ROW = {"train/loss_nats": 2.5, "lr": 3e-4}
gate = threading.Event()  # what a hanging logger waits for; a test that hangs one opens it again


class Heard:
    """Remembers all that it is told, and by which thread."""

    calls, threads = [], set()

    def __init__(self, run_dir, start_step):
        Heard.calls, Heard.threads = [("start", start_step)], {threading.current_thread()}

    def _hear(self, *call):
        Heard.calls.append(call)
        Heard.threads.add(threading.current_thread())

    def log(self, step, metrics):
        self._hear("log", step, metrics)

    def text(self, step, name, text):
        self._hear("text", step, text)

    def close(self, summary):
        self._hear("close", summary)


class NotBuilt(Heard):
    def __init__(self, run_dir, start_step):
        raise KeyError("no such key")


class NoLog(Heard):
    closed = 0

    def log(self, step, metrics):
        raise ValueError("no room for rows")

    def close(self, summary):
        NoLog.closed += 1
        raise ValueError("nor for the end")


class NoText(Heard):
    def text(self, step, name, text):
        sys.exit("text leaves the process")


class NoClose(Heard):
    def close(self, summary):
        raise OSError(errno.ENOSPC, "No space left on device")


class Warns(Heard):
    def log(self, step, metrics):
        warnings.warn("W&B isn't reachable", stacklevel=2)


class Hangs(Heard):
    def log(self, step, metrics):
        gate.wait()


class HangsAtOnce(Heard):
    def __init__(self, run_dir, start_step):
        gate.wait()


@pytest.fixture
def hanging(monkeypatch):
    """Loggers may hang, and have a second to end in. Those left behind have ended when the next test begins."""
    before = set(threading.enumerate())
    gate.clear()
    monkeypatch.setattr(journal, "PATIENCE", 1.0)
    yield
    gate.set()
    for thread in set(threading.enumerate()) - before:
        thread.join(10)


def _write(run_dir, loggers, rows=5):
    written = Journal(run_dir, loggers, 0)
    for step in range(rows):
        written.row(step, ROW)
    written.sample(rows, "Once upon")
    written.close()
    return written


def test_a_logger_hears_everything_in_order_in_a_thread_of_its_own(tmp_path):
    written = _write(tmp_path, [Heard], rows=900)
    latest = [("close", ROW)]
    expected = [("start", 0), *(("log", step, ROW) for step in range(900)), ("text", 900, "Once upon"), *latest]
    assert Heard.calls == expected and written.latest == ROW
    assert len(Heard.threads) == 1 and threading.main_thread() not in Heard.threads
    assert not written.loggers[0].is_alive()


@pytest.mark.parametrize(
    "broken, reason",
    [(NotBuilt, "KeyError: 'no such key'"), (NoLog, "no room for rows"),
     (NoText, "SystemExit: text leaves the process"), (NoClose, "[Errno 28] No space left on device"),
     (Warns, "UserWarning: W&B isn't reachable")],  # the tests make errors of warnings
)  # fmt: skip
def test_a_logger_that_fails_costs_one_warning_and_itself(broken, reason, tmp_path, caplog):
    NoLog.closed = 0
    _write(tmp_path, [broken, type("Sound", (Heard,), {})])
    assert caplog.messages == [f"logger {broken.__name__} failed and is not used any more: {reason}"]
    assert [row["step"] for row in read(tmp_path / "metrics.jsonl")] == [0, 1, 2, 3, 4]
    assert NoLog.closed == (broken is NoLog), "it was not given the chance to close its files"


@pytest.mark.parametrize("broken", [Hangs, HangsAtOnce])
def test_a_logger_that_hangs_is_left_behind(broken, tmp_path, caplog, hanging):
    start = time.monotonic()
    _write(tmp_path, [broken, Heard])
    assert 0.9 < time.monotonic() - start < 5
    assert caplog.messages == [f"logger {broken.__name__} did not close within 1 s; its last entries may be missing"]
    assert Heard.calls[-1] == ("close", ROW) and len(read(tmp_path / "metrics.jsonl")) == 5


def test_a_logger_that_is_too_slow_misses_rows_and_is_not_waited_for(tmp_path, caplog, hanging):
    class Slow(Heard):
        def log(self, step, metrics):
            gate.wait()
            super().log(step, metrics)

    written = Journal(tmp_path, [Slow], 0)
    for step in range(1500):
        written.row(step, ROW)
    gate.set()
    written.close()
    assert caplog.messages == ["logger Slow is too slow: 1000 entries are waiting, further ones are dropped"]
    heard = [call[1] for call in Heard.calls if call[0] == "log"]
    assert heard in (list(range(1000)), list(range(1001)))  # the thread may hold one that no longer waits
    assert Heard.calls[-1] == ("close", ROW) and len(read(tmp_path / "metrics.jsonl")) == 1500


def test_a_logger_that_is_left_out_is_told_no_more(tmp_path, caplog):
    thread = LoggerThread(NotBuilt, tmp_path, 0)
    thread.join(10)
    for step in range(1500):
        thread.tell("log", step, ROW)
    assert thread.entries.empty() and len(caplog.messages) == 1


HANGS = """
import sys, threading
from pathlib import Path
from toolkit.store import journal
class Hangs:
    def __init__(self, run_dir, start_step):
        threading.Event().wait()
journal.PATIENCE = 1.0
written = journal.Journal(Path(sys.argv[1]), [Hangs], 0)
written.row(0, {})
written.close()
print("closed", flush=True)
"""


def test_a_process_ends_although_a_logger_hangs(tmp_path):
    command = [sys.executable, "-W", "error", "-c", HANGS, str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=20)
    assert (done.returncode, done.stdout) == (0, "closed\n")
    assert done.stderr == "logger Hangs did not close within 1 s; its last entries may be missing\n"


# ------------------------------------------------------------------------------------------------------- full disks


# The limit on a file's size stands for the free bytes of a disk; each line says how many steps there are rows of.
FULL = """
import resource, sys
from pathlib import Path
from toolkit.store.journal import Journal, read
folder = Path(sys.argv[1])
_, most = resource.getrlimit(resource.RLIMIT_FSIZE)
def room(size):
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, most))
def rows():
    assert (folder / "metrics.jsonl").read_bytes()[-1:] in (b"", b"\\n")
    return [row["step"] for row in read(folder / "metrics.jsonl")]
written = Journal(folder, [], 0)
"""


def _on_a_full_disk(folder, script):
    pytest.importorskip("resource")
    command = [sys.executable, "-W", "error", "-c", FULL + script, str(folder)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)


def test_rows_wait_for_room_and_come_out_complete_and_in_order(tmp_path):
    done = _on_a_full_disk(
        tmp_path,
        """
room(40)
for step in range(5):
    written.row(step, {"loss": 2.5})
    written.sample(step, "x" * 40)
print(rows())
room(60)
written.row(5, {"loss": 2.5})
print(rows())
room(most)
written.row(6, {"loss": 2.5})
print(rows())
written.close()
""",
    )
    assert done.stdout == "[0]\n[0, 1]\n[0, 1, 2, 3, 4, 5, 6]\n", done.stderr
    said = [line.split(" trying")[0] for line in done.stderr.splitlines()]
    assert sorted(said) == [f"can't write {tmp_path / name}," for name in ("metrics.jsonl", "samples.md")]
    assert (tmp_path / "samples.md").read_text() == "".join(f"## step {s}\n\n{'x' * 40}\n\n" for s in range(5))


def test_rows_that_never_find_room_are_an_error_that_counts_them(tmp_path):
    done = _on_a_full_disk(
        tmp_path,
        """
room(50)
for step in range(10, 15):
    written.row(step, {"loss": 2.5})
try:
    raise KeyboardInterrupt
except KeyboardInterrupt:
    written.close()
try:
    written.close()
except OSError as error:
    print(error)
""",
    )
    lacks = "lacks its last 4 entries, from step 11 on: [Errno 27] File too large; make room, delete the checkpoints"
    assert lacks in done.stdout and done.returncode == 0, done.stderr
    assert len(done.stderr.splitlines()) == 2 and lacks in done.stderr  # an interrupt that is under way is not replaced
    assert [row["step"] for row in read(tmp_path / "metrics.jsonl")] == [10]


def test_half_an_entry_is_taken_back_even_if_that_takes_a_second_try(tmp_path):
    """An interrupt between the two leaves what a failed truncation leaves: a part behind the whole entries."""
    entries = Entries(tmp_path / "file")
    entries.add(0, "whole\n")
    entries.file.write(b"ha")
    entries.torn = True
    entries.add(1, "next\n")
    assert entries.close() is None and (tmp_path / "file").read_text() == "whole\nnext\n"


def test_a_file_that_can_not_be_opened_is_tried_again(tmp_path, caplog):
    written = Journal(tmp_path, [], 0)
    (tmp_path / "samples.md").mkdir()
    written.sample(1, "one")
    (tmp_path / "samples.md").rmdir()
    written.sample(2, "two")
    written.close()
    assert (tmp_path / "samples.md").read_text() == "## step 1\n\none\n\n## step 2\n\ntwo\n\n"
    assert len(caplog.messages) == 1 and "samples.md, trying again" in caplog.text


# ----------------------------------------------------------------------------------------------------------- resumes


def test_a_resume_cuts_what_is_past_it_and_what_is_half(tmp_path):
    written = Journal(tmp_path, [], 0)
    for step in (0, 5, 10):
        written.row(step, ROW)
        written.sample(step, f"text {step}\n\nmore")
    written.close()
    for name, half in (("metrics.jsonl", '{"step": 1'), ("samples.md", "## step 1")):  # of step 15: not step 1
        with open(tmp_path / name, "a") as file:
            file.write(half)
    Journal(tmp_path, [], 10).close()
    assert [row["step"] for row in read(tmp_path / "metrics.jsonl")] == [0, 5]
    assert (tmp_path / "metrics.jsonl").read_text() == "".join(json.dumps({"step": s} | ROW) + "\n" for s in (0, 5))
    assert (tmp_path / "samples.md").read_text() == "".join(f"## step {s}\n\ntext {s}\n\nmore\n\n" for s in (0, 5))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["metrics.jsonl", "samples.md"]


def test_a_cut_that_finds_no_room_changes_nothing(tmp_path):
    _write(tmp_path, [])
    before = (tmp_path / "metrics.jsonl").read_bytes()
    script = FULL.replace("written = Journal(folder, [], 0)", "room(20)\nJournal(folder, [], 4)")
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path)], cwd=ROOT, capture_output=True, text=True)
    assert "metrics.jsonl back to the step of the checkpoint: [Errno 27]" in done.stderr
    assert (tmp_path / "metrics.jsonl").read_bytes() == before and not (tmp_path / "metrics.jsonl.tmp").exists()


KILLED = """
import os, sys
from pathlib import Path
from toolkit.store.journal import Journal
def trace(event, arguments):
    if event == sys.argv[2] and str(arguments[0]).endswith("metrics.jsonl.tmp"):
        os.kill(os.getpid(), 9)
sys.addaudithook(trace)
Journal(Path(sys.argv[1]), [], 3)
"""


@pytest.mark.parametrize("moment", ["open", "os.rename"])
def test_a_kill_in_the_middle_of_a_cut_loses_no_row(moment, tmp_path):
    _write(tmp_path, [])
    before = (tmp_path / "metrics.jsonl").read_bytes()
    done = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path), moment], cwd=ROOT)
    assert done.returncode == -9 and (tmp_path / "metrics.jsonl").read_bytes() == before
    Journal(tmp_path, [], 3).close()
    assert [row["step"] for row in read(tmp_path / "metrics.jsonl")] == [0, 1, 2]


def test_a_journal_that_is_not_writing_writes_nothing(tmp_path):
    silent = Journal(tmp_path, [Heard], 0, writing=False)
    silent.row(0, ROW)
    silent.sample(0, "text")
    silent.close()
    assert list(tmp_path.iterdir()) == [] and silent.latest == ROW and silent.loggers == []
