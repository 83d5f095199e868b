"""Faults from inside a run: ``python -m tests.faults.inject SPEC -- <arguments of toolkit.run>``.

SPEC is JSON, a list of orders that the process gives itself before it starts; toolkit itself runs unchanged.

    {"point": "save", "n": 7, "do": "kill"}           the seventh time that a run comes by such a point
    {"point": "save", "do": "list", "to": FILE}       every time
    {"limit": "RLIMIT_FSIZE", "bytes": 20000}         a limit of the system's, from the start
    {"limit": "RLIMIT_AS", "above": 100000000}        the same, beyond what the process holds when it starts
    {"permissions": true}                             root too may write only where they allow it
    {"peak": FILE}                                    at its end, the most bytes of memory that it ever had go there

Points: ``save`` (each change of a file or folder under checkpoints/: mkdir, open, the middle of a write; fsync, rename,
remove), ``rename NAME`` (a file of the run is put in its place), ``update`` and ``updated`` (before and after an
optimizer step), ``build`` (a model), ``evaluate`` (a micro-batch), ``sample`` (a token).

Deeds: ``kill`` (SIGKILL to oneself), ``sleep`` (``seconds``), ``list`` (a line in ``to``), ``fill`` (the disk, by a
file at ``to``, up to its last ``leave`` bytes)."""

from __future__ import annotations

import builtins
import ctypes
import faulthandler
import functools
import io
import json
import os
import resource
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

import components  # noqa: F401  (the shelf, so that a forked process finds all that is costly imported)
from toolkit import run
from toolkit.command import run_command
from toolkit.model import GPT
from toolkit.objective import Objective
from toolkit.rundir.facts import peak_memory

CHANGES = {"os.mkdir": 2, "os.rmdir": 1, "os.remove": 1, "os.rename": 2}  # audit event: where its dir_fd stands
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC


class Orders:
    """What to do at which point, and how often each has been passed."""

    def __init__(self, spec: list[dict]):
        self.orders = [order for order in spec if "point" in order]
        self.passed: dict[str, int] = {}
        self.inside = threading.local()

    def names(self, *points: str) -> bool:
        """Whether any order is for one of these points."""
        return any(order["point"] in points for order in self.orders)

    def at(self, point: str, about: str = "") -> None:
        """The run comes by a point. What is done here comes by none."""
        if getattr(self.inside, "busy", False):
            return
        self.inside.busy = True
        try:
            self.passed[point] = self.passed.get(point, 0) + 1
            for order in self.orders:
                if order["point"] == point and order.get("n", self.passed[point]) == self.passed[point]:
                    _do(order, f"{point}\t{about}")
        finally:
            self.inside.busy = False


def main(argv: list[str]) -> None:
    """Take the orders, then run ``toolkit.run`` with the rest, and leave the process as it does."""
    spec, separator, *arguments = argv
    if separator != "--":
        raise ValueError("python -m tests.faults.inject SPEC -- <arguments of toolkit.run>")
    orders = json.loads(spec)
    obey(orders)
    try:
        run_command(functools.partial(run.main, arguments))
    finally:
        for order in orders:
            if "peak" in order:
                Path(order["peak"]).write_text(str(peak_memory(torch.device("cpu"))))


def forked(spec: str, arguments: list[str], log: Path, environment: dict[str, str]) -> None:
    """The same in a process that was forked with everything imported: it says what it says into ``log``."""
    with open(log, "ab") as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
    faulthandler.enable()
    os.environ.update(environment)
    torch.set_num_threads(1)
    main([spec, "--", *arguments])


def obey(spec: list[dict]) -> None:
    """Put the limits in force, and watch the points that the orders name."""
    for order in spec:
        if "limit" in order:
            number = getattr(resource, order["limit"])
            size = order["bytes"] if "bytes" in order else _address_space() + order["above"]
            resource.setrlimit(number, (size, resource.getrlimit(number)[1]))
        elif "permissions" in order:
            _obey_permissions()
    orders = Orders(spec)
    if orders.names("save") or any(order.get("point", "").startswith("rename ") for order in spec):
        _watch_files(orders)
    register_optimizer_step_pre_hook(lambda *_: orders.at("update"))
    register_optimizer_step_post_hook(lambda *_: orders.at("updated"))
    if orders.names("build"):
        _before(GPT, "__init__", lambda: orders.at("build"))
    if orders.names("evaluate", "sample"):  # only then: a compiled model would be traced through these
        evaluating = []
        _before(Objective, "forward", lambda: evaluating.append(1))
        _before(GPT, "forward", lambda: _looked(orders, evaluating))


