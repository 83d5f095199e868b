"""Logs that can't be written, loggers that fail or hang, servers that don't answer: the run goes on, and metrics.jsonl
is complete."""

import contextlib
import importlib.util
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from runs import arguments, assert_exact, facts, rows, small_run
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from toolkit.store import checkpoint, journal

ROOT = Path(__file__).parents[2]
# Long enough to be met half-way; nothing but logs is written between the first step and the last.
LONG = (
    "Experiment.steps = 400",
    "Experiment.eval_every = 400",
    "Experiment.sample_every = 400",
    "Experiment.checkpoint_every = 400",
    "TensorBoard.flush_seconds = 1",
)


@contextlib.contextmanager
def _training(folder, name, *before, **options):
    """A small run in a process of its own, and the file of what it says; it is killed if the test leaves early."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "TERM": "dumb"} | options.pop("environment", {})
    command = [*before, sys.executable, "-m", "toolkit.run", *arguments(folder, name, **options)]
    said = folder.parent / f"{name}.said"
    with open(said, "w") as output:
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, stderr=output)
    try:
        yield process, said
    finally:
        process.kill()
        process.wait()


def _until(true, seconds=90):
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, "it did not come to pass"
        time.sleep(0.02)


def _warnings(said):
    return [line for line in said.read_text().splitlines() if "WARNING" in line or "Warning" in line]


@contextlib.contextmanager
def _small_disk(folder, size):
    """A tmpfs over a folder, in a namespace of its own, so that it takes no root. Yields the command that enters it and
    the folder as seen from out here."""
    if not (shutil.which("unshare") and shutil.which("nsenter")):
        pytest.skip("no unshare or nsenter here")
    script = f"mount -t tmpfs -o size={size} none '{folder}' && echo mounted && exec sleep 600"
    holder = subprocess.Popen(["unshare", "-Urm", "sh", "-c", script], stdout=subprocess.PIPE, text=True)
    try:
        if holder.stdout.readline() != "mounted\n":
            pytest.skip("mounting is not permitted here, not even in a namespace")
        enter = ["nsenter", "-t", str(holder.pid), "-U", "-m", "--preserve-credentials"]
        yield enter, Path(f"/proc/{holder.pid}/root{folder}")
    finally:
        holder.kill()
        holder.wait()
        holder.stdout.close()


def _fill(path):
    """A file that takes the last byte of its disk."""
    with open(path, "wb", buffering=0) as file, pytest.raises(OSError, match="No space left"):
        while True:
            file.write(bytes(4096))


@pytest.mark.slow
@pytest.mark.fault(10, "disk full in the logs: a small tmpfs under the runs", 1)
def test_a_full_disk_is_waited_out(fault, tmp_path):
    runs = tmp_path / "runs"
    runs.mkdir()
    with _small_disk(runs, "4m") as (enter, seen):
        with _training(runs, "broken", *enter, bindings=LONG) as (process, said):
            _until(lambda: len(rows(seen / "broken")) > 50)
            _fill(seen / "filler")
            _until(lambda: "can't write" in said.read_text())
            full = len(rows(seen / "broken"))
            time.sleep(0.5)
            fault.happened = process.poll() is None and len(rows(seen / "broken")) == full
            (seen / "filler").unlink()
            freed = time.perf_counter()
            _until(lambda: len(rows(seen / "broken")) > full)
            fault.recovery_seconds.append(time.perf_counter() - freed)
            assert process.wait(timeout=120) == 0
        broken = rows(seen / "broken")
    assert small_run(runs, "straight", bindings=LONG) == 0
    assert broken == rows(runs / "straight")
    _one_warning_each(said)


@pytest.mark.slow
@pytest.mark.fault(10, "disk full in the logs: files that may not grow", 1)
def test_files_that_may_not_grow_are_waited_for(fault, tmp_path):
    resource = pytest.importorskip("resource")
    if not hasattr(resource, "prlimit"):
        pytest.skip("no prlimit here")
    runs = tmp_path / "runs"
    runs.mkdir()
    with _training(runs, "broken", bindings=LONG) as (process, said):
        metrics = runs / "broken" / "metrics.jsonl"
        _until(lambda: len(rows(runs / "broken")) > 50)
        before = resource.prlimit(process.pid, resource.RLIMIT_FSIZE)
        resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (metrics.stat().st_size + 300, before[1]))
        _until(lambda: "can't write" in said.read_text())
        full = len(rows(runs / "broken"))
        assert metrics.read_bytes().endswith(b"\n")
        time.sleep(0.5)
        fault.happened = process.poll() is None and len(rows(runs / "broken")) == full
        resource.prlimit(process.pid, resource.RLIMIT_FSIZE, before)
        freed = time.perf_counter()
        _until(lambda: len(rows(runs / "broken")) > full)
        fault.recovery_seconds.append(time.perf_counter() - freed)
        assert process.wait(timeout=120) == 0
    assert small_run(runs, "straight", bindings=LONG) == 0
    assert rows(runs / "broken") == rows(runs / "straight")
    _one_warning_each(said)


def _one_warning_each(said):
    found = _warnings(said)
    assert len([line for line in found if "metrics.jsonl" in line]) == 1
    assert len([line for line in found if "logger TensorBoard" in line]) <= 1
    assert all("metrics.jsonl" in line or "logger TensorBoard" in line for line in found), found


@pytest.mark.slow
@pytest.mark.fault(37, "W&B unreachable", 1)
def test_a_server_that_does_not_answer_costs_no_time(fault, tmp_path):
    if not importlib.util.find_spec("wandb"):
        pytest.skip("wandb is not installed")
    runs = tmp_path / "runs"
    runs.mkdir()
    with socket.socket() as closed:  # a port that nobody listens on, and that nobody else can take meanwhile
        closed.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{closed.getsockname()[1]}"
        environment = {"WANDB_BASE_URL": address, "WANDB_API_KEY": "0" * 40, "WANDB_MODE": "online"}
        environment |= {f"WANDB_{kind}_DIR": str(tmp_path / kind) for kind in ("CACHE", "CONFIG", "DATA")}
        overlays = ("gin/logger/wandb.gin",)
        start = time.perf_counter()
        with _training(runs, "broken", overlays=overlays, environment=environment) as (process, said):
            _until(lambda: len(rows(runs / "broken")) > 0)
            assert time.perf_counter() - start < 15
            assert process.wait(timeout=120) == 0
            fault.recovery_seconds.append(time.perf_counter() - start)
    fault.happened = "W&B isn't reachable" in said.read_text()
    assert len(_warnings(said)) == 1, said.read_text()
    assert small_run(runs, "straight") == 0
    assert rows(runs / "broken") == rows(runs / "straight")
    assert list((runs / "broken").glob("wandb/offline-run-*/*.wandb")), "nothing is there to be synchronised later"


@pytest.mark.slow
@pytest.mark.fault(38, "TensorBoard can't write its file", 1)
def test_an_events_file_that_can_not_be_written_costs_one_warning(fault, tmp_path):
    """Folders lie where the file would go, whichever second it is made in: root is stopped by that as well."""
    runs = tmp_path / "runs"
    (runs / "broken").mkdir(parents=True)
    with _training(runs, "broken") as (process, said):
        for second in range(int(time.time()), int(time.time()) + 120):
            name = f"events.out.tfevents.{second:010}.{socket.gethostname()}.{process.pid}.0"
            (runs / "broken" / name).mkdir()
        assert process.wait(timeout=120) == 0
    warned = _warnings(said)
    fault.happened = len(warned) == 1 and "logger TensorBoard" in warned[0] and "Is a directory" in warned[0]
    assert not [path for path in (runs / "broken").glob("events*") if path.is_file()]
    assert small_run(runs, "straight") == 0
    assert rows(runs / "broken") == rows(runs / "straight")


@pytest.mark.slow
@pytest.mark.fault(39, "kill -9, and TensorBoard after the resume", 1)
def test_tensorboard_shows_each_step_once_after_a_kill(fault, tmp_path):
    runs = tmp_path / "runs"
    runs.mkdir()
    bindings = (*LONG, "Experiment.checkpoint_every = 100")
    with _training(runs, "broken", bindings=bindings) as (process, _):
        _until(lambda: len(_shown(runs / "broken")) > 0)
        while not _ahead(runs / "broken"):
            process.send_signal(signal.SIGCONT)
            time.sleep(0.3)
            assert process.poll() is None
            process.send_signal(signal.SIGSTOP)
        process.kill()
    before = _shown(runs / "broken")
    assert small_run(runs, "broken", "--resume", bindings=bindings) == 0
    (resumed,) = facts(runs / "broken")["resumed"]
    fault.happened = 0 < resumed["step"] < max(before)
    assert small_run(runs, "straight", bindings=bindings) == 0
    assert_exact(runs / "straight", runs / "broken", 400)
    assert _shown(runs / "broken") == list(range(400))


def _shown(folder):
    """The steps that TensorBoard shows."""
    if not list(folder.glob("events*")):
        return []
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
    return [event.step for event in events.Scalars("lr")] if "lr" in events.Tags()["scalars"] else []


def _ahead(folder):
    """Whether TensorBoard shows steps that a resume has to do again."""
    saved = checkpoint.newest(folder / "checkpoints")
    return saved is not None and _shown(folder)[-1] > int(saved.name.removeprefix("step-"))


PLUGINS = '''
import threading
from toolkit.registry import register

class Silent:
    """Keeps nothing."""
    def __init__(self, run_dir, start_step): pass
    def log(self, step, metrics): pass
    def text(self, step, name, text): pass
    def close(self, summary): pass

@register("logger")
class Blocks(Silent):
    """Never comes back from a row."""
    def log(self, step, metrics): threading.Event().wait()

@register("logger")
class FailsToStart(Silent):
    """Can't be built."""
    def __init__(self, run_dir, start_step): raise RuntimeError("no server")

@register("logger")
class FailsToLog(Silent):
    """Takes no row."""
    def log(self, step, metrics): return metrics["no such metric"]
'''


def test_loggers_of_ones_own_can_not_end_a_run(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(journal, "PATIENCE", 1.0)
    (tmp_path / "my_loggers.py").write_text(PLUGINS)
    loggers = ("Experiment.loggers = [@Blocks, @FailsToStart, @FailsToLog, @CSV]",)
    assert small_run(tmp_path, "a", "--import", str(tmp_path / "my_loggers.py"), bindings=loggers) == 0
    assert sorted(caplog.messages) == [
        "logger Blocks did not close within 1 s; its last entries may be missing",
        "logger FailsToLog failed and is not used any more: KeyError: 'no such metric'",
        "logger FailsToStart failed and is not used any more: RuntimeError: no server",
    ]
    assert small_run(tmp_path, "straight", bindings=("Experiment.loggers = [@CSV]",)) == 0
    assert rows(tmp_path / "a") == rows(tmp_path / "straight")
