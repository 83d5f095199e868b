"""Two processes under torchrun: one dies, one hangs, one alone hears the signal, and how many there are changes.

All start torchrun, so all are slow."""

import contextlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from runs import arguments, assert_exact, facts, rows, small_run
from safetensors.torch import load_file

from toolkit.store import checkpoint, journal

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="finds the ranks' processes in /proc"),
]
ROOT = Path(__file__).parent.parent.parent
STEPS = 200
LONG = (
    f"Experiment.steps = {STEPS}",
    "Experiment.checkpoint_every = 20",
    "Experiment.eval_every = 100",
    "Experiment.sample_every = 100",
)


class Torchrun:
    """``torchrun --nproc-per-node 2 -m toolkit.run ...`` in the background, and its two ranks."""

    def __init__(self, runs: Path, name: str, *more: str, bindings: tuple[str, ...] = LONG, **environment: str):
        self.folder, self.stderr = runs / name, runs / f"{name}.{time.time_ns()}.err"
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
        command += ["-m", "toolkit.run", *arguments(runs, name, *more, bindings=bindings)]
        env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"} | environment
        with open(self.stderr, "w") as stderr:
            self.process = subprocess.Popen(command, cwd=ROOT, env=env, stdout=subprocess.DEVNULL, stderr=stderr)

    def status(self) -> dict:
        with contextlib.suppress(OSError):
            return json.loads((self.folder / "status.json").read_text())
        return {}

    def rows_written(self) -> int:
        return len(journal.read(self.folder / "metrics.jsonl"))

    def until(self, condition, seconds: float = 120.0) -> None:
        """Wait for it; fails where torchrun ends first."""
        deadline = time.monotonic() + seconds
        while not condition():
            assert self.process.poll() is None and time.monotonic() < deadline, self.errors()
            time.sleep(0.02)

    def ranks(self) -> dict[int, int]:
        """The ranks that live: number to process id."""
        found = {}
        for listed in Path(f"/proc/{self.process.pid}/task").glob("*/children"):
            for pid in listed.read_text().split():
                with contextlib.suppress(OSError):
                    number = re.search(rb"(?:^|\0)RANK=(\d+)", Path(f"/proc/{pid}/environ").read_bytes())
                    found[int(number[1])] = int(pid)
        return found

    def end(self, seconds: float = 120.0) -> int:
        """Wait for the end of torchrun; returns its exit code."""
        return self.process.wait(timeout=seconds)

    def errors(self) -> str:
        return self.stderr.read_text()[-6000:]

    def kill(self) -> None:
        """Leave nothing behind, whatever the test has found."""
        for pid in [*self.ranks().values(), self.process.pid]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.process.wait()


@pytest.fixture
def torchrun(tmp_path):
    """Starts runs in the test's folder, and ends those that the test has not seen the end of."""
    started = []

    def start(name, *more, **options):
        started.append(Torchrun(tmp_path, name, *more, **options))
        return started[-1]

    yield start
    for run in started:
        run.kill()


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """The run of two processes that nobody disturbed."""
    run = Torchrun(tmp_path_factory.mktemp("straight"), "straight")
    assert run.end() == 0, run.errors()
    assert facts(run.folder)["processes"] == 2
    return run.folder


def gone(pids: dict[int, int]) -> bool:
    return not any(Path(f"/proc/{pid}").exists() for pid in pids.values())


