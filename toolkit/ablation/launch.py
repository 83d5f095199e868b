"""Launchers: where jobs run. Local processes, Slurm (through submitit) and Ray share one protocol.

A task is the same command on every launcher. The command itself saves, resumes and refuses a second process, so a
launcher only starts it, checks whether it has ended, and asks it to stop."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Protocol

import filelock

from toolkit.root import ROOT

if TYPE_CHECKING:
    import ray
    import submitit


@dataclass(frozen=True)
class Task:
    """One ``python -m toolkit.run``: its arguments, its run folder, and the file for its output."""

    name: str
    arguments: tuple[str, ...]
    folder: Path
    log: Path
    cwd: Path
    environment: dict[str, str] = field(default_factory=dict)

    def start(self, extra_environment: dict[str, str] | None = None) -> subprocess.Popen:
        """Start the process; it resumes if the folder holds a run. It gets its own session, so that Ctrl-C in a
        terminal reaches only the launcher."""
        resume = ["--resume"] if (self.folder / "config.gin").is_file() else []
        path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        environment = os.environ | {"PYTHONPATH": path} | self.environment | (extra_environment or {})
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
    """A task that was started."""

    def poll(self) -> int | None:
        """The exit code, or None while the task runs."""

    def stop(self) -> None:
        """Ask the task to save and end. A second call asks it to end at once."""


class Launcher(Protocol):
    """Starts tasks. ``slots`` is the number of tasks that can run at once."""

    slots: int

    def submit(self, task: Task) -> Handle: ...

    def close(self) -> None: ...


class Local:
    """Processes on this machine. Each of the ``slots`` is a set of environment variables, such as the GPU to use, and
    holds one process at a time."""

    def __init__(self, slots: Sequence[dict[str, str]]):
        self.free, self.slots = list(slots), len(slots)

    def submit(self, task: Task) -> Handle:
        slot = self.free.pop(0)
        return _Process(task.start(slot), lambda: self.free.append(slot))

    def close(self) -> None:
        pass


class _Process:
    def __init__(self, process: subprocess.Popen, release: Callable[[], None]):
        self.process, self.release, self.released = process, release, False

    def poll(self) -> int | None:
        code = self.process.poll()
        if code is not None and not self.released:
            self.released = True
            self.release()
        return code

    def stop(self) -> None:
        self.process.send_signal(signal.SIGTERM)  # does nothing once poll() has seen the process end


class Slurm:
    """Slurm jobs through submitit. A job that is preempted or runs out of time saves and is queued again. ``options``
    are those of submitit's AutoExecutor (timeout_min, slurm_partition, ...) and ``cluster``. Raises ValueError:
    submitit or Slurm is missing, or submitit refuses an option."""

    def __init__(self, folder: Path, slots: int, options: dict[str, object], requeues: int = 100):
        try:
            import submitit
        except ImportError as error:
            raise ValueError('--launcher slurm needs submitit: python -m pip install -e ".[slurm]"') from error
        options = dict(options)
        cluster = options.pop("cluster", "slurm")
        if cluster == "slurm" and shutil.which("srun") is None:
            remedy = "log in to a machine of the cluster, or use --option cluster=local"
            raise ValueError(f"--launcher slurm: Slurm not found (no srun); {remedy}")
        self.slots = slots
        self.executor = submitit.AutoExecutor(folder, cluster=cluster, **{f"{cluster}_max_num_timeout": requeues})
        try:
            self.executor.update_parameters(**{"timeout_min": 240} | options)
        except (NameError, TypeError, AssertionError) as error:
            raise ValueError(f"--option: submitit refused it: {error}") from error

    def submit(self, task: Task) -> Handle:
        self.executor.update_parameters(name=task.name)
        return _SlurmJob(self.executor.submit(Requeued(task)))

    def close(self) -> None:
        pass


class _SlurmJob:
    def __init__(self, job: submitit.Job[int]):
        self.job = job

    def poll(self) -> int | None:
        from submitit.core.utils import FailedJobError, FailedSubmissionError, UncompletedJobError

        if not self.job.done():
            return None
        try:
            return self.job.result()
        except (FailedJobError, FailedSubmissionError, UncompletedJobError):
            return 1

    def stop(self) -> None:
        self.job.cancel()  # Slurm sends SIGTERM to every process of the job, and SIGKILL after KillWait


class Requeued:
    """The callable that submitit runs on the node: it runs the task, and asks for the same task after a preemption."""

    def __init__(self, task: Task):
        self.task = task
        self.process: subprocess.Popen | None = None

    def __call__(self) -> int:
        return execute(self.task, self._remember_process)

    def checkpoint(self) -> submitit.helpers.DelayedSubmission:
        """Let the run save, then queue the same task again. submitit calls this before it gives up the node."""
        from submitit.helpers import DelayedSubmission

        if self.process is not None:
            with contextlib.suppress(ProcessLookupError, ChildProcessError):
                os.kill(self.process.pid, signal.SIGTERM)
                os.waitid(os.P_PID, self.process.pid, os.WEXITED | os.WNOWAIT)  # not Popen.wait: its lock may be held
        return DelayedSubmission(Requeued(self.task))

    def _remember_process(self, process: subprocess.Popen) -> None:
        self.process = process


class Ray:
    """Ray tasks, which Ray restarts on another node if theirs dies. ``options``: ``address`` is a cluster's (without
    it, a local cluster is started); all others, such as num_gpus, go to ray.remote. Raises ValueError: Ray is
    missing."""

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
    def __init__(self, ray: ModuleType, reference: ray.ObjectRef):
        self.ray, self.reference = ray, reference

    def poll(self) -> int | None:
        done, _ = self.ray.wait([self.reference], timeout=0)
        if not done:
            return None
        try:
            return self.ray.get(self.reference)
        except self.ray.exceptions.TaskCancelledError:
            return -signal.SIGTERM
        except self.ray.exceptions.RayError:
            return 1

    def stop(self) -> None:
        self.ray.cancel(self.reference)


def execute(task: Task, on_start: Callable[[subprocess.Popen], object] = lambda process: None) -> int:
    """Run a task on this machine and return its exit code. If a lost launcher left a process in the same folder, wait
    for that one first. An exception here terminates the process, which saves before it ends."""
    with contextlib.suppress(ValueError):  # signals can't be set outside the main thread
        # A shell's "&" makes processes ignore SIGINT, but Ray stops tasks with it.
        signal.signal(signal.SIGINT, signal.default_int_handler)
    lock = filelock.FileLock(task.folder / ".lock")
    if task.folder.is_dir():
        with lock:
            pass
    process = task.start()
    on_start(process)
    try:
        while (code := process.poll()) is None:
            time.sleep(0.2)
        return code
    except BaseException:
        process.terminate()
        process.wait()
        raise
