"""Runs to be struck: in a process of their own, fresh or forked, watched from outside, resumed and compared."""

from __future__ import annotations

import contextlib
import hashlib
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from runs import arguments, assert_exact, facts

from faults import inject
from toolkit.store import checkpoint

ROOT = Path(__file__).parent.parent.parent
LONG = (
    "Experiment.steps = 150",
    "Experiment.checkpoint_every = 5",
    "Experiment.eval_every = 30",
    "Experiment.sample_every = 50",
)  # enough steps for random moments to fall into all that a run does

LATER = (  # what a run imports on its way, and what costs most of a short one's time
    "torch._dynamo",
    "torch.distributed.fsdp",
    "matplotlib.figure",
    "matplotlib.backends.backend_agg",
    "rich.progress",
    "tensorboard.summary.writer.event_file_writer",
    "toolkit.compose",
    "toolkit.rundir.report",
    "toolkit.rundir.curve",
    "toolkit.rundir.facts",
    "toolkit.rundir.folder",
    "toolkit.training",
)


class Child:
    """A run in a process of its own. ``orders`` are those of inject.py. A fresh process starts as a person's would,
    which takes seconds of imports; a forked one has them behind it. All that it says is in ``said``."""

    def __init__(self, arguments: list[str], log: Path, orders: list[dict] = (), fresh: bool = False, **environment):
        self.log, self.began = log, time.time()
        environment = {"OMP_NUM_THREADS": "1", "PYTHONFAULTHANDLER": "1"} | environment
        spec = json.dumps(list(orders))
        if fresh:
            module = ["tests.faults.inject", spec, "--"] if orders else ["toolkit.run"]
            with open(log, "ab") as file:
                self.process = subprocess.Popen(
                    [sys.executable, "-m", *module, *arguments],
                    cwd=ROOT,
                    env=os.environ | {"PYTHONPATH": str(ROOT)} | environment,
                    stdout=file,
                    stderr=file,
                )
        else:
            given = (spec, arguments, log, {**os.environ, **environment})
            self.process = _forkserver().Process(target=inject.forked, args=given, daemon=True)
            self.process.start()

    def wait(self, seconds: float = 300) -> int:
        """Its exit code, or minus the signal that ended it. A process that outlasts the time is killed, and that is a
        failure that shows where each of its threads was."""
        if isinstance(self.process, subprocess.Popen):
            try:
                return self.process.wait(seconds)
            except subprocess.TimeoutExpired:
                pass
        else:
            self.process.join(seconds)
            if self.process.exitcode is not None:
                return self.process.exitcode
        self.signal(signal.SIGABRT)  # of which faulthandler makes a traceback
        time.sleep(2)
        self.process.kill()
        pytest.fail(f"still at work after {seconds} s:\n{self.said}")

    def running(self) -> bool:
        """Whether it has not ended yet."""
        if isinstance(self.process, subprocess.Popen):
            return self.process.poll() is None
        return self.process.is_alive()

    def signal(self, number: int) -> None:
        """Send it a signal."""
        os.kill(self.process.pid, number)

    def killed_after(self, seconds: float) -> bool:
        """SIGKILL it ``seconds`` after its start; whether that is what it died of."""
        while self.running() and time.time() < self.began + seconds:
            time.sleep(0.002)
        if self.running():
            self.signal(signal.SIGKILL)
        return self.wait() == -signal.SIGKILL

    def until(self, holds: Callable[[], object], seconds: float = 300) -> object:
        """Wait until something holds, and return it. The process has to be there for that long."""
        deadline = time.time() + seconds
        while not (found := holds()):
            if not self.running():
                pytest.fail(f"it ended too early, with {self.wait()}:\n{self.said}")
            if time.time() > deadline:
                self.process.kill()
                pytest.fail(f"{seconds} s went by in vain:\n{self.said}")
            time.sleep(0.005)
        return found

    @property
    def age(self) -> float:
        """Seconds since its start."""
        return time.time() - self.began

    @property
    def said(self) -> str:
        """Its output and its errors."""
        return self.log.read_text(errors="replace") if self.log.exists() else ""