@pytest.mark.fault(40, "kill -9 of one of two ranks", 10)
def test_a_killed_rank_ends_all_and_is_named(fault, torchrun, straight):
    dice = random.Random(fault.repetition)
    victim, moment = 1 - fault.repetition % 2, dice.randrange(10, STEPS // 2)
    run = torchrun("broken")
    run.until(lambda: run.rows_written() > moment)
    ranks = run.ranks()
    killed = time.monotonic()
    os.kill(ranks[victim], signal.SIGKILL)
    code = run.end(60)
    assert code != 0 and gone(ranks) and time.monotonic() - killed < 60
    status = run.status()
    assert status["state"] == "failed", run.errors()
    assert re.match(rf"rank {victim} \(.*, pid {ranks[victim]}\) has ended", status["reason"])
    fault.happened = run.rows_written() < STEPS

    saved = checkpoint.newest(run.folder / "checkpoints")
    newest = int(saved.name.removeprefix("step-")) if saved else 0
    resumed, began = torchrun("broken", "--resume"), time.monotonic()
    resumed.until(lambda: resumed.status().get("state") == "running")
    fault.recovery_seconds.append(time.monotonic() - began)
    assert resumed.end() == 0, resumed.errors()
    fault.lost_steps = newest - facts(run.folder)["resumed"][-1]["step"]
    assert fault.lost_steps == 0
    assert_exact(straight, run.folder, STEPS)


@pytest.mark.fault(41, "SIGSTOP of one of two ranks", 3)
def test_a_rank_that_hangs_is_named(fault, torchrun):
    victim = 1 - fault.repetition % 2
    run = torchrun("stopped", bindings=(*LONG, "Experiment.steps = 100_000", "Experiment.rank_timeout = 5"))
    run.until(lambda: run.rows_written() > 10)
    ranks = run.ranks()
    os.kill(ranks[victim], signal.SIGSTOP)
    run.until(lambda: run.status()["state"] == "failed", 30)
    fault.happened = Path(f"/proc/{ranks[victim]}/stat").read_text().rpartition(")")[2].split()[0] == "T"
    named = rf"rank {victim} \(.*, pid {ranks[victim]}\) has given no sign of life for 5 s since step \d+"
    assert re.match(named, run.status()["reason"]) and re.search(named, run.errors())
    assert run.end(60) != 0 and gone(ranks)  # torchrun kills what SIGTERM does not end, after 30 s


STUCK = """
import os, threading
from datetime import timedelta
from toolkit.parallel import distributed
from toolkit.text.tokens import TokenFiles

distributed.PATIENCE = timedelta(seconds=15)
plain = TokenFiles.batch

def batch(self, split, index, size):
    if split == "train" and index == 41:  # of rank 1: micro-batch 20 * 2 + 1
        open(os.environ["STUCK_AT"], "w").close()
        threading.Event().wait()
    return plain(self, split, index, size)

TokenFiles.batch = batch
"""


@pytest.mark.fault(41, "a rank that lives, but does not come to the collective", 3)
def test_a_rank_that_stays_behind_is_named(fault, torchrun, tmp_path):
    (tmp_path / "stuck.py").write_text(STUCK)
    flag = tmp_path / "flag"
    run = torchrun("stuck", "--import", str(tmp_path / "stuck.py"), STUCK_AT=str(flag))
    run.until(flag.exists)
    fault.happened, ranks = True, run.ranks()
    assert run.end(90) != 0 and gone(ranks)
    named = rf"the other ranks waited too long \(.*[Tt]imed out.*\) for rank 1 \(.*, pid {ranks[1]}\) at step 20$"
    assert re.match(named, run.status()["reason"]), run.status()
    assert re.search(r"This rank, 1, is at\n(.*\n)*?.*in train\n", run.stderr.read_text())


@pytest.mark.fault(42, "SIGTERM to one of two ranks", 10)
def test_a_signal_to_one_rank_stops_all_at_one_step(fault, torchrun, straight):
    run = torchrun("told", bindings=(*LONG, "Experiment.checkpoint_every = 150"))
    moment = random.Random(fault.repetition).randrange(10, STEPS // 2)
    run.until(lambda: run.rows_written() > moment)
    ranks, before = run.ranks(), run.rows_written()
    os.kill(ranks[1 - fault.repetition % 2], signal.SIGTERM)
    assert run.end() != 0 and gone(ranks)
    status = run.status()
    assert status["state"] == "preempted", run.errors()
    assert [f.name for f in (run.folder / "checkpoints").glob("step-*")] == [f"step-{status['step']:08d}"]
    assert checkpoint.problem(checkpoint.newest(run.folder / "checkpoints")) is None
    fault.happened = before <= len(rows(run.folder)) < STEPS
    assert rows(run.folder) == rows(straight)[: len(rows(run.folder))]
    assert rows(run.folder)[-1]["step"] == status["step"] - 1


RECORD = """
import hashlib, json, os
from toolkit.parallel import distributed
from toolkit.text.tokens import TokenFiles

plain = TokenFiles.batch

def batch(self, split, index, size):
    rows = plain(self, split, index, size)
    if split == "train":
        with open(f"{os.environ['BATCHES']}.{distributed.rank()}", "a") as file:
            for row, ids in enumerate(rows):
                file.write(json.dumps([index * size + row, hashlib.sha256(ids.tobytes()).hexdigest()]) + "\\n")
    return rows

TokenFiles.batch = batch
"""


@pytest.mark.fault(43, "one process, then two, then one", 2)
def test_the_number_of_processes_changes_nothing_but_rounding(fault, torchrun, tmp_path):
    (tmp_path / "record.py").write_text(RECORD)
    flags = ("--import", str(tmp_path / "record.py"))

    def alone(name, batches, *more):
        root = str(ROOT)
        env = os.environ | {"PYTHONPATH": root, "BATCHES": str(tmp_path / batches)}
        command = [sys.executable, "-m", "toolkit.run", *arguments(tmp_path, name, *flags, *more)]
        done = subprocess.run(command, cwd=root, env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr

    alone("one", "straight")
    alone("changing", "first", "--stop-at", "4")  # of 12 steps, each of 4 samples
    two = torchrun("changing", *flags, "--resume", "--stop-at", "8", bindings=(), BATCHES=str(tmp_path / "second"))
    assert two.end() == 0, two.errors()
    fault.happened = facts(two.folder)["processes"] == 2
    alone("changing", "third", "--resume")
    assert facts(two.folder)["processes"] == 1

    def samples(*files):
        return dict(json.loads(line) for file in files for line in (tmp_path / file).read_text().splitlines())

    whole = samples("straight.0")
    legs = samples("first.0"), samples("second.0", "second.1"), samples("third.0")
    assert sorted(whole) == list(range(48)) and [sorted(leg)[0] for leg in legs] == [0, 16, 32]
    assert {k: v for leg in legs for k, v in leg.items()} == whole and sum(map(len, legs)) == len(whole)
    shares = samples("second.0"), samples("second.1")
    assert [len(share) for share in shares] == [8, 8] and not shares[0].keys() & shares[1].keys()
    for step in range(4, 8):  # the two together hold the batch of each step
        batch = set(range(4 * step, 4 * step + 4))
        assert all(len(batch & share.keys()) == 2 for share in shares)
    for one, other in zip(rows(tmp_path / "one"), rows(two.folder), strict=True):
        assert one == pytest.approx(other, rel=1e-5)


def tensors(folder: Path, step: int) -> tuple[set[str], set]:
    """Names of the weights in a checkpoint, and of what its optimizer keeps."""
    saved = folder / "checkpoints" / f"step-{step:08d}"
    state = torch.load(saved / "state.pt", weights_only=True)["optimizer"]
    groups = [(tuple(sorted(group)), len(group["params"])) for group in state["param_groups"]]
    return set(load_file(saved / "model.safetensors")), {*groups, *((k, *sorted(v)) for k, v in state["state"].items())}


@pytest.mark.fault(44, "the wrapper of data parallelism in a checkpoint", 4)
def test_checkpoints_of_two_processes_and_of_one_are_alike(fault, straight, tmp_path):
    """That they can be exchanged is shown above, and for compiled ones below."""
    assert small_run(tmp_path, "plain", "--stop-at", "4") == 0
    fault.happened = facts(straight)["processes"] == 2 and facts(tmp_path / "plain")["processes"] == 1
    assert tensors(straight, STEPS) == tensors(tmp_path / "plain", 4)


@pytest.mark.fault(44, "two compiled processes, then one eager, then two compiled", 4)
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile on a CPU takes g++")
def test_a_compiled_run_of_two_goes_on_as_one_eager_process_and_back(fault, torchrun, tmp_path):
    compiled = ("GPT.dim = 8", "GPT.n_layer = 1", "GPT.n_head = 1", "Experiment.compile = True")
    eager = (*compiled[:-1], "Experiment.compile = False")
    assert small_run(tmp_path, "eager", bindings=eager) == 0
    cheap = {"TORCHINDUCTOR_COMPILE_THREADS": "1"}  # no pool of compilers beside each rank
    first = torchrun("mixed", "--stop-at", "4", bindings=compiled, **cheap)
    assert first.end(600) == 0, first.errors()
    fault.happened = facts(first.folder)["compiled"] and facts(first.folder)["processes"] == 2
    assert small_run(tmp_path, "mixed", "--resume", "--allow-change", "--stop-at", "8", bindings=eager) == 0
    assert not facts(first.folder)["compiled"] and facts(first.folder)["resumed"][-1]["step"] == 4
    again = torchrun("mixed", "--resume", "--allow-change", bindings=compiled, **cheap)
    assert again.end(600) == 0, again.errors()
    assert facts(first.folder)["resumed"][-1]["step"] == 8
    assert tensors(first.folder, 12) == tensors(tmp_path / "eager", 12)
    for one, other in zip(rows(tmp_path / "eager"), rows(first.folder), strict=True):
        assert one == pytest.approx(other, rel=1e-5)