def _obey_permissions():
    """Give up CAP_DAC_OVERRIDE (Linux's capabilities(7)); all that root owns stays readable, Python itself among it."""
    libc = ctypes.CDLL(None, use_errno=True)
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)
    sets = (ctypes.c_uint32 * 6)()  # effective, permitted and inheritable, of the first and the last 32 capabilities
    if libc.capget(header, sets) == 0:
        sets[0] &= ~(1 << 1)
        if libc.capset(header, sets) == 0:
            return
    raise OSError(ctypes.get_errno(), "can't give up CAP_DAC_OVERRIDE")


def _do(order: dict, what: str) -> None:
    if order["do"] == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    elif order["do"] == "sleep":
        end = time.monotonic() + order["seconds"]
        while time.monotonic() < end:  # in many calls, as work goes: Python hears of a signal between two of them
            time.sleep(0.01)
    elif order["do"] == "list":
        with open(order["to"], "a") as file:
            file.write(what + "\n")
    elif order["do"] == "fill":
        free = os.statvfs(Path(order["to"]).parent)
        Path(order["to"]).write_bytes(bytes(max(0, free.f_bavail * free.f_frsize - order["leave"])))
    else:
        raise ValueError(f"{order['do']!r} is no deed")


def _watch_files(orders: Orders) -> None:
    """Python tells an audit hook of each file that it opens, moves or removes; fsync and write are not among that."""

    def hear(event, arguments):
        if event == "open" and isinstance(arguments[2], int) and arguments[2] & WRITES:
            _changed(orders, "open", arguments[0], -1)
        elif event in CHANGES:
            _changed(orders, event.removeprefix("os."), arguments[0], arguments[CHANGES[event]])
            if event == "os.rename":
                orders.at(f"rename {Path(os.fsdecode(arguments[1])).name}")

    fsync, opened = os.fsync, io.open

    @functools.wraps(fsync)
    def watched_fsync(handle):
        _changed(orders, "fsync", os.readlink(f"/proc/self/fd/{handle}"), -1)
        fsync(handle)

    @functools.wraps(opened)
    def watched_open(file, mode="r", *more, **options):
        if "w" not in mode or not isinstance(file, str | os.PathLike) or not _of_a_checkpoint(file, -1):
            return opened(file, mode, *more, **options)
        torn = _TornFile(orders, file)
        if options.get("buffering", -1) == 0:
            return torn
        return io.BufferedWriter(torn) if "b" in mode else io.TextIOWrapper(io.BufferedWriter(torn), encoding="utf-8")

    os.fsync, builtins.open, io.open = watched_fsync, watched_open, watched_open
    sys.addaudithook(hear)


class _TornFile(io.FileIO):
    """A file whose first, second, fourth ... write is done in two halves, with a point between."""

    def __init__(self, orders: Orders, path):
        super().__init__(path, "w")
        self.orders, self.writes = orders, 0

    def write(self, data) -> int:
        self.writes += 1
        if self.writes & (self.writes - 1):
            return super().write(data)
        data = memoryview(data).cast("B")
        half = super().write(data[: len(data) // 2])
        self.orders.at("save", f"write {self.name}")
        return half + super().write(data[half:])


def _changed(orders, what, path, dir_fd):
    if _of_a_checkpoint(path, dir_fd):
        orders.at("save", f"{what} {os.fsdecode(path)}")


def _of_a_checkpoint(path, dir_fd) -> bool:
    if not isinstance(path, str | bytes | os.PathLike):  # an open file's number
        return False
    folder = os.readlink(f"/proc/self/fd/{dir_fd}") if dir_fd >= 0 else ""
    return "checkpoints" in Path(folder, os.fsdecode(path)).parts


def _before(cls: type, method: str, call: Callable[[], None]) -> None:
    original = getattr(cls, method)

    @functools.wraps(original)
    def watched(self, *arguments, **options):
        call()
        return original(self, *arguments, **options)

    setattr(cls, method, watched)


def _looked(orders: Orders, evaluating: list[int]) -> None:
    """The model is called: by an objective that has just been called, which trains or evaluates, or to sample."""
    by_objective = bool(evaluating)
    evaluating.clear()
    if not torch.is_grad_enabled():
        orders.at("evaluate" if by_objective else "sample")


def _address_space() -> int:
    """Bytes of this process's address space."""
    return int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")


def points(path: Path) -> Iterator[tuple[str, int]]:
    """What ``list`` wrote, one point after the other: its name, and what happened to which file or folder."""
    for line in path.read_text().splitlines():
        yield tuple(line.split("\t"))


if __name__ == "__main__":
    main(sys.argv[1:])