def _forkserver():
    """Processes forked from one that has torch and toolkit imported, and has run nothing."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["faults.inject", *LATER])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), str(ROOT / "tests")]))
        patch.setenv("OMP_NUM_THREADS", "1")
        multiprocessing.forkserver.ensure_running()
    return context


def go(runs: Path, name: str, *more: str, orders: list[dict] = (), fresh: bool = False, env: dict = {}, **options):  # noqa: B006
    """A Child that trains the small run ``name``; ``options`` as in runs.arguments. A run that is there is resumed."""
    resume = ["--resume"] if (runs / name / "config.gin").is_file() else []
    log = runs.parent / f"{runs.name}-{name}.log"
    return Child(arguments(runs, name, *resume, *more, **options), log, orders, fresh, **env)


def straight(base: Path, **options) -> Path:
    """The run that nothing strikes, made once per session, with ``seconds`` it took from its start in a file beside
    it, both for a fresh process."""
    key = hashlib.sha256(json.dumps(options, sort_keys=True).encode()).hexdigest()[:12]
    runs = base / f"straight-{key}"
    if not runs.exists():
        runs.mkdir()
        child = go(runs, "run", fresh=True, **options)
        assert child.wait() == 0, child.said
        (runs / "seconds").write_text(str(time.time() - child.began))
    return runs / "run"


def points(base: Path, **options) -> list[tuple[str, str]]:
    """Each change that a run makes under checkpoints/, and each status.json, in order, seen in a run that is left
    alone: its point, and what happened to which file or folder."""
    runs = straight(base, **options).parent
    if not (runs / "points").exists():
        seen = {"do": "list", "to": str(runs / "points")}
        child = go(runs, "seen", orders=[{"point": "save"} | seen, {"point": "rename status.json"} | seen], **options)
        assert child.wait() == 0, child.said
    return list(inject.points(runs / "points"))


def saves(base: Path, folder: str = "", **options) -> list[int]:
    """The numbers of the points ``save``, those of one checkpoint's folder alone, such as step-00000004."""
    seen = [what for point, what in points(base, **options) if point == "save"]
    return [number for number, what in enumerate(seen, 1) if folder in what]


def completed(folder: Path) -> list[int]:
    """The steps whose checkpoint lies in its place, in order: the promise is that none of these is lost."""
    return sorted(int(path.name[5:]) for path in (folder / "checkpoints").glob("step-" + "[0-9]" * 8))


def finish(folder: Path, fault, *more: str, orders: list[dict] = (), **options) -> None:
    """Resume a struck run until it is done, and note in ``fault`` what had to be done again, and how long it took from
    the start of the process to the first new row."""
    before = max(completed(folder), default=0)
    child = go(folder.parent, folder.name, *more, orders=orders, **options)
    child.until(lambda: _first_new_row(folder, child.began) or not child.running())
    if child.running():
        fault.recovery_seconds.append(child.age)
    assert child.wait() == 0, child.said
    if "nothing to resume" not in child.said:
        fault.lost_steps += max(0, before - resumed_at(folder))


def resumed_at(folder: Path) -> int:
    """The step that the newest process went on from; 0 where none was resumed: the run was struck before it began."""
    return (facts(folder)["resumed"] or [{"step": 0}])[-1]["step"]


def _first_new_row(folder: Path, began: float) -> bool:
    """Whether a process that started at ``began`` has written a row of its own: first it says in status.json that it
    runs, then it cuts the rows from its step on, then it adds to them."""
    try:
        status, metrics = (folder / "status.json").stat(), folder / "metrics.jsonl"
        if not (began < status.st_mtime and status.st_mtime_ns < metrics.stat().st_mtime_ns):
            return False
        last = metrics.read_text().splitlines()[-1]
        return json.loads(last)["step"] >= resumed_at(folder)
    except (OSError, ValueError, IndexError, KeyError):
        return False


def assert_sound(folder: Path) -> None:
    """What lies in place under checkpoints/ proves itself, but for a folder that was just being removed: there a newer
    one does."""
    steps = completed(folder)
    for step in steps[-1:]:
        path = folder / "checkpoints" / f"step-{step:08d}"
        assert checkpoint.problem(path) is None, path
    best = folder / "checkpoints" / "best"
    assert not best.exists() or checkpoint.problem(best) is None


def assert_same(one: Path, other: Path, last: int) -> None:
    """EXACT, and nothing is left lying about: the newest two checkpoints and the best one, no temporary."""
    assert_exact(one, other, last)
    kept = completed(other)
    assert len(kept) == 2 and kept[-1] == last
    assert names(other / "checkpoints") == ["best", *(f"step-{step:08d}" for step in kept)]
    assert not list(other.rglob("*.tmp*")), "a temporary is left"
    left, right = (folder / "checkpoints" / "best" / "model.safetensors" for folder in (one, other))
    assert left.read_bytes() == right.read_bytes()


def names(folder: Path) -> list[str]:
    """What lies in a folder."""
    return sorted(path.name for path in folder.iterdir())


def content(folder: Path) -> dict[str, str]:
    """SHA-256 of each file below a folder, but for the lock."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != ".lock")
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def reseal(folder: Path) -> None:
    """Make the manifest of a forged checkpoint true again, as its forger would."""
    path = folder / checkpoint.MANIFEST
    manifest = json.loads(path.read_text())
    del manifest["sha256"]
    for name, file in manifest["files"].items():
        data = (folder / name).read_bytes()
        file |= {"sha256": hashlib.sha256(data).hexdigest(), "size": len(data)}
    own = hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()
    path.write_text(json.dumps(manifest | {"sha256": own}))
    assert checkpoint.problem(folder) is None


@contextlib.contextmanager
def mounted(folder: Path, options: str) -> Iterator[Path]:
    """A tmpfs of one's own at ``folder``, gone afterwards; skips where mounting is not permitted."""
    folder.mkdir()
    tried = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)], capture_output=True, text=True
    )
    if tried.returncode:
        pytest.skip(f"mounting a tmpfs takes root: {tried.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)
