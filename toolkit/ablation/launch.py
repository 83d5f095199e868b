"""Where jobs run: processes here, Slurm through submitit, Ray tasks, behind one protocol.

A task is the same command wherever it runs, and that command is what saves, resumes and refuses a second process, so a
launcher only starts it, asks whether it has ended, and asks it to stop."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import filelock

from toolkit.root import ROOT


@dataclass(frozen=True)
class Task:
    """One ``python -m toolkit.run``: its arguments, the folder that it fills, and where its output goes."""

    name: str
    arguments: tuple[str, ...]
    folder: Path
    log: Path
    cwd: Path
    environment: dict[str, str] = field(default_factory=dict)

    def start(self, more: dict[str, str] | None = None) -> subprocess.Popen:
        """Start it, to resume where a run is there. Its own session: a terminal's Ctrl-C reaches the launcher alone."""
        resume = ["--resume"] if (self.folder / "config.gin").is_file() else []
        path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        environment = os.environ | {"PYTHONPATH": path} | self.environment | (more or {})
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with open(self.log, "ab") as log:
            return subprocess.Popen(
                [sys.executable, "-m", "toolkit.run", *self.arguments, *resume],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                cwd=self.cwd,
                env=environment,
                start_new_session=True,
            )


class Handle(Protocol):
    """A task under way."""

    def poll(self) -> int | None:
        """Its exit code, or None while it runs."""

    def stop(self) -> None:
        """Ask it to save and end; a second time, to end at once."""


class Launcher(Protocol):
    """``slots`` is how many tasks it takes at once."""

    slots: int

    def submit(self, task: Task) -> Handle: ...

    def close(self) -> None: ...


class Local:
    """Processes on this machine, each in one of the ``slots``, which are environments: GPUs, or threads."""

    def __init__(self, slots: Sequence[dict[str, str]]):
        self.free, self.slots = list(slots), len(slots)

    def submit(self, task: Task) -> Handle:
        slot = self.free.pop(0)
        return _Process(task.start(slot), lambda: self.free.append(slot))

    def close(self) -> None:
        pass


class _Process:
    def __init__(self, process, release):
        self.process, self.release = process, release

    def poll(self):
        code = self.process.poll()
        if code is not None and self.release:
            self.release()
            self.release = None
        return code

    def stop(self):
        self.process.send_signal(signal.SIGTERM)  # does nothing once it has been seen to end


class Slurm:
    """Slurm jobs through submitit: requeued when they are preempted or out of time, after a save. ``options`` are those
    of submitit's AutoExecutor (timeout_min, slurm_partition, ...), and ``cluster``."""

    def __init__(self, folder: Path, slots: int, options: dict[str, object], requeues: int = 100):
        try:
            import submitit
        except ImportError as error:
            raise ValueError('--launcher slurm needs submitit: python -m pip install -e ".[slurm]"') from error
        options = dict(options)
        cluster = options.pop("cluster", "slurm")
        if cluster == "slurm" and shutil.which("srun") is None:
            remedy = "log in to a machine of the cluster, or try --option cluster=local"
            raise ValueError(f"--launcher slurm: there is no Slurm here (no srun); {remedy}")
        self.slots = slots
        self.executor = submitit.AutoExecutor(folder, cluster=cluster, **{f"{cluster}_max_num_timeout": requeues})
        try:
            self.executor.update_parameters(**{"timeout_min": 240} | options)
        except (NameError, TypeError, AssertionError) as error:
            raise ValueError(f"--option: submitit does not take it: {error}") from error

    def submit(self, task: Task) -> Handle:
        self.executor.update_parameters(name=task.name)
        return _SlurmJob(self.executor.submit(Requeued(task)))

    def close(self) -> None:
        pass


class _SlurmJob:
    def __init__(self, job):
        self.job = job

    def poll(self):
        from submitit.core.utils import FailedJobError, FailedSubmissionError, UncompletedJobError

        if not self.job.done():
            return None
        try:
            return self.job.result()
        except (FailedJobError, FailedSubmissionError, UncompletedJobError):
            return 1

    def stop(self):
        self.job.cancel()  # Slurm sends SIGTERM to every process of the job, and kills after its KillWait


class Requeued:
    """What submitit runs on the node: the task, and the same again after a preemption."""

    def __init__(self, task: Task):
        self.task, self.process = task, None

    def __call__(self) -> int:
        return execute(self.task, self._started)

    def checkpoint(self):
        """submitit calls this before it gives the node up: let the run save, then queue the same task again."""
        from submitit.helpers import DelayedSubmission

        if self.process is not None:
            with contextlib.suppress(ProcessLookupError, ChildProcessError):
                os.kill(self.process.pid, signal.SIGTERM)
                os.waitid(os.P_PID, self.process.pid, os.WEXITED | os.WNOWAIT)  # Popen.wait may hold its lock already
        return DelayedSubmission(Requeued(self.task))

    def _started(self, process):
        self.process = process


class Ray:
    """Ray tasks, started again elsewhere when their node dies. ``options``: ``address`` of a cluster, else a local one
    is started; anything else goes to ray.remote, such as num_gpus."""

    def __init__(self, slots: int, options: dict[str, object], retries: int = 3):
        try:
            import ray
        except ImportError as error:
            raise ValueError('--launcher ray needs Ray: python -m pip install -e ".[ray]"') from error
        options = dict(options)
        environment = {"env_vars": {"PYTHONPATH": str(ROOT)}}
        ray.init(address=options.pop("address", None), runtime_env=environment, log_to_driver=False)
        self.ray, self.slots = ray, slots
        self.remote = ray.remote(**{"max_retries": retries, "num_cpus": 1} | options)(execute)

    def submit(self, task: Task) -> Handle:
        return _RayTask(self.ray, self.remote.options(name=task.name).remote(task))

    def close(self) -> None:
        self.ray.shutdown()


class _RayTask:
    def __init__(self, ray, reference):
        self.ray, self.reference = ray, reference

    def poll(self):
        done, _ = self.ray.wait([self.reference], timeout=0)
        if not done:
            return None
        try:
            return self.ray.get(self.reference)
        except self.ray.exceptions.TaskCancelledError:
            return -signal.SIGTERM
        except self.ray.exceptions.RayError:
            return 1

    def stop(self):
        self.ray.cancel(self.reference)


def execute(task: Task, started=lambda process: None) -> int:
    """Run a task on the machine where this is called. Whatever ends this ends the process too, which then saves; one
    that a lost launcher left behind is waited for."""
    with contextlib.suppress(ValueError):  # not in the main thread
        signal.signal(
            signal.SIGINT, signal.default_int_handler
        )  # a shell's "&" has it ignored, and Ray stops tasks by it
    lock = filelock.FileLock(task.folder / ".lock")
    if task.folder.is_dir():
        with lock:
            pass
    process = task.start()
    started(process)
    try:
        while (code := process.poll()) is None:
            time.sleep(0.2)
        return code
    except BaseException:
        process.terminate()
        process.wait()
        raise
